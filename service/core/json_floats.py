"""Floats in stored JSON.

JSON has no NaN and no infinity, so a number that is not finite is stored as null.
"""

import math
from typing import Any


def finite_or_none(value: float | None) -> float | None:
    """The number, or None if it is not finite."""
    return value if value is not None and math.isfinite(value) else None


def replace_non_finite(document: Any) -> Any:
    """A copy of a JSON-like document in which every number that is not finite is None."""
    if isinstance(document, float):
        return finite_or_none(document)
    if isinstance(document, dict):
        return {key: replace_non_finite(value) for key, value in document.items()}
    if isinstance(document, list):
        return [replace_non_finite(value) for value in document]
    return document
