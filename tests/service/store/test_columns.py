"""Ids are in the order in which they were made."""

import itertools
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from service.store.columns import new_id


def test_ids_of_one_thread_grow_and_those_of_several_are_all_different() -> None:
    with ThreadPoolExecutor(4) as threads:
        made = list(threads.map(lambda _: [new_id("x") for _ in range(2000)], range(4)))
    assert all(before < after for ids in made for before, after in itertools.pairwise(ids))
    assert len({each for ids in made for each in ids}) == 8000


def test_ids_grow_while_the_clock_goes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    present, before = time.time_ns(), new_id("x")
    monkeypatch.setattr(time, "time_ns", lambda: present - 3600 * 10**9)
    assert before < new_id("x") < new_id("x")


def test_an_id_has_a_prefix_and_as_many_digits_always(monkeypatch: pytest.MonkeyPatch) -> None:
    length = len(new_id("upd"))
    assert length == len("upd_") + 28
    monkeypatch.setattr(time, "time_ns", lambda: 1)
    assert len(new_id("upd")) == length
