"""Steps and rows of the stream: how many new rows each step reads."""

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.core.ledger import (
    new_rows_before,
    own_steps,
    replaced_rows,
    steps_of,
    steps_that_end_with,
    total_steps,
    unread_rows,
)
from tests.support.specs import ledger_of, line_spec

LEDGERS = st.tuples(
    st.lists(st.integers(1, 20), min_size=1, max_size=4),
    st.integers(1, 9),
    st.integers(1, 3),
    st.sampled_from([0.0, 0.15, 0.25, 0.5, 0.9]),
)


def made(batches: Any, batch_rows: Any, epochs: Any, replay: Any) -> Any:
    line = line_spec(batch_rows=batch_rows, epochs=epochs)
    return line, ledger_of(*batches, batch_rows=batch_rows, epochs=epochs, replay=replay)


@pytest.mark.parametrize(
    ("rows", "replay", "expected"),
    [(160, 0.0, 10), (160, 0.5, 20), (160, 0.15, 12), (1, 0.0, 1), (161, 0.0, 11)],
)
def test_replay_lengthens_a_version_by_one_over_one_minus_its_fraction(
    rows: int, replay: float, expected: int
) -> None:
    assert steps_of(rows, 16, 1, replay) == expected


@given(LEDGERS)
def test_new_rows_are_spread_evenly_and_all_are_read(ledger_parts: Any) -> None:
    line, ledger = made(*ledger_parts)
    end = total_steps(ledger)
    counts = [new_rows_before(line, ledger, step) for step in range(end + 1)]
    assert counts[0] == 0
    assert counts[-1] == own_steps(line, ledger) * line.batch_rows
    per_step = [after - before for before, after in itertools.pairwise(counts)]
    assert all(0 <= count <= line.batch_rows for count in per_step)
    first = ledger[0].steps
    assert per_step[:first] == [line.batch_rows] * first


@given(LEDGERS, st.data())
def test_the_smallest_number_of_last_steps_with_the_rows_is_found(ledger_parts: Any, data: Any) -> None:
    line, ledger = made(*ledger_parts)
    end = total_steps(ledger)
    everything = new_rows_before(line, ledger, end)
    rows = data.draw(st.integers(1, everything))
    steps = steps_that_end_with(line, ledger, rows)

    def held(last: Any) -> Any:
        return everything - new_rows_before(line, ledger, end - last)

    assert held(steps) >= rows
    assert held(steps - 1) < rows


@given(LEDGERS, st.sampled_from([0.1, 0.5, 0.75]))
def test_a_kept_budget_never_replaces_more_rows_than_a_batch_has(ledger_parts: Any, fraction: Any) -> None:
    line, ledger = made(*ledger_parts)
    total = 0
    for k in range(1, total_steps(ledger) + 1):
        new = new_rows_before(line, ledger, k) - new_rows_before(line, ledger, k - 1)
        replaced = replaced_rows(line, ledger, 0, k, fraction)
        assert 0 <= replaced <= new
        total += replaced
    assert unread_rows(line, ledger, 0, total_steps(ledger), fraction) == total
