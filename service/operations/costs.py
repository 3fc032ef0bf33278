"""Reports what a line has cost, what other paradigms would have cost, and what the next version will cost.

Every figure comes from the training stages of the line's updates: what they trained, and the ledger they trained on.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from sqlalchemy.orm import Session

from service.core.auto_length import AutoChoice
from service.core.costs import Amount, StageCost, continual, from_scratch, stage_cost
from service.core.ledger import LedgerEntry, own_steps, steps_of
from service.core.paradigm_specs import ParadigmSpec
from service.core.paradigms import PARADIGMS
from service.core.plan import LineEnd, PlanContext
from service.core.specs import ModelSpec
from service.core.stage_specs import TRAINING_KINDS, LineSpec, StageKind, TrainStage
from service.core.states import FINISHED_UPDATES, StageState
from service.store import datasets, lines, models, updates
from service.store.database import Database
from service.store.tables import Model, ModelVersion, Stage


@dataclass(frozen=True)
class VersionCost:
    """The training of one version. ``from_scratch_tokens`` is E_i in tokens: what training from scratch would take."""

    number: int
    data_version: int
    tokens: int
    flops: float
    device_seconds: float
    reused_tokens: int
    from_scratch_tokens: int


@dataclass(frozen=True)
class Totals:
    """Totals of a line.

    ``spent`` was trained for this line, ``reused`` had been trained before, ``wasted`` led to no version, and ``extra``
    went into one-off updates.
    """

    spent: Amount
    reused: Amount
    wasted: Amount
    extra: Amount


@dataclass(frozen=True)
class Forecast:
    """The next version, planned on ``new_tokens`` of new data as the line's paradigm would."""

    new_tokens: int
    tokens: int
    flops: float
    device_seconds: float
    from_scratch_tokens: int
    ratio_to_from_scratch: float


@dataclass(frozen=True)
class CostReport:
    """``ratio_to_from_scratch`` is the line's tokens, reused ones included, over Σ E_i of its versions."""

    ratio_to_from_scratch: float | None
    versions: tuple[VersionCost, ...]
    totals: Totals
    from_scratch: Amount
    continual: Amount
    forecast: Forecast | None


@dataclass(frozen=True)
class _Position:
    """The current position of a line, from which its next version is planned."""

    excluded: frozenset[int]
    trunk_step: int
    data_version: int  # of the version it continues from; 0 if there is none


@dataclass(frozen=True)
class _Trained:
    """A succeeded training stage, and the version that its update made, if any."""

    kind: str
    spec: TrainStage
    cost: StageCost
    one_off: bool
    ended: bool  # the update has ended, so it will make no version any more
    abandoned: bool  # a rewind abandoned this trunk segment
    version: ModelVersion | None


def report_costs(database: Database, model_name: str, *, next_tokens: int | None = None) -> CostReport:
    """Report a model's costs. ``next_tokens`` is the size of the next data version, by default the last one's.

    Raises NotFound.
    """
    with database.reading() as session:
        model = models.model(session, model_name)
        versions = models.versions(session, model.id)
        trained, wasted_seconds = _read(session, model, versions)
        trunk, newest = lines.trunk(session, model.id), lines.newest_version(session, model)
        position = _Position(
            excluded=datasets.excluded_numbers(session, model.dataset_id),
            trunk_step=trunk.step if trunk else 0,
            data_version=newest.data_version if newest else 0,
        )
    totals = _totals(trained, Amount(device_seconds=wasted_seconds))
    if not versions:
        return CostReport(None, (), totals, Amount(), Amount(), None)
    line = LineSpec.model_validate(model.line)
    rows = tuple(_version_cost(row, line, trained, position.excluded) for row in versions)
    one_off = {stage.version.id for stage in trained if stage.version and stage.one_off}
    of_line = [row for row in versions if row.id not in one_off]
    if not of_line:
        return CostReport(None, rows, totals, Amount(), Amount(), None)
    trained = [stage for stage in trained if not stage.one_off]
    # What the versions needed: their own training, and trunk segments trained by updates that later failed.
    highest = max(row.branch_point for row in of_line)
    needed = _sum(
        stage.cost.whole
        for stage in trained
        if stage.version or (stage.kind == StageKind.TRAIN_TRUNK and stage.spec.to_step <= highest)
    )
    ends = [cost.from_scratch_tokens for row, cost in zip(versions, rows, strict=True) if row in of_line]
    scratch = from_scratch(ends)
    return CostReport(
        ratio_to_from_scratch=needed.tokens / scratch,
        versions=rows,
        totals=totals,
        from_scratch=needed.scaled_to(scratch),
        continual=needed.scaled_to(continual(ends)),
        forecast=_forecast(model, line, position, of_line, trained, needed, scratch, next_tokens),
    )


def _read(session: Session, model: Model, versions: Sequence[ModelVersion]) -> tuple[list[_Trained], float]:
    """Read the line's succeeded training stages, and the device-seconds of failed attempts."""
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
    """Sum up. A branch without a version is wasted; a trunk segment is only wasted once a rewind abandons it."""
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
    useful = stage.version is not None or stage.kind == StageKind.TRAIN_TRUNK or not stage.ended
    return useful and not stage.abandoned


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
    position: _Position,
    versions: Sequence[ModelVersion],
    trained: Sequence[_Trained],
    needed: Amount,
    scratch: int,
    next_tokens: int | None,
) -> Forecast | None:
    """Plan a version after the newest one, as the paradigm would, and add up its training stages.

    Device-seconds follow the speed of the newest version that trained anything, since hardware and settings change during
    the life of a line.
    """
    newest = max(versions, key=lambda row: (row.data_version, row.number))
    ledger = _ledger([stage for stage in trained if stage.version is newest], position.excluded)
    if not ledger:  # everything the line has read is excluded
        return None
    # If earlier data versions are excluded, the first remaining one has nothing to replay.
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
            trunk_step=position.trunk_step,
            previous=LineEnd(checkpoint_key="", data_version=position.data_version),
            auto_length=_same_share(spec.paradigm, newest, ledger[-1].steps, steps),
            paradigm=spec.paradigm,
            gate=spec.gate,
            checkpoint_every=spec.training.checkpoint_every,
        )
    )
    planned = [TrainStage.model_validate(stage.spec) for stage in plan.stages if stage.kind in TRAINING_KINDS]
    cost = needed.scaled_to(sum(stage.total_steps for stage in planned) * batch_tokens(line))
    measured = [
        _sum(stage.cost.anew for stage in trained if stage.version is row) for row in reversed(versions)
    ]
    speed = next((amount for amount in measured if amount.tokens), needed)
    end = own_steps(line, (*ledger, entry)) * batch_tokens(line)
    return Forecast(
        new_tokens=new_tokens,
        tokens=cost.tokens,
        flops=cost.flops,
        device_seconds=speed.scaled_to(cost.tokens).device_seconds,
        from_scratch_tokens=end,
        ratio_to_from_scratch=(needed.tokens + cost.tokens) / (scratch + end),
    )


def _same_share(
    paradigm: ParadigmSpec, newest: ModelVersion, version_steps: int, next_steps: int
) -> AutoChoice | None:
    """Forecast a branch of automatic length: it takes the same share of its version's steps as the newest branch did."""
    if paradigm.name != "path_switching" or paradigm.decay.length.rule != "auto":
        return None
    share = (newest.final_step - newest.branch_point) / version_steps
    return AutoChoice(steps=max(1, round(share * next_steps)), notes={})


def batch_tokens(line: LineSpec) -> int:
    """Return the tokens of one step. The last batch of a data version is filled up, so every step has the same number."""
    return line.batch_rows * line.sequence_length


def _ledger(own: Sequence[_Trained], excluded: Collection[int]) -> tuple[LedgerEntry, ...]:
    """Return the ledger of a version: the longest of its stages', since a trunk segment's ends with the segment."""
    whole = max((stage.spec.ledger for stage in own), key=len)
    return tuple(entry for entry in whole if entry.number not in excluded)


def _sum(amounts: Iterable[Amount]) -> Amount:
    return sum(amounts, start=Amount())
