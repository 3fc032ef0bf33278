"""Learning-rate path switching (arXiv 2410.04103): the trunk at the peak rate to the branch point, then a full decay.

With T_i steps in data version i and E_i = T_1 + … + T_i, branch i has d_i steps and leaves the trunk at
b_i = max(b_(i-1), E_i - d_i), where b_1 ≥ the warm-up W. The trunk does not run past b_i until the next version needs it.
"""

import math
from fractions import Fraction
from typing import Any

from service.core.paradigms.finish import plan_finish
from service.core.plan import Plan, PlanContext, PlannedStage, branch_key, ledger_up_to, pack_name, trunk_key
from service.core.schedules import warmup_steps
from service.core.specs import DecaySpec, FixedLength, Spec
from service.core.stage_specs import BranchPath, LedgerEntry, StageKind, TrainStage

SHORTEST_BRANCH = 8  # below this a decay is a handful of steps and the shape means nothing


class BranchGeometry(Spec):
    """Where a branch leaves the trunk and how long it is, in steps, and why it is not what the rule alone would give."""

    point: int
    steps: int
    new_rows_steps: int
    replay_fraction: float
    held: str | None  # "min", "max" or "shortest": which bound set the length
    clamped: bool  # the trunk already stood past the point the rule asked for


def branch_length(decay: DecaySpec, version_steps: int, total_steps: int) -> tuple[int, str | None]:
    """d_i and which bound, if any, set it. Fractions count as the decimals they were written as, so 0.1 of 30 is 3."""
    length = decay.length
    fraction = Fraction(str(length.fraction))
    held = None
    if isinstance(length, FixedLength):
        wanted = fraction * version_steps
        longest = Fraction(version_steps)
    else:
        wanted = fraction * total_steps
        longest = Fraction(str(length.max)) * version_steps
        shortest = Fraction(str(length.min)) * version_steps
        if wanted < shortest:
            wanted, held = shortest, "min"
    steps = math.ceil(wanted)
    if steps < SHORTEST_BRANCH:
        steps, held = SHORTEST_BRANCH, "shortest"
    if steps > longest:
        steps, held = max(1, math.floor(longest)), "max"
    return steps, held


def branch_geometry(
    decay: DecaySpec, ledger: tuple[LedgerEntry, ...], trunk_step: int, requested_warmup: int
) -> BranchGeometry:
    """b_i and d_i for the last version of the ledger, given where the trunk stands."""
    version_steps = ledger[-1].steps
    total_steps = sum(entry.steps for entry in ledger)
    length, held = branch_length(decay, version_steps, total_steps)
    # There is nothing old to replay while the ledger has one version.
    replay = Fraction(str(decay.replay_fraction)) if len(ledger) > 1 else Fraction(0)
    grown = replay > 0 and decay.replay_budget == "grown"
    new_rows_steps = max(1, math.ceil((1 - replay) * length)) if grown else length
    earliest = max(trunk_step, warmup_steps(requested_warmup, ledger[0].steps))
    point = max(earliest, total_steps - new_rows_steps)
    clamped = point > total_steps - new_rows_steps
    if clamped:
        new_rows_steps = total_steps - point
        length = math.ceil(new_rows_steps / (1 - replay)) if grown else new_rows_steps
    return BranchGeometry(
        point=point,
        steps=length,
        new_rows_steps=new_rows_steps,
        replay_fraction=float(replay),
        held=held,
        clamped=clamped,
    )


def plan_path_switching(context: PlanContext) -> Plan:
    """Trunk segment (unless the trunk stands at the branch point already), branch, and what every update ends with."""
    decay = context.paradigm.decay
    line, ledger = context.line, context.ledger
    geometry = branch_geometry(decay, ledger, context.trunk_step, line.warmup_steps)
    stages: list[PlannedStage] = []
    packs = tuple(pack_name(entry.number) for entry in ledger)

    start_key = trunk_key(line, ledger, geometry.point)
    if geometry.point > context.trunk_step or geometry.point == 0:
        trunk = TrainStage(
            line=line,
            ledger=_read_up_to(ledger, geometry.point),
            from_step=context.trunk_step,
            to_step=geometry.point,
            start_key=trunk_key(line, ledger, context.trunk_step) if context.trunk_step else None,
            checkpoint_every=context.checkpoint_every,
        )
        stages.append(_train("trunk", StageKind.TRAIN_TRUNK, trunk, packs, start_key))
    branch = TrainStage(
        line=line,
        ledger=ledger,
        from_step=geometry.point,
        to_step=geometry.point + geometry.steps,
        start_key=start_key,
        branch=BranchPath(
            steps=geometry.steps,
            new_rows_steps=geometry.new_rows_steps,
            shape=decay.shape,
            floor=decay.floor,
            cuts=decay.cuts,
            beta2=decay.beta2,
            replay_fraction=geometry.replay_fraction,
            replay_budget=decay.replay_budget,
        ),
        checkpoint_every=context.checkpoint_every,
    )
    key = branch_key(branch)
    stages.append(_train("branch", StageKind.TRAIN_BRANCH, branch, ("trunk",) if stages else packs, key))
    stages += plan_finish(context, after="branch", checkpoint_key=key)
    return Plan(
        stages=tuple(stages),
        branch_point=geometry.point,
        final_step=geometry.point + geometry.steps,
        notes=_notes(geometry, context),
    )


def _train(name: str, kind: StageKind, stage: TrainStage, needs: tuple[str, ...], key: str) -> PlannedStage:
    return PlannedStage(name=name, kind=kind, needs=needs, spec=stage.model_dump(mode="json"), key=key)


def _read_up_to(ledger: tuple[LedgerEntry, ...], step: int) -> tuple[LedgerEntry, ...]:
    # The initial checkpoint at step 0 has read nothing, but its stage still names the line's first version.
    return ledger_up_to(ledger, step) or ledger[:1]


def _notes(geometry: BranchGeometry, context: PlanContext) -> dict[str, Any]:
    notes = geometry.model_dump(mode="json", include={"steps", "held", "clamped", "replay_fraction"})
    unread = 0
    if geometry.replay_fraction and context.paradigm.decay.replay_budget == "kept":
        unread = int(Fraction(str(geometry.replay_fraction)) * geometry.steps * context.line.batch_rows)
    return {"branch_" + key: value for key, value in notes.items()} | {"unread_rows": unread}
