"""The data order is a function of seed, versions read and global step, and of nothing else."""

from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.core.stage_specs import BranchPath, LedgerEntry, TrainStage, steps_of
from tests.support.specs import line_spec
from workers.data.mixture import draw_rows
from workers.data.rows import Row, StageRows, TrunkRows

BATCHES = st.integers(1, 9)
ROWS = st.lists(st.integers(1, 40), min_size=1, max_size=4)


def ledger_with(rows: list[int], batch_rows: int, epochs: int = 1) -> tuple[LedgerEntry, ...]:
    return tuple(
        LedgerEntry(number=n, pack_key=f"pack/{n}", rows=count, steps=steps_of(count, batch_rows, epochs))
        for n, count in enumerate(rows, start=1)
    )


def branch_rows(
    ledger: tuple[LedgerEntry, ...], from_step: int, steps: int, batch_rows: int, **changes: Any
) -> list[list[Row]]:
    line = line_spec(batch_rows=batch_rows, replay_mixture=changes.pop("mixture", "equal"))
    values = {"steps": steps, "new_rows_steps": steps, "replay_fraction": 0.0, "replay_budget": "grown"}
    shape = {"shape": "1-sqrt", "floor": 0.0, "cuts": (), "beta2": None}
    path = BranchPath(**(values | shape | changes))
    to_step = from_step + steps
    stage = TrainStage(
        line=line,
        ledger=ledger,
        from_step=from_step,
        to_step=to_step,
        start_key="t",
        branch=path,
        checkpoint_every=1,
    )
    rows = StageRows(stage)
    return [rows.of_step(step) for step in range(from_step + 1, to_step + 1)]


@given(rows=ROWS, batch_rows=BATCHES, epochs=st.integers(1, 3))
def test_every_pass_reads_every_row_and_fills_its_last_batch_from_its_first(
    rows: list[int], batch_rows: int, epochs: int
) -> None:
    ledger = ledger_with(rows, batch_rows, epochs)
    trunk = TrunkRows(line_spec(batch_rows=batch_rows, epochs=epochs), ledger)
    step = 0
    for version, entry in enumerate(ledger):
        for _ in range(epochs):
            read = []
            for _ in range(entry.steps // epochs):
                step += 1
                read += trunk.of_step(step)
            assert {row.version for row in read} == {version}
            assert sorted(row.number for row in read[: entry.rows]) == list(range(entry.rows))
            assert all(row == read[index % entry.rows] for index, row in enumerate(read))
    with pytest.raises(ValueError, match="past the end"):
        trunk.of_step(step + 1)


@given(rows=st.lists(st.integers(1, 30), min_size=2, max_size=4), batch_rows=BATCHES)
def test_later_versions_change_nothing(rows: list[int], batch_rows: int) -> None:
    line, ledger = line_spec(batch_rows=batch_rows), ledger_with(rows, batch_rows)
    long, short = TrunkRows(line, ledger), TrunkRows(line, ledger[:1])
    for step in range(1, ledger[0].steps + 1):
        assert long.of_step(step) == short.of_step(step)


def test_a_step_is_the_same_whatever_was_asked_before() -> None:
    line, ledger = line_spec(batch_rows=4), ledger_with([17, 9], 4)
    forward = TrunkRows(line, ledger)
    in_order = [forward.of_step(step) for step in range(1, 9)]
    assert [TrunkRows(line, ledger).of_step(step) for step in range(1, 9)] == in_order
    assert [forward.of_step(step) for step in range(8, 0, -1)] == in_order[::-1]


def test_seed_pass_and_version_have_orders_of_their_own() -> None:
    def pass_order(seed: int, version: int, one_pass: int) -> list[int]:
        trunk = TrunkRows(line_spec(batch_rows=20, epochs=2, seed=seed), ledger_with([20, 20], 20, epochs=2))
        return [row.number for row in trunk.of_step(1 + 2 * version + one_pass)]

    orders = [pass_order(*where) for where in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]]
    assert len({tuple(order) for order in orders}) == 4


def test_the_order_is_pinned() -> None:
    """A change here trains every existing line on other rows: it must never happen by accident."""
    trunk = TrunkRows(line_spec(batch_rows=6, seed=7), ledger_with([10], 6))
    assert [row.number for row in trunk.of_step(1)] == [7, 0, 1, 9, 6, 5]
    assert draw_rows(4, [5, 50], "recency", "replay", 7, 1) == [(1, 20), (1, 34), (0, 2), (0, 3)]


def test_a_branch_without_replay_reads_what_the_trunk_reads() -> None:
    ledger = ledger_with([40, 40], 4)
    trunk = TrunkRows(line_spec(batch_rows=4), ledger)
    # From version 1 into version 2, as a branch longer than its version does.
    assert branch_rows(ledger, 8, 12, 4) == [trunk.of_step(step) for step in range(9, 21)]


@given(
    batch_rows=BATCHES,
    new_steps=st.integers(1, 10),
    longer=st.integers(1, 12),
    mixture=st.sampled_from(["equal", "by_size"]),
)
def test_a_grown_branch_reads_every_new_row_once_and_fills_with_old_ones(
    batch_rows: int, new_steps: int, longer: int, mixture: str
) -> None:
    ledger = ledger_with([3 * batch_rows, 12 * batch_rows], batch_rows)
    end, steps = ledger[0].steps + ledger[1].steps, new_steps + longer
    batches = branch_rows(
        ledger,
        end - new_steps,
        steps,
        batch_rows,
        new_rows_steps=new_steps,
        replay_fraction=round(longer / steps, 3),
        mixture=mixture,
    )
    assert all(len(batch) == batch_rows for batch in batches)
    trunk = TrunkRows(line_spec(batch_rows=batch_rows), ledger)
    unread = [row for step in range(end - new_steps + 1, end + 1) for row in trunk.of_step(step)]
    assert [row for batch in batches for row in batch if row.version == 1] == unread
    old = [row for batch in batches for row in batch if row.version == 0]
    assert len(old) == longer * batch_rows
    assert all(row.number < ledger[0].rows for row in old)
    # New rows are spread evenly: no batch has more than one row over its share.
    new_per_batch = [sum(row.version == 1 for row in batch) for batch in batches]
    assert max(new_per_batch) - min(new_per_batch) <= 1


@given(batch_rows=BATCHES, steps=st.integers(1, 12), replay=st.integers(1, 19))
def test_a_kept_branch_replaces_exactly_its_share(batch_rows: int, steps: int, replay: int) -> None:
    ledger = ledger_with([3 * batch_rows, 12 * batch_rows], batch_rows)
    from_step = ledger[0].steps + ledger[1].steps - steps
    share = replay / 20
    batches = branch_rows(ledger, from_step, steps, batch_rows, replay_fraction=share, replay_budget="kept")
    trunk = TrunkRows(line_spec(batch_rows=batch_rows), ledger)
    replaced = 0
    for k, batch in enumerate(batches, start=1):
        for row, would_be in zip(batch, trunk.of_step(from_step + k), strict=True):
            assert row.version == 0 or row == would_be
            replaced += row.version == 0
        assert replaced == replay * batch_rows * k // 20
    assert replaced == replay * batch_rows * steps // 20


def test_replay_ignores_versions_that_arrive_later() -> None:
    rows = [12, 16, 400]
    for budget in ("grown", "kept"):
        changes: dict[str, Any] = {"replay_fraction": 0.5, "replay_budget": budget}
        if budget == "grown":
            changes["new_rows_steps"] = 2
        # Three steps of version 1, four of version 2: the branch ends with version 2.
        start = 5 if budget == "grown" else 3
        then = branch_rows(ledger_with(rows[:2], 4), start, 4, 4, **changes)
        assert branch_rows(ledger_with(rows, 4), start, 4, 4, **changes) == then


def test_mixtures_weigh_old_versions() -> None:
    """Over many steps each old version gives its share of the replayed rows."""
    ledger = ledger_with([100, 300, 200, 4000], 20)
    expected = {"equal": [1, 1, 1], "by_size": [1, 3, 2], "recency": [1, 2, 4]}
    for mixture, weights in expected.items():
        batches = branch_rows(
            ledger, 30 + 50, 150, 20, replay_fraction=0.9, replay_budget="kept", mixture=mixture
        )
        drawn = Counter(row.version for batch in batches for row in batch if row.version < 3)
        total = sum(drawn.values())
        assert total == 2700
        for version, weight in enumerate(weights):
            assert drawn[version] / total == pytest.approx(weight / sum(weights), abs=0.04)
