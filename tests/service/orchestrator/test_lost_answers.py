"""If the answer to a commit is lost, the next tick finds what was done in the rows, and nothing is lost."""

from typing import Any

import pytest

from service.core.stage_specs import StageKind
from service.core.states import UpdateState
from service.store.database import Database
from tests.service.orchestrator.conftest import Harness

pytestmark = pytest.mark.no_database_faults("injects its own fault")


class AnswerLosingDatabase(Database):
    """Carries out its ``at``-th commit but reports that it failed."""

    def __init__(self, url: str, at: int) -> None:
        super().__init__(url)
        self.commits = 0
        dialect: Any = self.engine.dialect
        commit = dialect.do_commit

        def do_commit(connection: Any) -> None:
            commit(connection)
            self.commits += 1
            if self.commits == at:
                raise dialect.loaded_dbapi.OperationalError("the answer is lost")

        dialect.do_commit = do_commit


@pytest.mark.slow_on_postgres
def test_a_lost_commit_answer_costs_no_attempt_and_no_lease_time(harness: Harness) -> None:
    at, commits = 0, 0
    while commits >= at:  # one commit later each time, until the update ends before that commit
        at += 1
        harness.artifacts.root = harness.artifacts.root.with_name(f"artifacts-{at}")
        harness.executor.executed.clear()
        harness.serving.swaps.clear()
        losing = AnswerLosingDatabase(harness.database.url, at)
        update = harness.add_update(harness.add_model(f"m{at}"))
        row = harness.finish(harness.orchestrator(losing), update)
        commits = losing.commits
        losing.close()
        assert row.state == UpdateState.SUCCEEDED
        assert {stage.attempt for stage in harness.stages(update).values()} == {1}
        assert len(harness.executor.executed) == len(set(harness.executor.executed)) == 6
        assert len(harness.serving.swaps) == 1
    assert at > 15


def test_a_reclaimed_run_is_adopted(harness: Harness) -> None:
    harness.executor.hold = {StageKind.TRAIN_TRUNK}
    update, first = harness.add_update(harness.add_model()), harness.orchestrator()
    while harness.stages_running(update) != {StageKind.TRAIN_TRUNK, StageKind.TRAIN_BRANCH}:
        first.tick()
    harness.expire_leases()
    losing = AnswerLosingDatabase(harness.database.url, 1)
    second = harness.orchestrator(losing)
    second.tick()
    assert not second.leases.stages
    second.tick()
    assert {lease.kind for lease in second.leases.stages.values()} == {"train_trunk", "train_branch"}
    harness.executor.hold.clear()
    assert harness.finish(second, update).state == UpdateState.SUCCEEDED
    assert len(harness.executor.submitted) == len(set(harness.executor.submitted))
    assert {stage.attempt for stage in harness.stages(update).values()} == {1}
    losing.close()
