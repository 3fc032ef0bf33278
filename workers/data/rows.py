"""Decides which rows an optimizer step reads: a function of the seed, the step and the data versions so far.

The order never depends on rank, number of workers or time, and versions that arrive later never change it.

The new rows of a line form one long sequence: version after version, pass after pass. Each pass is a
permutation of the version's rows, and its last batch is filled up from its first rows. The trunk reads the
sequence at the pace that the ledger's steps set, and fills each batch up with rows of older versions. A
branch reads the same sequence at its own pace. A run from scratch reads all rows in one shuffled order.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from service.core.ledger import (
    LedgerEntry,
    ledger_up_to,
    new_rows_before,
    new_rows_of,
    replaced_rows,
    total_steps,
)
from service.core.stage_specs import LineSpec, RunPath, TrainStage
from workers.data.mixture import Ints, draw_rows, permutation, positions


class PackRow(NamedTuple):
    """One row of one pack. ``version`` is the position of its data version in the ledger."""

    version: int
    number: int


class NewRows:
    """The sequence of new rows, numbered from 0 across all versions."""

    def __init__(self, line: LineSpec, ledger: Sequence[LedgerEntry]) -> None:
        self._line = line
        self._ledger = ledger
        self._orders: dict[tuple[int, int], Ints] = {}

    def between(self, first: int, end: int) -> list[PackRow]:
        """Return rows ``first`` to ``end - 1`` of the sequence."""
        rows: list[PackRow] = []
        begin = 0
        for version, entry in enumerate(self._ledger):
            length = new_rows_of(self._line, entry)
            per_pass = length // self._line.epochs
            for position in range(max(first - begin, 0), min(end - begin, length)):
                pass_number, index = divmod(position, per_pass)
                order = self._order(version, entry, pass_number)
                rows.append(PackRow(version, int(order[index % entry.rows])))
            begin += length
        return rows

    def _order(self, version: int, entry: LedgerEntry, pass_number: int) -> Ints:
        if (version, pass_number) not in self._orders:
            # Steps come in order, so the permutations of earlier passes are not needed again.
            order = permutation(entry.rows, "order", self._line.seed, entry.pack_key, pass_number)
            self._orders = {(version, pass_number): order}
        return self._orders[version, pass_number]


class TrunkRows:
    """The trunk's rows: one batch of ``line.batch_rows`` rows per step. Steps are numbered from 1."""

    def __init__(self, line: LineSpec, ledger: Sequence[LedgerEntry]) -> None:
        self._line = line
        self._ledger = ledger
        self._new_rows = NewRows(line, ledger)

    def of_step(self, step: int) -> list[PackRow]:
        """Return the rows of ``step``, replayed rows last. Raises ValueError past the end of the ledger."""
        read = ledger_up_to(self._ledger, step)
        rows = self._new_rows.between(
            new_rows_before(self._line, read, step - 1), new_rows_before(self._line, read, step)
        )
        return rows + draw_old_rows(
            self._line, read[:-1], self._line.batch_rows - len(rows), "trunk-replay", step
        )


class StageRows:
    """The rows of a training stage: trunk, branch or other run."""

    def __init__(self, stage: TrainStage) -> None:
        self._line = stage.line
        self._ledger = stage.ledger
        self._start = stage.from_step
        self._path = stage.path
        self._trunk = TrunkRows(stage.line, stage.ledger)
        self._new_rows = NewRows(stage.line, stage.ledger)
        self._shuffled = ShuffledRows(stage.line, stage.ledger)
        self._older: tuple[LedgerEntry, ...] = ()
        if stage.path is not None:
            # All versions before the last one that the branch reads: later entries do not matter.
            self._older = ledger_up_to(stage.ledger, stage.from_step + stage.path.stream_steps)[:-1]

    def of_step(self, step: int) -> list[PackRow]:
        """Return the ``line.batch_rows`` rows of ``step``, in the order in which they are dealt to ranks."""
        path = self._path
        if path is not None and path.order == "shuffled":
            return self._shuffled.of_step(step)
        if path is None or not path.replay_fraction or not self._older:
            return self._trunk.of_step(step)
        if path.replay_budget == "grown":
            return self._rows_of_grown_branch(step, path)
        return self._rows_of_kept_branch(step, path)

    def _rows_of_grown_branch(self, step: int, path: RunPath) -> list[PackRow]:
        """Spread the new rows evenly over a longer branch, and fill every batch up with old rows.

        With u unread rows and n steps, step k reads rows ⌊(k-1)·u/n⌋ to ⌊k·u/n⌋ - 1 of them.
        """
        k = step - self._start
        begin = new_rows_before(self._line, self._ledger, self._start)
        unread = new_rows_before(self._line, self._ledger, self._start + path.stream_steps) - begin
        rows = self._new_rows.between(
            begin + (k - 1) * unread // path.steps, begin + k * unread // path.steps
        )
        return rows + draw_old_rows(
            self._line, self._older, self._line.batch_rows - len(rows), "replay", step
        )

    def _rows_of_kept_branch(self, step: int, path: RunPath) -> list[PackRow]:
        """Replace new rows of the trunk's batch by old ones.

        Over the whole branch, the share of old rows is exact to the row.
        """
        line, k = self._line, step - self._start
        replaced = replaced_rows(line, self._ledger, self._start, k, path.replay_fraction)
        new = new_rows_before(line, self._ledger, step) - new_rows_before(line, self._ledger, step - 1)
        rows = self._trunk.of_step(step)
        targets = positions(replaced, new, "replace", line.seed, step)
        old_rows = draw_old_rows(line, self._older, replaced, "replay", step)
        for position, old_row in zip(targets, old_rows, strict=True):
            rows[int(position)] = old_row
        return rows


class ShuffledRows:
    """Every row of the ledger in one shuffled order per pass, as if all versions were one."""

    def __init__(self, line: LineSpec, ledger: Sequence[LedgerEntry]) -> None:
        self._line = line
        self._ledger = ledger
        self._ends = np.cumsum([entry.rows for entry in ledger])
        self._orders: dict[int, Ints] = {}

    def of_step(self, step: int) -> list[PackRow]:
        """Return the rows of ``step``. Raises ValueError past the end of the ledger.

        The last batch of a pass is filled up from the first rows of the pass.
        """
        num_steps = total_steps(self._ledger)
        if step > num_steps:
            raise ValueError(f"step {step} lies past the end of the ledger at {num_steps}")
        pass_number, batch_in_pass = divmod(step - 1, num_steps // self._line.epochs)
        if pass_number not in self._orders:
            keys = [entry.pack_key for entry in self._ledger]
            self._orders = {
                pass_number: permutation(int(self._ends[-1]), "shuffle", self._line.seed, pass_number, *keys)
            }
        order, batch = self._orders[pass_number], self._line.batch_rows
        indices = range(batch_in_pass * batch, (batch_in_pass + 1) * batch)
        return [self._row(int(order[index % len(order)])) for index in indices]

    def _row(self, position: int) -> PackRow:
        """The row at ``position`` of the packs, laid end to end."""
        version = int(np.searchsorted(self._ends, position, side="right"))
        return PackRow(version, position - int(self._ends[version]) + self._ledger[version].rows)


def draw_old_rows(
    line: LineSpec, older: Sequence[LedgerEntry], count: int, purpose: str, step: int
) -> list[PackRow]:
    """Draw ``count`` rows of older versions by the line's mixture, as a function of purpose, seed and step."""
    if not count:
        return []
    rows = [entry.rows for entry in older]
    pairs = draw_rows(count, rows, line.replay_mixture, purpose, line.seed, step)
    return [PackRow(version, number) for version, number in pairs]
