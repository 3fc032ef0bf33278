"""The hash cache: which versions it covers, what it leaves to the files, and which datasets it evicts."""

import hashlib
from pathlib import Path

import pytest

from service.artifacts import LocalArtifacts
from service.registration import hash_cache
from service.registration.hash_cache import MIN_KEPT_SECONDS, CachedHashes, HashCache, VersionHashes
from service.store.datasets import DatasetExtent
from tests.support.still_clock import StillClock

UNUSED = LocalArtifacts(Path("unused"))


def digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def digests(texts: str) -> list[bytes]:
    """The sorted hashes of one document per letter."""
    return sorted(digest(text) for text in texts)


def version(number: int, texts: str | None) -> VersionHashes:
    """A version with these documents; None for too many to cache."""
    return VersionHashes(number, f"data/{number}", None if texts is None else digests(texts))


def extent(newest: int, excluded: int = 0) -> DatasetExtent:
    return DatasetExtent(newest, excluded, 0)


def fill(cache: HashCache, dataset: str, *texts: str | None) -> None:
    """Add the first versions of a dataset."""
    versions = [version(number, each) for number, each in enumerate(texts, start=1)]
    cache.add(dataset, extent(len(texts)), 0, versions)


def get(cache: HashCache, dataset: str, newest: int, excluded: int = 0) -> CachedHashes:
    cached = cache.get(dataset, extent(newest, excluded))
    assert cached is not None
    return cached


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> StillClock:
    """The clock of the cache alone."""
    clock = StillClock()
    monkeypatch.setattr(hash_cache, "time", clock)
    return clock


def test_cached_hashes_are_those_of_the_versions_up_to_the_newest() -> None:
    cache = HashCache(UNUSED)
    fill(cache, "d", "ab", "bc", "cd")
    for newest, known in enumerate(("", "ab", "abc", "abcd")):
        cached = get(cache, "d", newest)
        assert cached.newest == newest
        assert cached.among(digests("abcdx")) == set(digests(known))


def test_a_dataset_that_is_not_cached_to_its_newest_version_is_not_returned() -> None:
    cache = HashCache(UNUSED)
    assert cache.newest("d", extent(0)) == 0
    assert cache.get("d", extent(0)) is None
    fill(cache, "d", "a", "b")
    assert cache.newest("d", extent(2)) == 2
    assert cache.get("d", extent(3)) is None
    assert cache.get("other", extent(1)) is None


def test_versions_added_later_stay_invisible() -> None:
    cache = HashCache(UNUSED)
    fill(cache, "d", "a")
    before = get(cache, "d", 1)
    cache.add("d", extent(3), 1, [version(2, "ab"), version(3, None)])
    assert before.among(digests("ab")) == {digest("a")}
    assert before.uncached == ()
    assert get(cache, "d", 3).among(digests("ab")) == set(digests("ab"))


def test_added_hashes_are_those_that_no_earlier_version_has() -> None:
    cache = HashCache(UNUSED)
    fill(cache, "d", "ab", "bc", "ade")
    assert cache.added_since("d", extent(3), 1) == digests("cde")
    assert cache.added_since("d", extent(2), 1) == digests("c")
    assert cache.added_since("d", extent(3), 3) == []


def test_added_hashes_are_unknown_if_a_version_is_not_cached() -> None:
    cache = HashCache(UNUSED)
    assert cache.added_since("d", extent(0), 0) is None
    fill(cache, "d", None, "a", None, "b")
    assert cache.added_since("d", extent(2), 1) == digests("a")
    assert cache.added_since("d", extent(2), 0) is None
    assert cache.added_since("d", extent(4), 2) is None
    assert cache.added_since("d", extent(4), 3) == digests("b")
    assert cache.added_since("d", extent(5), 4) is None
    assert cache.added_since("d", extent(4, excluded=1), 3) is None


def test_a_version_with_too_many_documents_is_uncached() -> None:
    cache = HashCache(UNUSED)
    fill(cache, "d", "a", None, "b", None)
    assert get(cache, "d", 1).uncached == ()
    assert get(cache, "d", 3).uncached == ((2, "data/2"),)
    assert get(cache, "d", 4).uncached == ((2, "data/2"), (4, "data/4"))
    assert get(cache, "d", 4).among(digests("ab")) == set(digests("ab"))


def test_versions_that_would_leave_a_gap_are_not_added() -> None:
    cache = HashCache(UNUSED)
    cache.add("d", extent(2), 1, [version(2, "b")])
    assert cache.newest("d", extent(2)) == 0
    fill(cache, "d", "a")
    cache.add("d", extent(3), 2, [version(3, "c")])
    assert cache.newest("d", extent(3)) == 1
    cache.add("d", extent(3), 1, [version(2, "b"), version(3, "c")])
    assert get(cache, "d", 3).among(digests("abc")) == set(digests("abc"))


def test_versions_that_another_thread_has_added_are_skipped() -> None:
    cache = HashCache(UNUSED)
    fill(cache, "d", None, "a")
    fill(cache, "d", None)
    assert cache.newest("d", extent(2)) == 2
    fill(cache, "d", None, "a", "ab")
    assert get(cache, "d", 3).uncached == ((1, "data/1"),)
    assert cache.added_since("d", extent(3), 2) == digests("b")


def test_an_exclusion_starts_the_dataset_anew() -> None:
    cache = HashCache(UNUSED)
    fill(cache, "d", "a", "b")
    assert cache.newest("d", extent(2, excluded=1)) == 0
    assert cache.get("d", extent(2, excluded=1)) is None
    cache.add("d", extent(2, excluded=1), 0, [version(2, "b")])
    assert get(cache, "d", 2, excluded=1).among(digests("ab")) == {digest("b")}
    assert cache.get("d", extent(2)) is None


def test_a_thread_that_has_not_seen_an_exclusion_changes_nothing() -> None:
    cache = HashCache(UNUSED)
    cache.add("d", extent(2, excluded=1), 0, [version(2, "b")])
    fill(cache, "d", "a", "b", "c")
    assert cache.newest("d", extent(3)) == 0
    assert cache.newest("d", extent(2, excluded=1)) == 2
    assert get(cache, "d", 2, excluded=1).among(digests("abc")) == {digest("b")}


def test_a_dataset_that_starts_anew_frees_its_room() -> None:
    cache = HashCache(UNUSED, max_hashes=2)
    fill(cache, "d", "ab")
    cache.add("d", extent(2, excluded=1), 0, [version(2, "cd")])
    assert get(cache, "d", 2, excluded=1).uncached == ()


def test_the_least_recently_used_dataset_is_evicted(clock: StillClock) -> None:
    cache = HashCache(UNUSED, max_hashes=4)
    fill(cache, "first", "ab")
    fill(cache, "second", "cd")
    get(cache, "first", 1)  # counts as a use
    clock.seconds += MIN_KEPT_SECONDS + 1
    fill(cache, "third", "ef")
    assert get(cache, "third", 1) == CachedHashes(1, (), dict.fromkeys(digests("ef"), 1))
    assert cache.newest("second", extent(1)) == 0
    assert get(cache, "first", 1).among(digests("ab")) == set(digests("ab"))


def test_only_as_many_datasets_are_evicted_as_needed(clock: StillClock) -> None:
    cache = HashCache(UNUSED, max_hashes=4)
    for name in ("first", "second", "third"):
        fill(cache, name, "a")
    clock.seconds += MIN_KEPT_SECONDS + 1
    fill(cache, "newcomer", "bcd")
    names = ("first", "second", "third", "newcomer")
    assert [cache.newest(name, extent(1)) for name in names] == [0, 0, 1, 1]
    assert get(cache, "newcomer", 1).uncached == ()


def test_a_dataset_used_within_the_last_minute_is_not_evicted(clock: StillClock) -> None:
    cache = HashCache(UNUSED, max_hashes=4)
    fill(cache, "first", "ab")
    fill(cache, "second", "cd")
    clock.seconds += MIN_KEPT_SECONDS - 1
    fill(cache, "newcomer", "ef")
    newcomer = get(cache, "newcomer", 1)
    assert (newcomer.uncached, newcomer.first_version) == (((1, "data/1"),), {})
    assert get(cache, "first", 1).among(digests("ab")) == set(digests("ab"))
    assert get(cache, "second", 1).among(digests("cd")) == set(digests("cd"))


@pytest.mark.parametrize("use", ["get", "add"])
def test_every_use_starts_the_minute_again(clock: StillClock, use: str) -> None:
    cache = HashCache(UNUSED, max_hashes=2)
    fill(cache, "first", "ab")
    clock.seconds += MIN_KEPT_SECONDS - 1
    if use == "get":
        get(cache, "first", 1)
    else:
        fill(cache, "first", "ab", "")
    clock.seconds += MIN_KEPT_SECONDS - 1
    fill(cache, "newcomer", "c")
    assert get(cache, "newcomer", 1).uncached == ((1, "data/1"),)
    clock.seconds += 2
    cache.add("newcomer", extent(2), 1, [version(2, "d")])
    assert cache.newest("first", extent(1)) == 0
    assert get(cache, "newcomer", 2).among(digests("cd")) == {digest("d")}


def test_a_dataset_does_not_evict_itself(clock: StillClock) -> None:
    cache = HashCache(UNUSED, max_hashes=3)
    fill(cache, "d", "ab")
    clock.seconds += MIN_KEPT_SECONDS + 1
    cache.add("d", extent(3), 1, [version(2, "cd"), version(3, "e")])
    cached = get(cache, "d", 3)
    assert cached.uncached == ((2, "data/2"),)
    assert cached.among(digests("abcde")) == set(digests("abe"))
