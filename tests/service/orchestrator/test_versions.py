"""Candidates are judged by what the database holds at that time."""

from functools import partial
from typing import Any

from service.core.states import UpdateState
from service.operations.models import change_model
from service.store import models
from tests.service.orchestrator.conftest import Harness


def reasons(harness: Harness, model_id: str, number: int) -> Any:
    with harness.database.reading() as session:
        return models.version(session, model_id, number).gate["reasons"]


def test_a_candidate_that_forgot_too_much_is_rejected_with_the_figure(harness: Harness) -> None:
    model_id = harness.add_model()
    change_model(harness.database, "m", {"gate": {"max_backward_transfer": 0.02}})
    orchestrator = harness.orchestrator()
    assert harness.finish(orchestrator, harness.add_update(model_id)).state == UpdateState.SUCCEEDED
    assert any("backward transfer: none" in reason for reason in reasons(harness, model_id, 1))
    harness.add_version(2)
    # 0.04 worse than the first version on v1: allowed for one old slice, too much on average.
    harness.executor.losses = lambda name: 3.04 if name == "v1" else 3.0
    assert harness.finish(orchestrator, harness.add_update(model_id, 2)).state == UpdateState.REJECTED
    assert reasons(harness, model_id, 2) == ["backward transfer: +0.0400 nats per token, allowed +0.0200"]


def test_backward_transfer_compares_with_the_loss_when_the_slice_was_new(harness: Harness) -> None:
    model_id = harness.add_model(versions=3)
    change_model(harness.database, "m", {"gate": {"max_backward_transfer": 0.05}})
    orchestrator = harness.orchestrator()

    def loss_of(loss_on_v1: float, name: str) -> float:
        return loss_on_v1 if name == "v1" else 2.0

    states = []
    for number, loss_on_v1 in ((1, 3.0), (2, 3.04), (3, 3.08)):
        harness.executor.losses = partial(loss_of, loss_on_v1)
        states.append(harness.finish(orchestrator, harness.add_update(model_id, number)).state)
    # v1 got worse by 0.04 twice and v2 not at all: 0.04 on average.
    assert states == [UpdateState.SUCCEEDED] * 3
    assert "backward transfer: +0.0400 nats per token, allowed +0.0500" in reasons(harness, model_id, 3)
