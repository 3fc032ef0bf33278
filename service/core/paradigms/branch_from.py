"""A requested branch: from any trunk checkpoint, with any decay.

It leaves the trunk as it is and releases nothing.
"""

from service.core.paradigm_specs import PathSwitchingSpec
from service.core.paradigms.branching import branch_from_geometry, decay_path, geometry_notes
from service.core.paradigms.finish import plan_finish
from service.core.paradigms.training import packs, run
from service.core.plan import Plan, PlanContext
from service.core.stage_specs import StageKind


def plan_branch_from(context: PlanContext) -> Plan:
    """The branch, its export and its evaluation. Whether to release the version is up to the user."""
    assert isinstance(context.paradigm, PathSwitchingSpec)
    assert context.branch_from is not None
    decay, start = context.paradigm.decay, context.branch_from
    geometry = branch_from_geometry(decay, context.ledger, start.step, context.line)
    branch = run(
        context,
        decay_path(decay, geometry),
        name="branch",
        kind=StageKind.TRAIN_BRANCH,
        from_step=start.step,
        start_key=start.checkpoint_key,
        needs=packs(context),
    )
    judged = (StageKind.GATE, StageKind.RELEASE)
    finish = [stage for stage in plan_finish(context, branch) if stage.kind not in judged]
    return Plan(
        stages=(branch, *finish),
        branch_point=start.step,
        final_step=start.step + geometry.steps,
        notes=geometry_notes(decay, geometry, context.ledger, context.line),
    )
