"""Model versions: record a candidate once it is evaluated, and judge it."""

from typing import Any

from sqlalchemy.orm import Session

from service.core.costs import stage_cost
from service.core.gates import GateVerdict, judge, losses_by_slice
from service.core.stage_specs import TRAINING_KINDS, GateStage, StageKind, TrainStage
from service.core.states import ModelVersionState
from service.store import datasets, events, forgetting, lines, models, updates
from service.store.database import now
from service.store.tables import ModelVersion, Stage, Update


def record_candidate(session: Session, update: Update, evaluate: Stage) -> ModelVersion:
    """Write the model version that an update has made. Adds the new evaluations of the served version."""
    by_kind = {stage.kind: stage for stage in updates.stages(session, update.id)}
    export, result = by_kind[StageKind.EXPORT], evaluate.result
    assert export.key is not None
    assert export.result is not None
    assert result is not None
    assert update.final_step is not None
    branch_checkpoints = [
        row.id
        for row in lines.live_checkpoints(session, update.model_id)
        if row.id == update.branch_from or (row.step == update.branch_point and not update.branch_from)
    ]
    version = ModelVersion(
        model_id=update.model_id,
        number=models.next_number(session, update.model_id),
        data_version=datasets.version_by_id(session, update.data_version_id).number,
        update_id=update.id,
        checkpoint_id=branch_checkpoints[0] if branch_checkpoints else None,
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
        known = losses_by_slice(served.evaluations)
        added = [row for row in result["served_evaluations"] if row["slice"] not in known]
        served.evaluations = [*served.evaluations, *added]
        session.flush()
    events.append(session, "version.candidate", update=update.id, number=version.number)
    return version


def judge_candidate(session: Session, update: Update, gate: Stage) -> GateVerdict:
    """Judge the update's candidate against the version that was served at planning time.

    Records the verdict.
    """
    spec = GateStage.model_validate(gate.spec)
    candidate = models.version_of_update(session, update.id)
    assert candidate is not None
    served = None
    if spec.served_number is not None:
        served = losses_by_slice(models.version(session, update.model_id, spec.served_number).evaluations)
    line = forgetting.of_model(session, models.by_id(session, update.model_id))
    verdict = judge(
        spec.gate,
        losses_by_slice(candidate.evaluations),
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
    """Cost of an update's training stages.

    ``device_seconds`` covers only newly trained steps; ``tokens`` and ``flops`` cover the whole plan.
    """
    cost = {"tokens": 0, "flops": 0.0, "device_seconds": 0.0, "reused_tokens": 0, "wasted_seconds": 0.0}
    for stage in updates.stages(session, update_id):
        if stage.kind not in TRAINING_KINDS:
            continue
        cost["wasted_seconds"] += stage.wasted_seconds
        spec = TrainStage.model_validate(stage.spec)
        stage_total = stage_cost(spec, stage.result or {}, reused=stage.reused)
        cost["tokens"] += stage_total.whole.tokens
        cost["flops"] += stage_total.whole.flops
        cost["reused_tokens"] += stage_total.reused.tokens
        cost["device_seconds"] += stage_total.anew.device_seconds
    return cost
