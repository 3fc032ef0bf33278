"""How many are taken on, and when those who are refused are told to come back."""

import pytest

from tests.support.still_clock import StillClock
from workers.serving.engine import admission
from workers.serving.engine.admission import MAX_QUEUED_SECONDS, Admission, Admitted
from workers.serving.engine.port import QueueFull


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> StillClock:
    clock = StillClock()
    monkeypatch.setattr(admission, "time", clock)
    return clock


@pytest.fixture
def ten_a_second(clock: StillClock) -> Admission:
    """Has ended a hundred, has one in its slot and sixteen that wait, and would take no more."""
    made = Admission(1, 16)
    made.admit(17)
    for _ in range(100):
        clock.seconds += 0.1
        made.end()
        made.admit(1)
    return made


def retry_seconds(full: Admission) -> float:
    with pytest.raises(QueueFull) as refused:
        full.admit(1)
    return refused.value.retry_seconds


def test_a_request_is_taken_whole_or_refused_by_what_waits_before_it() -> None:
    slots = Admission(2, 3)
    slots.admit(4)
    assert (slots.num_running, slots.num_waiting) == (2, 2)
    slots.admit(10)
    assert (slots.num_running, slots.num_waiting) == (2, 12)
    with pytest.raises(QueueFull, match="12 sequences are waiting"):
        slots.admit(1)
    with pytest.raises(QueueFull, match="12 sequences are waiting"):
        slots.check_room()
    slots.end(10)
    slots.check_room()
    slots.admit(1)
    assert slots.num_waiting == 3


def test_what_is_withdrawn_makes_room_and_ends_only_once() -> None:
    slots = Admission(1, 1)
    first, second = Admitted(slots, 1), Admitted(slots, 3)
    second.end(1)
    second.withdraw()
    second.end(1)  # emitted before the engine heard of it
    second.withdraw()
    assert (slots.num_running, slots.num_waiting) == (1, 0)
    first.end(1)
    assert slots.num_running == 0


def test_before_anything_has_ended_a_second(clock: StillClock) -> None:
    full = Admission(1, 16)
    full.admit(17)
    assert retry_seconds(full) == 1.0


def test_half_of_what_waits_has_its_turn_first_and_then_one_after_another(ten_a_second: Admission) -> None:
    assert [retry_seconds(ten_a_second) for _ in range(3)] == pytest.approx([0.8, 0.9, 1.0], rel=0.05)


def test_the_time_in_which_there_was_nothing_to_do_does_not_count(
    ten_a_second: Admission, clock: StillClock
) -> None:
    ten_a_second.end(17)
    clock.seconds += 1000
    ten_a_second.admit(17)
    assert retry_seconds(ten_a_second) < 1.0


def test_when_they_should_have_come_back_nobody_is_before_the_next(
    ten_a_second: Admission, clock: StillClock
) -> None:
    for _ in range(20):
        retry_seconds(ten_a_second)
    assert retry_seconds(ten_a_second) > 2.5
    for _ in range(64):  # they have, and all is as it was
        clock.seconds += 0.1
        ten_a_second.end()
        ten_a_second.admit(1)
    assert retry_seconds(ten_a_second) == pytest.approx(0.8, rel=0.05)


def test_those_who_come_back_too_early_do_not_push_it_out_of_sight(ten_a_second: Admission) -> None:
    assert max(retry_seconds(ten_a_second) for _ in range(1000)) == pytest.approx(MAX_QUEUED_SECONDS)
    ten_a_second.end(1)
    ten_a_second.admit(185)
    assert retry_seconds(ten_a_second) == pytest.approx(10, rel=0.1)
