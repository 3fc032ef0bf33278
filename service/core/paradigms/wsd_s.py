"""WSD-S (Wen et al. 2024, arXiv 2410.05192): one line that decays for every version and continues from there.

No step is trained twice, so N versions cost E_N plus the replayed rows of their decays. The price is that the
line itself decays again and again.
"""

from service.core.paradigm_specs import WsdSSpec
from service.core.paradigms.branching import branch_geometry, decay_path, geometry_notes
from service.core.paradigms.finish import plan_finish
from service.core.paradigms.training import packs, require_unread, run
from service.core.plan import Plan, PlanContext, PlannedStage
from service.core.schedules import warmup_steps
from service.core.stage_specs import RunPath


def plan_wsd_s(context: PlanContext) -> Plan:
    """A stable part at the peak rate from the end of the previous version, and the decay."""
    assert isinstance(context.paradigm, WsdSSpec)
    start = context.previous_step
    require_unread(context, start)
    decay, line, ledger = context.paradigm.decay, context.line, context.ledger
    geometry = branch_geometry(decay, ledger, start, line)
    previous = context.previous
    warmup = 0 if previous else warmup_steps(line.warmup_steps, ledger[0].steps)
    stable_steps = geometry.point - start
    stages: list[PlannedStage] = []
    needs = packs(context)
    start_key = previous.checkpoint_key if previous else None
    fresh = previous is not None and not previous.resumable
    if stable_steps:
        path = RunPath(
            warmup_steps=warmup,
            hold_steps=stable_steps - warmup,
            fresh_optimizer=fresh,
            resumable=True,
            stream_steps=stable_steps,
        )
        stable = run(context, path, name="stable", from_step=start, start_key=start_key, needs=needs)
        stages.append(stable)
        needs, start_key, fresh = (stable.name,), stable.key, False
    last = run(
        context,
        decay_path(decay, geometry, resumable=True, fresh_optimizer=fresh),
        name="decay",
        from_step=geometry.point,
        start_key=start_key,
        needs=needs,
    )
    return Plan(
        stages=(*stages, last, *plan_finish(context, last)),
        branch_point=geometry.point,
        final_step=geometry.point + geometry.steps,
        notes=geometry_notes(decay, geometry, ledger, line),
    )
