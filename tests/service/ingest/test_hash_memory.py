"""The memory of hashes: up to which version it knows, what it leaves to the files, and who must make room for whom."""

import hashlib

import pytest

from service.ingest import hash_memory
from service.ingest.hash_memory import KEPT_SECONDS, HashMemory, Remembered, VersionHashes
from tests.support.still_clock import StillClock


def digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def digests(texts: str) -> list[bytes]:
    """The sorted hashes of one document a letter."""
    return sorted(digest(text) for text in texts)


def version(number: int, texts: str | None) -> VersionHashes:
    """A version of these documents; None for too many."""
    return VersionHashes(number, f"data/{number}", None if texts is None else digests(texts))


def remember(memory: HashMemory, dataset: str, *texts: str | None) -> None:
    """Add the first versions of a dataset."""
    memory.add(
        dataset, 0, 0, len(texts), [version(number, each) for number, each in enumerate(texts, start=1)]
    )


def all_of(memory: HashMemory, dataset: str, newest: int, excluded: int = 0) -> Remembered:
    remembered = memory.remembered(dataset, excluded, newest)
    assert remembered is not None
    return remembered


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> StillClock:
    """The clock that the memory goes by, and nobody else."""
    clock = StillClock()
    monkeypatch.setattr(hash_memory, "time", clock)
    return clock


def test_what_is_remembered_is_that_of_the_versions_up_to_one_and_not_beyond() -> None:
    memory = HashMemory()
    remember(memory, "d", "ab", "bc", "cd")
    for newest, known in enumerate(("", "ab", "abc", "abcd")):
        remembered = all_of(memory, "d", newest)
        assert remembered.newest == newest
        assert remembered.among(digests("abcdx")) == set(digests(known))


def test_what_is_not_known_to_its_end_is_not_remembered() -> None:
    memory = HashMemory()
    assert memory.newest("d", 0) == 0
    assert memory.remembered("d", 0, 0) is None
    remember(memory, "d", "a", "b")
    assert memory.newest("d", 0) == 2
    assert memory.remembered("d", 0, 3) is None
    assert memory.remembered("other", 0, 1) is None


def test_what_was_added_since_is_not_seen() -> None:
    memory = HashMemory()
    remember(memory, "d", "a")
    before = all_of(memory, "d", 1)
    memory.add("d", 0, 1, 3, [version(2, "ab"), version(3, None)])
    assert before.among(digests("ab")) == {digest("a")}
    assert before.others == ()
    assert all_of(memory, "d", 3).among(digests("ab")) == set(digests("ab"))


def test_since_a_version_are_the_hashes_that_none_up_to_it_has() -> None:
    memory = HashMemory()
    remember(memory, "d", "ab", "bc", "ade")
    assert all_of(memory, "d", 3).since(1) == digests("cde")
    assert all_of(memory, "d", 2).since(1) == digests("c")
    assert all_of(memory, "d", 3).since(3) == []


def test_a_version_of_too_many_documents_is_among_the_others() -> None:
    memory = HashMemory()
    remember(memory, "d", "a", None, "b", None)
    assert all_of(memory, "d", 1).others == ()
    assert all_of(memory, "d", 3).others == ((2, "data/2"),)
    assert all_of(memory, "d", 4).others == ((2, "data/2"), (4, "data/4"))
    assert all_of(memory, "d", 4).among(digests("ab")) == set(digests("ab"))


def test_versions_that_do_not_follow_on_are_not_added() -> None:
    memory = HashMemory()
    memory.add("d", 0, 1, 2, [version(2, "b")])
    assert memory.newest("d", 0) == 0
    remember(memory, "d", "a")
    memory.add("d", 0, 2, 3, [version(3, "c")])
    assert memory.newest("d", 0) == 1
    assert memory.remembered("d", 0, 3) is None
    memory.add("d", 0, 1, 3, [version(2, "b"), version(3, "c")])
    assert all_of(memory, "d", 3).among(digests("abc")) == set(digests("abc"))


def test_what_others_have_added_meanwhile_is_passed_over() -> None:
    memory = HashMemory()
    remember(memory, "d", None, "a")
    remember(memory, "d", None)
    assert memory.newest("d", 0) == 2
    remember(memory, "d", None, "a", "ab")
    remembered = all_of(memory, "d", 3)
    assert remembered.others == ((1, "data/1"),)
    assert remembered.since(2) == digests("b")


def test_another_excluded_version_forgets_the_dataset() -> None:
    memory = HashMemory()
    remember(memory, "d", "a", "b")
    assert memory.newest("d", 1) == 0
    assert memory.remembered("d", 1, 2) is None
    memory.add("d", 1, 0, 2, [version(2, "b")])
    assert all_of(memory, "d", 2, excluded=1).among(digests("ab")) == {digest("b")}
    assert memory.remembered("d", 0, 2) is None


def test_who_does_not_know_of_an_excluded_version_yet_changes_nothing() -> None:
    memory = HashMemory()
    memory.add("d", 1, 0, 2, [version(2, "b")])
    remember(memory, "d", "a", "b", "c")
    assert memory.newest("d", 0) == 0
    assert memory.newest("d", 1) == 2
    assert all_of(memory, "d", 2, excluded=1).among(digests("abc")) == {digest("b")}


def test_what_is_forgotten_leaves_its_room() -> None:
    memory = HashMemory(max_hashes=2)
    remember(memory, "d", "ab")
    memory.add("d", 1, 0, 2, [version(2, "cd")])
    assert all_of(memory, "d", 2, excluded=1).others == ()


def test_for_lack_of_room_the_least_recently_used_dataset_is_thrown_out(clock: StillClock) -> None:
    memory = HashMemory(max_hashes=4)
    remember(memory, "first", "ab")
    remember(memory, "second", "cd")
    all_of(memory, "first", 1)  # which uses it
    clock.seconds += KEPT_SECONDS + 1
    remember(memory, "third", "ef")
    assert all_of(memory, "third", 1) == Remembered(1, (), dict.fromkeys(digests("ef"), 1))
    assert memory.newest("second", 0) == 0
    assert all_of(memory, "first", 1).among(digests("ab")) == set(digests("ab"))


def test_as_many_are_thrown_out_as_are_in_the_way(clock: StillClock) -> None:
    memory = HashMemory(max_hashes=4)
    for name in ("first", "second", "third"):
        remember(memory, name, "a")
    clock.seconds += KEPT_SECONDS + 1
    remember(memory, "newcomer", "bcd")
    assert [memory.newest(name, 0) for name in ("first", "second", "third", "newcomer")] == [0, 0, 1, 1]
    assert all_of(memory, "newcomer", 1).others == ()


def test_what_was_used_within_the_last_minute_stays_and_the_newcomer_is_left_to_its_files(
    clock: StillClock,
) -> None:
    memory = HashMemory(max_hashes=4)
    remember(memory, "first", "ab")
    remember(memory, "second", "cd")
    clock.seconds += KEPT_SECONDS - 1
    remember(memory, "newcomer", "ef")
    newcomer = all_of(memory, "newcomer", 1)
    assert (newcomer.others, newcomer.first) == (((1, "data/1"),), {})
    assert all_of(memory, "first", 1).among(digests("ab")) == set(digests("ab"))
    assert all_of(memory, "second", 1).among(digests("cd")) == set(digests("cd"))


@pytest.mark.parametrize("use", ["look", "add"])
def test_every_use_starts_the_minute_again(clock: StillClock, use: str) -> None:
    memory = HashMemory(max_hashes=2)
    remember(memory, "first", "ab")
    clock.seconds += KEPT_SECONDS - 1
    if use == "look":
        all_of(memory, "first", 1)
    else:
        remember(memory, "first", "ab", "")
    clock.seconds += KEPT_SECONDS - 1
    remember(memory, "newcomer", "c")
    assert all_of(memory, "newcomer", 1).others == ((1, "data/1"),)
    clock.seconds += 2
    memory.add("newcomer", 0, 1, 2, [version(2, "d")])
    assert memory.newest("first", 0) == 0
    assert all_of(memory, "newcomer", 2).among(digests("cd")) == {digest("d")}


def test_no_dataset_makes_room_for_itself(clock: StillClock) -> None:
    memory = HashMemory(max_hashes=3)
    remember(memory, "d", "ab")
    clock.seconds += KEPT_SECONDS + 1
    memory.add("d", 0, 1, 3, [version(2, "cd"), version(3, "e")])
    remembered = all_of(memory, "d", 3)
    assert remembered.others == ((2, "data/2"),)
    assert remembered.among(digests("abcde")) == set(digests("abe"))
