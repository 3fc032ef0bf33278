"""Continual pre-training: every version continues from the one before, on the new data.

N versions cost E_N. ``reset`` starts at the peak and decays along a cosine, ``rewarm`` first rises to the
peak from the floor (Gupta et al. 2023, arXiv 2308.04014), and ``low`` stays at the floor at which the
previous version ended.
"""

from service.core.paradigm_specs import ContinualSpec
from service.core.paradigms.finish import plan_finish
from service.core.paradigms.training import packs, require_unread, run
from service.core.plan import LineEnd, Plan, PlanContext
from service.core.schedules import warmup_steps
from service.core.stage_specs import RunPath


def plan_continual(context: PlanContext) -> Plan:
    """One run over the rows that no version of the line has read yet."""
    assert isinstance(context.paradigm, ContinualSpec)
    start = context.previous_step
    require_unread(context, start)
    previous = context.previous
    steps = context.total_steps - start
    trained = run(
        context,
        _path(context.paradigm, steps, warmup_steps(context.line.warmup_steps, steps), previous),
        name="train",
        from_step=start,
        start_key=previous.checkpoint_key if previous else None,
        needs=packs(context),
    )
    return Plan(
        stages=(trained, *plan_finish(context, trained)),
        branch_point=start,
        final_step=start + steps,
        notes={},
    )


def _path(paradigm: ContinualSpec, steps: int, warmup: int, previous: LineEnd | None) -> RunPath:
    first = previous is None
    fresh = previous is not None and (paradigm.optimizer_state == "reset" or not previous.resumable)
    if not first and paradigm.restart == "low":
        return RunPath(
            hold_steps=steps,
            level=paradigm.floor,
            fresh_optimizer=fresh,
            resumable=True,
            stream_steps=steps,
        )
    rising_steps = 0 if not first and paradigm.restart == "reset" else warmup
    return RunPath(
        warmup_steps=rising_steps,
        warmup_from=0.0 if first else paradigm.floor,
        decay_steps=steps - rising_steps,
        shape="cosine",
        floor=paradigm.floor,
        fresh_optimizer=fresh,
        resumable=True,
        stream_steps=steps,
    )
