"""Every spec field that holds an artifact key is typed so: garbage collection finds references by that type."""

import json
import re
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import pytest

from service.core.ledger import LedgerEntry
from service.core.spec import ArtifactKey, Spec, artifact_key_fields
from service.core.stage_specs import (
    STAGE_SPECS,
    EvaluateStage,
    LineSpec,
    SliceRef,
    StageKind,
    TokenizerStage,
    parse_stage_spec,
)

GOLDEN_PLANS = sorted((Path(__file__).parents[2] / "golden").glob("plan_*.json"))
KEY_FIELD_NAME = re.compile(r"(?:.*_)?keys?")
KEY = re.compile(r"(?:base|branch|data|export|merge|pack|slice|tokenizer|tokenizer-source|train|trunk)/.+")


def specs_in(spec: type[Spec]) -> Iterator[type[Spec]]:
    """The spec's class, and those of all specs it can contain."""
    yield spec
    for field in spec.model_fields.values():
        for nested in spec_types(field.annotation):
            yield from specs_in(nested)


def spec_types(annotation: Any) -> Iterator[type[Spec]]:
    if isinstance(annotation, type) and issubclass(annotation, Spec):
        yield annotation
    for argument in get_args(annotation):
        yield from spec_types(argument)


def undeclared_key_fields(spec: type[Spec]) -> set[str]:
    named_like_keys = {name for name in spec.model_fields if KEY_FIELD_NAME.fullmatch(name)}
    return named_like_keys - artifact_key_fields(spec)


def is_walked(annotation: Any) -> bool:
    """Whether ``Spec.artifact_keys`` sees every spec in a field of this type."""
    if isinstance(annotation, type) and issubclass(annotation, Spec):
        return True
    if get_origin(annotation) in (types.UnionType, Annotated):
        return all(is_walked(argument) for argument in get_args(annotation))
    if get_origin(annotation) is tuple:  # not in a tuple of tuples
        items = (argument for argument in get_args(annotation) if argument is not Ellipsis)
        return all(get_origin(item) is not tuple and is_walked(item) for item in items)
    return not list(spec_types(annotation))


ROOT_SPECS: tuple[type[Spec], ...] = (LineSpec, *STAGE_SPECS.values())
ALL_SPECS = sorted(
    {nested for spec in ROOT_SPECS for nested in specs_in(spec)},
    key=lambda spec: spec.__name__,
)


def strings_in(document: Any) -> Iterator[str]:
    if isinstance(document, str):
        yield document
    elif isinstance(document, dict):
        for value in document.values():
            yield from strings_in(value)
    elif isinstance(document, list):
        for value in document:
            yield from strings_in(value)


def test_every_stage_kind_has_a_spec() -> None:
    assert STAGE_SPECS.keys() == set(StageKind)


@pytest.mark.parametrize("spec", ALL_SPECS, ids=lambda spec: spec.__name__)
def test_every_field_named_like_a_key_is_typed_as_one(spec: type[Spec]) -> None:
    assert undeclared_key_fields(spec) == set()
    assert all(is_walked(field.annotation) for field in spec.model_fields.values())


def test_a_key_field_without_the_type_is_caught() -> None:
    class Undeclared(Spec):
        declared_key: ArtifactKey | None
        reference_key: str
        other_keys: tuple[str, ...]
        key: str
        monkey: str

    assert undeclared_key_fields(Undeclared) == {"reference_key", "other_keys", "key"}


def test_a_nesting_that_the_walk_would_miss_is_caught() -> None:
    assert not is_walked(dict[str, SliceRef])
    assert not is_walked(tuple[tuple[SliceRef, ...], ...])


@pytest.mark.parametrize("path", GOLDEN_PLANS, ids=lambda path: path.stem)
def test_stored_stages_give_exactly_the_keys_in_their_json(path: Path) -> None:
    for stage in json.loads(path.read_text())["stages"]:
        keys = set(parse_stage_spec(stage["kind"], stage["spec"]).artifact_keys())
        assert keys == {text for text in strings_in(stage["spec"]) if KEY.fullmatch(text)}, stage["name"]


def test_keys_in_optional_fields_tuples_and_nested_specs_are_found() -> None:
    tokenizer = TokenizerStage(data_key="data/1", slice_keys=("slice/a", "slice/b"))
    assert set(tokenizer.artifact_keys()) == {"data/1", "slice/a", "slice/b"}
    assert list(LedgerEntry(number=1, pack_key="pack/p", rows=1, steps=1).artifact_keys()) == ["pack/p"]
    assert list(TokenizerStage().artifact_keys()) == []


def test_the_base_of_a_line_is_one_of_its_keys() -> None:
    line = first_line()
    assert set(line.artifact_keys()) == {line.tokenizer_key}
    based = LineSpec.model_validate(line.model_dump() | {"architecture": {"base": "base/b"}})
    assert set(based.artifact_keys()) == {line.tokenizer_key, "base/b"}


def test_a_typed_key_is_stored_as_plain_text() -> None:
    evaluate = EvaluateStage(
        export_key="export/e",
        slices=(SliceRef(name="s", key="slice/s", file="f"),),
        served_export_key=None,
        served_slices=(),
        sequence_length=8,
        numerics=first_line().numerics,
    )
    document = evaluate.model_dump(mode="json")
    assert type(document["export_key"]) is str
    assert parse_stage_spec("evaluate", json.loads(json.dumps(document))) == evaluate


def first_line() -> LineSpec:
    stages = json.loads(GOLDEN_PLANS[0].read_text())["stages"]
    return LineSpec.model_validate(next(stage["spec"]["line"] for stage in stages if "line" in stage["spec"]))
