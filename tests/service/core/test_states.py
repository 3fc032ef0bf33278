"""The table of moves: complete, closed, and obeyed by the database for every pair of states."""

from itertools import product
from typing import Any

import pytest

from service.core.states import (
    FINISHED_STAGES,
    FINISHED_UPDATES,
    MOVES,
    CheckpointState,
    ModelVersionState,
    ReleaseState,
    StageState,
    UpdateState,
    sources,
)

ENUMS = [UpdateState, StageState, ModelVersionState, ReleaseState, CheckpointState]
PAIRS = [(enum, a, b) for enum in ENUMS for a, b in product(enum, enum)]

LEGAL = {
    UpdateState: "pending>running pending>cancelled pending>failed running>succeeded running>rejected running>failed "
    "running>cancelled failed>running failed>pending failed>cancelled",
    StageState: "pending>ready pending>running pending>cancelled ready>running ready>succeeded ready>cancelled running>succeeded "
    "running>ready running>pending running>failed running>cancelled succeeded>ready failed>ready failed>cancelled "
    "cancelled>pending cancelled>ready",
    ModelVersionState: "candidate>released candidate>rejected rejected>released released>retired retired>released",
    ReleaseState: "pending>live pending>superseded pending>failed live>ended",
    CheckpointState: "live>abandoned",
}


@pytest.mark.parametrize(("enum", "a", "b"), PAIRS, ids=[f"{e.__name__}-{a}-{b}" for e, a, b in PAIRS])
def test_exactly_the_listed_moves_are_legal(enum: Any, a: Any, b: Any) -> None:
    assert (b in MOVES[enum][a]) == (f"{a}>{b}" in LEGAL[enum].split())


@pytest.mark.parametrize("enum", ENUMS)
def test_sources_invert_the_table_of_moves(enum: Any) -> None:
    for target in enum:
        assert sources(target) == {state for state in enum if target in MOVES[enum][state]}


def test_finished_rows_move_only_on_a_retry_or_a_repair() -> None:
    for state in FINISHED_UPDATES - {UpdateState.FAILED}:
        assert not MOVES[UpdateState][state]
    assert {StageState.SUCCEEDED, StageState.FAILED, StageState.CANCELLED} == FINISHED_STAGES
    assert MOVES[StageState][StageState.SUCCEEDED] == {StageState.READY}
