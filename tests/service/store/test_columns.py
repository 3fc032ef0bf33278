"""Ids sort by creation order."""

import itertools
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from service.store.columns import new_id


def test_ids_increase_within_a_thread_and_are_unique_across_threads() -> None:
    with ThreadPoolExecutor(4) as threads:
        ids_by_thread = list(threads.map(lambda _: [new_id("x") for _ in range(2000)], range(4)))
    assert all(before < after for ids in ids_by_thread for before, after in itertools.pairwise(ids))
    assert len({each for ids in ids_by_thread for each in ids}) == 8000


def test_ids_increase_when_the_clock_goes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    current, before = time.time_ns(), new_id("x")
    monkeypatch.setattr(time, "time_ns", lambda: current - 3600 * 10**9)
    assert before < new_id("x") < new_id("x")


def test_an_id_has_a_prefix_and_a_constant_number_of_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    length = len(new_id("upd"))
    assert length == len("upd_") + 28
    monkeypatch.setattr(time, "time_ns", lambda: 1)
    assert len(new_id("upd")) == length
