"""Files of a body: in memory while they are small, in a staging folder from then on."""

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest

from service.core.manifest import SMALL_BYTES
from service.ingest.scratch import Scratch


@pytest.mark.parametrize("size", [0, 1, SMALL_BYTES, SMALL_BYTES + 1, 3 * SMALL_BYTES])
@pytest.mark.parametrize("step", [1000, SMALL_BYTES, 10 * SMALL_BYTES])
def test_a_file_is_what_was_written_wherever_it_is(tmp_path: Path, size: int, step: int) -> None:
    content = bytes(range(256)) * (size // 256 + 1)
    content = content[:size]
    scratch = Scratch(tmp_path, small=True)
    with closing(scratch.create("a")) as file:
        for start in range(0, size, step):
            file.write(content[start : start + step])
    with scratch.open("a") as found:
        assert found.read() == content
    is_small = size <= SMALL_BYTES
    assert scratch.small("a") == (content if is_small else None)
    assert (list(tmp_path.iterdir()) == []) is is_small
    source = scratch.source("a")
    assert (source if isinstance(source, bytes) else source.read_bytes()) == content
    scratch.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", [100, 2 * SMALL_BYTES])
def test_a_file_can_be_cut_and_written_again(tmp_path: Path, size: int) -> None:
    scratch = Scratch(tmp_path, small=True)
    with closing(scratch.create("a")) as file:
        file.write(bytes(size))
        file.truncate(10)
    with scratch.open("a") as found:
        assert found.read() == bytes(10)
    with closing(scratch.create("a")) as file:
        file.write(b"again")
    with scratch.open("a") as found:
        assert found.read() == b"again"
    scratch.close()


def test_two_threads_that_ask_at_once_have_one_folder(tmp_path: Path) -> None:
    for number in range(20):
        scratch, together = Scratch(tmp_path / str(number), small=True), threading.Barrier(2)

        def ask(scratch: Scratch = scratch, together: threading.Barrier = together) -> Path:
            together.wait()
            return scratch.folder

        with ThreadPoolExecutor(2) as threads:
            asked = [threads.submit(ask) for _ in range(2)]
        assert asked[0].result() == asked[1].result()
        scratch.close()


def test_of_a_body_that_is_not_small_the_folder_is_there_from_the_beginning(tmp_path: Path) -> None:
    scratch = Scratch(tmp_path)
    assert list(tmp_path.iterdir()) == [scratch.folder]
    scratch.close()
    assert list(tmp_path.iterdir()) == []
