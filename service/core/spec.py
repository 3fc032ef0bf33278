"""The base class of all specs, their fingerprints, and the type of their fields that hold artifact keys."""

import hashlib
import json
from collections.abc import Collection, Iterator
from functools import cache
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from pydantic import BaseModel, ConfigDict
from pydantic_core import to_jsonable_python


class AddedAfter020:
    """Marks a field that did not exist in 0.2.0: ``field: Annotated[bool, ADDED_AFTER_0_2_0] = False``.

    A fingerprint leaves the field out while it has its default, so the default must mean what 0.2.0 did.
    Otherwise existing lines would lose their trunks, which are found by fingerprint.
    """


ADDED_AFTER_0_2_0 = AddedAfter020()


class _IsArtifactKey:
    pass


ArtifactKey = Annotated[str, _IsArtifactKey]
"""A spec field that holds an artifact key. Garbage collection keeps the artifacts that such fields name."""


class Spec(BaseModel):
    """Frozen, and closed to unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def artifact_keys(self) -> Iterator[str]:
        """Every artifact key in this spec and in the specs it contains."""
        key_fields = artifact_key_fields(type(self))
        for name in type(self).model_fields:
            value = getattr(self, name)
            for item in value if isinstance(value, tuple) else (value,):
                if isinstance(item, Spec):
                    yield from item.artifact_keys()
                elif name in key_fields and item is not None:
                    yield item

    def fields_of(self, base: "type[Spec]") -> dict[str, Any]:
        """The values of the fields that ``base`` declares, for another spec that extends ``base``."""
        assert isinstance(self, base)
        return {name: getattr(self, name) for name in base.model_fields}


@cache
def artifact_key_fields(spec: type[Spec]) -> frozenset[str]:
    """Names of the spec's fields that are typed ArtifactKey, optional or in a tuple."""
    hints = get_type_hints(spec, include_extras=True)
    return frozenset(name for name in spec.model_fields if _holds_artifact_key(hints[name]))


def _holds_artifact_key(annotation: Any) -> bool:
    if get_origin(annotation) is Annotated and _IsArtifactKey in annotation.__metadata__:
        return True
    return any(_holds_artifact_key(argument) for argument in get_args(annotation))


def fingerprint(kind: str, *parts: Any) -> str:
    """First 32 hex digits of the sha256 of the kind and the parts as canonical JSON.

    Defaults of specs count, except those of fields added after 0.2.0.
    """
    canonical = json.dumps(
        [kind, *map(canonical_json, parts)], sort_keys=True, separators=(",", ":"), allow_nan=False
    )
    return hashlib.sha256(canonical.encode()).hexdigest()[:32]


def canonical_json(part: Any, *, exclude: Collection[str] = ()) -> Any:
    """A spec, or a JSON-like value that may hold specs, as the plain JSON that its fingerprint covers.

    ``exclude`` names fields of the outermost spec that do not count.
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
