"""Gather from the database everything that part two of a plan depends on."""

from collections.abc import Sequence

from sqlalchemy.orm import Session

from service.core.errors import StageInputInvalid
from service.core.gates import losses_by_slice
from service.core.ledger import LedgerEntry, steps_of, total_steps
from service.core.paradigm_specs import paradigm_of
from service.core.plan import BranchFrom, LineEnd, PlanContext, pack_name
from service.core.specs import ModelSpec
from service.core.stage_specs import (
    TRAINING_KINDS,
    ExportStage,
    LineSpec,
    StageKind,
    TrainStage,
    holdout_name,
)
from service.core.states import CheckpointState
from service.planning.branch_length import choose_length
from service.store import datasets, lines, models, updates
from service.store.tables import Model, Update


def plan_context(session: Session, update: Update) -> PlanContext:
    """The context of an update whose packs have all succeeded.

    Raises StageInputInvalid for an abandoned checkpoint.
    """
    model = models.by_id(session, update.model_id)
    spec = ModelSpec.model_validate(model.spec)
    line = LineSpec.model_validate(model.line)
    number = datasets.version_by_id(session, update.data_version_id).number
    ledger = _ledger(session, update, model, spec, line, number)
    slices = datasets.slice_refs(session, model.dataset_id, number)
    served = models.served(session, model.id)
    measured = losses_by_slice(served.evaluations).keys() if served else set()
    paradigm, trunk_step = paradigm_of(update.paradigm), _trunk_step(session, update, ledger)
    auto_length = None
    if not update.branch_from:
        auto_length = choose_length(session, model.id, paradigm, line, ledger, trunk_step)
    return PlanContext(
        line=line,
        model=model.name,
        ledger=ledger,
        trunk_step=trunk_step,
        auto_length=auto_length,
        previous=_line_end(session, update, model, number),
        branch_from=_branch_from(session, update),
        paradigm=paradigm,
        gate=spec.gate,
        slices=tuple(slices),
        newest_slice=next((ref.name for ref in slices if ref.name == holdout_name(number)), None),
        served_number=served.number if served else None,
        served_export_key=served.export_key if served else None,
        served_missing_slices=tuple(ref for ref in slices if ref.name not in measured) if served else (),
        auto_release=spec.auto_release,
        checkpoint_every=spec.training.checkpoint_every,
    )


def _ledger(
    session: Session, update: Update, model: Model, spec: ModelSpec, line: LineSpec, number: int
) -> tuple[LedgerEntry, ...]:
    """The data versions up to ``number`` with their packs and their steps."""
    packs = {stage.name: stage for stage in updates.stages(session, update.id)}
    # From scratch reads all data anyway: a one-off of a line that replays must not count rows twice.
    replays = update.paradigm["name"] != "from_scratch"
    ledger: list[LedgerEntry] = []
    for data in datasets.ledger_data(session, model.dataset_id, number):
        pack = packs[pack_name(data.number)]
        assert pack.key is not None
        assert pack.result is not None
        rows = int(pack.result["rows"])
        # The first version has nothing older to replay.
        replay = spec.training.replay_fraction if ledger and replays else 0.0
        steps = steps_of(rows, line.batch_rows, line.epochs, replay)
        ledger.append(LedgerEntry(number=data.number, pack_key=pack.key, rows=rows, steps=steps))
    return tuple(ledger)


def _trunk_step(session: Session, update: Update, ledger: Sequence[LedgerEntry]) -> int:
    """The trunk's newest step. For a one-off update, its newest step before the update's own data version."""
    if not update.one_off:
        trunk = lines.trunk(session, update.model_id)
        return trunk.step if trunk else 0
    before = total_steps(ledger[:-1])
    steps = [row.step for row in lines.live_checkpoints(session, update.model_id)]
    return max((step for step in steps if step <= before), default=0)


def _line_end(session: Session, update: Update, model: Model, number: int) -> LineEnd | None:
    """The state that the line's newest version was exported from, whether or not the gate passed it.

    For a one-off update, the newest version before the update's own data version counts.
    """
    newest = lines.newest_version(session, model, before=number if update.one_off else None)
    if newest is None:
        return None
    stages = updates.stages(session, newest.update_id)
    [export] = [ExportStage.model_validate(s.spec) for s in stages if s.kind == StageKind.EXPORT]
    [producer] = [stage for stage in stages if stage.key == export.checkpoint_key]
    resumable = False
    if producer.kind in TRAINING_KINDS:
        path = TrainStage.model_validate(producer.spec).path
        resumable = path is None or path.resumable
    return LineEnd(
        checkpoint_key=export.checkpoint_key, data_version=newest.data_version, resumable=resumable
    )


def _branch_from(session: Session, update: Update) -> BranchFrom | None:
    if update.branch_from is None:
        return None
    row = models.checkpoint(session, update.model_id, update.branch_from)
    if row.state != CheckpointState.LIVE:
        raise StageInputInvalid(
            f"checkpoint {row.id} has read data that was excluded later: branch from a live checkpoint"
        )
    return BranchFrom(checkpoint_key=row.artifact_key, step=row.step)
