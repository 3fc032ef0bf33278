"""Requests are admitted up to the limit, and rejected ones are told when to retry."""

import pytest

from tests.support.still_clock import StillClock
from workers.serving.engine.batching import admission
from workers.serving.engine.batching.admission import MAX_QUEUED_SECONDS, AdmissionQueue, AdmittedRequest
from workers.serving.engine.port import QueueFull


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> StillClock:
    clock = StillClock()
    monkeypatch.setattr(admission, "time", clock)
    return clock


@pytest.fixture
def ten_a_second(clock: StillClock) -> AdmissionQueue:
    """A full queue with one running and sixteen waiting sequences; a hundred have ended, ten a second."""
    made = AdmissionQueue(1, 16)
    made.admit(17)
    for _ in range(100):
        clock.seconds += 0.1
        made.end()
        made.admit(1)
    return made


def retry_seconds(full: AdmissionQueue) -> float:
    with pytest.raises(QueueFull) as rejected:
        full.admit(1)
    return rejected.value.retry_seconds


def test_a_request_is_admitted_or_rejected_as_a_whole_by_the_number_already_waiting() -> None:
    slots = AdmissionQueue(2, 3)
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


def test_withdrawn_sequences_make_room_and_end_only_once() -> None:
    slots = AdmissionQueue(1, 1)
    first, second = AdmittedRequest(slots, 1), AdmittedRequest(slots, 3)
    second.end(1)
    second.withdraw()
    second.end(1)  # an event emitted before the engine processed the cancellation
    second.withdraw()
    assert (slots.num_running, slots.num_waiting) == (1, 0)
    first.end(1)
    assert slots.num_running == 0


def test_before_any_sequence_has_ended_the_retry_time_is_one_second(clock: StillClock) -> None:
    full = AdmissionQueue(1, 16)
    full.admit(17)
    assert retry_seconds(full) == 1.0


def test_retries_start_after_half_the_waiting_sequences_and_follow_one_by_one(
    ten_a_second: AdmissionQueue,
) -> None:
    assert [retry_seconds(ten_a_second) for _ in range(3)] == pytest.approx([0.8, 0.9, 1.0], rel=0.05)


def test_idle_time_does_not_count(ten_a_second: AdmissionQueue, clock: StillClock) -> None:
    ten_a_second.end(17)
    clock.seconds += 1000
    ten_a_second.admit(17)
    assert retry_seconds(ten_a_second) < 1.0


def test_past_retry_times_no_longer_delay_the_next(ten_a_second: AdmissionQueue, clock: StillClock) -> None:
    for _ in range(20):
        retry_seconds(ten_a_second)
    assert retry_seconds(ten_a_second) > 2.5
    for _ in range(64):  # they have retried
        clock.seconds += 0.1
        ten_a_second.end()
        ten_a_second.admit(1)
    assert retry_seconds(ten_a_second) == pytest.approx(0.8, rel=0.05)


def test_early_retries_cannot_delay_the_next_retry_indefinitely(ten_a_second: AdmissionQueue) -> None:
    assert max(retry_seconds(ten_a_second) for _ in range(1000)) == pytest.approx(MAX_QUEUED_SECONDS)
    ten_a_second.end(1)
    ten_a_second.admit(185)
    assert retry_seconds(ten_a_second) == pytest.approx(10, rel=0.1)
