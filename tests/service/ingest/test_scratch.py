"""Files of a body: in memory while they are small, and in a staging folder beyond that."""

import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest

from service.core.manifest import SMALL_BYTES
from service.ingest.scratch import Scratch, staging


@pytest.mark.parametrize("size", [0, 1, SMALL_BYTES, SMALL_BYTES + 1, 3 * SMALL_BYTES])
@pytest.mark.parametrize("step", [1000, SMALL_BYTES, 10 * SMALL_BYTES])
def test_a_file_reads_back_as_written_in_memory_and_on_disk(tmp_path: Path, size: int, step: int) -> None:
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
def test_a_file_can_be_truncated_and_rewritten(tmp_path: Path, size: int) -> None:
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


def test_two_threads_that_ask_at_once_get_the_same_folder(tmp_path: Path) -> None:
    for number in range(20):
        scratch, barrier = Scratch(tmp_path / str(number), small=True), threading.Barrier(2)

        def ask(scratch: Scratch = scratch, barrier: threading.Barrier = barrier) -> Path:
            barrier.wait()
            return scratch.folder

        with ThreadPoolExecutor(2) as threads:
            folders = [threads.submit(ask) for _ in range(2)]
        assert folders[0].result() == folders[1].result()
        scratch.close()


def test_a_large_body_has_a_folder_from_the_beginning(tmp_path: Path) -> None:
    scratch = Scratch(tmp_path)
    assert list(tmp_path.iterdir()) == [scratch.folder]
    scratch.close()
    assert list(tmp_path.iterdir()) == []


def age(directory: Path) -> None:
    hour_ago = time.time() - 3600
    os.utime(directory, (hour_ago, hour_ago))


def test_a_staging_folder_is_deleted_at_the_end_of_its_block(tmp_path: Path) -> None:
    with staging(tmp_path / "root") as directory:
        (directory / "file").write_bytes(b"x")
        assert directory.parent == tmp_path / "root"
    assert list((tmp_path / "root").iterdir()) == []
    with pytest.raises(KeyError), staging(tmp_path / "root") as directory:
        raise KeyError
    assert list((tmp_path / "root").iterdir()) == []


def test_the_folder_of_a_killed_process_is_deleted_and_a_used_one_is_not(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path; from service.ingest.scratch import staging\n"
        "with staging(Path(sys.argv[1])): os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code, tmp_path], check=False).returncode == -9
    (abandoned,) = tmp_path.iterdir()
    with staging(tmp_path) as used:
        # Too young to tell from a folder that is being created.
        assert set(tmp_path.iterdir()) == {abandoned, used}
        age(abandoned)
        age(used)
        with staging(tmp_path) as other:
            assert set(tmp_path.iterdir()) == {used, other}
    assert list(tmp_path.iterdir()) == []
