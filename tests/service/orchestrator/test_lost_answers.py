"""The answer to any one commit is lost: what was done is found in the rows at the next tick, and costs nothing."""

from typing import Any

import pytest

from service.core.stage_specs import StageKind
from service.core.states import UpdateState
from service.store.database import Database
from tests.service.orchestrator.conftest import House

pytestmark = pytest.mark.no_database_faults("has a fault of its own")


class Forgetful(Database):
    """Carries out its ``at``-th commit, and says that it failed."""

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
def test_whatever_commit_it_is_it_costs_no_attempt_and_no_lease_is_waited_for(house: House) -> None:
    at, commits = 0, 0
    while commits >= at:  # one commit later each time, until the update ends before it
        at += 1
        house.artifacts.root = house.artifacts.root.with_name(f"artifacts-{at}")
        house.executor.executed.clear()
        house.serving.swaps.clear()
        forgetful = Forgetful(house.database.url, at)
        update = house.add_update(house.add_model(f"m{at}"))
        row = house.finish(house.orchestrator(forgetful), update)
        commits = forgetful.commits
        forgetful.close()
        assert row.state == UpdateState.SUCCEEDED
        assert {stage.attempt for stage in house.stages(update).values()} == {1}
        assert len(house.executor.executed) == len(set(house.executor.executed)) == 6
        assert len(house.serving.swaps) == 1
    assert at > 15


def test_a_run_that_was_taken_over_and_is_taken_back_is_adopted(house: House) -> None:
    house.executor.hold = {StageKind.TRAIN_TRUNK}
    update, first = house.add_update(house.add_model()), house.orchestrator()
    while house.stages_running(update) != {StageKind.TRAIN_TRUNK, StageKind.TRAIN_BRANCH}:
        first.tick()
    house.expire_leases()
    forgetful = Forgetful(house.database.url, 1)
    second = house.orchestrator(forgetful)
    second.tick()
    assert not second.holding.stages
    second.tick()
    assert {held.kind for held in second.holding.stages.values()} == {"train_trunk", "train_branch"}
    house.executor.hold.clear()
    assert house.finish(second, update).state == UpdateState.SUCCEEDED
    assert len(house.executor.submitted) == len(set(house.executor.submitted))
    assert {stage.attempt for stage in house.stages(update).values()} == {1}
    forgetful.close()
