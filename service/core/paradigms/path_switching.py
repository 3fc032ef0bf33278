"""Learning-rate path switching (arXiv 2410.04103): a trunk at the peak rate, and branches that decay fully.

The trunk does not run past a branch point until the next version needs it, so N versions cost E_N + Σ_(i<N)
d_i.
"""

from service.core.paradigm_specs import PathSwitchingSpec
from service.core.paradigms.branching import branch_geometry, decay_path, geometry_notes
from service.core.paradigms.finish import plan_finish
from service.core.paradigms.training import packs, require_unread, run, trunk_segment
from service.core.plan import Plan, PlanContext, PlannedStage, trunk_key
from service.core.stage_specs import StageKind


def plan_path_switching(context: PlanContext) -> Plan:
    """A trunk segment, unless the trunk is at the branch point, then the branch and the final stages."""
    assert isinstance(context.paradigm, PathSwitchingSpec)
    require_unread(context, context.trunk_step)
    decay, line, ledger = context.paradigm.decay, context.line, context.ledger
    auto = context.auto_length
    geometry = branch_geometry(decay, ledger, context.trunk_step, line, auto.steps if auto else None)
    stages: list[PlannedStage] = []
    needs = packs(context)
    if geometry.point > context.trunk_step or geometry.point == 0:
        stages.append(
            trunk_segment(
                context, name="trunk", from_step=context.trunk_step, to_step=geometry.point, needs=needs
            )
        )
        needs = ("trunk",)
    branch = run(
        context,
        decay_path(decay, geometry),
        name="branch",
        kind=StageKind.TRAIN_BRANCH,
        from_step=geometry.point,
        start_key=trunk_key(line, ledger, geometry.point),
        needs=needs,
    )
    return Plan(
        stages=(*stages, branch, *plan_finish(context, branch)),
        branch_point=geometry.point,
        final_step=geometry.point + geometry.steps,
        notes=geometry_notes(decay, geometry, ledger, line) | ({"auto": auto.notes} if auto else {}),
    )
