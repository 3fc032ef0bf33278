"""Model versions: a candidate when it is measured, judged by the gate."""

from typing import Any

from sqlalchemy.orm import Session

from service.core.costs import stage_cost
from service.core.gates import Verdict, judge
from service.core.stage_specs import TRAINING_KINDS, GateStage, StageKind, TrainStage
from service.core.states import ModelVersionState
from service.planning.training_stages import losses
from service.store import datasets, events, forgetting, lines, models, updates
from service.store.database import now
from service.store.tables import ModelVersion, Stage, Update


def record_candidate(session: Session, update: Update, evaluate: Stage) -> ModelVersion:
    """Write the model version that an update has exported and measured, and what was measured of the served one."""
    rows = {stage.kind: stage for stage in updates.stages(session, update.id)}
    export, result = rows[StageKind.EXPORT], evaluate.result
    assert export.key is not None
    assert export.result is not None
    assert result is not None
    assert update.final_step is not None
    left = [
        row.id
        for row in lines.live_checkpoints(session, update.model_id)
        if row.id == update.branch_from or (row.step == update.branch_point and not update.branch_from)
    ]
    version = ModelVersion(
        model_id=update.model_id,
        number=models.next_number(session, update.model_id),
        data_version=datasets.version_by_id(session, update.data_version_id).number,
        update_id=update.id,
        checkpoint_id=left[0] if left else None,
        branch_point=update.branch_point,
        final_step=update.final_step,
        parameters=int(export.result["parameters"]),
        evaluations=result["evaluations"],
        cost=cost_of(session, update.id),
        export_key=export.key,
        created_at=now(session),
    )
    session.add(version)
    session.flush()
    served = models.served(session, update.model_id)
    if served is not None and result["served_evaluations"]:
        known = losses(served.evaluations)
        fresh = [row for row in result["served_evaluations"] if row["slice"] not in known]
        served.evaluations = [*served.evaluations, *fresh]
        session.flush()
    events.append(session, "version.candidate", update=update.id, number=version.number)
    return version


def pass_judgement(session: Session, update: Update, gate: Stage) -> Verdict:
    """Hold the update's candidate against the version that was served when the plan was written."""
    spec = GateStage.model_validate(gate.spec)
    candidate = models.version_of_update(session, update.id)
    assert candidate is not None
    served = None
    if spec.served_number is not None:
        served = losses(models.version(session, update.model_id, spec.served_number).evaluations)
    line = forgetting.of_model(session, models.by_id(session, update.model_id))
    verdict = judge(
        spec.gate,
        losses(candidate.evaluations),
        served,
        spec.newest_slice,
        backward_transfer=line.backward_transfer_of(candidate.number),
    )
    candidate.gate = verdict.model_dump(mode="json")
    if not verdict.passed:
        candidate.state = ModelVersionState.REJECTED
    session.flush()
    events.append(
        session,
        "version.judged",
        update=update.id,
        number=candidate.number,
        passed=verdict.passed,
        reasons=list(verdict.reasons),
    )
    return verdict


def cost_of(session: Session, update_id: str) -> dict[str, Any]:
    """What an update's training stages cost: all that its plan asked for, and of that what was trained anew."""
    cost = {"tokens": 0, "flops": 0.0, "device_seconds": 0.0, "reused_tokens": 0, "wasted_seconds": 0.0}
    for stage in updates.stages(session, update_id):
        if stage.kind not in TRAINING_KINDS:
            continue
        cost["wasted_seconds"] += stage.wasted_seconds
        spec = TrainStage.model_validate(stage.spec)
        taken = stage_cost(spec, stage.result or {}, reused=stage.reused)
        cost["tokens"] += taken.whole.tokens
        cost["flops"] += taken.whole.flops
        cost["reused_tokens"] += taken.reused.tokens
        cost["device_seconds"] += taken.anew.device_seconds
    return cost
