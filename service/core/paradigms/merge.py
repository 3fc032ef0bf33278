"""Merging trunk checkpoints in place of a decay (WSM: Tian et al. 2025, arXiv 2507.17634; 2505.12082).

The trunk runs to the end of every version and nothing is trained twice: N versions cost E_N. A decay scales
the last weight updates down, and so does a weighted mean of the checkpoints between them.
"""

import math

from service.core.paradigm_specs import MergeSpec
from service.core.paradigms.branching import branch_length
from service.core.paradigms.finish import plan_finish
from service.core.paradigms.training import packs, require_unread, trunk_segment
from service.core.plan import Plan, PlanContext, PlannedStage, merge_key, trunk_key
from service.core.schedules import warmup_steps
from service.core.stage_specs import MergeStage, StageKind


def plan_merge(context: PlanContext) -> Plan:
    """The trunk to the end of the data, in segments that end at the checkpoints to merge, and the merge."""
    assert isinstance(context.paradigm, MergeSpec)
    require_unread(context, context.trunk_step)
    paradigm, line, ledger = context.paradigm, context.line, context.ledger
    end = context.total_steps
    span, held = branch_length(paradigm.span, ledger[-1].steps, end)
    # Not before the trunk's current step, where no checkpoint is guaranteed to exist.
    reached = max(context.trunk_step, warmup_steps(line.warmup_steps, ledger[0].steps))
    clamped = span > end - reached
    points, weights = merge_points(end, min(span, end - reached), paradigm.k, paradigm.weights)
    stages: list[PlannedStage] = []
    needs, trunk_step = packs(context), context.trunk_step
    for point in points:
        if point > trunk_step or point == 0:
            name = f"trunk-{len(stages) + 1}"
            stages.append(trunk_segment(context, name=name, from_step=trunk_step, to_step=point, needs=needs))
            needs, trunk_step = (name,), point
    merged = MergeStage(
        line=line, checkpoint_keys=tuple(trunk_key(line, ledger, point) for point in points), weights=weights
    )
    stage = PlannedStage(
        name="merge",
        kind=StageKind.MERGE,
        needs=needs,
        spec=merged.model_dump(mode="json"),
        key=merge_key(merged),
    )
    return Plan(
        stages=(*stages, stage, *plan_finish(context, stage)),
        branch_point=end,
        final_step=end,
        notes={"merged_steps": list(points), "branch_held": held, "branch_clamped": clamped},
    )


def merge_points(end: int, span: int, k: int, weights: str) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Steps of the checkpoints, spread evenly over the last ``span`` steps, oldest first, and their weights.

    With "1-sqrt", θ = θ_0 + Σ_j w_j (θ_j - θ_(j-1)) and w_j = 1-√(j/(k+1)). That is Σ_j c_j θ_j with c_0 =
    1-w_1, c_j = w_j - w_(j+1) and c_k = w_k. With "mean", the weights of θ_1 … θ_k are equal and θ_0 is left
    out. A span of fewer than ``k`` steps has one interval per step.
    """
    k = min(k, span)
    steps = [end - span + j * span // k for j in range(k + 1)]
    if weights == "mean":
        return tuple(steps[1:]), (1 / k,) * k
    scales = [1.0, *(1 - math.sqrt(j / (k + 1)) for j in range(1, k + 1)), 0.0]
    return tuple(steps), tuple(scales[j] - scales[j + 1] for j in range(k + 1))
