"""The gate passes and rejects candidates, with reasons."""

import math

from service.core.gates import judge
from service.core.specs import GateSpec

GATE = GateSpec(max_new_loss_increase=0.0, max_old_loss_increase=0.05)


def test_a_first_version_passes_without_comparison() -> None:
    verdict = judge(GATE, {"v1": 5.0}, None, "v1")
    assert verdict.passed
    assert "first version" in verdict.reasons[-1]


def test_an_old_slice_may_get_worse_up_to_the_limit() -> None:
    assert judge(GATE, {"v1": 3.05, "v2": 2.9}, {"v1": 3.01, "v2": 3.0}, "v2").passed
    verdict = judge(GATE, {"v1": 3.07, "v2": 2.9}, {"v1": 3.01, "v2": 3.0}, "v2")
    assert not verdict.passed
    assert verdict.reasons == ("v1: 3.0700, +0.0600 against the served version, allowed +0.0500",)


def test_the_newest_slice_may_not_get_worse() -> None:
    assert not judge(GATE, {"v2": 3.01}, {"v2": 3.0}, "v2").passed


def test_a_loss_that_is_not_finite_never_passes() -> None:
    for loss in (math.nan, math.inf):
        assert not judge(GATE, {"v1": loss}, None, "v1").passed
        assert not judge(GATE, {"v1": loss}, {"v1": math.nan}, "v1").passed


def test_a_slice_without_a_served_loss_is_reported_but_does_not_decide() -> None:
    verdict = judge(GATE, {"v1": 3.0, "extra": 9.0}, {"v1": 3.0}, "v1")
    assert verdict.passed
    assert any("not measured" in reason for reason in verdict.reasons)


def test_a_missing_holdout_is_reported() -> None:
    verdict = judge(GATE, {"v1": 3.0}, {"v1": 3.0}, None)
    assert verdict.passed
    assert "no holdout" in verdict.reasons[0]


def test_backward_transfer_counts_only_if_the_gate_limits_it() -> None:
    slices = {"v1": 3.0, "v2": 3.0}
    verdict = judge(GATE, slices, slices, "v2", backward_transfer=9.0)
    assert verdict.passed
    assert not any("backward transfer" in reason for reason in verdict.reasons)


def test_old_slices_may_get_worse_on_average_up_to_the_limit() -> None:
    gate = GateSpec(max_backward_transfer=0.02)
    slices = {"v1": 3.0, "v2": 3.0}
    for transfer in (-0.5, 0.02):
        assert judge(gate, slices, slices, "v2", backward_transfer=transfer).passed
    verdict = judge(gate, slices, slices, "v2", backward_transfer=0.031)
    assert not verdict.passed
    assert verdict.reasons == ("backward transfer: +0.0310 nats per token, allowed +0.0200",)


def test_a_gate_can_require_improvement_on_old_slices() -> None:
    gate = GateSpec(max_backward_transfer=-0.1)
    assert judge(gate, {"v1": 3.0}, {"v1": 3.0}, "v1", backward_transfer=-0.2).passed
    assert not judge(gate, {"v1": 3.0}, {"v1": 3.0}, "v1", backward_transfer=0.0).passed


def test_backward_transfer_of_nan_never_passes() -> None:
    gate = GateSpec(max_backward_transfer=100.0)
    assert not judge(gate, {"v1": 3.0}, {"v1": 3.0}, "v1", backward_transfer=math.nan).passed


def test_a_first_version_has_no_backward_transfer_and_passes() -> None:
    verdict = judge(GateSpec(max_backward_transfer=-1.0), {"v1": 5.0}, None, "v1", backward_transfer=None)
    assert verdict.passed
    assert any("backward transfer: none" in reason for reason in verdict.reasons)
