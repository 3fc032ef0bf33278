"""What every spec is: frozen, closed to unknown keys, and identified by a fingerprint of its content."""

import hashlib
import json
from collections.abc import Collection
from typing import Any

from pydantic import BaseModel, ConfigDict
from pydantic_core import to_jsonable_python


class AddedAfter020:
    """Marks a field that did not exist in 0.2.0: ``field: Annotated[bool, ADDED_AFTER_0_2_0] = False``.

    A fingerprint leaves the field out while it has its default, so the default must mean what 0.2.0 did. Otherwise
    existing lines would lose their trunk, which is found by its fingerprint.
    """


ADDED_AFTER_0_2_0 = AddedAfter020()


class Spec(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


def fingerprint(kind: str, *parts: Any) -> str:
    """First 32 hex digits of the sha256 of the kind and the parts as canonical JSON.

    Specs count with their defaults, but for fields added after 0.2.0 that have theirs.
    """
    canonical = json.dumps(
        [kind, *map(canonical_json, parts)], sort_keys=True, separators=(",", ":"), allow_nan=False
    )
    return hashlib.sha256(canonical.encode()).hexdigest()[:32]


def canonical_json(part: Any, *, exclude: Collection[str] = ()) -> Any:
    """A spec, or a JSON-like value that may hold specs, as the plain JSON that its fingerprint covers.

    ``exclude``: fields of the outermost spec that don't count.
    """
    if isinstance(part, BaseModel):
        names = [name for name in type(part).model_fields if name not in exclude]
        return {name: canonical_json(getattr(part, name)) for name in names if not _is_left_out(part, name)}
    if isinstance(part, list | tuple):
        return [canonical_json(item) for item in part]
    if isinstance(part, dict):
        return {key: canonical_json(value) for key, value in part.items()}
    return to_jsonable_python(part)


def _is_left_out(spec: BaseModel, name: str) -> bool:
    field = type(spec).model_fields[name]
    added = any(isinstance(mark, AddedAfter020) for mark in field.metadata)
    return added and bool(getattr(spec, name) == field.get_default(call_default_factory=True))
