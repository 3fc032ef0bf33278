"""Tables of costs, serving and forgetting."""

from rich.table import Table

from api.cli import tables
from api.schemas.costs import Amount, Costs, Estimate, Forecast, Totals, VersionCost
from api.schemas.models import Forgetting
from api.schemas.releases import ServingStatus
from service.core.forgetting import Measure
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


def test_costs_show_every_version_and_the_alternatives() -> None:
    text = rendered(tables.costs(costs()))
    version, total = (line.split() for line in text.splitlines() if line.strip().startswith(("1 ", "all")))
    assert version == ["1", "1", "100", "k", "40.0", "k", "900", "G", "19", "s", "200", "k", "50%"]
    assert total == ["all", "100", "k", "40.0", "k", "900", "G", "19", "s", "200", "k", "50%"]
    assert "continual" in text


def test_costs_in_words_give_the_ratio_the_waste_and_the_forecast() -> None:
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
    assert "Additional wasted work: 12.3 k tokens" in words
    assert "trains 65.0 k tokens in 30 s" in words
    assert tables.costs_in_words(costs(ratio_to_from_scratch=None)) == "This model has no version yet."


FORGETTING = Forgetting(
    slices=["v1", "v2"],
    versions=[1, 2],
    loss=[[6.25, None], [6.5, 5.0]],
    perplexity=[[518.0, None], [665.125, 1148.4]],
    bits_per_byte=[[2.5, None], [2.6, 2.0]],
    backward_transfer=0.25,
    backward_transfers=[None, 0.25],
)


def test_serving_shows_the_versions_of_every_replica_and_the_rollout() -> None:
    counts = {
        "requests": 1_200,
        "failures": 1,
        "prompt_tokens": 40_000,
        "output_tokens": 90_000,
        "error": None,
    }
    failed = {**dict.fromkeys(counts, 0), "version": 3, "state": "failed", "error": "not finite"}
    replica = {
        "replica": "a1",
        "version": 2,
        "versions": [
            {**counts, "version": 2, "state": "ready"},
            {**counts, "version": 1, "state": "ready"},
            failed,
        ],
    }
    values = {"model": "m", "spec": {}, "version": 2, "pending": 3, "in_step": True, "observed_at": None}
    found = ServingStatus.model_validate(values | {"replicas": [replica]})
    lines = rendered(tables.serving(found)).strip().splitlines()
    states = [line.split()[2] for line in lines if line.split()[0] == "a1"]
    assert states == ["answers", "ready", "failed"]
    assert "not finite" in lines[-1]
    assert tables.serving_in_words(found) == (
        "Version 2 is released and every replica answers with it. Version 3 is being rolled out. "
        "No replica has reported yet."
    )


def cells_of(table: Table) -> list[list[object]]:
    return [list(column.cells) for column in table.columns]


def test_forgetting_marks_the_best_version_of_every_slice_and_missing_values() -> None:
    assert cells_of(tables.forgetting(FORGETTING)) == [
        ["1", "2"],
        ["[bold]6.2500[/bold]", "6.5000"],
        ["–", "[bold]5.0000[/bold]"],
        ["–", "+0.2500"],
    ]


def test_forgetting_shows_the_requested_measure() -> None:
    perplexity = tables.forgetting(FORGETTING, Measure.PERPLEXITY)
    assert cells_of(perplexity)[1:3] == [["[bold]518.00[/bold]", "665.12"], ["–", "[bold]1,148.40[/bold]"]]
    bits = tables.forgetting(FORGETTING, Measure.BITS_PER_BYTE)
    assert cells_of(bits)[1:3] == [["[bold]2.5000[/bold]", "2.6000"], ["–", "[bold]2.0000[/bold]"]]
    # Backward transfer is always measured on the loss.
    assert cells_of(perplexity)[-1] == cells_of(bits)[-1] == ["–", "+0.2500"]
    assert "Perplexity on every slice" in rendered(perplexity)
