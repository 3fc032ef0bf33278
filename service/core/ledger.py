"""The ledger: data versions in training order, and which steps of the stream read which rows.

The stream is what the trunk reads, one data version after another. Without replay, a version has as many
steps as its own rows fill. With replay it has more, and rows of older versions fill the difference, so that
its own rows are spread evenly over its steps.
"""

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Protocol

from service.core.spec import ArtifactKey, Spec


class LedgerEntry(Spec):
    """One data version as training sees it: its pack, its rows, and its steps T_i."""

    number: int
    pack_key: ArtifactKey
    rows: int
    steps: int


class Batching(Protocol):
    """The settings of a line that decide how many steps its rows fill."""

    @property
    def batch_rows(self) -> int: ...
    @property
    def epochs(self) -> int: ...


def steps_of(rows: int, batch_rows: int, epochs: int, replay_fraction: float = 0.0) -> int:
    """T_i: optimizer steps of a data version with ``rows`` rows of its own.

    Rows of older versions are added, so that ``replay_fraction`` of all rows in these steps are replayed.
    The first of its own rows fill the last batch of each pass over them; a pass takes at least one step.
    """
    own = epochs * max(1, -(-rows // batch_rows))
    return math.ceil(own / (1 - Fraction(str(replay_fraction)))) if replay_fraction else own


def total_steps(ledger: Sequence[LedgerEntry]) -> int:
    """E_i: steps of the stream up to the end of the ledger."""
    return sum(entry.steps for entry in ledger)


def own_steps(line: Batching, ledger: Sequence[LedgerEntry]) -> int:
    """E_i without replay."""
    return sum(steps_of(entry.rows, line.batch_rows, line.epochs) for entry in ledger)


def ledger_up_to(ledger: Sequence[LedgerEntry], step: int) -> tuple[LedgerEntry, ...]:
    """The entries that the first ``step`` steps of the stream read: E_i ≥ step for the last of them.

    Raises ValueError if the ledger ends before ``step``.
    """
    read: list[LedgerEntry] = []
    total = 0
    for entry in ledger:
        if total >= step:
            break
        read.append(entry)
        total += entry.steps
    if total < step:
        raise ValueError(f"step {step} lies past the end of the ledger at {total}")
    return tuple(read)


def new_rows_of(line: Batching, entry: LedgerEntry) -> int:
    """Number of a version's own rows that the stream reads, including those that fill its last batches."""
    return steps_of(entry.rows, line.batch_rows, line.epochs) * line.batch_rows


def new_rows_before(line: Batching, ledger: Sequence[LedgerEntry], step: int) -> int:
    """Number of rows that are not replayed in the first ``step`` steps of the stream."""
    rows = 0
    for entry in ledger:
        inside = min(step, entry.steps)
        rows += inside * new_rows_of(line, entry) // entry.steps
        step -= inside
        if step <= 0:
            break
    return rows


def steps_that_end_with(line: Batching, ledger: Sequence[LedgerEntry], rows: int) -> int:
    """The smallest number of last steps of the stream with ``rows`` new rows, or all steps."""
    steps = 0
    for entry in reversed(ledger):
        own = new_rows_of(line, entry)
        if rows > own:
            rows -= own
            steps += entry.steps
            continue
        # The first k steps hold floor(k·own/T) rows, so the last T-k hold at least ``rows`` up to this k.
        first = ((own - rows + 1) * entry.steps - 1) // own
        return steps + entry.steps - min(first, entry.steps)
    return steps


def unread_rows(
    line: Batching, ledger: Sequence[LedgerEntry], from_step: int, steps: int, replay_fraction: float
) -> int:
    """Number of new rows that a branch with budget "kept" replaces, and so leaves to the trunk."""
    if all(entry.steps * line.batch_rows == new_rows_of(line, entry) for entry in ledger):
        return math.floor(steps * Fraction(str(replay_fraction)) * line.batch_rows)
    return sum(replaced_rows(line, ledger, from_step, k, replay_fraction) for k in range(1, steps + 1))


def replaced_rows(
    line: Batching, ledger: Sequence[LedgerEntry], from_step: int, k: int, replay_fraction: float
) -> int:
    """Number of new rows of the batch at ``from_step + k`` that a branch with budget "kept" replaces.

    Over the branch, old rows make up ``replay_fraction`` exactly to the row; rows that the trunk replays
    count as old.
    """
    share = Fraction(str(replay_fraction)) * line.batch_rows
    old = math.floor(k * share) - math.floor((k - 1) * share)
    step = from_step + k
    new = new_rows_before(line, ledger, step) - new_rows_before(line, ledger, step - 1)
    return max(0, old - (line.batch_rows - new))
