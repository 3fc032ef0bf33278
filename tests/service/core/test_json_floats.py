"""Numbers that are not finite become null in stored JSON, at any depth."""

import math

import pytest

from service.core.gates import losses_by_slice
from service.core.json_floats import finite_or_none, replace_non_finite


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, None])
def test_a_number_that_is_not_finite_is_none(value: float | None) -> None:
    assert finite_or_none(value) is None


def test_a_finite_number_stays() -> None:
    assert finite_or_none(-2.5) == -2.5


def test_a_document_keeps_everything_else() -> None:
    document = {"loss": math.nan, "rows": [{"loss": 1.5, "name": "v1"}, math.inf], "passed": True, "count": 3}
    expected = {"loss": None, "rows": [{"loss": 1.5, "name": "v1"}, None], "passed": True, "count": 3}
    assert replace_non_finite(document) == expected


def test_a_loss_stored_as_null_is_read_as_nan() -> None:
    losses = losses_by_slice([{"slice": "v1", "loss": None}, {"slice": "v2", "loss": 3.0}])
    assert math.isnan(losses["v1"])
    assert losses["v2"] == 3.0
