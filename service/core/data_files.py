"""Names that data versions and slices share: the files of their artifacts, and the slice of a holdout."""

import re

DOCUMENTS = "documents.ndjson.zst"
HASHES = "hashes.bin"
HOLDOUT = "holdout.ndjson.zst"
HOLDOUT_HASHES = "holdout.bin"

_HOLDOUT_NAME = re.compile(r"v[0-9]+")


def holdout_name(number: int) -> str:
    """Name of the slice made of the holdout of data version ``number``."""
    return f"v{number}"


def is_holdout_name(name: str) -> bool:
    """Whether ``name`` is reserved for the holdout of some data version."""
    return _HOLDOUT_NAME.fullmatch(name) is not None
