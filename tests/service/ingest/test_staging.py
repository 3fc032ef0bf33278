"""Staging folders: removed by whoever made them, and those of killed processes by whoever comes next."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from service.ingest.staging import staging


def age(directory: Path) -> None:
    hour_ago = time.time() - 3600
    os.utime(directory, (hour_ago, hour_ago))


def test_a_folder_lasts_as_long_as_its_block(tmp_path: Path) -> None:
    with staging(tmp_path / "root") as directory:
        (directory / "file").write_bytes(b"x")
        assert directory.parent == tmp_path / "root"
    assert list((tmp_path / "root").iterdir()) == []
    with pytest.raises(KeyError), staging(tmp_path / "root") as directory:
        raise KeyError
    assert list((tmp_path / "root").iterdir()) == []


def test_what_a_killed_process_left_is_removed_and_what_is_in_use_is_not(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path; from service.ingest.staging import staging\n"
        "with staging(Path(sys.argv[1])): os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code, tmp_path], check=False).returncode == -9
    (left,) = tmp_path.iterdir()
    with staging(tmp_path) as used:
        assert set(tmp_path.iterdir()) == {left, used}  # too young to tell from one that is being made
        age(left)
        age(used)
        with staging(tmp_path) as other:
            assert set(tmp_path.iterdir()) == {used, other}
    assert list(tmp_path.iterdir()) == []
