"""Killed at any moment and started again, an update ends as the undisturbed one did, and nothing is done twice."""

from contextlib import contextmanager

import pytest

from service.core.stage_specs import StageKind
from service.core.states import UpdateState
from service.store import lines, models, releases
from service.store.database import Database

TICKS_TO_TRAINING = 10  # enough to come to a stage that is held in training, and to stay at it


class Killed(BaseException):
    """kill -9: no handler of ours may catch it."""


class MortalDatabase(Database):
    """Dies before or after its n-th commit."""

    def __init__(self, url, at, when):
        super().__init__(url)
        self.left, self.when = at, when

    @contextmanager
    def transaction(self):
        self.left -= 1
        dies = self.left == 0
        with super().transaction() as session:
            yield session
            if dies and self.when == "before":
                raise Killed
        if dies:
            raise Killed


def outcome(house, model_id, update_id):
    """All that the world sees of an update: states, keys, results, versions, history."""
    with house.database.reading() as session:
        versions = [
            (v.number, v.state, v.export_key, v.evaluations) for v in models.versions(session, model_id)
        ]
        history = [r.state for r in releases.history(session, model_id)]
        trunk = lines.trunk(session, model_id)
    stages = [(s.name, s.state, s.key, s.result if s.kind != StageKind.RELEASE else None)
              for s in house.stages(update_id).values()]  # fmt: skip
    return house.update(update_id).state, stages, versions, history, trunk.artifact_key


def run_to_the_end(house, database=None):
    model_id = house.add_model(f"m{house.starts}")
    update_id = house.add_update(model_id)
    try:
        house.finish(house.orchestrator(database), update_id)
        return outcome(house, model_id, update_id), False
    except Killed:
        house.expire_leases()
        house.finish(house.orchestrator(), update_id)
        return outcome(house, model_id, update_id), True


@pytest.mark.slow
@pytest.mark.parametrize("when", ["before", "after"])
def test_killed_around_any_commit_it_ends_the_same_and_nothing_runs_twice(house, when):
    at, killed, expected = 0, True, None
    while killed:  # one commit later each time, until the update ends before its turn to be killed comes
        at += 1
        house.artifacts.root = house.artifacts.root.with_name(f"artifacts-{at}")
        house.executor.executed.clear()
        house.serving.swaps.clear()
        mortal = MortalDatabase(house.database.url, at, when)
        result, killed = run_to_the_end(house, mortal)
        mortal.close()
        expected = expected or result
        assert result == expected
        assert result[0] == UpdateState.SUCCEEDED
        assert len(house.executor.executed) == len(set(house.executor.executed)) == 6
        assert len(house.serving.swaps) == 1
    assert at > 15


def held_in(house, kind):
    """An update that is at work on a stage of this kind until ``hold`` is emptied, and its orchestrator."""
    house.executor.hold = {kind}
    update_id = house.add_update(house.add_model())
    orchestrator = house.orchestrator()
    for _ in range(TICKS_TO_TRAINING):
        orchestrator.tick()
    [stage] = [row for row in house.stages(update_id).values() if row.kind == kind]
    assert stage.state == "running"
    return update_id, orchestrator


def test_a_restarted_orchestrator_adopts_the_run_that_lives(house):
    update_id, _ = held_in(house, StageKind.TRAIN_TRUNK)
    trunk = house.stages(update_id)["trunk"]
    submitted = list(house.executor.submitted)
    house.expire_leases()
    second = house.orchestrator()
    second.tick()
    taken = house.stages(update_id)["trunk"]
    assert (taken.run_id, taken.attempt, taken.epoch) == (trunk.run_id, trunk.attempt, trunk.epoch + 1)
    assert house.executor.submitted == submitted
    house.executor.hold = set()
    assert house.finish(second, update_id).state == UpdateState.SUCCEEDED


@pytest.mark.no_database_faults("calls a part of a tick, and only whole ticks come again")
def test_the_one_that_was_presumed_dead_writes_nothing(house):
    update_id, first = held_in(house, StageKind.TRAIN_TRUNK)
    house.expire_leases()
    second = house.orchestrator()
    second.tick()
    house.executor.hold = set()
    # The zombie sees the run end first, and may not say so.
    first._collect()
    assert house.stages(update_id)["trunk"].state == "running"
    assert not first.holding.stages
    assert house.finish(second, update_id).state == UpdateState.SUCCEEDED


def test_a_lost_cluster_costs_an_attempt_and_no_more(house):
    update_id, orchestrator = held_in(house, StageKind.TRAIN_BRANCH)
    house.executor.lose_everything()
    house.executor.hold = set()
    assert house.finish(orchestrator, update_id).state == UpdateState.SUCCEEDED
    assert house.stages(update_id)["trunk"].attempt == 1
    assert house.stages(update_id)["branch"].attempt == 2


def test_a_cluster_lost_during_the_trunk_leaves_the_branch_behind_it_waiting(house):
    update_id, orchestrator = held_in(house, StageKind.TRAIN_TRUNK)
    house.executor.lose_everything()
    orchestrator.tick()
    branch = house.stages(update_id)["branch"]
    assert (branch.state, branch.attempt) == ("pending", 0)
    house.executor.hold = set()
    assert house.finish(orchestrator, update_id).state == UpdateState.SUCCEEDED
    assert house.stages(update_id)["trunk"].attempt == 2
    assert house.stages(update_id)["branch"].attempt == 1


def test_two_orchestrators_share_the_work_without_doing_any_of_it_twice(house):
    model_ids = [house.add_model(name) for name in ("m", "n", "o")]
    update_ids = [house.add_update(model_id) for model_id in model_ids]
    one, two = house.orchestrator(), house.orchestrator()
    for _ in range(40):
        one.tick()
        two.tick()
    assert {house.update(update_id).state for update_id in update_ids} == {UpdateState.SUCCEEDED}
    assert len(house.executor.executed) == len(set(house.executor.executed))
