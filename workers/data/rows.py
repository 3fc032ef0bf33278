"""Which rows an optimizer step reads: a pure function of seed, data versions up to the step's own, and step.

Never of rank, number of workers or time, and never changed by versions that arrive later. The trunk's rows
form one long sequence, B to a step: version after version, pass after pass, each pass a permutation of the
version's rows whose last batch is filled from the pass's first rows. Branches read from the same sequence.
"""

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

from service.core.plan import ledger_up_to
from service.core.stage_specs import BranchPath, LedgerEntry, LineSpec, TrainStage
from workers.data.mixture import Ints, draw_rows, permutation, slots


class Row(NamedTuple):
    """One row of one pack: ``version`` is the place of its data version in the ledger."""

    version: int
    number: int


class TrunkRows:
    """The trunk's sequence of rows. Steps are 1-based and global; a step holds ``line.batch_rows`` rows."""

    def __init__(self, line: LineSpec, ledger: Sequence[LedgerEntry]) -> None:
        self._line = line
        self._ledger = ledger
        self._orders: dict[tuple[int, int], Ints] = {}

    def of_step(self, step: int) -> list[Row]:
        """Rows of the trunk's ``step``. Raises ValueError past the end of the ledger."""
        batch = self._line.batch_rows
        read = ledger_up_to(self._ledger, step)
        version, entry = len(read) - 1, read[-1]
        step_in_version = step - 1 - sum(earlier.steps for earlier in read[:-1])
        one_pass, batch_in_pass = divmod(step_in_version, entry.steps // self._line.epochs)
        order = self._order(version, entry, one_pass)
        first = batch_in_pass * batch
        return [Row(version, int(order[(first + slot) % entry.rows])) for slot in range(batch)]

    def between(self, start: int, first: int, end: int) -> list[Row]:
        """Rows ``first`` up to ``end`` (not included) of the sequence that follows the step ``start``."""
        batch = self._line.batch_rows
        rows: list[Row] = []
        for offset in range(first // batch, math.ceil(end / batch)):
            low, high = max(first - offset * batch, 0), min(end - offset * batch, batch)
            rows += self.of_step(start + offset + 1)[low:high]
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


class StageRows:
    """The rows of a training stage: the trunk's own, or those of a branch with its replay."""

    def __init__(self, stage: TrainStage) -> None:
        self._line = stage.line
        self._start = stage.from_step
        self._branch = stage.branch
        self._trunk = TrunkRows(stage.line, stage.ledger)
        self._old_rows: list[int] = []
        if stage.branch is not None:
            # Older than the version that the branch reads last: the same whatever the ledger goes on with.
            last = stage.from_step + stage.branch.new_rows_steps
            self._old_rows = [entry.rows for entry in ledger_up_to(stage.ledger, last)[:-1]]

    def of_step(self, step: int) -> list[Row]:
        """The ``line.batch_rows`` rows of the global ``step``, in the order in which ranks share them out."""
        if self._branch is None or not self._branch.replay_fraction or not self._old_rows:
            return self._trunk.of_step(step)
        if self._branch.replay_budget == "grown":
            return self._grown(step, self._branch)
        return self._kept(step, self._branch)

    def _grown(self, step: int, branch: BranchPath) -> list[Row]:
        """New rows spread evenly over a longer branch, each read once; the rest of every batch is old."""
        batch, k = self._line.batch_rows, step - self._start
        new_rows = branch.new_rows_steps * batch
        rows = self._trunk.between(
            self._start, (k - 1) * new_rows // branch.steps, k * new_rows // branch.steps
        )
        return rows + self._old(step, batch - len(rows))

    def _kept(self, step: int, branch: BranchPath) -> list[Row]:
        """The trunk's batch with a share of its rows replaced: over the branch, exact to the row."""
        batch, k = self._line.batch_rows, step - self._start
        share = Fraction(str(branch.replay_fraction)) * batch
        replaced = math.floor(k * share) - math.floor((k - 1) * share)
        rows = self._trunk.of_step(step)
        where = slots(replaced, batch, "replace", self._line.seed, step)
        for slot, old in zip(where, self._old(step, replaced), strict=True):
            rows[int(slot)] = old
        return rows

    def _old(self, step: int, count: int) -> list[Row]:
        drawn = draw_rows(count, self._old_rows, self._line.replay_mixture, "replay", self._line.seed, step)
        return [Row(version, number) for version, number in drawn]
