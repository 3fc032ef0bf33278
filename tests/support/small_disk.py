"""A small in-memory file system that a test can fill up and clear."""

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
        """Fill the disk except for ``leave`` bytes, rounded to a page."""
        with self._ballast.open("ab") as file:
            while True:
                status = os.statvfs(self.path)
                excess = status.f_bavail * status.f_frsize - leave
                if excess <= 0:
                    return
                with suppress(OSError):  # another process wrote in between
                    os.posix_fallocate(file.fileno(), os.fstat(file.fileno()).st_size, excess)

    def clear(self) -> None:
        self._ballast.unlink(missing_ok=True)


@contextmanager
def small_disk(path: Path, size: int) -> Iterator[SmallDisk]:
    """Mount a tmpfs of ``size`` bytes at ``path``. Skips the test if the user is not allowed to."""
    path.mkdir(parents=True, exist_ok=True)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a tmpfs: {mounted.stderr.strip()}")
    try:
        disk = SmallDisk(path)
        disk.fill()
        with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):  # the fixture itself works
            (path / "more").write_bytes(b"x" * 8192)
        (path / "more").unlink(missing_ok=True)
        disk.clear()
        yield disk
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)
