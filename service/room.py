"""A disk without room is a part of the service that does not answer: come back, and nothing is lost."""

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager

from service.core.errors import NoRoom

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
# Libraries that are not Python's (safetensors, tokenizers, pyarrow) tell the number in their text alone.
_TOLD = re.compile(
    rf"\b(?:os error|errno) (?:{'|'.join(str(number) for number in sorted(_FULL))})\b", re.IGNORECASE
)


@contextmanager
def room_for(what: str) -> Iterator[None]:
    """Raise NoRoom where the block fails because a disk is full, or a quota used up."""
    try:
        yield
    except Exception as error:
        if is_full(error):
            raise NoRoom(f"no room left for {what}") from error
        raise


def is_full(error: BaseException | None) -> bool:
    """Whether a full disk is what the error, or what it was raised from, comes from."""
    while error is not None:
        number = error.errno if isinstance(error, OSError) else None
        if number in _FULL or (number is None and _TOLD.search(str(error))):
            return True
        error = error.__cause__ or error.__context__
    return False
