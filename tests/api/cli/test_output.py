"""Formatting of numbers for people."""

import pytest

from api.cli import output


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (None, "–"),
        (0, "0"),
        (9_999, "9,999"),
        (10_000, "10.0 k"),
        (123_456, "123 k"),
        (999_600, "1.00 M"),
        (1.32e12, "1.32 T"),
        (5e19, "50.0 E"),
    ],
)
def test_count(number: float | None, text: str) -> None:
    assert output.count(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "–"),
        (0.04, "0.0 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (59.6, "1 min 00 s"),
        (7_500, "2 h 05 min"),
    ],
)
def test_duration(seconds: float | None, text: str) -> None:
    assert output.duration(seconds) == text


def test_rate_loss_and_size() -> None:
    assert output.rate(2e-3) == "2.00e-3"
    assert output.rate(0) == "0"
    assert output.loss(5.12345) == "5.1235"
    assert output.loss(None) == "–"
    assert output.size(812) == "812 B"
    assert output.size(12_000_000) == "12.0 MB"
