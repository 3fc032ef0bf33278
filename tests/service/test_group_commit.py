"""Group commit: who is in which round, who gets which outcome, and what one that fails does to the others."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import ContextVar
from typing import Any

import pytest

from service.core.errors import Unavailable
from service.group_commit import GroupCommit

FIRST = "first"
SECONDS = 30

asked_by: ContextVar[str] = ContextVar("asked_by", default="nobody")


class Turn:
    """A lock that tells of everybody who comes for it."""

    def __init__(self) -> None:
        self.came = threading.Semaphore(0)
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        self.came.release()
        self._lock.acquire()

    def __exit__(self, *error: object) -> None:
        self._lock.release()


class Crowd:
    """A group in whose first round is FIRST alone; it lasts until all others have come."""

    def __init__(self, work: Callable[[Sequence[str]], Sequence[str]]) -> None:
        self.rounds: list[list[str]] = []
        self.group = GroupCommit(self._round)
        self._work = work
        self._turn: Any = Turn()
        self.group._turn = self._turn
        self._under_way, self._all_came = threading.Event(), threading.Event()

    def gather(self, *others: str) -> dict[str, Future[str]]:
        """What became of everybody, the others having come in this order."""
        with ThreadPoolExecutor(1 + len(others)) as pool:
            futures = {FIRST: pool.submit(self.group.do, FIRST)}
            assert self._under_way.wait(SECONDS)
            assert self._turn.came.acquire(timeout=SECONDS)
            for item in others:
                futures[item] = pool.submit(self.group.do, item)
                assert self._turn.came.acquire(timeout=SECONDS)
            self._all_came.set()
        return futures

    def _round(self, items: Sequence[str]) -> Sequence[str]:
        self.rounds.append(list(items))
        self._under_way.set()
        assert self._all_came.wait(SECONDS)
        return self._work(items)


def in_capitals(items: Sequence[str]) -> list[str]:
    return [item.upper() for item in items]


def refusing_bad(items: Sequence[str]) -> list[str]:
    if "bad" in items:
        raise ValueError("bad")
    return in_capitals(items)


def test_those_that_come_during_a_round_are_one_next_round() -> None:
    crowd = Crowd(in_capitals)
    crowd.gather("a", "b", "c")
    assert crowd.rounds == [[FIRST], ["a", "b", "c"]]


def test_everybody_gets_the_outcome_of_the_own_item() -> None:
    futures = Crowd(in_capitals).gather("a", "b", "c")
    assert {item: future.result() for item, future in futures.items()} == {
        FIRST: "FIRST",
        "a": "A",
        "b": "B",
        "c": "C",
    }


def test_of_many_at_once_each_is_done_once_and_gets_its_own() -> None:
    done: list[int] = []

    def squares(numbers: Sequence[int]) -> list[int]:
        done.extend(numbers)
        return [number**2 for number in numbers]

    group = GroupCommit(squares)
    start = threading.Barrier(8)

    def ask(of: int) -> list[int]:
        start.wait(SECONDS)
        return [group.do(number) for number in range(of, 200, 8)]

    with ThreadPoolExecutor(8) as pool:
        outcomes = list(pool.map(ask, range(8)))
    assert outcomes == [[number**2 for number in range(of, 200, 8)] for of in range(8)]
    assert sorted(done) == list(range(200))


def test_one_that_fails_raises_and_the_others_of_its_round_succeed() -> None:
    crowd = Crowd(refusing_bad)
    futures = crowd.gather("a", "bad", "b")
    assert crowd.rounds == [[FIRST], ["a", "bad", "b"], ["a"], ["bad"], ["b"]]
    with pytest.raises(ValueError, match="bad"):
        futures.pop("bad").result()
    assert [future.result() for future in futures.values()] == ["FIRST", "A", "B"]


def test_one_that_fails_alone_is_not_repeated() -> None:
    crowd = Crowd(refusing_bad)
    futures = crowd.gather("bad")
    assert crowd.rounds == [[FIRST], ["bad"]]
    with pytest.raises(ValueError, match="bad"):
        futures["bad"].result()


def test_what_is_unavailable_is_so_for_the_whole_round_and_is_not_repeated() -> None:
    def out_of_reach(items: Sequence[str]) -> list[str]:
        if items != [FIRST]:
            raise Unavailable("nobody answers")
        return in_capitals(items)

    crowd = Crowd(out_of_reach)
    futures = crowd.gather("a", "b")
    assert crowd.rounds == [[FIRST], ["a", "b"]]
    assert futures[FIRST].result() == "FIRST"
    for item in "ab":
        with pytest.raises(Unavailable):
            futures[item].result()


def test_what_failed_does_not_hold_up_what_comes_later() -> None:
    crowd = Crowd(refusing_bad)
    crowd.gather("bad", "a")
    assert crowd.group.do("later") == "LATER"


def test_the_work_sees_nothing_of_its_callers_contexts_nor_they_of_its() -> None:
    def who_asks(items: Sequence[str]) -> list[str]:
        seen = asked_by.get()
        asked_by.set("the work")
        return [seen] * len(items)

    token = asked_by.set("the caller")
    try:
        group = GroupCommit(who_asks)
        assert [group.do("a"), group.do("b")] == ["nobody", "nobody"]
        assert asked_by.get() == "the caller"
    finally:
        asked_by.reset(token)
