"""Training from scratch: every version from initial weights, on all data, shuffled.

N versions cost Σ E_i. The other paradigms are compared with this one.
"""

from service.core.paradigm_specs import FromScratchSpec
from service.core.paradigms.branching import branch_length, decay_fields
from service.core.paradigms.finish import plan_finish
from service.core.paradigms.training import packs, run
from service.core.plan import Plan, PlanContext
from service.core.schedules import warmup_steps
from service.core.stage_specs import RunPath


def plan_from_scratch(context: PlanContext) -> Plan:
    """One run of E_i steps from initial weights."""
    assert isinstance(context.paradigm, FromScratchSpec)
    trained = run(
        context,
        _path(context.paradigm, context.total_steps, context.line.warmup_steps),
        name="train",
        from_step=0,
        start_key=None,
        needs=packs(context),
    )
    return Plan(
        stages=(trained, *plan_finish(context, trained)),
        branch_point=0,
        final_step=context.total_steps,
        notes={},
    )


def _path(paradigm: FromScratchSpec, steps: int, requested_warmup: int) -> RunPath:
    warmup = warmup_steps(requested_warmup, steps)
    if paradigm.schedule == "cosine":
        return RunPath(
            warmup_steps=warmup,
            decay_steps=steps - warmup,
            shape="cosine",
            floor=paradigm.floor,
            order="shuffled",
            stream_steps=steps,
        )
    decay = paradigm.decay
    decay_steps = min(branch_length(decay.length, steps, steps)[0], steps - warmup)
    return RunPath(
        **decay_fields(decay, 0.0),
        warmup_steps=warmup,
        hold_steps=steps - warmup - decay_steps,
        decay_steps=decay_steps,
        order="shuffled",
        stream_steps=steps,
    )
