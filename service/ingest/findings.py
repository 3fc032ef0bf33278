"""What is wrong with a body: the first findings by line, and whether it decodes to far too much."""

from service.core.errors import BadContent, ErrorItem
from service.ingest.formats import Limits

MAX_FINDINGS = 20


class Flaw(Exception):
    """One document cannot be taken; the message says why. Its reader adds where it lies."""


class Findings:
    """Collects what is wrong with a body, and ends the reading of it at the 20th finding."""

    def __init__(self) -> None:
        self.items: list[ErrorItem] = []

    def __bool__(self) -> bool:
        return bool(self.items)

    def add(self, location: str, message: str) -> None:
        """Add a finding. Raises BadContent with all of them once there are 20."""
        self.items.append(ErrorItem(location, message))
        if len(self.items) == MAX_FINDINGS:
            raise BadContent(f"the body has {MAX_FINDINGS} errors or more; nothing was stored", self.items)

    def check(self) -> None:
        """Raise BadContent where anything was found."""
        if self.items:
            count = "1 error" if len(self.items) == 1 else f"{len(self.items)} errors"
            raise BadContent(f"the body has {count}; nothing was stored", self.items)


def bad_body(message: str) -> BadContent:
    """The error for what is wrong with a body as a whole."""
    return BadContent(f"{message}; nothing was stored", [ErrorItem("body", message)])


class Meter:
    """Counts what goes into a decoder and what comes out of it. Raises BadContent when that is too much."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self.encoded = 0
        self.decoded = 0

    def count(self, decoded: int) -> None:
        self.decoded += decoded
        if self.decoded > self._limits.max_decoded_bytes:
            raise bad_body(f"the body decodes to more than {self._limits.max_decoded_bytes} bytes")
        if (
            self.decoded > self._limits.expansion_floor_bytes
            and self.decoded > self._limits.max_expansion * self.encoded
        ):
            raise bad_body(f"the body decodes to more than {self._limits.max_expansion} times its size")
