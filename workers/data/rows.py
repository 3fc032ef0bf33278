"""Which rows an optimizer step reads: a pure function of seed, data versions up to the step's own, and step.

Never of rank, number of workers or time, and never changed by versions that arrive later. The new rows of the line's
stream form one long sequence: version after version, pass after pass, each pass a permutation of the version's rows
whose last batch is filled from the pass's first rows. The trunk reads it at the pace that the ledger's steps give,
with older rows between where those leave room; a branch reads from the same sequence at a pace of its own; a run from
scratch reads everything in one order.
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
from workers.data.mixture import Ints, draw_rows, permutation, slots


class Row(NamedTuple):
    """One row of one pack: ``version`` is the place of its data version in the ledger."""

    version: int
    number: int


class NewRows:
    """The sequence of new rows, counted from 0 over all versions."""

    def __init__(self, line: LineSpec, ledger: Sequence[LedgerEntry]) -> None:
        self._line = line
        self._ledger = ledger
        self._orders: dict[tuple[int, int], Ints] = {}

    def between(self, first: int, end: int) -> list[Row]:
        """Rows ``first`` up to ``end`` (not included) of the sequence."""
        rows: list[Row] = []
        begin = 0
        for version, entry in enumerate(self._ledger):
            length = new_rows_of(self._line, entry)
            per_pass = length // self._line.epochs
            for place in range(max(first - begin, 0), min(end - begin, length)):
                one_pass, index = divmod(place, per_pass)
                order = self._order(version, entry, one_pass)
                rows.append(Row(version, int(order[index % entry.rows])))
            begin += length
        return rows

    def _order(self, version: int, entry: LedgerEntry, one_pass: int) -> Ints:
        if (version, one_pass) not in self._orders:
            # Steps come in order: the permutations of earlier passes are not needed again.
            self._orders = {
                (version, one_pass): permutation(
                    entry.rows, "order", self._line.seed, entry.pack_key, one_pass
                )
            }
        return self._orders[version, one_pass]


class TrunkRows:
    """The line's stream, a batch to a step. Steps are 1-based; a step holds ``line.batch_rows`` rows."""

    def __init__(self, line: LineSpec, ledger: Sequence[LedgerEntry]) -> None:
        self._line = line
        self._ledger = ledger
        self._new_rows = NewRows(line, ledger)

    def of_step(self, step: int) -> list[Row]:
        """Rows of the stream's ``step``, replayed ones last. Raises ValueError past the end of the ledger."""
        read = ledger_up_to(self._ledger, step)
        rows = self._new_rows.between(
            new_rows_before(self._line, read, step - 1), new_rows_before(self._line, read, step)
        )
        return rows + draw_old_rows(
            self._line, read[:-1], self._line.batch_rows - len(rows), "trunk-replay", step
        )


class StageRows:
    """The rows of a training stage, whatever its path."""

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
            # Older than the version that the branch reads last: the same whatever the ledger goes on with.
            self._older = ledger_up_to(stage.ledger, stage.from_step + stage.path.stream_steps)[:-1]

    def of_step(self, step: int) -> list[Row]:
        """The ``line.batch_rows`` rows of ``step``, in the order in which ranks share them out."""
        path = self._path
        if path is not None and path.order == "shuffled":
            return self._shuffled.of_step(step)
        if path is None or not path.replay_fraction or not self._older:
            return self._trunk.of_step(step)
        return self._grown(step, path) if path.replay_budget == "grown" else self._kept(step, path)

    def _grown(self, step: int, path: RunPath) -> list[Row]:
        """New rows spread evenly over a longer branch, each read once; the rest of every batch is old."""
        k = step - self._start
        begin = new_rows_before(self._line, self._ledger, self._start)
        unread = new_rows_before(self._line, self._ledger, self._start + path.stream_steps) - begin
        rows = self._new_rows.between(
            begin + (k - 1) * unread // path.steps, begin + k * unread // path.steps
        )
        return rows + draw_old_rows(
            self._line, self._older, self._line.batch_rows - len(rows), "replay", step
        )

    def _kept(self, step: int, path: RunPath) -> list[Row]:
        """The trunk's batch with new rows of it replaced, until a share of it is old: over the branch, exact to the row."""
        line, k = self._line, step - self._start
        replaced = replaced_rows(line, self._ledger, self._start, k, path.replay_fraction)
        new = new_rows_before(line, self._ledger, step) - new_rows_before(line, self._ledger, step - 1)
        rows = self._trunk.of_step(step)
        where = slots(replaced, new, "replace", line.seed, step)
        old = draw_old_rows(line, self._older, replaced, "replay", step)
        for slot, row in zip(where, old, strict=True):
            rows[int(slot)] = row
        return rows


class ShuffledRows:
    """Every row of the ledger in one order, pass after pass: as if all versions had been one from the beginning."""

    def __init__(self, line: LineSpec, ledger: Sequence[LedgerEntry]) -> None:
        self._line = line
        self._ledger = ledger
        self._ends = np.cumsum([entry.rows for entry in ledger])
        self._orders: dict[int, Ints] = {}

    def of_step(self, step: int) -> list[Row]:
        """Rows of the 1-based ``step``; a pass is filled up from its first rows. Raises ValueError past the end."""
        ends = total_steps(self._ledger)
        if step > ends:
            raise ValueError(f"step {step} lies past the end of the ledger at {ends}")
        one_pass, batch_in_pass = divmod(step - 1, ends // self._line.epochs)
        if one_pass not in self._orders:
            keys = [entry.pack_key for entry in self._ledger]
            self._orders = {
                one_pass: permutation(int(self._ends[-1]), "shuffle", self._line.seed, one_pass, *keys)
            }
        order, batch = self._orders[one_pass], self._line.batch_rows
        slots_of_batch = range(batch_in_pass * batch, (batch_in_pass + 1) * batch)
        return [self._row(int(order[slot % len(order)])) for slot in slots_of_batch]

    def _row(self, place: int) -> Row:
        version = int(np.searchsorted(self._ends, place, side="right"))
        return Row(version, place - int(self._ends[version]) + self._ledger[version].rows)


def draw_old_rows(
    line: LineSpec, older: Sequence[LedgerEntry], count: int, purpose: str, step: int
) -> list[Row]:
    """``count`` rows of older versions under the line's mixture, as a function of purpose, seed and step."""
    if not count:
        return []
    rows = [entry.rows for entry in older]
    drawn = draw_rows(count, rows, line.replay_mixture, purpose, line.seed, step)
    return [Row(version, number) for version, number in drawn]
