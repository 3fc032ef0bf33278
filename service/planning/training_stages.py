"""Part two of a plan: written in the transaction that records the last pack, because only then the steps are known."""

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy.orm import Session

from service.core.errors import StageInputInvalid
from service.core.ledger import LedgerEntry, steps_of, total_steps
from service.core.paradigms import PARADIGMS
from service.core.paradigms.branch_from import plan_branch_from
from service.core.plan import BranchFrom, LineEnd, PlanContext, pack_name
from service.core.specs import ModelSpec, paradigm_of
from service.core.stage_specs import TRAINING_KINDS, ExportStage, LineSpec, StageKind, TrainStage
from service.core.states import CheckpointState
from service.planning.branch_length import choose_length
from service.planning.data_stages import write_stages
from service.store import datasets, lines, models, updates
from service.store.tables import Update


def write_part_two(session: Session, update: Update) -> None:
    """Plan the stages after the packs and write them. Raises StageInputInvalid where no plan exists."""
    model = models.by_id(session, update.model_id)
    spec = ModelSpec.model_validate(model.spec)
    line = LineSpec.model_validate(model.line)
    number = datasets.version_by_id(session, update.data_version_id).number
    packs = {stage.name: stage for stage in updates.stages(session, update.id)}
    # From scratch all data is read in any case, and a one-off of a line that replays must not count rows twice.
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
    slices = datasets.slice_refs(session, model.dataset_id, number)
    served = models.served(session, model.id)
    measured = losses(served.evaluations).keys() if served else set()
    planner = plan_branch_from if update.branch_from else PARADIGMS[update.paradigm["name"]]
    paradigm, trunk_step = paradigm_of(update.paradigm), _trunk_step(session, update, ledger)
    auto_length = (
        None if update.branch_from else choose_length(session, model.id, paradigm, line, ledger, trunk_step)
    )
    plan = planner(
        PlanContext(
            line=line,
            model=model.name,
            ledger=tuple(ledger),
            trunk_step=trunk_step,
            auto_length=auto_length,
            previous=_line_end(session, update, number),
            branch_from=_branch_from(session, update),
            paradigm=paradigm,
            gate=spec.gate,
            slices=tuple(slices),
            newest_slice=next((s.name for s in slices if s.name == datasets.holdout_name(number)), None),
            served_number=served.number if served else None,
            served_export_key=served.export_key if served else None,
            served_missing_slices=tuple(s for s in slices if s.name not in measured) if served else (),
            auto_release=spec.auto_release,
            checkpoint_every=spec.training.checkpoint_every,
        )
    )
    write_stages(session, update, plan.stages)
    update.planned = True
    update.branch_point = plan.branch_point
    update.final_step = plan.final_step
    update.notes = plan.notes | _how_it_went_on(session, update, number)
    session.flush()


def _how_it_went_on(session: Session, update: Update, number: int) -> dict[str, Any]:
    """What history should say of an update that plans around excluded data, or begins behind where the trunk was."""
    excluded = datasets.excluded_numbers(session, models.by_id(session, update.model_id).dataset_id)
    notes: dict[str, Any] = {}
    if left_out := sorted(version for version in excluded if version < number):
        notes["excluded"] = left_out
    rewound_from = None if update.one_off else lines.rewound_from(session, update.model_id)
    if rewound_from is not None:
        trunk = lines.trunk(session, update.model_id)
        notes["rewound"] = {"from_step": rewound_from, "to_step": trunk.step if trunk else 0}
    return notes


def _trunk_step(session: Session, update: Update, ledger: Sequence[LedgerEntry]) -> int:
    """Where the trunk stands; for an update that is no part of the line, where it stood before its data version."""
    if not update.one_off:
        trunk = lines.trunk(session, update.model_id)
        return trunk.step if trunk else 0
    before = total_steps(ledger[:-1])
    steps = [row.step for row in lines.live_checkpoints(session, update.model_id)]
    return max((step for step in steps if step <= before), default=0)


def _line_end(session: Session, update: Update, number: int) -> LineEnd | None:
    """What the line's newest version was exported from, whatever the gate said of it: a trunk goes on after that, too.

    For an update that is no part of the line: the newest before its own data version.
    """
    model = models.by_id(session, update.model_id)
    newest = lines.newest_version(session, model, before=number if update.one_off else None)
    if newest is None:
        return None
    stages = updates.stages(session, newest.update_id)
    [exported] = [ExportStage.model_validate(s.spec) for s in stages if s.kind == StageKind.EXPORT]
    [made] = [stage for stage in stages if stage.key == exported.checkpoint_key]
    resumable = False
    if made.kind in TRAINING_KINDS:
        path = TrainStage.model_validate(made.spec).path
        resumable = path is None or path.resumable
    return LineEnd(
        checkpoint_key=exported.checkpoint_key, data_version=newest.data_version, resumable=resumable
    )


def _branch_from(session: Session, update: Update) -> BranchFrom | None:
    if update.branch_from is None:
        return None
    row = models.checkpoint(session, update.model_id, update.branch_from)
    if row.state != CheckpointState.LIVE:
        raise StageInputInvalid(f"checkpoint {row.id} has read data that is excluded since")
    return BranchFrom(checkpoint_key=row.artifact_key, step=row.step)


def losses(evaluations: list[dict[str, Any]]) -> Mapping[str, float]:
    """Loss by slice name; one that was not finite is stored as null and comes back as NaN."""
    return {row["slice"]: float("nan") if row["loss"] is None else row["loss"] for row in evaluations}
