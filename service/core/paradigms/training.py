"""The training stages of every paradigm: segments of the trunk, and runs along another path."""

from collections.abc import Sequence

from service.core.errors import StageInputInvalid
from service.core.ledger import ledger_up_to
from service.core.plan import PlanContext, PlannedStage, pack_name, run_key, trunk_key
from service.core.stage_specs import RunPath, StageKind, TrainStage


def packs(context: PlanContext) -> tuple[str, ...]:
    """Names of all packs of the ledger: the needs of the first training stage."""
    return tuple(pack_name(entry.number) for entry in context.ledger)


def trunk_segment(
    context: PlanContext, *, name: str, from_step: int, to_step: int, needs: Sequence[str]
) -> PlannedStage:
    """The trunk from ``from_step``, its current step, to ``to_step``."""
    line, ledger = context.line, context.ledger
    stage = TrainStage(
        line=line,
        # The initial checkpoint at step 0 has read nothing, but its stage still names the line's first
        # version.
        ledger=ledger_up_to(ledger, to_step) or ledger[:1],
        from_step=from_step,
        to_step=to_step,
        start_key=trunk_key(line, ledger, from_step) if from_step else None,
        checkpoint_every=context.checkpoint_every,
    )
    return _planned(name, StageKind.TRAIN_TRUNK, stage, needs)


def run(
    context: PlanContext,
    path: RunPath,
    *,
    name: str,
    kind: StageKind = StageKind.TRAIN,
    from_step: int,
    start_key: str | None,
    needs: Sequence[str],
) -> PlannedStage:
    """A run along ``path`` from the state ``start_key`` at ``from_step``, or from initial weights."""
    stage = TrainStage(
        line=context.line,
        ledger=ledger_up_to(context.ledger, from_step + path.stream_steps),
        from_step=from_step,
        to_step=from_step + path.steps,
        start_key=start_key,
        path=path,
        checkpoint_every=context.checkpoint_every,
    )
    return _planned(name, kind, stage, needs)


def require_unread(context: PlanContext, read_steps: int) -> None:
    """Raise StageInputInvalid if the ledger has nothing new for a line that has read ``read_steps`` steps."""
    total = context.total_steps
    if read_steps >= total:
        raise StageInputInvalid(
            f"the line is at step {read_steps}, past the last step {total} of data version "
            f"{context.ledger[-1].number}"
        )


def _planned(name: str, kind: StageKind, stage: TrainStage, needs: Sequence[str]) -> PlannedStage:
    return PlannedStage(
        name=name,
        kind=kind,
        needs=tuple(needs),
        spec=stage.model_dump(mode="json"),
        key=run_key(kind, stage),
    )
