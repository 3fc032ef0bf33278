"""Judging a candidate by what the database holds at that time."""

from service.core.states import UpdateState
from service.operations.models import change_model
from service.store import models


def reasons(house, model_id, number):
    with house.database.reading() as session:
        return models.version(session, model_id, number).gate["reasons"]


def test_a_candidate_that_forgot_more_than_the_gate_allows_is_rejected_with_the_figure(house):
    model_id = house.add_model()
    change_model(house.database, "m", {"gate": {"max_backward_transfer": 0.02}})
    orchestrator = house.orchestrator()
    assert house.finish(orchestrator, house.add_update(model_id)).state == UpdateState.SUCCEEDED
    assert any("backward transfer: none" in reason for reason in reasons(house, model_id, 1))
    house.add_version(2)
    # On v1 0.04 above the first version: less than an old slice may lose, more than they may on average.
    house.executor.losses = lambda name: 3.04 if name == "v1" else 3.0
    assert house.finish(orchestrator, house.add_update(model_id, 2)).state == UpdateState.REJECTED
    assert reasons(house, model_id, 2) == ["backward transfer: +0.0400 nats per token, allowed +0.0200"]


def test_what_is_compared_is_the_loss_when_the_slice_was_new_not_that_of_the_served_version(house):
    model_id = house.add_model(versions=3)
    change_model(house.database, "m", {"gate": {"max_backward_transfer": 0.05}})
    orchestrator = house.orchestrator()
    states = []
    for number, loss_on_v1 in ((1, 3.0), (2, 3.04), (3, 3.08)):
        house.executor.losses = lambda name, on_v1=loss_on_v1: on_v1 if name == "v1" else 2.0
        states.append(house.finish(orchestrator, house.add_update(model_id, number)).state)
    # v1 lost 0.08 in two steps of 0.04, v2 nothing: 0.04 on average.
    assert states == [UpdateState.SUCCEEDED] * 3
    assert "backward transfer: +0.0400 nats per token, allowed +0.0500" in reasons(house, model_id, 3)
