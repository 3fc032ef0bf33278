"""The base class of all specs, and the type of their fields that hold artifact keys."""

from collections.abc import Iterator
from functools import cache
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from pydantic import BaseModel, ConfigDict


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


@cache
def artifact_key_fields(spec: type[Spec]) -> frozenset[str]:
    """Names of the spec's fields that are typed ArtifactKey, optional or in a tuple."""
    hints = get_type_hints(spec, include_extras=True)
    return frozenset(name for name in spec.model_fields if _holds_artifact_key(hints[name]))


def _holds_artifact_key(annotation: Any) -> bool:
    if get_origin(annotation) is Annotated and _IsArtifactKey in annotation.__metadata__:
        return True
    return any(_holds_artifact_key(argument) for argument in get_args(annotation))
