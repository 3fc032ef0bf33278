"""Part two of a plan: written in the transaction that records the last pack, because only then the steps are known."""

from collections.abc import Mapping
from typing import Any

from sqlalchemy.orm import Session

from service.core.ledger import LedgerEntry, steps_of
from service.core.paradigms import PARADIGMS
from service.core.plan import LineEnd, PlanContext, pack_name
from service.core.specs import ModelSpec, paradigm_of
from service.core.stage_specs import ExportStage, LineSpec, StageKind
from service.orchestrator.start import write_stages
from service.store import datasets, models, updates
from service.store.tables import Update


def write_part_two(session: Session, update: Update) -> None:
    """Plan the stages after the packs and write them. Raises StageInputInvalid where no plan exists."""
    model = models.by_id(session, update.model_id)
    spec = ModelSpec.model_validate(model.spec)
    line = LineSpec.model_validate(model.line)
    number = datasets.version_by_id(session, update.data_version_id).number
    packs = {stage.name: stage for stage in updates.stages(session, update.id)}
    ledger: list[LedgerEntry] = []
    for data in datasets.ledger_data(session, model.dataset_id, number):
        pack = packs[pack_name(data.number)]
        assert pack.key is not None
        assert pack.result is not None
        rows = int(pack.result["rows"])
        # The first version has nothing older to replay.
        replay = spec.training.replay_fraction if ledger else 0.0
        steps = steps_of(rows, line.batch_rows, line.epochs, replay)
        ledger.append(LedgerEntry(number=data.number, pack_key=pack.key, rows=rows, steps=steps))
    trunk = models.trunk(session, model.id)
    slices = datasets.slice_refs(session, model.dataset_id, number)
    served = models.served(session, model.id)
    measured = losses(served.evaluations).keys() if served else set()
    plan = PARADIGMS[update.paradigm["name"]](
        PlanContext(
            line=line,
            model=model.name,
            ledger=tuple(ledger),
            trunk_step=trunk.step if trunk else 0,
            previous=_line_end(session, model.id),
            paradigm=paradigm_of(update.paradigm),
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
    update.notes = plan.notes
    session.flush()


def _line_end(session: Session, model_id: str) -> LineEnd | None:
    """What the newest version was exported from, whatever the gate said of it: a trunk goes on after a rejection, too."""
    newest = models.newest_version(session, model_id)
    if newest is None:
        return None
    stages = {stage.kind: stage for stage in updates.stages(session, newest.update_id)}
    exported = ExportStage.model_validate(stages[StageKind.EXPORT].spec)
    return LineEnd(checkpoint_key=exported.checkpoint_key, data_version=newest.data_version)


def losses(evaluations: list[dict[str, Any]]) -> Mapping[str, float]:
    """Loss by slice name; one that was not finite is stored as null and comes back as NaN."""
    return {row["slice"]: float("nan") if row["loss"] is None else row["loss"] for row in evaluations}
