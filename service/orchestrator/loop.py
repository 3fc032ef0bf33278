"""The durable loop. Every tick could be the first after a crash: read rows, observe the world, act.

    rescue      take over stages whose lease has expired; end the runs of cancelled stages
    collect     poll the runs of held stages; record progress, results and failures
    start       begin pending updates: move them to running and write part one of their plans
    dispatch    claim ready stages and run them
    serve       tell replicas what to serve; record what they serve

The loop may lose everything that it holds in memory (leases, epochs, poll cursors) at any time: leases
expire, and rescue takes the stages over. For the same reason a commit whose answer is lost does no harm. If
it was carried out, the next tick finds it in the rows; if not, the next tick repeats the work. That includes
claims: dispatch looks for stages that run under this orchestrator's name without a lease in memory, and
submits their runs.
"""

import logging
from dataclasses import dataclass

from service.artifacts import Artifacts
from service.core.errors import DatabaseOutdated, DatabaseUnavailable, PathswitchError, Unavailable
from service.core.executor import Executor
from service.core.serving import Serving
from service.orchestrator import advance, collect, dispatch, release, rescue
from service.orchestrator.leases import LeaseTable
from service.planning.data_stages import begin_update
from service.store import migrate, stages, updates
from service.store.database import Database

logger = logging.getLogger(__name__)


@dataclass
class Orchestrator:
    """One orchestrator process.

    Several may share a database. ``owner`` names this process in leases: never reuse a name.
    """

    database: Database
    artifacts: Artifacts
    executor: Executor
    serving: Serving
    owner: str
    lease_seconds: float = 15.0

    def __post_init__(self) -> None:
        self.leases = LeaseTable(self.owner, self.lease_seconds)
        self.serving_answers = False
        self._database_answers = True
        self._database_is_migrated = False

    def tick(self) -> bool:
        """One pass.

        Returns whether any row changed. Whatever is unavailable is retried at the next tick.
        """
        moved = False
        for part in (
            self.check_database,
            self.rescue,
            self.collect,
            self.start,
            self.dispatch,
            self.serve,
        ):
            try:
                moved |= part()
            except (DatabaseUnavailable, DatabaseOutdated) as error:
                if self._database_answers:
                    logger.error("waiting for the database: %s", error.__cause__ or error.detail)
                self._database_answers = False
                return False
            except Unavailable as error:
                logger.warning("%s: %s", part.__name__, error.detail)
        if not self._database_answers:
            logger.info("the database answers again")
        self._database_answers = True
        return moved

    def release_leases(self) -> None:
        """Record what has ended and end all leases. Call it last in a process, after closing the executor.

        The next orchestrator then adopts runs that continue elsewhere immediately, without waiting for leases to
        expire.
        """
        try:
            collect.collect(self.database, self.artifacts, self.executor, self.leases)
            with self.database.transaction() as session:
                stages.renew(session, self.leases.epochs(), lease_seconds=0)
        except PathswitchError as error:
            logger.warning("leases are kept until they expire: %s", error.detail)

    def check_database(self) -> bool:
        """Raise DatabaseOutdated until the database has the migrations that this code needs.

        Later migrations do no harm.
        """
        if not self._database_is_migrated:
            migrate.check(self.database)
            self._database_is_migrated = True
        return False

    def rescue(self) -> bool:
        moved = rescue.take_over(self.database, self.leases)
        return rescue.end_cancelled_runs(self.database, self.executor) or moved

    def collect(self) -> bool:
        return collect.collect(self.database, self.artifacts, self.executor, self.leases)

    def start(self) -> bool:
        with self.database.reading() as session:
            ids = [row.id for row in updates.startable(session)]
            unplanned = updates.unplanned(session)
        moved = bool(unplanned)
        for update_id in unplanned:
            with self.database.transaction() as session:
                advance.plan(session, updates.update(session, update_id))
        for update_id in ids:
            try:
                moved |= begin_update(self.database, self.executor, update_id)
            except Unavailable:
                raise
            except PathswitchError as error:
                rescue.fail_unstarted(self.database, update_id, error)
                moved = True
        return moved

    def dispatch(self) -> bool:
        return dispatch.dispatch(self.database, self.artifacts, self.executor, self.leases)

    def serve(self) -> bool:
        moved = release.reconcile(self.database, self.serving)
        self.serving_answers = True
        return moved
