"""``auto`` is resolved from the hardware, and explicit choices are respected."""

import pytest

from service.core.executor import Capabilities
from service.core.specs import TrainingSpec
from service.core.stage_specs import Numerics
from service.planning.line import resolve_numerics


@pytest.mark.parametrize(
    ("device", "bf16", "precision", "compiled"),
    [("cpu", False, "fp32", False), ("cpu", True, "bf16", False), ("cuda", True, "bf16", True)],
)
def test_auto_follows_the_hardware(device: str, bf16: bool, precision: str, compiled: bool) -> None:
    numerics = resolve_numerics(TrainingSpec(), Capabilities(device, bf16=bf16, threads=3))
    expected = {"device": device, "precision": precision, "compile": compiled, "threads": 3}
    assert numerics == Numerics.model_validate(expected)


def test_explicit_choices_are_respected() -> None:
    slow = Capabilities("cpu", bf16=False, threads=2)
    asked = resolve_numerics(TrainingSpec(precision="bf16", compile="on"), slow)
    assert (asked.precision, asked.compile) == ("bf16", True)
    fast = Capabilities("cuda", bf16=True, threads=2)
    asked = resolve_numerics(TrainingSpec(precision="fp32", compile="off"), fast)
    assert (asked.precision, asked.compile, asked.device) == ("fp32", False, "cuda")
