"""Recovery goes through the same door as a first run: take over leases, and end what nobody wants any more."""

import logging

from service.core.errors import PathswitchError
from service.core.executor import Executor, RunState
from service.core.states import UpdateState
from service.orchestrator.leases import Holding
from service.store import stages, updates
from service.store.database import Database

logger = logging.getLogger(__name__)


def take_over(database: Database, holding: Holding) -> bool:
    """Hold what was held under a lease that has run out. Its run may well live: collect will see.

    An expired lease of our own is taken over too, under a new epoch: we may have been stopped for a while.
    """
    with database.reading() as session:
        if not stages.any_expired(session, holding.lease_seconds):
            return False
    with database.transaction() as session:
        rows = stages.take_over_expired(session, owner=holding.owner, lease_seconds=holding.lease_seconds)
    for row in rows:
        logger.info("took over stage %s (attempt %d, run %s)", row.id, row.attempt, row.run_id)
        holding.add(row)
    return bool(rows)


def end_cancelled_runs(database: Database, executor: Executor) -> bool:
    """Cancel the runs of cancelled stages until they are gone."""
    with database.reading() as session:
        run_ids = stages.runs_to_end(session)
    moved = False
    for run_id in run_ids:
        executor.cancel(run_id)
        if executor.poll(run_id, 0).state != RunState.RUNNING:
            with database.transaction() as session:
                stages.forget_run(session, run_id)
            moved = True
    return moved


def fail_unstarted(database: Database, update_id: str, error: PathswitchError) -> None:
    """An update that could not even be planned ends as failed, with its reason."""
    with database.transaction() as session:
        row = updates.update(session, update_id)
        updates.move(
            session, row, UpdateState.FAILED, {"code": error.code, "detail": error.detail, "stage": "plan"}
        )
