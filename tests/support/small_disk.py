"""A disk that is full when a test wants it: a file system in memory of a few MiB, and ballast."""

import errno
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest


class SmallDisk:
    def __init__(self, path: Path) -> None:
        self.path = path
        self._ballast = path / ".ballast"

    def fill(self, leave: int = 0) -> None:
        """Leave so many bytes, to the page."""
        with self._ballast.open("ab") as file:
            while True:
                status = os.statvfs(self.path)
                more = status.f_bavail * status.f_frsize - leave
                if more <= 0:
                    return
                with suppress(OSError):  # somebody else has written meanwhile
                    os.posix_fallocate(file.fileno(), os.fstat(file.fileno()).st_size, more)

    def clear(self) -> None:
        self._ballast.unlink(missing_ok=True)


@contextmanager
def small_disk(path: Path, size: int) -> Iterator[SmallDisk]:
    """Mount it at ``path``, which needs a privilege; skip where there is none."""
    path.mkdir(parents=True, exist_ok=True)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    try:
        disk = SmallDisk(path)
        disk.fill()
        with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):  # it is full when it says so
            (path / "more").write_bytes(b"x" * 8192)
        (path / "more").unlink(missing_ok=True)
        disk.clear()
        yield disk
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)
