"""Fingerprints name the artifacts of existing lines, so they must not move when a release adds a field."""

import json
from pathlib import Path
from typing import Annotated

import pytest

from service.core.ledger import LedgerEntry
from service.core.spec import ADDED_AFTER_0_2_0, AddedAfter020, Spec, canonical_json, fingerprint
from service.core.specs import ArchitectureSpec
from service.core.stage_specs import (
    EvaluateStage,
    ExportStage,
    LineSpec,
    MergeStage,
    Numerics,
    PackStage,
    RunPath,
    SliceRef,
    TokenizerStage,
    TrainStage,
)

FINGERPRINTED: tuple[type[Spec], ...] = (
    ArchitectureSpec,
    EvaluateStage,
    ExportStage,
    LedgerEntry,
    LineSpec,
    MergeStage,
    Numerics,
    PackStage,
    RunPath,
    SliceRef,
    TokenizerStage,
    TrainStage,
)
FIELDS_OF_0_2_0 = json.loads(
    (Path(__file__).parents[2] / "golden" / "fingerprinted_fields_0.2.0.json").read_text()
)


class Then(Spec):
    rate: float = 0.5


class Now(Then):
    shuffled: Annotated[bool, ADDED_AFTER_0_2_0] = False


class Outer(Spec):
    parts: tuple[Then, ...]


@pytest.mark.parametrize("spec", FINGERPRINTED, ids=lambda spec: spec.__name__)
def test_a_field_added_since_0_2_0_is_marked_and_has_a_default(spec: type[Spec]) -> None:
    marked = {
        name
        for name, field in spec.model_fields.items()
        if any(isinstance(mark, AddedAfter020) for mark in field.metadata)
    }
    assert sorted(spec.model_fields.keys() - marked) == FIELDS_OF_0_2_0[spec.__name__]
    assert not any(spec.model_fields[name].is_required() for name in marked)


def test_an_added_field_counts_only_when_it_differs_from_its_default() -> None:
    assert fingerprint("kind", Now()) == fingerprint("kind", Then())
    assert fingerprint("kind", Now(shuffled=True)) != fingerprint("kind", Then())
    assert fingerprint("kind", Now(rate=0.25)) == fingerprint("kind", Then(rate=0.25))


def test_an_added_field_of_a_nested_spec_is_left_out_too() -> None:
    assert canonical_json(Outer(parts=(Now(), Now(shuffled=True)))) == {
        "parts": [{"rate": 0.5}, {"rate": 0.5, "shuffled": True}]
    }


def test_fields_of_0_2_0_count_with_their_defaults() -> None:
    assert canonical_json(Then()) == {"rate": 0.5}
