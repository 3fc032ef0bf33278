"""Recovery: take over expired leases, and end runs that nothing needs any more."""

import logging

from service.core.errors import PathswitchError
from service.core.executor import Executor, RunState
from service.core.states import UpdateState
from service.orchestrator.leases import LeaseTable
from service.store import stages, updates
from service.store.database import Database

logger = logging.getLogger(__name__)


def take_over(database: Database, leases: LeaseTable) -> bool:
    """Take over stages whose lease has expired. Their runs may still be alive: collect polls them.

    This orchestrator's own expired leases count too and get a new epoch, because the process may have been
    suspended.
    """
    with database.reading() as session:
        if not stages.any_expired(session, leases.lease_seconds):
            return False
    with database.transaction() as session:
        rows = stages.take_over_expired(session, owner=leases.owner, lease_seconds=leases.lease_seconds)
    for row in rows:
        logger.info("took over stage %s (attempt %d, run %s)", row.id, row.attempt, row.run_id)
        leases.add(row)
    return bool(rows)


def end_cancelled_runs(database: Database, executor: Executor) -> bool:
    """Cancel the runs of cancelled stages, and forget those that have ended. Returns whether any ended."""
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
    """Fail an update that could not start, with the reason."""
    with database.transaction() as session:
        row = updates.update(session, update_id)
        updates.move(
            session, row, UpdateState.FAILED, {"code": error.code, "detail": error.detail, "stage": "plan"}
        )
