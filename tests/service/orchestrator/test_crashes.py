"""After a kill at any moment and a restart, an update ends as if undisturbed, and nothing is done twice."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from service.core.stage_specs import StageKind
from service.core.states import UpdateState
from service.store import lines, models, releases
from service.store.database import Database
from tests.service.orchestrator.conftest import Harness

TICKS_TO_TRAINING = 10  # enough ticks to reach a training stage that is held, and to stay there


class Killed(BaseException):
    """Simulates SIGKILL: no handler catches it."""


class MortalDatabase(Database):
    """Dies before or after its n-th commit."""

    def __init__(self, url: str, at: int, when: str) -> None:
        super().__init__(url)
        self.left, self.when = at, when

    @contextmanager
    def transaction(self) -> Iterator[Any]:
        self.left -= 1
        dies = self.left == 0
        with super().transaction() as session:
            yield session
            if dies and self.when == "before":
                raise Killed
        if dies:
            raise Killed


def outcome(harness: Harness, model_id: str, update_id: str) -> Any:
    """The visible outcome of an update: states, keys, results, versions, history."""
    with harness.database.reading() as session:
        versions = [
            (v.number, v.state, v.export_key, v.evaluations) for v in models.versions(session, model_id)
        ]
        history = [r.state for r in releases.history(session, model_id)]
        trunk = lines.trunk(session, model_id)
    stages = [(s.name, s.state, s.key, s.result if s.kind != StageKind.RELEASE else None)
              for s in harness.stages(update_id).values()]  # fmt: skip
    return harness.update(update_id).state, stages, versions, history, trunk.artifact_key


def run_to_the_end(harness: Harness, database: Any = None) -> Any:
    model_id = harness.add_model(f"m{harness.starts}")
    update_id = harness.add_update(model_id)
    try:
        harness.finish(harness.orchestrator(database), update_id)
        return outcome(harness, model_id, update_id), False
    except Killed:
        harness.expire_leases()
        harness.finish(harness.orchestrator(), update_id)
        return outcome(harness, model_id, update_id), True


@pytest.mark.slow
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_kill_around_any_commit_changes_nothing_and_runs_nothing_twice(harness: Harness, when: str) -> None:
    at, killed, expected = 0, True, None
    while killed:  # one commit later each time, until the update ends before the kill
        at += 1
        harness.artifacts.root = harness.artifacts.root.with_name(f"artifacts-{at}")
        harness.executor.executed.clear()
        harness.serving.swaps.clear()
        mortal = MortalDatabase(harness.database.url, at, when)
        result, killed = run_to_the_end(harness, mortal)
        mortal.close()
        expected = expected or result
        assert result == expected
        assert result[0] == UpdateState.SUCCEEDED
        assert len(harness.executor.executed) == len(set(harness.executor.executed)) == 6
        assert len(harness.serving.swaps) == 1
    assert at > 15


def held_in(harness: Harness, kind: StageKind) -> Any:
    """An update that runs a stage of this kind until ``hold`` is emptied, and its orchestrator."""
    harness.executor.hold = {kind}
    update_id = harness.add_update(harness.add_model())
    orchestrator = harness.orchestrator()
    for _ in range(TICKS_TO_TRAINING):
        orchestrator.tick()
    [stage] = [row for row in harness.stages(update_id).values() if row.kind == kind]
    assert stage.state == "running"
    return update_id, orchestrator


def test_a_restarted_orchestrator_adopts_the_live_run(harness: Harness) -> None:
    update_id, _ = held_in(harness, StageKind.TRAIN_TRUNK)
    trunk = harness.stages(update_id)["trunk"]
    submitted = list(harness.executor.submitted)
    harness.expire_leases()
    second = harness.orchestrator()
    second.tick()
    taken = harness.stages(update_id)["trunk"]
    assert (taken.run_id, taken.attempt, taken.epoch) == (trunk.run_id, trunk.attempt, trunk.epoch + 1)
    assert harness.executor.submitted == submitted
    harness.executor.hold = set()
    assert harness.finish(second, update_id).state == UpdateState.SUCCEEDED


@pytest.mark.no_database_faults("calls a part of a tick, and only whole ticks come again")
def test_an_orchestrator_presumed_dead_writes_nothing(harness: Harness) -> None:
    update_id, first = held_in(harness, StageKind.TRAIN_TRUNK)
    harness.expire_leases()
    second = harness.orchestrator()
    second.tick()
    harness.executor.hold = set()
    # The zombie sees the run end first, but must not record it.
    first.collect()
    assert harness.stages(update_id)["trunk"].state == "running"
    assert not first.leases.stages
    assert harness.finish(second, update_id).state == UpdateState.SUCCEEDED


def test_a_lost_cluster_costs_one_attempt(harness: Harness) -> None:
    update_id, orchestrator = held_in(harness, StageKind.TRAIN_BRANCH)
    harness.executor.lose_everything()
    harness.executor.hold = set()
    assert harness.finish(orchestrator, update_id).state == UpdateState.SUCCEEDED
    assert harness.stages(update_id)["trunk"].attempt == 1
    assert harness.stages(update_id)["branch"].attempt == 2


def test_a_cluster_lost_during_the_trunk_leaves_the_branch_behind_it_waiting(harness: Harness) -> None:
    update_id, orchestrator = held_in(harness, StageKind.TRAIN_TRUNK)
    harness.executor.lose_everything()
    orchestrator.tick()
    branch = harness.stages(update_id)["branch"]
    assert (branch.state, branch.attempt) == ("pending", 0)
    harness.executor.hold = set()
    assert harness.finish(orchestrator, update_id).state == UpdateState.SUCCEEDED
    assert harness.stages(update_id)["trunk"].attempt == 2
    assert harness.stages(update_id)["branch"].attempt == 1


def test_two_orchestrators_share_the_work_without_repeating_any(harness: Harness) -> None:
    model_ids = [harness.add_model(name) for name in ("m", "n", "o")]
    update_ids = [harness.add_update(model_id) for model_id in model_ids]
    one, two = harness.orchestrator(), harness.orchestrator()
    for _ in range(40):
        one.tick()
        two.tick()
    assert {harness.update(update_id).state for update_id in update_ids} == {UpdateState.SUCCEEDED}
    assert len(harness.executor.executed) == len(set(harness.executor.executed))
