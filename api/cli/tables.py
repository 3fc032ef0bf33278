"""Models, versions, costs and forgetting as tables. Pure: documents in, tables out."""

from collections.abc import Sequence

from rich.table import Table

from api.cli.output import count, duration, loss, size, table
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
    made = table(
        "model", "dataset", "architecture", "paradigm", ">trunk step", ">latest", ">served", "update"
    )
    for model in found:
        architecture = model.architecture
        made.add_row(
            model.name,
            model.dataset,
            architecture.preset or ("base" if architecture.base else "config"),
            model.paradigm.name,
            f"{model.state.trunk_step:,}",
            _number(model.state.latest_version),
            _number(model.state.served_version),
            model.state.update or "",
        )
    return made


def checkpoints(found: Sequence[Checkpoint]) -> Table:
    made = table("checkpoint", "state", ">step", ">data", ">size", "created")
    for row in found:
        created = f"{row.created_at:%Y-%m-%d %H:%M}"
        made.add_row(row.id, row.state, f"{row.step:,}", str(row.data_version), size(row.bytes), created)
    return made


def versions(found: Sequence[ModelVersion]) -> Table:
    made = table(
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
        verdict = "" if gate is None else "passed" if gate.passed else "; ".join(gate.reasons)
        made.add_row(
            f"{version.model}@{version.number}",
            str(version.data_version),
            version.state,
            f"{version.branch_point.step:,}",
            f"{version.final_step:,}",
            loss(own_loss(version)),
            count(version.cost.tokens),
            count(version.cost.flops),
            duration(version.cost.device_seconds),
            verdict,
        )
    return made


def own_loss(version: ModelVersion) -> float | None:
    """Loss on the slice of the data version that it was trained for, the last that was measured."""
    return version.evaluations[-1].loss if version.evaluations else None


def costs(found: Costs) -> Table:
    made = table(
        *("version", ">data", ">tokens", ">reused", ">FLOPs", ">trained in", ">from scratch", ">share"),
        title="What each version cost",
    )
    for version in found.versions:
        made.add_row(
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
    made.add_section()
    made.add_row(
        *("all", "", count(tokens), count(reused.tokens), count(spent.flops + reused.flops)),
        duration(spent.device_seconds + reused.device_seconds),
        count(found.from_scratch.tokens),
        _share(tokens, found.from_scratch.tokens),
    )
    for name, estimate in (("from scratch", found.from_scratch), ("continual", found.continual)):
        made.add_row(name, "", count(estimate.tokens), "", count(estimate.flops), "", "", "", style="dim")
    return made


def costs_in_words(found: Costs) -> str:
    if found.ratio_to_from_scratch is None:
        return "No version has been trained yet."
    lines = [f"{found.ratio_to_from_scratch:.1%} of what training every version from scratch would take."]
    for name, amount in (("wasted", found.totals.wasted), ("extra", found.totals.extra)):
        if amount.tokens:
            lines.append(
                f"Besides, {name}: {count(amount.tokens)} tokens, {duration(amount.device_seconds)}."
            )
    if (next_one := found.forecast) is not None:
        lines.append(
            f"The next version, of {count(next_one.new_tokens)} tokens, would take {count(next_one.tokens)} "
            f"tokens and {duration(next_one.device_seconds)}; "
            f"from scratch it would take {count(next_one.from_scratch_tokens)}."
        )
    return "\n".join(lines)


def serving(found: ServingStatus) -> Table:
    made = table(
        "replica", ">version", "state", ">requests", ">failed", ">prompt tokens", ">output tokens", "error"
    )
    for replica in found.replicas:
        for held in replica.versions:
            made.add_row(
                replica.replica,
                str(held.version),
                "answers" if held.version == replica.version else held.state,
                f"{held.requests:,}",
                f"{held.failures:,}",
                count(held.prompt_tokens),
                count(held.output_tokens),
                held.error or "",
            )
    return made


def serving_in_words(found: ServingStatus) -> str:
    parts = ["No version is released." if found.version is None else f"Version {found.version} is released"]
    if found.version is not None:
        parts[0] += (
            "; every replica answers with it." if found.in_step else "; not every replica answers with it."
        )
    if found.pending is not None:
        parts.append(f"Version {found.pending} is on its way.")
    if found.observed_at is None:
        parts.append("Replicas have not been asked yet.")
    return " ".join(parts)


def forgetting(found: Forgetting, measure: Measure = Measure.LOSS) -> Table:
    """The best of each column is marked: what lies below it in the column has forgotten something since."""
    made = table(
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
        made.add_row(str(number), *cells, "–" if transfer is None else f"{transfer:+.4f}")
    return made


def _figure(value: float | None, measure: Measure) -> str:
    return f"{value:,.2f}" if value is not None and measure == Measure.PERPLEXITY else loss(value)


def _number(value: int | None) -> str:
    return "–" if value is None else str(value)


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.0%}" if whole else "–"
