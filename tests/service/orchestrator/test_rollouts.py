"""Releases by every strategy, from being asked for to being live or given up, on both databases."""

import math
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
import sqlalchemy as sa

from service.core.errors import Conflict
from service.core.serving import ReplicaReport, Residence, ServedVersion, Trial, VersionReport
from service.core.states import ReleaseState, UpdateState
from service.core.traffic import Histogram, Traffic
from service.operations.models import change_model
from service.operations.releases import release_version, roll_back
from service.orchestrator.rollout import GRACE_SECONDS, ROLLOUT, Pending, Step, next_move
from service.store import observations, releases
from service.store.tables import Release

TRIED = {"strategy": "canary", "share": 0.25, "seconds": 60, "max_seconds": 600, "min_requests": 50}


def traffic(requests, failures=0):
    seconds = Histogram()
    for _ in range(requests - failures):
        seconds = seconds.observed(0.1)
    return Traffic(requests, failures, 0, 0, seconds, seconds)


@pytest.fixture
def line(house):
    """A line whose first version is live, and whose second is there to be released."""
    model_id = house.add_model(versions=2)
    orchestrator = house.orchestrator()
    house.finish(orchestrator, house.add_update(model_id))
    change_model(house.database, "m", {"auto_release": False})
    house.finish(orchestrator, house.add_update(model_id, 2))
    return model_id


def history(house, model_id):
    with house.database.reading() as session:
        return list(releases.history(session, model_id))


def last(house, model_id):
    return history(house, model_id)[-1]


def later(house, seconds):
    """As if everything that is on its way had been so for so long already."""
    with house.database.transaction() as session:
        for row in session.scalars(sa.select(Release).where(Release.state == ReleaseState.PENDING)):
            for name in ("begun_at", "tried_at", "promoted_at"):
                at = getattr(row, name)
                setattr(row, name, None if at is None else at - timedelta(seconds=seconds))


def numbers(house):
    target = house.serving.targets["m"]
    trial = None if target.trial is None else target.trial.version.number
    return target.stable.number, trial, [version.number for version in target.kept]


def test_a_first_version_is_served_as_soon_as_it_is_loaded_whatever_the_strategy(house):
    model_id = house.add_model()
    change_model(house.database, "m", {"serving": {"rollout": TRIED}})
    row = house.finish(house.orchestrator(), house.add_update(model_id))
    assert row.state == UpdateState.SUCCEEDED
    assert house.serving.answers == {"m": 1}


def test_replace_takes_over_when_every_replica_has_it_and_keeps_the_one_before(house, line):
    house.serving.loading = {2}
    release_version(house.database, "m", 2, by="somebody")
    orchestrator = house.orchestrator()
    orchestrator.tick()
    assert numbers(house) == (1, 2, [])
    assert house.serving.targets["m"].trial.share == 0
    assert last(house, line).state == ReleaseState.PENDING
    house.serving.loading = set()
    orchestrator.tick()
    assert numbers(house) == (2, None, [1])
    assert house.serving.answers == {"m": 2}
    assert last(house, line).state == ReleaseState.LIVE


def test_a_canary_that_stands_its_trial_takes_over_by_itself(house, line):
    change_model(house.database, "m", {"serving": {"rollout": TRIED}})
    release_version(house.database, "m", 2, by="somebody")
    orchestrator = house.orchestrator()
    orchestrator.tick()
    trial = house.serving.targets["m"].trial
    assert (trial.version.number, trial.share, trial.shadowed) == (2, 0.25, 0)
    house.serving.traffic = {1: traffic(150), 2: traffic(50)}
    orchestrator.tick()
    assert last(house, line).state == ReleaseState.PENDING, "a minute is not over"
    later(house, 61)
    # Another orchestrator, that remembers nothing.
    house.orchestrator().tick()
    row = last(house, line)
    assert row.state == ReleaseState.LIVE
    assert row.begun_at < row.tried_at < row.promoted_at <= row.released_at
    assert row.trial["tried"]["requests"] == 50
    assert row.trial["served"]["requests"] == 150
    assert house.serving.answers == {"m": 2}


@pytest.mark.parametrize("strategy", ["canary", "shadow"])
def test_nobody_is_answered_by_a_version_that_not_every_replica_has(house, line, strategy):
    house.serving.loading = {2}
    tried = ROLLOUT.validate_python({**TRIED, "strategy": strategy, "max_loss_increase": 0.1})
    release_version(house.database, "m", 2, by="somebody", rollout=tried)
    orchestrator = house.orchestrator()
    orchestrator.tick()
    before = house.serving.targets["m"]
    assert before.trial == Trial(before.trial.version)
    house.serving.loading = set()
    orchestrator.tick()
    target = house.serving.targets["m"]
    assert target.trial.scored
    assert target.trial.share or target.trial.shadowed
    assert target.sequence > before.sequence, "what it is compared by begins"


def test_what_a_replica_counted_before_the_trial_is_not_of_it(house, line):
    release_version(house.database, "m", 2, by="somebody", rollout=ROLLOUT.validate_python(TRIED))
    house.orchestrator().tick()
    target = house.serving.targets["m"]
    at = datetime(2026, 1, 1, tzinfo=UTC)
    pending = Pending("r", ServedVersion(2, "k"), False, ROLLOUT.validate_python(TRIED), at, at, None)
    late = VersionReport(2, Residence.READY, tried=traffic(100, failures=100))
    for sequence, moves in ((target.sequence - 1, False), (target.sequence, True)):
        report = ReplicaReport("m-0", 1, (late,), sequence)
        assert bool(next_move(pending, target, [report], at)) == moves


def test_nothing_is_promoted_while_a_replica_is_silent(house, line):
    release_version(house.database, "m", 2, by="somebody", rollout=ROLLOUT.validate_python(TRIED))
    house.orchestrator().tick()
    target = house.serving.targets["m"]
    at = datetime(2026, 1, 1, tzinfo=UTC)
    pending = Pending("r", ServedVersion(2, "k"), False, ROLLOUT.validate_python(TRIED), at, at, None)
    good = ReplicaReport("m-0", 1, (VersionReport(2, Residence.READY, tried=traffic(100)),), target.sequence)
    bad = replace(good, versions=(VersionReport(2, Residence.READY, tried=traffic(100, failures=50)),))
    silent = ReplicaReport("m-1", None)
    after = at + timedelta(seconds=601)
    much_later = after + timedelta(seconds=GRACE_SECONDS)
    assert next_move(pending, target, [good, silent], after) is None
    assert next_move(pending, target, [good, good], after).step == Step.PROMOTE
    assert next_move(pending, target, [bad, silent], after).step == Step.FAIL
    assert next_move(pending, target, [good, silent], much_later).step == Step.PROMOTE
    assert next_move(pending, target, [silent, silent], much_later) is None


def test_a_line_that_becomes_rolling_goes_on_with_the_trial_that_has_begun(house, line):
    release_version(house.database, "m", 2, by="somebody", rollout=ROLLOUT.validate_python(TRIED))
    orchestrator = house.orchestrator()
    orchestrator.tick()
    change_model(house.database, "m", {"serving": {"rollout": {"strategy": "rolling"}}})
    orchestrator.tick()
    assert numbers(house) == (1, 2, [])
    house.serving.traffic = {1: traffic(60), 2: traffic(20, failures=3)}
    orchestrator.tick()
    assert last(house, line).state == ReleaseState.FAILED
    assert house.serving.answers == {"m": 1}


def test_a_loss_that_is_no_number_fails_the_trial_and_is_written_as_none(house, line):
    shadow = {**TRIED, "strategy": "shadow", "share": 0.5, "max_loss_increase": 0.01}
    release_version(house.database, "m", 2, by="somebody", rollout=ROLLOUT.validate_python(shadow))
    house.orchestrator().tick()
    house.serving.traffic = {
        1: traffic(100) + Traffic(scored_tokens=2000, scored_loss=6000.0),
        2: traffic(100) + Traffic(scored_tokens=2000, scored_loss=math.nan),
    }
    later(house, 61)
    house.orchestrator().tick()
    assert "loss nan" in last(house, line).error
    assert last(house, line).trial["tried"]["loss"] is None


def test_a_canary_that_fails_is_taken_back_by_itself_and_the_history_shows_both(house, line):
    release_version(house.database, "m", 2, by="somebody", rollout=ROLLOUT.validate_python(TRIED))
    house.orchestrator().tick()
    house.serving.traffic = {1: traffic(60), 2: traffic(20, failures=3)}
    house.orchestrator().tick()
    row = last(house, line)
    assert (row.state, row.error) == (
        ReleaseState.FAILED,
        "3 of 20 requests failed, of the served version 0 of 60",
    )
    assert row.trial["tried"]["failures"] == 3
    house.orchestrator().tick()
    assert numbers(house) == (1, None, [])
    assert house.serving.answers == {"m": 1}
    assert [row.state for row in history(house, line)] == [ReleaseState.LIVE, ReleaseState.FAILED]


def test_a_shadow_is_given_copies_and_answers_nobody(house, line):
    shadow = {**TRIED, "strategy": "shadow", "share": 0.5, "max_loss_increase": 0.01}
    change_model(house.database, "m", {"serving": {"rollout": shadow}})
    release_version(house.database, "m", 2, by="somebody")
    house.orchestrator().tick()
    trial = house.serving.targets["m"].trial
    assert (trial.share, trial.shadowed, trial.scored) == (0.0, 0.5, True)
    house.serving.traffic = {
        1: traffic(100) + Traffic(scored_tokens=2000, scored_loss=6000.0),
        2: traffic(100) + Traffic(scored_tokens=2000, scored_loss=6100.0),
    }
    later(house, 61)
    house.orchestrator().tick()
    assert last(house, line).error == (
        "loss 3.0500 nats per token on shadowed prompts, of the served version 3.0000"
    )


def test_what_no_replica_ever_loads_is_given_up_after_its_time(house, line):
    house.serving.loading = {2}
    release_version(house.database, "m", 2, by="somebody")
    house.orchestrator().tick()
    later(house, 600)
    house.orchestrator().tick()
    assert last(house, line).state == ReleaseState.PENDING, "replicas are given time to say so themselves"
    later(house, GRACE_SECONDS + 1)
    house.orchestrator().tick()
    assert last(house, line).state == ReleaseState.FAILED
    assert "not loaded by every replica after 660 s" in last(house, line).error
    assert house.serving.answers == {"m": 1}


def test_what_replicas_lose_once_it_is_to_answer_is_taken_back(house, line):
    release_version(house.database, "m", 2, by="somebody")
    house.serving.broken = set()
    orchestrator = house.orchestrator()
    with house.database.transaction() as session:
        row = releases.pending(session, line)
        row.begun_at = row.promoted_at = releases.now(session)
    house.serving.broken = {2}  # as if every replica had ended, and could not load it again
    orchestrator.tick()
    assert last(house, line).state == ReleaseState.FAILED
    orchestrator.tick()
    assert numbers(house)[0] == 1
    assert house.serving.answers == {"m": 1}


def test_back_to_what_was_served_before_needs_no_trial(house, line):
    change_model(house.database, "m", {"serving": {"rollout": TRIED}})
    release_version(house.database, "m", 2, by="somebody")
    house.orchestrator().tick()
    house.serving.traffic = {2: traffic(50)}
    later(house, 61)
    house.orchestrator().tick()
    roll_back(house.database, "m", by="somebody")
    house.orchestrator().tick()
    assert last(house, line).rollout == {"strategy": "replace"}
    assert house.serving.answers == {"m": 1}
    assert numbers(house) == (1, None, [2])


def test_back_while_a_version_is_rolled_out_is_to_what_is_served(house, line):
    release_version(house.database, "m", 2, by="somebody", rollout=ROLLOUT.validate_python(TRIED))
    house.orchestrator().tick()
    roll_back(house.database, "m", by="somebody")
    house.orchestrator().tick()
    states = [row.state for row in history(house, line)]
    assert states == [ReleaseState.ENDED, ReleaseState.SUPERSEDED, ReleaseState.LIVE]
    assert numbers(house) == (1, None, [])


def test_back_again_and_again_ends_with_the_first(house):
    model_id = house.add_model(versions=3)
    orchestrator = house.orchestrator()
    for number in (1, 2, 3):
        house.finish(orchestrator, house.add_update(model_id, number))
    for number in (2, 1):
        house.serving.loading = {number}
        roll_back(house.database, "m", by="somebody")
        house.orchestrator().tick()
        roll_back(house.database, "m", by="somebody")  # again, while it is under way
        house.serving.loading = set()
        house.orchestrator().tick()
        assert numbers(house)[0] == number
    with pytest.raises(Conflict, match="nothing was served before"):
        roll_back(house.database, "m", by="somebody")
    release_version(house.database, "m", 3, by="somebody")
    house.orchestrator().tick()
    roll_back(house.database, "m", by="somebody")
    house.orchestrator().tick()
    assert numbers(house)[0] == 1


def test_what_a_replica_said_before_it_was_told_is_no_answer(house, line):
    """That it could not keep an earlier version does not fail the release of that version."""
    serving = house.serving
    observe, told_late = serving.observe, True

    def one_behind(models):
        observed = observe(models)
        if not told_late:
            return observed
        broken = VersionReport(2, Residence.FAILED, "let go of to make room")
        return {
            m: [replace(r, versions=(broken,), sequence=r.sequence - 1) for r in rs]
            for m, rs in observed.items()
        }

    serving.observe = one_behind
    release_version(house.database, "m", 2, by="somebody")
    house.orchestrator().tick()
    assert last(house, line).state == ReleaseState.PENDING
    told_late = False
    house.orchestrator().tick()
    assert last(house, line).state == ReleaseState.LIVE


def test_a_canary_is_called_off_by_releasing_what_is_served(house, line):
    release_version(house.database, "m", 2, by="somebody", rollout=ROLLOUT.validate_python(TRIED))
    house.orchestrator().tick()
    release_version(house.database, "m", 1, by="somebody")
    house.orchestrator().tick()
    states = [row.state for row in history(house, line)]
    assert states == [ReleaseState.ENDED, ReleaseState.SUPERSEDED, ReleaseState.LIVE]
    assert numbers(house) == (1, None, [])


def test_rolling_tells_replicas_of_one_version_alone(house, line):
    change_model(house.database, "m", {"serving": {"rollout": {"strategy": "rolling"}}})
    house.serving.loading = {2}
    release_version(house.database, "m", 2, by="somebody")
    house.orchestrator().tick()
    target = house.serving.targets["m"]
    assert target.rolling
    assert numbers(house) == (2, None, [])
    house.serving.loading, house.serving.broken = set(), {2}
    house.orchestrator().tick()
    assert last(house, line).state == ReleaseState.FAILED
    house.orchestrator().tick()
    assert numbers(house) == (1, None, [])


def test_a_line_may_sleep_but_not_while_a_version_is_on_its_way(house, line):
    change_model(house.database, "m", {"serving": {"replicas": {"min": 0}}})
    house.orchestrator().tick()
    assert not house.serving.targets["m"].awake
    house.serving.loading = {2}
    release_version(house.database, "m", 2, by="somebody")
    house.orchestrator().tick()
    assert house.serving.targets["m"].awake


def test_as_many_earlier_versions_are_kept_as_asked_for_and_none_twice(house):
    model_id = house.add_model(versions=4)
    orchestrator = house.orchestrator()
    for number in (1, 2, 3, 4):
        house.finish(orchestrator, house.add_update(model_id, number))
    roll_back(house.database, "m", by="somebody")
    for keep, kept in ((0, []), (1, [4]), (2, [4, 2]), (9, [4, 2, 1])):
        change_model(house.database, "m", {"serving": {"keep": keep}})
        house.orchestrator().tick()
        assert numbers(house) == (3, None, kept)
    assert all(isinstance(version, ServedVersion) for version in house.serving.targets["m"].kept)


def test_what_replicas_say_is_written_down_every_few_seconds(house, line):
    house.orchestrator().tick()
    with house.database.reading() as session:
        seen_at, [replica] = observations.of_model(session, line)
    assert replica.number == 1
    house.serving.answers["m"] = 7  # changed by hand
    house.orchestrator().tick()
    with house.database.transaction() as session:
        assert observations.of_model(session, line)[0] == seen_at
        row = session.get(observations.Observation, line)
        row.observed_at -= timedelta(seconds=6)
    house.orchestrator().tick()
    assert house.serving.answers == {"m": 1}
    with house.database.reading() as session:
        assert observations.of_model(session, line)[0] > seen_at
