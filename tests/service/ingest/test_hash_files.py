"""Hash files, and the spool they are merged from, behave like sets at every size."""

import hashlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.ingest.hash_file import HashFile, hash_at
from service.ingest.hash_spool import HashSpool
from service.ingest.scratch import Scratch


def digest(number: int) -> bytes:
    return hashlib.sha256(str(number).encode()).digest()


def hash_file(path: Path, numbers: set[int]) -> HashFile:
    path.write_bytes(b"".join(sorted(digest(number) for number in numbers)))
    return HashFile(path)


@settings(max_examples=60)
@given(st.lists(st.integers(0, 40), max_size=120), st.integers(1, 9))
def test_runs_are_merged_into_the_sorted_distinct_hashes(
    tmp_path_factory: pytest.TempPathFactory, numbers: list[int], run_length: int
) -> None:
    spool = HashSpool(Scratch(tmp_path_factory.mktemp("spool"), small=True), run_length)
    for number in numbers:
        spool.add(digest(number))
    spool.seal()
    merged = [found for block in spool.merged() for found in block]
    assert merged == sorted({digest(number) for number in numbers})
    assert list(spool.in_order()) == [digest(number) for number in numbers]
    assert spool.count == len(numbers)


def test_blocks_are_about_as_long_as_a_run(tmp_path: Path) -> None:
    spool = HashSpool(Scratch(tmp_path, small=True), 256)
    for number in range(8192):
        spool.add(digest(number))
    spool.seal()
    assert all(150 < len(block) < 400 for block in spool.merged())


@given(st.sets(st.integers(0, 60)), st.sets(st.integers(0, 60)))
def test_a_hash_file_is_a_sorted_set(
    tmp_path_factory: pytest.TempPathFactory, inside: set[int], asked: set[int]
) -> None:
    with hash_file(tmp_path_factory.mktemp("h") / "hashes.bin", inside) as hashes:
        ordered = sorted(digest(number) for number in inside)
        assert list(hashes) == ordered
        assert len(hashes) == len(inside)
        for number in asked:
            index = hashes.find(digest(number))
            assert (index is not None) == (number in inside) == (digest(number) in hashes)
            assert index is None or ordered[index] == digest(number)
        block = sorted(digest(number) for number in asked)
        assert hashes.among(block) == {digest(number) for number in inside & asked}
        assert list(hashes[1:3]) == ordered[1:3]
        assert [hashes[index] for index in range(-len(hashes), len(hashes))] == ordered * 2


def test_few_hashes_and_many_are_found_in_a_long_file(tmp_path: Path) -> None:
    with hash_file(tmp_path / "hashes.bin", set(range(5000))) as hashes:
        few = sorted(digest(number) for number in (3, 7000, 4999))
        assert hashes.among(few) == {digest(3), digest(4999)}
        many = sorted(digest(number) for number in range(4000, 6000))
        assert hashes.among(many) == {digest(number) for number in range(4000, 5000)}


def test_hash_at_a_share_of_the_hash_space() -> None:
    assert hash_at(0) == bytes(8)
    assert hash_at(0.5) == b"\x80" + bytes(7)
    assert max(b"\xff" * 32, hash_at(1), hash_at(1.5)) == hash_at(1)
    assert sum(digest(number) < hash_at(0.25) for number in range(4000)) == pytest.approx(1000, rel=0.1)


def test_a_file_that_is_not_a_hash_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "hashes.bin").write_bytes(bytes(33))
    with pytest.raises(ValueError, match=r"hashes\.bin: 33 bytes are not whole hashes"):
        HashFile(tmp_path / "hashes.bin")
    (tmp_path / "hashes.bin").write_bytes(b"")
    with HashFile(tmp_path / "hashes.bin") as empty:
        assert not empty
        assert digest(1) not in empty
        with pytest.raises(IndexError):
            empty[0]
