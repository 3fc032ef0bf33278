"""Tables of models, versions, checkpoints, costs, serving and forgetting. Pure functions of API responses."""

from collections.abc import Sequence

from rich.table import Table

from api.cli.output import count, duration, loss, new_table, size
from api.schemas.costs import Costs
from api.schemas.models import Checkpoint, Forgetting, Model, ModelVersion
from api.schemas.releases import ServingStatus
from service.core.forgetting import Measure

_TITLES = {
    Measure.LOSS: "Loss on every slice (nats per token)",
    Measure.PERPLEXITY: "Perplexity on every slice",
    Measure.BITS_PER_BYTE: "Bits per byte on every slice",
}


def models(found: Sequence[Model]) -> Table:
    table = new_table(
        "model", "dataset", "architecture", "paradigm", ">trunk step", ">latest", ">served", "update"
    )
    for model in found:
        architecture = model.architecture
        table.add_row(
            model.name,
            model.dataset,
            architecture.preset or ("base" if architecture.base else "config"),
            model.paradigm.name,
            f"{model.state.trunk_step:,}",
            _number(model.state.latest_version),
            _number(model.state.served_version),
            model.state.update or "",
        )
    return table


def checkpoints(found: Sequence[Checkpoint]) -> Table:
    table = new_table("checkpoint", "state", ">step", ">data", ">size", "created")
    for row in found:
        created = f"{row.created_at:%Y-%m-%d %H:%M}"
        table.add_row(row.id, row.state, f"{row.step:,}", str(row.data_version), size(row.bytes), created)
    return table


def versions(found: Sequence[ModelVersion]) -> Table:
    table = new_table(
        *(
            "version",
            ">data",
            "state",
            ">branch point",
            ">final step",
            ">loss",
            ">tokens",
            ">FLOPs",
            ">trained in",
        ),
        "gate",
    )
    for version in found:
        gate = version.gate
        decision = "" if gate is None else "passed" if gate.passed else "; ".join(gate.reasons)
        table.add_row(
            f"{version.model}@{version.number}",
            str(version.data_version),
            version.state,
            f"{version.branch_point.step:,}",
            f"{version.final_step:,}",
            loss(own_loss(version)),
            count(version.cost.tokens),
            count(version.cost.flops),
            duration(version.cost.device_seconds),
            decision,
        )
    return table


def own_loss(version: ModelVersion) -> float | None:
    """Loss on the slice of the version's own data version, which is measured last."""
    return version.evaluations[-1].loss if version.evaluations else None


def costs(found: Costs) -> Table:
    table = new_table(
        *("version", ">data", ">tokens", ">reused", ">FLOPs", ">trained in", ">from scratch", ">share"),
        title="What each version cost",
    )
    for version in found.versions:
        table.add_row(
            str(version.number),
            str(version.data_version),
            count(version.tokens),
            count(version.reused_tokens),
            count(version.flops),
            duration(version.device_seconds),
            count(version.from_scratch_tokens),
            _share(version.tokens, version.from_scratch_tokens),
        )
    spent, reused = found.totals.spent, found.totals.reused
    tokens = spent.tokens + reused.tokens
    table.add_section()
    table.add_row(
        *("all", "", count(tokens), count(reused.tokens), count(spent.flops + reused.flops)),
        duration(spent.device_seconds + reused.device_seconds),
        count(found.from_scratch.tokens),
        _share(tokens, found.from_scratch.tokens),
    )
    for name, estimate in (("from scratch", found.from_scratch), ("continual", found.continual)):
        table.add_row(name, "", count(estimate.tokens), "", count(estimate.flops), "", "", "", style="dim")
    return table


def costs_in_words(found: Costs) -> str:
    if found.ratio_to_from_scratch is None:
        return "This model has no version yet."
    lines = [f"The model cost {found.ratio_to_from_scratch:.1%} of training every version from scratch."]
    for name, amount in (("wasted work", found.totals.wasted), ("one-off work", found.totals.extra)):
        if amount.tokens:
            lines.append(
                f"Additional {name}: {count(amount.tokens)} tokens, {duration(amount.device_seconds)}."
            )
    if (forecast := found.forecast) is not None:
        lines.append(
            f"Forecast: a next version of {count(forecast.new_tokens)} tokens trains {count(forecast.tokens)} tokens "
            f"in {duration(forecast.device_seconds)}; from scratch it would train "
            f"{count(forecast.from_scratch_tokens)}."
        )
    return "\n".join(lines)


def serving(found: ServingStatus) -> Table:
    table = new_table(
        "replica", ">version", "state", ">requests", ">failed", ">prompt tokens", ">output tokens", "error"
    )
    for replica in found.replicas:
        for version in replica.versions:
            table.add_row(
                replica.replica,
                str(version.version),
                "answers" if version.version == replica.version else version.state,
                f"{version.requests:,}",
                f"{version.failures:,}",
                count(version.prompt_tokens),
                count(version.output_tokens),
                version.error or "",
            )
    return table


def serving_in_words(found: ServingStatus) -> str:
    parts = [
        "No version is released yet." if found.version is None else f"Version {found.version} is released"
    ]
    if found.version is not None:
        parts[0] += (
            " and every replica answers with it."
            if found.in_step
            else ", but not every replica answers with it."
        )
    if found.pending is not None:
        parts.append(f"Version {found.pending} is being rolled out.")
    if found.observed_at is None:
        parts.append("No replica has reported yet.")
    return " ".join(parts)


def forgetting(found: Forgetting, measure: Measure = Measure.LOSS) -> Table:
    """Measurements of every version on every slice. The best value of each column is bold."""
    table = new_table(
        "version",
        *(f">{name}" for name in found.slices),
        ">backward transfer (nats)",
        title=_TITLES[measure],
    )
    matrix: list[list[float | None]] = getattr(found, measure)
    best = [
        min((value for value in column if value is not None), default=None)
        for column in zip(*matrix, strict=True)
    ]
    for number, row, transfer in zip(found.versions, matrix, found.backward_transfers, strict=True):
        cells = [
            f"[bold]{_figure(value, measure)}[/bold]"
            if value is not None and value == lowest
            else _figure(value, measure)
            for value, lowest in zip(row, best, strict=True)
        ]
        table.add_row(str(number), *cells, "–" if transfer is None else f"{transfer:+.4f}")
    return table


def _figure(value: float | None, measure: Measure) -> str:
    return f"{value:,.2f}" if value is not None and measure == Measure.PERPLEXITY else loss(value)


def _number(value: int | None) -> str:
    return "–" if value is None else str(value)


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.0%}" if whole else "–"
