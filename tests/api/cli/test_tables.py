"""Costs and forgetting as tables."""

from api.cli import tables
from api.schemas.costs import Amount, Costs, Estimate, Forecast, Totals, VersionCost
from api.schemas.models import Forgetting
from tests.api.cli.documents import rendered


def costs(**changes: object) -> Costs:
    nothing = Amount(tokens=0, flops=0, device_seconds=0)
    values: dict[str, object] = {
        "ratio_to_from_scratch": 0.57,
        "versions": [
            VersionCost(
                number=1,
                data_version=1,
                tokens=100_000,
                flops=9e11,
                device_seconds=19,
                reused_tokens=40_000,
                from_scratch_tokens=200_000,
            )
        ],
        "totals": Totals(
            spent=Amount(tokens=60_000, flops=5e11, device_seconds=12),
            reused=Amount(tokens=40_000, flops=4e11, device_seconds=7),
            wasted=nothing,
            extra=nothing,
        ),
        "from_scratch": Estimate(tokens=200_000, flops=1.8e12),
        "continual": Estimate(tokens=90_000, flops=8e11),
        "forecast": None,
    }
    return Costs.model_validate(values | changes)


def test_costs_show_every_version_beside_the_other_ways() -> None:
    text = rendered(tables.costs(costs()))
    version, total = (line.split() for line in text.splitlines() if line.strip().startswith(("1 ", "all")))
    assert version == ["1", "1", "100", "k", "40.0", "k", "900", "G", "19", "s", "200", "k", "50%"]
    assert total == ["all", "100", "k", "40.0", "k", "900", "G", "19", "s", "200", "k", "50%"]
    assert "continual" in text


def test_costs_in_words_tell_the_ratio_waste_and_the_forecast() -> None:
    forecast = Forecast(
        new_tokens=50_000,
        tokens=65_000,
        flops=1e12,
        device_seconds=30,
        from_scratch_tokens=250_000,
        ratio_to_from_scratch=0.4,
    )
    wasted = costs().totals.model_copy(update={"wasted": Amount(tokens=12_345, flops=0, device_seconds=3)})
    words = tables.costs_in_words(costs(forecast=forecast, totals=wasted))
    assert "57.0%" in words
    assert "wasted: 12.3 k tokens" in words
    assert "65.0 k tokens and 30 s" in words
    assert tables.costs_in_words(costs(ratio_to_from_scratch=None)) == "No version has been trained yet."


def test_forgetting_marks_the_best_of_every_slice_and_shows_what_was_not_measured() -> None:
    table = tables.forgetting(
        Forgetting(slices=["v1", "v2"], versions=[1, 2], loss=[[6.25, None], [6.5, 5.0]])
    )
    assert [list(column.cells) for column in table.columns] == [
        ["1", "2"],
        ["[bold]6.2500[/bold]", "6.5000"],
        ["–", "[bold]5.0000[/bold]"],
    ]
