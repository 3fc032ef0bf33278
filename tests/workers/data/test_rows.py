"""The data order depends on the seed, the versions read so far and the global step, and on nothing else."""

from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.core.ledger import LedgerEntry, steps_of
from service.core.stage_specs import RunPath, TrainStage
from tests.support.specs import line_spec
from workers.data.mixture import draw_rows
from workers.data.rows import PackRow, StageRows, TrunkRows

BATCHES = st.integers(1, 9)
ROWS = st.lists(st.integers(1, 40), min_size=1, max_size=4)


def ledger_with(
    rows: list[int], batch_rows: int, epochs: int = 1, replay: float = 0.0
) -> tuple[LedgerEntry, ...]:
    """A ledger in which a share ``replay`` of what the trunk reads is old, from the second version on."""
    return tuple(
        LedgerEntry(
            number=n,
            pack_key=f"pack/{n}",
            rows=count,
            steps=steps_of(count, batch_rows, epochs, replay if n > 1 else 0.0),
        )
        for n, count in enumerate(rows, start=1)
    )


def branch_rows(
    ledger: tuple[LedgerEntry, ...], from_step: int, steps: int, batch_rows: int, **changes: Any
) -> list[list[PackRow]]:
    line = line_spec(batch_rows=batch_rows, replay_mixture=changes.pop("mixture", "equal"))
    path = RunPath(**({"decay_steps": steps, "stream_steps": steps} | changes))
    to_step = from_step + steps
    stage = TrainStage(
        line=line,
        ledger=ledger,
        from_step=from_step,
        to_step=to_step,
        start_key="t",
        path=path,
        checkpoint_every=1,
    )
    rows = StageRows(stage)
    return [rows.of_step(step) for step in range(from_step + 1, to_step + 1)]


@given(rows=ROWS, batch_rows=BATCHES, epochs=st.integers(1, 3))
def test_every_pass_reads_every_row_and_fills_its_last_batch_from_its_first_rows(
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
def test_later_versions_do_not_change_the_order(rows: list[int], batch_rows: int) -> None:
    line, ledger = line_spec(batch_rows=batch_rows), ledger_with(rows, batch_rows)
    long, short = TrunkRows(line, ledger), TrunkRows(line, ledger[:1])
    for step in range(1, ledger[0].steps + 1):
        assert long.of_step(step) == short.of_step(step)


def test_a_step_has_the_same_rows_in_any_order_of_access() -> None:
    line, ledger = line_spec(batch_rows=4), ledger_with([17, 9], 4)
    forward = TrunkRows(line, ledger)
    in_order = [forward.of_step(step) for step in range(1, 9)]
    assert [TrunkRows(line, ledger).of_step(step) for step in range(1, 9)] == in_order
    assert [forward.of_step(step) for step in range(8, 0, -1)] == in_order[::-1]


def test_every_seed_pass_and_version_has_its_own_order() -> None:
    def pass_order(seed: int, version: int, pass_number: int) -> list[int]:
        trunk = TrunkRows(line_spec(batch_rows=20, epochs=2, seed=seed), ledger_with([20, 20], 20, epochs=2))
        return [row.number for row in trunk.of_step(1 + 2 * version + pass_number)]

    orders = [pass_order(*where) for where in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]]
    assert len({tuple(order) for order in orders}) == 4


def test_the_order_is_pinned() -> None:
    """Changing this order would train every existing line on other rows."""
    trunk = TrunkRows(line_spec(batch_rows=6, seed=7), ledger_with([10], 6))
    assert [row.number for row in trunk.of_step(1)] == [7, 0, 1, 9, 6, 5]
    assert draw_rows(4, [5, 50], "recency", "replay", 7, 1) == [(1, 20), (1, 34), (0, 2), (0, 3)]


def test_a_branch_without_replay_reads_the_trunks_rows() -> None:
    ledger = ledger_with([40, 40], 4)
    trunk = TrunkRows(line_spec(batch_rows=4), ledger)
    # The branch is longer than version 2, so it starts in version 1.
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
        stream_steps=new_steps,
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
    # New rows are spread evenly: batches differ by at most one.
    new_per_batch = [sum(row.version == 1 for row in batch) for batch in batches]
    assert max(new_per_batch) - min(new_per_batch) <= 1


@given(batch_rows=BATCHES, steps=st.integers(1, 12), replay=st.integers(1, 19))
def test_a_kept_branch_replaces_exactly_its_share_of_rows(batch_rows: int, steps: int, replay: int) -> None:
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


def test_later_versions_do_not_change_replay() -> None:
    rows = [12, 16, 400]
    for budget in ("grown", "kept"):
        changes: dict[str, Any] = {"replay_fraction": 0.5, "replay_budget": budget}
        if budget == "grown":
            changes["stream_steps"] = 2
        # Three steps of version 1, four of version 2: the branch ends with version 2.
        start = 5 if budget == "grown" else 3
        then = branch_rows(ledger_with(rows[:2], 4), start, 4, 4, **changes)
        assert branch_rows(ledger_with(rows, 4), start, 4, 4, **changes) == then


def test_mixtures_set_the_shares_of_old_versions() -> None:
    """Over many steps, each old version contributes its share of the replayed rows."""
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


@given(
    rows=st.lists(st.integers(1, 40), min_size=2, max_size=4),
    batch_rows=BATCHES,
    epochs=st.integers(1, 2),
    replay=st.sampled_from([0.15, 0.5, 0.8]),
    mixture=st.sampled_from(["equal", "by_size", "recency"]),
)
def test_a_trunk_with_replay_reads_every_new_row_in_the_order_of_one_without(
    rows: list[int], batch_rows: int, epochs: int, replay: float, mixture: str
) -> None:
    line = line_spec(batch_rows=batch_rows, epochs=epochs, replay_mixture=mixture)
    ledger = ledger_with(rows, batch_rows, epochs, replay)
    plain = ledger_with(rows, batch_rows, epochs)
    trunk, without = TrunkRows(line, ledger), TrunkRows(line, plain)
    first, first_plain = 0, 0
    for version, (entry, entry_plain) in enumerate(zip(ledger, plain, strict=True)):
        batches = [trunk.of_step(first + k) for k in range(1, entry.steps + 1)]
        assert all(len(batch) == batch_rows for batch in batches)
        new = [row for batch in batches for row in batch if row.version == version]
        assert new == [
            row for k in range(1, entry_plain.steps + 1) for row in without.of_step(first_plain + k)
        ]
        old = [row for batch in batches for row in batch if row.version != version]
        assert all(row.version < version and row.number < ledger[row.version].rows for row in old)
        assert len(old) == (entry.steps - entry_plain.steps) * batch_rows
        first, first_plain = first + entry.steps, first_plain + entry_plain.steps


def test_later_versions_do_not_change_what_a_trunk_replays() -> None:
    line, ledger = line_spec(batch_rows=4), ledger_with([16, 16, 400], 4, replay=0.5)
    long, short = TrunkRows(line, ledger), TrunkRows(line, ledger[:2])
    assert [long.of_step(step) for step in range(1, 13)] == [short.of_step(step) for step in range(1, 13)]


@given(
    batch_rows=BATCHES, back=st.integers(1, 10), longer=st.integers(1, 12), replay=st.sampled_from([0.2, 0.5])
)
def test_a_grown_branch_of_a_trunk_with_replay_reads_every_unread_new_row_once(
    batch_rows: int, back: int, longer: int, replay: float
) -> None:
    ledger = ledger_with([3 * batch_rows, 12 * batch_rows], batch_rows, replay=replay)
    end = ledger[0].steps + ledger[1].steps
    batches = branch_rows(
        ledger, end - back, back + longer, batch_rows, stream_steps=back, replay_fraction=0.5
    )
    assert all(len(batch) == batch_rows for batch in batches)
    trunk = TrunkRows(line_spec(batch_rows=batch_rows), ledger)
    unread = [
        row for step in range(end - back + 1, end + 1) for row in trunk.of_step(step) if row.version == 1
    ]
    assert [row for batch in batches for row in batch if row.version == 1] == unread


@given(batch_rows=BATCHES, steps=st.integers(1, 12), share=st.sampled_from([0.2, 0.5, 0.75]))
def test_a_kept_branch_counts_the_rows_that_the_trunk_replays(
    batch_rows: int, steps: int, share: float
) -> None:
    ledger = ledger_with([3 * batch_rows, 12 * batch_rows], batch_rows, replay=0.5)
    from_step = ledger[0].steps + ledger[1].steps - steps
    batches = branch_rows(ledger, from_step, steps, batch_rows, replay_fraction=share, replay_budget="kept")
    trunk = TrunkRows(line_spec(batch_rows=batch_rows), ledger)
    for k, batch in enumerate(batches, start=1):
        would_be = trunk.of_step(from_step + k)
        wanted = int(k * share * batch_rows + 1e-9) - int((k - 1) * share * batch_rows + 1e-9)
        already = sum(row.version == 0 for row in would_be)
        assert sum(row.version == 0 for row in batch) == max(wanted, already)
        assert all(row == original or row.version == 0 for row, original in zip(batch, would_be, strict=True))


def shuffled_rows(rows: list[int], batch_rows: int, epochs: int = 1, seed: int = 0) -> list[list[PackRow]]:
    """Return all batches of a run from scratch."""
    ledger = ledger_with(rows, batch_rows, epochs)
    steps = sum(entry.steps for entry in ledger)
    stage = TrainStage(
        line=line_spec(batch_rows=batch_rows, epochs=epochs, seed=seed),
        ledger=ledger,
        from_step=0,
        to_step=steps,
        start_key=None,
        path=RunPath(decay_steps=steps, stream_steps=steps, order="shuffled"),
        checkpoint_every=1,
    )
    stage_rows = StageRows(stage)
    with pytest.raises(ValueError, match="past the end"):
        stage_rows.of_step(steps + 1)
    return [stage_rows.of_step(step) for step in range(1, steps + 1)]


@given(rows=ROWS, batch_rows=BATCHES, epochs=st.integers(1, 3))
def test_a_run_from_scratch_reads_every_row_in_every_pass(
    rows: list[int], batch_rows: int, epochs: int
) -> None:
    batches = shuffled_rows(rows, batch_rows, epochs)
    assert all(len(batch) == batch_rows for batch in batches)
    per_pass = len(batches) // epochs
    everything = sorted(PackRow(version, n) for version, count in enumerate(rows) for n in range(count))
    for number in range(epochs):
        read = [row for batch in batches[number * per_pass : (number + 1) * per_pass] for row in batch]
        assert sorted(read[: len(everything)]) == everything
        assert all(row == read[index % len(everything)] for index, row in enumerate(read))


def test_a_run_from_scratch_mixes_versions_from_its_first_step_to_its_last() -> None:
    batches = shuffled_rows([400, 400], 40)
    shares = [sum(row.version for row in batch) / 40 for batch in batches]
    assert all(0.2 < share < 0.8 for share in shares)
    assert shuffled_rows([400, 400], 40, seed=1) != batches


def test_the_shuffled_order_is_pinned() -> None:
    [batch] = shuffled_rows([4, 3], 7)[:1]
    assert batch == [(0, 0), (1, 2), (0, 2), (1, 0), (0, 1), (1, 1), (0, 3)]
