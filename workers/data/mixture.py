"""Seeded draws: permutations, positions and weighted choices that depend only on a name.

The name identifies the draw: a purpose, the seed and the step. Its hash is the key of a Philox counter
generator. Only its raw 64-bit outputs are used, because the algorithm fixes them (Salmon et al. 2011,
"Parallel random numbers: as easy as 1, 2, 3"), whereas numpy's permutation and choice may change between
versions.
"""

import hashlib
import json
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np

Ints = np.ndarray[Any, np.dtype[np.int64]]


def permutation(size: int, *name: str | int) -> Ints:
    """Return a permutation of 0 … size - 1, of shape (size,)."""
    return np.argsort(_raw(size, name), kind="stable").astype(np.int64)


def positions(count: int, size: int, *name: str | int) -> Ints:
    """Draw ``count`` distinct numbers below ``size``, in ascending order."""
    return np.sort(permutation(size, *name)[:count])


def draw_rows(count: int, rows: Sequence[int], mixture: str, *name: str | int) -> list[tuple[int, int]]:
    """Draw (version, row) pairs with replacement. ``rows`` counts the rows of each version, oldest first."""
    version_draws = _uniform(count, (*name, "version"))
    row_draws = _raw(count, (*name, "row"))
    bounds = list(accumulate(mixture_weights(rows, mixture)))
    pairs = []
    for version_draw, row_draw in zip(version_draws, row_draws, strict=True):
        version = min(int(np.searchsorted(bounds, version_draw * bounds[-1], side="right")), len(rows) - 1)
        pairs.append((version, int(row_draw) % rows[version]))
    return pairs


def mixture_weights(rows: Sequence[int], mixture: str) -> list[float]:
    """Return the unnormalised weight of each older version, oldest first.

    ``equal``: 1 each. ``by_size``: the number of rows, so that every old row is equally likely. ``recency``:
    1 for the newest of them, and half as much with every version further back.
    """
    if mixture == "equal":
        return [1.0] * len(rows)
    if mixture == "by_size":
        return [float(count) for count in rows]
    if mixture == "recency":
        return [0.5 ** (len(rows) - 1 - index) for index in range(len(rows))]
    raise ValueError(f"unknown mixture {mixture!r}; use equal, by_size or recency")


def _uniform(size: int, name: Sequence[str | int]) -> list[float]:
    """Uniform floats in [0, 1): the upper 53 bits of each raw output, times 2⁻⁵³."""
    return [int(raw >> np.uint64(11)) * 2.0**-53 for raw in _raw(size, name)]


def _raw(size: int, name: Sequence[str | int]) -> "np.ndarray[Any, np.dtype[np.uint64]]":
    key = hashlib.sha256(json.dumps(list(name)).encode()).digest()[:16]
    return np.random.Philox(key=int.from_bytes(key, "little")).random_raw(size)
