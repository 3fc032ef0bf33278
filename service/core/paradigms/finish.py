"""What every update ends with, whatever trained it: export, evaluate, gate, release."""

from service.core.plan import PlanContext, PlannedStage
from service.core.spec import Spec, fingerprint
from service.core.stage_specs import EvaluateStage, ExportStage, GateStage, ReleaseStage, StageKind


def plan_finish(context: PlanContext, last: PlannedStage) -> list[PlannedStage]:
    """The stages from the weights that ``last`` ends with to a released version. Without ``auto_release`` the gate ends it."""
    assert last.key is not None
    export = ExportStage(line=context.line, checkpoint_key=last.key)
    export_key = f"export/{fingerprint('export', export)}"
    evaluate = EvaluateStage(
        export_key=export_key,
        slices=context.slices,
        served_export_key=context.served_export_key,
        served_slices=context.served_missing_slices,
        sequence_length=context.line.sequence_length,
        numerics=context.line.numerics,
    )
    gate = GateStage(
        gate=context.gate, newest_slice=context.newest_slice, served_number=context.served_number
    )
    stages = [
        _stage("export", StageKind.EXPORT, (last.name,), export, export_key),
        _stage(
            "evaluate",
            StageKind.EVALUATE,
            ("export",),
            evaluate,
            f"evaluate/{fingerprint('evaluate', evaluate)}",
        ),
        _stage("gate", StageKind.GATE, ("evaluate",), gate, None),
    ]
    if context.auto_release:
        stages.append(
            _stage("release", StageKind.RELEASE, ("gate",), ReleaseStage(model=context.model), None)
        )
    return stages


def _stage(name: str, kind: StageKind, needs: tuple[str, ...], spec: Spec, key: str | None) -> PlannedStage:
    return PlannedStage(name=name, kind=kind, needs=needs, spec=spec.model_dump(mode="json"), key=key)
