"""Write planned stages as rows of an update."""

from collections.abc import Sequence

from sqlalchemy.orm import Session

from service.core.plan import PlannedStage, topological
from service.core.states import StageState
from service.store import updates
from service.store.database import now
from service.store.tables import Stage, Update


def write_stages(session: Session, update: Update, planned: Sequence[PlannedStage]) -> None:
    """Add stages to an update.

    Their needs may be among ``planned`` or among the stages that the update already has.
    """
    at = now(session)
    existing = {stage.name: stage for stage in updates.stages(session, update.id)}
    by_name = {stage.name: stage for stage in planned}
    needs_in_plan = {
        name: [need for need in stage.needs if need in by_name] for name, stage in by_name.items()
    }
    ids = {name: stage.id for name, stage in existing.items()}
    succeeded = {stage.id for stage in existing.values() if stage.state == StageState.SUCCEEDED}
    for position, name in enumerate(topological(needs_in_plan), start=len(existing)):
        stage = by_name[name]
        needs = [ids[need] for need in stage.needs]
        is_ready = succeeded.issuperset(needs)
        row = Stage(
            update_id=update.id,
            position=position,
            name=name,
            kind=stage.kind,
            spec=stage.spec,
            key=stage.key,
            needs=needs,
            state=StageState.READY if is_ready else StageState.PENDING,
            ready_at=at if is_ready else None,
            created_at=at,
        )
        session.add(row)
        session.flush()
        ids[name] = row.id
