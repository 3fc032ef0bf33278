"""What a model line has cost, what other ways of making its versions would have, and what the next one will.

Everything is read from the training stages of the line's updates: what they trained, and the ledger they
trained on.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from sqlalchemy.orm import Session

from service.core.auto_length import AutoChoice
from service.core.costs import Amount, StageCost, continual, from_scratch, stage_cost
from service.core.ledger import LedgerEntry, own_steps, steps_of
from service.core.paradigms import PARADIGMS
from service.core.plan import LineEnd, PlanContext
from service.core.specs import ModelSpec, ParadigmSpec
from service.core.stage_specs import TRAINING_KINDS, LineSpec, StageKind, TrainStage
from service.core.states import FINISHED_UPDATES, StageState
from service.store import datasets, lines, models, updates
from service.store.database import Database
from service.store.tables import Model, ModelVersion, Stage


@dataclass(frozen=True)
class VersionCost:
    """One version's own training, and E_i in tokens: what it would have taken from scratch."""

    number: int
    data_version: int
    tokens: int
    flops: float
    device_seconds: float
    reused_tokens: int
    from_scratch_tokens: int


@dataclass(frozen=True)
class Totals:
    """Of the line: ``spent`` was trained anew, ``reused`` had been already, ``wasted`` led to no version. ``extra``: one-offs."""

    spent: Amount
    reused: Amount
    wasted: Amount
    extra: Amount


@dataclass(frozen=True)
class Forecast:
    new_tokens: int
    tokens: int
    flops: float
    device_seconds: float
    from_scratch_tokens: int
    ratio_to_from_scratch: float


@dataclass(frozen=True)
class CostReport:
    """``ratio_to_from_scratch``: tokens of the line over Σ E_i of its versions, reused ones counted too."""

    ratio_to_from_scratch: float | None
    versions: tuple[VersionCost, ...]
    totals: Totals
    from_scratch: Amount
    continual: Amount
    forecast: Forecast | None


@dataclass(frozen=True)
class _Standing:
    """Where the line stands: what its next version is planned from."""

    excluded: frozenset[int]
    trunk_step: int
    data_version: int  # of the version that it goes on from, 0 where there is none


@dataclass(frozen=True)
class _Trained:
    """A training stage that ended well, and the version that its update made, if any."""

    kind: str
    spec: TrainStage
    cost: StageCost
    one_off: bool
    ended: bool  # its update has: what it has not made by now, it never will
    abandoned: bool  # a trunk segment that the line was rewound behind
    version: ModelVersion | None


def report_costs(database: Database, model_name: str, *, next_tokens: int | None = None) -> CostReport:
    """``next_tokens``: how many the next data version has; by default as many as the last.

    Raises NotFound.
    """
    with database.reading() as session:
        model = models.model(session, model_name)
        versions = models.versions(session, model.id)
        trained, wasted_seconds = _read(session, model, versions)
        trunk, newest = lines.trunk(session, model.id), lines.newest_version(session, model)
        standing = _Standing(
            excluded=datasets.excluded_numbers(session, model.dataset_id),
            trunk_step=trunk.step if trunk else 0,
            data_version=newest.data_version if newest else 0,
        )
    totals = _totals(trained, Amount(device_seconds=wasted_seconds))
    if not versions:
        return CostReport(None, (), totals, Amount(), Amount(), None)
    line = LineSpec.model_validate(model.line)
    rows = tuple(_version_cost(row, line, trained, standing.excluded) for row in versions)
    one_off = {stage.version.id for stage in trained if stage.version and stage.one_off}
    of_line = [row for row in versions if row.id not in one_off]
    if not of_line:
        return CostReport(None, rows, totals, Amount(), Amount(), None)
    trained = [stage for stage in trained if not stage.one_off]
    # What the versions stand on: their own training, and trunk segments of updates that failed after them.
    highest = max(row.branch_point for row in of_line)
    stood_on = _sum(
        stage.cost.whole
        for stage in trained
        if stage.version or (stage.kind == StageKind.TRAIN_TRUNK and stage.spec.to_step <= highest)
    )
    ends = [cost.from_scratch_tokens for row, cost in zip(versions, rows, strict=True) if row in of_line]
    scratch = from_scratch(ends)
    return CostReport(
        ratio_to_from_scratch=stood_on.tokens / scratch,
        versions=rows,
        totals=totals,
        from_scratch=stood_on.scaled_to(scratch),
        continual=stood_on.scaled_to(continual(ends)),
        forecast=_forecast(model, line, standing, of_line, trained, stood_on, scratch, next_tokens),
    )


def _read(session: Session, model: Model, versions: Sequence[ModelVersion]) -> tuple[list[_Trained], float]:
    """The line's training stages, and the device-seconds of attempts that failed."""
    by_update = {row.update_id: row for row in versions}
    workers = ModelSpec.model_validate(model.spec).training.workers
    trained: list[_Trained] = []
    wasted_seconds = 0.0
    of_model = {row.id: row for row in updates.of_model(session, model.id)}
    abandoned = models.abandoned_keys(session, model.id)
    for update_id, stages in updates.stages_of_updates(session, list(of_model), TRAINING_KINDS).items():
        for stage in stages:
            wasted_seconds += stage.wasted_seconds * workers
            if stage.state == StageState.SUCCEEDED:
                trained.append(
                    _trained(
                        stage,
                        by_update.get(update_id),
                        one_off=of_model[update_id].one_off,
                        ended=of_model[update_id].state in FINISHED_UPDATES,
                        abandoned=stage.key in abandoned,
                    )
                )
    return trained, wasted_seconds


def _trained(
    stage: Stage, version: ModelVersion | None, *, one_off: bool, ended: bool, abandoned: bool
) -> _Trained:
    spec = TrainStage.model_validate(stage.spec)
    return _Trained(
        kind=stage.kind,
        spec=spec,
        cost=stage_cost(spec, stage.result or {}, reused=stage.reused),
        one_off=one_off,
        ended=ended,
        abandoned=abandoned,
        version=version,
    )


def _totals(trained: Sequence[_Trained], failed_attempts: Amount) -> Totals:
    """A branch that no version came of is wasted; a trunk segment is not, for the line goes on from it, until it is rewound."""
    of_line = [stage for stage in trained if not stage.one_off]
    kept = [stage for stage in of_line if _is_kept(stage)]
    lost = [stage for stage in of_line if not _is_kept(stage)]
    return Totals(
        spent=_sum(stage.cost.anew for stage in kept),
        reused=_sum(stage.cost.reused for stage in kept),
        wasted=_sum([*(stage.cost.anew for stage in lost), failed_attempts]),
        extra=_sum(stage.cost.anew for stage in trained if stage.one_off),
    )


def _is_kept(stage: _Trained) -> bool:
    of_use = stage.version is not None or stage.kind == StageKind.TRAIN_TRUNK or not stage.ended
    return of_use and not stage.abandoned


def _version_cost(
    row: ModelVersion, line: LineSpec, trained: Sequence[_Trained], excluded: Collection[int]
) -> VersionCost:
    own = [stage for stage in trained if stage.version is row]
    cost = _sum(stage.cost.whole for stage in own)
    return VersionCost(
        number=row.number,
        data_version=row.data_version,
        tokens=cost.tokens,
        flops=cost.flops,
        device_seconds=_sum(stage.cost.anew for stage in own).device_seconds,
        reused_tokens=_sum(stage.cost.reused for stage in own).tokens,
        from_scratch_tokens=own_steps(line, _ledger(own, excluded)) * batch_tokens(line),
    )


def _forecast(
    model: Model,
    line: LineSpec,
    standing: _Standing,
    versions: Sequence[ModelVersion],
    trained: Sequence[_Trained],
    stood_on: Amount,
    scratch: int,
    next_tokens: int | None,
) -> Forecast | None:
    """Plan a version right after the newest, as the paradigm would, and add up its training stages.

    At the speed of the newest version that trained anything anew: hardware and settings change in the life of a line.
    """
    newest = max(versions, key=lambda row: (row.data_version, row.number))
    ledger = _ledger([stage for stage in trained if stage.version is newest], standing.excluded)
    if not ledger:  # all that the line has read is excluded
        return None
    # Where what came before it is excluded, the first one has nothing to replay any more.
    first = ledger[0].model_copy(update={"steps": steps_of(ledger[0].rows, line.batch_rows, line.epochs)})
    ledger = (first, *ledger[1:])
    new_tokens = next_tokens or ledger[-1].rows * line.sequence_length
    rows = -(-new_tokens // line.sequence_length)
    spec = ModelSpec.model_validate(model.spec)
    steps = steps_of(rows, line.batch_rows, line.epochs, spec.training.replay_fraction)
    entry = LedgerEntry(number=ledger[-1].number + 1, pack_key="", rows=rows, steps=steps)
    plan = PARADIGMS[spec.paradigm.name](
        PlanContext(
            line=line,
            model=model.name,
            ledger=(*ledger, entry),
            trunk_step=standing.trunk_step,
            previous=LineEnd(checkpoint_key="", data_version=standing.data_version),
            auto_length=_as_before(spec.paradigm, newest, ledger[-1].steps, steps),
            paradigm=spec.paradigm,
            gate=spec.gate,
            slices=(),
            newest_slice=None,
            served_number=None,
            served_export_key=None,
            served_missing_slices=(),
            auto_release=False,
            checkpoint_every=spec.training.checkpoint_every,
        )
    )
    planned = [TrainStage.model_validate(stage.spec) for stage in plan.stages if stage.kind in TRAINING_KINDS]
    cost = stood_on.scaled_to(sum(stage.total_steps for stage in planned) * batch_tokens(line))
    measured = [
        _sum(stage.cost.anew for stage in trained if stage.version is row) for row in reversed(versions)
    ]
    speed = next((amount for amount in measured if amount.tokens), stood_on)
    end = own_steps(line, (*ledger, entry)) * batch_tokens(line)
    return Forecast(
        new_tokens=new_tokens,
        tokens=cost.tokens,
        flops=cost.flops,
        device_seconds=speed.scaled_to(cost.tokens).device_seconds,
        from_scratch_tokens=end,
        ratio_to_from_scratch=(stood_on.tokens + cost.tokens) / (scratch + end),
    )


def _as_before(
    paradigm: ParadigmSpec, newest: ModelVersion, version_steps: int, next_steps: int
) -> AutoChoice | None:
    """A branch that chooses its length is forecast to take the share of its version that the newest one took."""
    if paradigm.name != "path_switching" or paradigm.decay.length.rule != "auto":
        return None
    share = (newest.final_step - newest.branch_point) / version_steps
    return AutoChoice(steps=max(1, round(share * next_steps)), notes={})


def batch_tokens(line: LineSpec) -> int:
    """Tokens that one step trains on: the last batch of a data version is filled up."""
    return line.batch_rows * line.sequence_length


def _ledger(own: Sequence[_Trained], excluded: Collection[int]) -> tuple[LedgerEntry, ...]:
    """The ledger of a version, which the last of its stages has: a trunk segment's stops with the segment."""
    whole = max((stage.spec.ledger for stage in own), key=len)
    return tuple(entry for entry in whole if entry.number not in excluded)


def _sum(amounts: Iterable[Amount]) -> Amount:
    return sum(amounts, start=Amount())
