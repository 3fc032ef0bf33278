"""Errors in a body: those of single rows, collected by line, and those of the body as a whole."""

from service.core.errors import BadContent, ErrorItem
from service.ingest.formats import Limits

MAX_ROW_ERRORS = 20


class RowError(Exception):
    """A document that cannot be accepted. The message says why; the parser adds the location."""


class RowErrors:
    """Collects row errors and stops the ingestion at the 20th."""

    def __init__(self) -> None:
        self._items: list[ErrorItem] = []

    def add(self, location: str, message: str) -> None:
        """Add an error. Raises BadContent with all of them once there are 20."""
        self._items.append(ErrorItem(location, message))
        if len(self._items) == MAX_ROW_ERRORS:
            raise BadContent(
                f"the body has at least {MAX_ROW_ERRORS} errors; nothing was stored", self._items
            )

    def check(self) -> None:
        """Raise BadContent if there are any errors."""
        if self._items:
            count = "1 error" if len(self._items) == 1 else f"{len(self._items)} errors"
            raise BadContent(f"the body has {count}; nothing was stored", self._items)


def body_error(message: str) -> BadContent:
    """The error for a body that is bad as a whole."""
    return BadContent(f"{message}; nothing was stored", [ErrorItem("body", message)])


class ExpansionMeter:
    """Counts the bytes into and out of a decoder, and raises BadContent if it expands too much."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self.encoded_bytes = 0
        self.decoded_bytes = 0

    def add_encoded(self, num_bytes: int) -> None:
        self.encoded_bytes += num_bytes

    def add_decoded(self, num_bytes: int) -> None:
        """Raises BadContent if the decoded body is too large, in itself or compared with the encoded one."""
        limits = self._limits
        self.decoded_bytes += num_bytes
        if self.decoded_bytes > limits.max_decoded_bytes:
            raise body_error(f"the body decodes to more than {limits.max_decoded_bytes} bytes")
        expanded = self.decoded_bytes > limits.max_expansion * self.encoded_bytes
        if expanded and self.decoded_bytes > limits.expansion_floor_bytes:
            raise body_error(f"the body decodes to more than {limits.max_expansion} times its size")
