"""Seeded draws: permutations, weighted choices of data versions, and slots, as functions of their names.

Everything comes from raw 64-bit outputs of a Philox counter generator keyed by a hash of what the draw is
for. Those outputs are fixed by the algorithm (Salmon et al. 2011); numpy's own permutation and choice may
change between versions.
"""

import hashlib
import json
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np

Ints = np.ndarray[Any, np.dtype[np.int64]]


def permutation(size: int, *name: str | int) -> Ints:
    """A permutation of 0 … size-1 that depends on ``name`` alone."""
    return np.argsort(_raw(size, name), kind="stable").astype(np.int64)


def slots(count: int, size: int, *name: str | int) -> Ints:
    """``count`` different numbers below ``size``, rising."""
    return np.sort(permutation(size, *name)[:count])


def draw_rows(count: int, rows: Sequence[int], mixture: str, *name: str | int) -> list[tuple[int, int]]:
    """Draw (version, row) pairs with replacement, from versions of so many ``rows``, the oldest first."""
    versions = _uniform(count, (*name, "version"))
    positions = _raw(count, (*name, "row"))
    bounds = list(accumulate(mixture_weights(rows, mixture)))
    drawn = []
    for uniform, position in zip(versions, positions, strict=True):
        version = min(int(np.searchsorted(bounds, uniform * bounds[-1], side="right")), len(rows) - 1)
        drawn.append((version, int(position) % rows[version]))
    return drawn


def mixture_weights(rows: Sequence[int], mixture: str) -> list[float]:
    """Unnormalised weight of each older version, oldest first.

    ``equal``: one each. ``by_size``: its rows, so that every old row is equally likely. ``recency``:
    halving with every version back, so that the newest old version gives half of the rows, or a little
    more.
    """
    if mixture == "equal":
        return [1.0] * len(rows)
    if mixture == "by_size":
        return [float(count) for count in rows]
    if mixture == "recency":
        return [0.5 ** (len(rows) - 1 - index) for index in range(len(rows))]
    raise ValueError(f"unknown mixture {mixture!r}")


def _uniform(size: int, name: Sequence[str | int]) -> list[float]:
    return [int(raw >> np.uint64(11)) * 2.0**-53 for raw in _raw(size, name)]


def _raw(size: int, name: Sequence[str | int]) -> "np.ndarray[Any, np.dtype[np.uint64]]":
    key = hashlib.sha256(json.dumps(list(name)).encode()).digest()[:16]
    return np.random.Philox(key=int.from_bytes(key, "little")).random_raw(size)
