import pytest

from workers.serving.engine.slots import MIN_AWAITED, MIN_COPIED, Place, Slots

LONG = list(range(100))


def test_a_prompt_goes_on_where_a_past_one_agrees_and_its_last_token_is_always_fed() -> None:
    slots = Slots(2, reuses=True)
    assert slots.take(LONG, whole=False) == Place(0, 0, 0)
    slots.feed(0, LONG)
    slots.give_back(0)
    assert slots.take(LONG, whole=False) == Place(0, 0, 99)
    assert slots.num_held == 99


def test_what_is_shared_with_a_running_sequence_is_copied() -> None:
    slots = Slots(3, reuses=True)
    slots.take(LONG, whole=False)
    slots.feed(0, LONG)
    assert slots.take([*LONG[:40], 7, 7], whole=False) == Place(1, 0, 40)
    assert slots.take([*LONG[: MIN_COPIED - 1], 7, 7], whole=False) == Place(2, 2, 0)


def test_a_small_part_of_a_past_sequence_is_copied_and_the_rest_stays_of_use() -> None:
    slots = Slots(2, reuses=True)
    slots.take(LONG, whole=False)
    slots.feed(0, LONG)
    slots.give_back(0)
    assert slots.take([*LONG[:40], 7, 7], whole=False) == Place(1, 0, 40)
    slots.give_back(1)
    assert slots.take(LONG, whole=False) == Place(0, 0, 99)


def test_who_shares_much_with_a_prompt_that_is_being_fed_waits_for_it() -> None:
    slots = Slots(3, reuses=True)
    slots.take(LONG, whole=False)
    assert slots.take(LONG[: MIN_AWAITED + 1], whole=False) is None
    assert slots.take(LONG[:MIN_AWAITED], whole=False) == Place(1, 1, 0)
    slots.feed(0, LONG)
    assert slots.take(LONG, whole=False) == Place(2, 0, 99)


@pytest.mark.parametrize(("reuses", "whole"), [(False, False), (True, True)])
def test_nothing_is_reused_where_it_cannot_or_must_not_be(reuses: bool, whole: bool) -> None:
    slots = Slots(1, reuses=reuses)
    slots.take(LONG, whole=whole)
    slots.feed(0, LONG)
    slots.give_back(0)
    assert slots.take(LONG, whole=whole) == Place(0, 0, 0)


def test_a_spoilt_slot_is_not_gone_on_from_and_the_longest_unused_goes_first() -> None:
    slots = Slots(2, reuses=True)
    for position in (0, 1):
        slots.take([position] * 20, whole=False)
        slots.feed(position, [position] * 20)
    slots.give_back(1, spoilt=True)
    slots.give_back(0)
    assert slots.num_held == 20
    assert slots.take([1] * 20, whole=False) == Place(1, 1, 0)
