"""Slots are assigned so that prompts reuse the prefixes that slots hold."""

import pytest

from workers.serving.engine.batching.slots import MIN_AWAITED, MIN_COPIED, SlotAssignment, SlotTable

LONG = list(range(100))


def test_a_repeated_prompt_reuses_its_slot_and_feeds_only_its_last_token() -> None:
    slots = SlotTable(2, reuses=True)
    assert slots.assign(LONG, whole=False) == SlotAssignment(0, 0, 0)
    slots.feed(0, LONG)
    slots.release(0)
    assert slots.assign(LONG, whole=False) == SlotAssignment(0, 0, 99)
    assert slots.num_held == 99


def test_a_prefix_shared_with_a_running_sequence_is_copied() -> None:
    slots = SlotTable(3, reuses=True)
    slots.assign(LONG, whole=False)
    slots.feed(0, LONG)
    assert slots.assign([*LONG[:40], 7, 7], whole=False) == SlotAssignment(1, 0, 40)
    assert slots.assign([*LONG[: MIN_COPIED - 1], 7, 7], whole=False) == SlotAssignment(2, 2, 0)


def test_a_small_part_of_a_past_sequence_is_copied_and_the_slot_stays_reusable() -> None:
    slots = SlotTable(2, reuses=True)
    slots.assign(LONG, whole=False)
    slots.feed(0, LONG)
    slots.release(0)
    assert slots.assign([*LONG[:40], 7, 7], whole=False) == SlotAssignment(1, 0, 40)
    slots.release(1)
    assert slots.assign(LONG, whole=False) == SlotAssignment(0, 0, 99)


def test_a_prompt_waits_for_a_long_prefix_that_is_being_fed() -> None:
    slots = SlotTable(3, reuses=True)
    slots.assign(LONG, whole=False)
    assert slots.assign(LONG[: MIN_AWAITED + 1], whole=False) is None
    assert slots.assign(LONG[:MIN_AWAITED], whole=False) == SlotAssignment(1, 1, 0)
    slots.feed(0, LONG)
    assert slots.assign(LONG, whole=False) == SlotAssignment(2, 0, 99)


@pytest.mark.parametrize(("reuses", "whole"), [(False, False), (True, True)])
def test_nothing_is_reused_if_the_runner_cannot_or_the_request_forbids_it(reuses: bool, whole: bool) -> None:
    slots = SlotTable(1, reuses=reuses)
    slots.assign(LONG, whole=whole)
    slots.feed(0, LONG)
    slots.release(0)
    assert slots.assign(LONG, whole=whole) == SlotAssignment(0, 0, 0)


def test_discarded_contents_are_not_reused_and_the_least_recently_used_slot_goes_first() -> None:
    slots = SlotTable(2, reuses=True)
    for position in (0, 1):
        slots.assign([position] * 20, whole=False)
        slots.feed(position, [position] * 20)
    slots.release(1, discard=True)
    slots.release(0)
    assert slots.num_held == 20
    assert slots.assign([1] * 20, whole=False) == SlotAssignment(1, 1, 0)
