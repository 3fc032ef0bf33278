"""A full disk is a temporary failure: it raises DiskFull, and the caller may try again once there is space."""

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager

from service.core.errors import DiskFull

_DISK_FULL_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT})
# Native libraries (safetensors, tokenizers, pyarrow) report the number in their message only.
_DISK_FULL_MESSAGE = re.compile(
    rf"\b(?:os error|errno) (?:{'|'.join(str(number) for number in sorted(_DISK_FULL_ERRNOS))})\b",
    re.IGNORECASE,
)


@contextmanager
def translate_disk_full(what: str) -> Iterator[None]:
    """Raise DiskFull, saying that ``what`` could not be written, if the block fails on a full disk or an exhausted quota."""
    try:
        yield
    except Exception as error:
        if is_disk_full(error):
            raise DiskFull(f"no disk space left for {what}") from error
        raise


def is_disk_full(error: BaseException | None) -> bool:
    """Whether a full disk caused the error, directly or through the errors it was raised from."""
    while error is not None:
        number = error.errno if isinstance(error, OSError) else None
        if number in _DISK_FULL_ERRNOS or (number is None and _DISK_FULL_MESSAGE.search(str(error))):
            return True
        error = error.__cause__ or error.__context__
    return False
