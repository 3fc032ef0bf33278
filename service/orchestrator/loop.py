"""The durable loop. Every tick could be the first after a crash: it reads rows, observes the world, closes the difference.

    rescue      take over what was held under an expired lease, end the runs of what was cancelled
    collect     poll the runs of what is held; record progress, results and failures
    start       move pending updates to running and write part one of their plans
    dispatch    claim what is ready and have it run
    serve       make what should be served desired, and record what is

What is held in memory (epoch and poll cursor per stage) may be lost at any time: leases run out and rescue finds it again.
So a commit whose answer is lost does no harm: carried out, it is found in the rows; not carried out, it is done again. Also of
a claim: what runs under this orchestrator's name, and is not held in memory, is held and submitted at the next tick.
"""

import logging
from dataclasses import dataclass

from service.artifacts import Artifacts
from service.core.errors import DatabaseAway, DatabaseBehind, PathswitchError, Unavailable
from service.core.executor import Executor
from service.core.serving import Serving
from service.orchestrator import advance, collect, dispatch, release, rescue
from service.orchestrator.leases import Holding
from service.planning.data_stages import start_update
from service.store import migrate, stages, updates
from service.store.database import Database

logger = logging.getLogger(__name__)


@dataclass
class Orchestrator:
    """One orchestrator process. ``owner`` names it and no other, ever, in leases; several may share one database."""

    database: Database
    artifacts: Artifacts
    executor: Executor
    serving: Serving
    owner: str
    lease_seconds: float = 15.0

    def __post_init__(self) -> None:
        self.holding = Holding(self.owner, self.lease_seconds)
        self.serving_answers = False
        self._database_answers = True
        self._database_is_migrated = False

    def tick(self) -> bool:
        """One pass. Returns whether any row moved. A part of the world that does not answer is tried again next tick."""
        moved = False
        for step in (self._look, self._rescue, self._collect, self._start, self._dispatch, self._serve):
            try:
                moved |= step()
            except (DatabaseAway, DatabaseBehind) as error:
                if self._database_answers:
                    logger.error("waiting for the database: %s", error.__cause__ or error.detail)
                self._database_answers = False
                return False
            except Unavailable as error:
                logger.warning("%s: %s", step.__name__.strip("_"), error.detail)
        if not self._database_answers:
            logger.info("the database answers again")
        self._database_answers = True
        return moved

    def let_go(self) -> None:
        """The last thing a process does, when the executor is closed: write down what has ended, and end the leases of the rest.

        What runs elsewhere is adopted by whoever comes next, at once instead of when the leases have run out.
        """
        try:
            collect.collect(self.database, self.artifacts, self.executor, self.holding)
            with self.database.transaction() as session:
                held = {stage.stage_id: stage.epoch for stage in self.holding.stages.values()}
                stages.renew(session, held, lease_seconds=0)
        except PathswitchError as error:
            logger.warning("what is held stays so until the leases have run out: %s", error.detail)

    def _look(self) -> bool:
        """Not before the migrations that this code relies on; from then on the database only goes further ahead."""
        if not self._database_is_migrated:
            migrate.check(self.database)
            self._database_is_migrated = True
        return False

    def _rescue(self) -> bool:
        moved = rescue.take_over(self.database, self.holding)
        return rescue.end_cancelled_runs(self.database, self.executor) or moved

    def _collect(self) -> bool:
        return collect.collect(self.database, self.artifacts, self.executor, self.holding)

    def _start(self) -> bool:
        with self.database.reading() as session:
            ids = [row.id for row in updates.startable(session)]
            unplanned = updates.unplanned(session)
        moved = bool(unplanned)
        for update_id in unplanned:
            with self.database.transaction() as session:
                advance.plan(session, updates.update(session, update_id))
        for update_id in ids:
            try:
                moved |= start_update(self.database, self.executor, update_id)
            except Unavailable:
                raise
            except PathswitchError as error:
                rescue.fail_unstarted(self.database, update_id, error)
                moved = True
        return moved

    def _dispatch(self) -> bool:
        return dispatch.dispatch(self.database, self.artifacts, self.executor, self.holding)

    def _serve(self) -> bool:
        moved = release.reconcile(self.database, self.serving)
        self.serving_answers = True
        return moved
