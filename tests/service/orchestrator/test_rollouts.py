"""Releases with every strategy, from the request until they are live or have failed, on both databases."""

import math
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
import sqlalchemy as sa

from service.core.errors import Conflict
from service.core.rollout import GRACE_SECONDS, ROLLOUT, Action, PendingRelease, next_action
from service.core.serving import ReplicaReport, Residence, ServedVersion, Trial, VersionReport
from service.core.states import ReleaseState, UpdateState
from service.core.traffic import Histogram, Traffic
from service.operations.models import change_model
from service.operations.releases import release_version, roll_back
from service.store import observations, releases
from service.store.tables import Release

TRIED = {"strategy": "canary", "share": 0.25, "seconds": 60, "max_seconds": 600, "min_requests": 50}


def traffic(requests, failures=0):
    seconds = Histogram()
    for _ in range(requests - failures):
        seconds = seconds.observed(0.1)
    return Traffic(requests, failures, 0, 0, seconds, seconds)


@pytest.fixture
def line(harness):
    """A line whose first version is live and whose second is a candidate."""
    model_id = harness.add_model(versions=2)
    orchestrator = harness.orchestrator()
    harness.finish(orchestrator, harness.add_update(model_id))
    change_model(harness.database, "m", {"auto_release": False})
    harness.finish(orchestrator, harness.add_update(model_id, 2))
    return model_id


def history(harness, model_id):
    with harness.database.reading() as session:
        return list(releases.history(session, model_id))


def last(harness, model_id):
    return history(harness, model_id)[-1]


def later(harness, seconds):
    """Pretend that the pending release started ``seconds`` earlier."""
    with harness.database.transaction() as session:
        for row in session.scalars(sa.select(Release).where(Release.state == ReleaseState.PENDING)):
            for name in ("begun_at", "tried_at", "promoted_at"):
                at = getattr(row, name)
                setattr(row, name, None if at is None else at - timedelta(seconds=seconds))


def numbers(harness):
    target = harness.serving.targets["m"]
    trial = None if target.trial is None else target.trial.version.number
    return target.stable.number, trial, [version.number for version in target.kept]


def test_a_first_version_is_served_once_loaded_under_any_strategy(harness):
    model_id = harness.add_model()
    change_model(harness.database, "m", {"serving": {"rollout": TRIED}})
    row = harness.finish(harness.orchestrator(), harness.add_update(model_id))
    assert row.state == UpdateState.SUCCEEDED
    assert harness.serving.answers == {"m": 1}


def test_replace_waits_for_every_replica_and_keeps_the_previous_version(harness, line):
    harness.serving.loading = {2}
    release_version(harness.database, "m", 2, by="somebody")
    orchestrator = harness.orchestrator()
    orchestrator.tick()
    assert numbers(harness) == (1, 2, [])
    assert harness.serving.targets["m"].trial.share == 0
    assert last(harness, line).state == ReleaseState.PENDING
    harness.serving.loading = set()
    orchestrator.tick()
    assert numbers(harness) == (2, None, [1])
    assert harness.serving.answers == {"m": 2}
    assert last(harness, line).state == ReleaseState.LIVE


def test_a_canary_that_passes_its_trial_takes_over(harness, line):
    change_model(harness.database, "m", {"serving": {"rollout": TRIED}})
    release_version(harness.database, "m", 2, by="somebody")
    orchestrator = harness.orchestrator()
    orchestrator.tick()
    trial = harness.serving.targets["m"].trial
    assert (trial.version.number, trial.share, trial.shadowed) == (2, 0.25, 0)
    harness.serving.traffic = {1: traffic(150), 2: traffic(50)}
    orchestrator.tick()
    assert last(harness, line).state == ReleaseState.PENDING, "the trial lasts a minute"
    later(harness, 61)
    # Another orchestrator, with nothing in memory.
    harness.orchestrator().tick()
    row = last(harness, line)
    assert row.state == ReleaseState.LIVE
    assert row.begun_at < row.tried_at < row.promoted_at <= row.released_at
    assert row.trial["tried"]["requests"] == 50
    assert row.trial["served"]["requests"] == 150
    assert harness.serving.answers == {"m": 2}


@pytest.mark.parametrize("strategy", ["canary", "shadow"])
def test_a_version_on_trial_gets_no_requests_until_every_replica_has_loaded_it(harness, line, strategy):
    harness.serving.loading = {2}
    tried = ROLLOUT.validate_python({**TRIED, "strategy": strategy, "max_loss_increase": 0.1})
    release_version(harness.database, "m", 2, by="somebody", rollout=tried)
    orchestrator = harness.orchestrator()
    orchestrator.tick()
    before = harness.serving.targets["m"]
    assert before.trial == Trial(before.trial.version)
    harness.serving.loading = set()
    orchestrator.tick()
    target = harness.serving.targets["m"]
    assert target.trial.scored
    assert target.trial.share or target.trial.shadowed
    assert target.sequence > before.sequence, "the trial's traffic starts from here"


def test_traffic_before_the_trial_does_not_count(harness, line):
    release_version(harness.database, "m", 2, by="somebody", rollout=ROLLOUT.validate_python(TRIED))
    harness.orchestrator().tick()
    target = harness.serving.targets["m"]
    at = datetime(2026, 1, 1, tzinfo=UTC)
    pending = PendingRelease("r", ServedVersion(2, "k"), False, ROLLOUT.validate_python(TRIED), at, at, None)
    late = VersionReport(2, Residence.READY, tried=traffic(100, failures=100))
    for sequence, moves in ((target.sequence - 1, False), (target.sequence, True)):
        report = ReplicaReport("m-0", 1, (late,), sequence)
        assert bool(next_action(pending, target, [report], at)) == moves


def test_nothing_is_promoted_while_a_replica_is_silent(harness, line):
    release_version(harness.database, "m", 2, by="somebody", rollout=ROLLOUT.validate_python(TRIED))
    harness.orchestrator().tick()
    target = harness.serving.targets["m"]
    at = datetime(2026, 1, 1, tzinfo=UTC)
    pending = PendingRelease("r", ServedVersion(2, "k"), False, ROLLOUT.validate_python(TRIED), at, at, None)
    good = ReplicaReport("m-0", 1, (VersionReport(2, Residence.READY, tried=traffic(100)),), target.sequence)
    bad = replace(good, versions=(VersionReport(2, Residence.READY, tried=traffic(100, failures=50)),))
    silent = ReplicaReport("m-1", None)
    after = at + timedelta(seconds=601)
    much_later = after + timedelta(seconds=GRACE_SECONDS)
    assert next_action(pending, target, [good, silent], after) is None
    assert next_action(pending, target, [good, good], after).action == Action.PROMOTE
    assert next_action(pending, target, [bad, silent], after).action == Action.FAIL
    assert next_action(pending, target, [good, silent], much_later).action == Action.PROMOTE
    assert next_action(pending, target, [silent, silent], much_later) is None


def test_a_trial_continues_after_its_line_becomes_rolling(harness, line):
    release_version(harness.database, "m", 2, by="somebody", rollout=ROLLOUT.validate_python(TRIED))
    orchestrator = harness.orchestrator()
    orchestrator.tick()
    change_model(harness.database, "m", {"serving": {"rollout": {"strategy": "rolling"}}})
    orchestrator.tick()
    assert numbers(harness) == (1, 2, [])
    harness.serving.traffic = {1: traffic(60), 2: traffic(20, failures=3)}
    orchestrator.tick()
    assert last(harness, line).state == ReleaseState.FAILED
    assert harness.serving.answers == {"m": 1}


def test_a_nan_loss_fails_the_trial_and_is_stored_as_none(harness, line):
    shadow = {**TRIED, "strategy": "shadow", "share": 0.5, "max_loss_increase": 0.01}
    release_version(harness.database, "m", 2, by="somebody", rollout=ROLLOUT.validate_python(shadow))
    harness.orchestrator().tick()
    harness.serving.traffic = {
        1: traffic(100) + Traffic(scored_tokens=2000, scored_loss=6000.0),
        2: traffic(100) + Traffic(scored_tokens=2000, scored_loss=math.nan),
    }
    later(harness, 61)
    harness.orchestrator().tick()
    assert "loss nan" in last(harness, line).error
    assert last(harness, line).trial["tried"]["loss"] is None


def test_a_failed_canary_is_withdrawn_and_the_history_shows_both_releases(harness, line):
    release_version(harness.database, "m", 2, by="somebody", rollout=ROLLOUT.validate_python(TRIED))
    harness.orchestrator().tick()
    harness.serving.traffic = {1: traffic(60), 2: traffic(20, failures=3)}
    harness.orchestrator().tick()
    row = last(harness, line)
    assert (row.state, row.error) == (
        ReleaseState.FAILED,
        "3 of 20 requests failed, against 0 of 60 for the served version",
    )
    assert row.trial["tried"]["failures"] == 3
    harness.orchestrator().tick()
    assert numbers(harness) == (1, None, [])
    assert harness.serving.answers == {"m": 1}
    assert [row.state for row in history(harness, line)] == [ReleaseState.LIVE, ReleaseState.FAILED]


def test_a_shadow_gets_copies_and_answers_no_requests(harness, line):
    shadow = {**TRIED, "strategy": "shadow", "share": 0.5, "max_loss_increase": 0.01}
    change_model(harness.database, "m", {"serving": {"rollout": shadow}})
    release_version(harness.database, "m", 2, by="somebody")
    harness.orchestrator().tick()
    trial = harness.serving.targets["m"].trial
    assert (trial.share, trial.shadowed, trial.scored) == (0.0, 0.5, True)
    harness.serving.traffic = {
        1: traffic(100) + Traffic(scored_tokens=2000, scored_loss=6000.0),
        2: traffic(100) + Traffic(scored_tokens=2000, scored_loss=6100.0),
    }
    later(harness, 61)
    harness.orchestrator().tick()
    assert last(harness, line).error == (
        "loss 3.0500 nats per token on shadowed prompts, against 3.0000 for the served version"
    )


def test_a_version_that_no_replica_loads_fails_after_its_time(harness, line):
    harness.serving.loading = {2}
    release_version(harness.database, "m", 2, by="somebody")
    harness.orchestrator().tick()
    later(harness, 600)
    harness.orchestrator().tick()
    assert last(harness, line).state == ReleaseState.PENDING, "replicas get time to report it themselves"
    later(harness, GRACE_SECONDS + 1)
    harness.orchestrator().tick()
    assert last(harness, line).state == ReleaseState.FAILED
    assert "not loaded by every replica after 660 s" in last(harness, line).error
    assert harness.serving.answers == {"m": 1}


def test_a_promoted_version_that_replicas_cannot_load_again_fails(harness, line):
    release_version(harness.database, "m", 2, by="somebody")
    harness.serving.broken = set()
    orchestrator = harness.orchestrator()
    with harness.database.transaction() as session:
        row = releases.pending(session, line)
        row.begun_at = row.promoted_at = releases.now(session)
    harness.serving.broken = {2}  # as if every replica had restarted and could not load it again
    orchestrator.tick()
    assert last(harness, line).state == ReleaseState.FAILED
    orchestrator.tick()
    assert numbers(harness)[0] == 1
    assert harness.serving.answers == {"m": 1}


def test_a_rollback_needs_no_trial(harness, line):
    change_model(harness.database, "m", {"serving": {"rollout": TRIED}})
    release_version(harness.database, "m", 2, by="somebody")
    harness.orchestrator().tick()
    harness.serving.traffic = {2: traffic(50)}
    later(harness, 61)
    harness.orchestrator().tick()
    roll_back(harness.database, "m", by="somebody")
    harness.orchestrator().tick()
    assert last(harness, line).rollout == {"strategy": "replace"}
    assert harness.serving.answers == {"m": 1}
    assert numbers(harness) == (1, None, [2])


def test_a_rollback_during_a_rollout_returns_to_the_live_version(harness, line):
    release_version(harness.database, "m", 2, by="somebody", rollout=ROLLOUT.validate_python(TRIED))
    harness.orchestrator().tick()
    roll_back(harness.database, "m", by="somebody")
    harness.orchestrator().tick()
    states = [row.state for row in history(harness, line)]
    assert states == [ReleaseState.ENDED, ReleaseState.SUPERSEDED, ReleaseState.LIVE]
    assert numbers(harness) == (1, None, [])


def test_repeated_rollbacks_end_at_the_first_version(harness):
    model_id = harness.add_model(versions=3)
    orchestrator = harness.orchestrator()
    for number in (1, 2, 3):
        harness.finish(orchestrator, harness.add_update(model_id, number))
    for number in (2, 1):
        harness.serving.loading = {number}
        roll_back(harness.database, "m", by="somebody")
        harness.orchestrator().tick()
        roll_back(harness.database, "m", by="somebody")  # again, while the first rollback is pending
        harness.serving.loading = set()
        harness.orchestrator().tick()
        assert numbers(harness)[0] == number
    with pytest.raises(Conflict, match="no earlier released version"):
        roll_back(harness.database, "m", by="somebody")
    release_version(harness.database, "m", 3, by="somebody")
    harness.orchestrator().tick()
    roll_back(harness.database, "m", by="somebody")
    harness.orchestrator().tick()
    assert numbers(harness)[0] == 1


def test_reports_on_an_earlier_target_are_ignored(harness, line):
    """A replica that failed to keep an earlier version does not fail that version's release."""
    serving = harness.serving
    observe, lags = serving.observe, True

    def one_behind(models):
        observed = observe(models)
        if not lags:
            return observed
        broken = VersionReport(2, Residence.FAILED, "unloaded to free memory")
        return {
            m: [replace(r, versions=(broken,), sequence=r.sequence - 1) for r in rs]
            for m, rs in observed.items()
        }

    serving.observe = one_behind
    release_version(harness.database, "m", 2, by="somebody")
    harness.orchestrator().tick()
    assert last(harness, line).state == ReleaseState.PENDING
    lags = False
    harness.orchestrator().tick()
    assert last(harness, line).state == ReleaseState.LIVE


def test_releasing_the_live_version_calls_off_a_canary(harness, line):
    release_version(harness.database, "m", 2, by="somebody", rollout=ROLLOUT.validate_python(TRIED))
    harness.orchestrator().tick()
    release_version(harness.database, "m", 1, by="somebody")
    harness.orchestrator().tick()
    states = [row.state for row in history(harness, line)]
    assert states == [ReleaseState.ENDED, ReleaseState.SUPERSEDED, ReleaseState.LIVE]
    assert numbers(harness) == (1, None, [])


def test_a_rolling_target_has_one_version(harness, line):
    change_model(harness.database, "m", {"serving": {"rollout": {"strategy": "rolling"}}})
    harness.serving.loading = {2}
    release_version(harness.database, "m", 2, by="somebody")
    harness.orchestrator().tick()
    target = harness.serving.targets["m"]
    assert target.rolling
    assert numbers(harness) == (2, None, [])
    harness.serving.loading, harness.serving.broken = set(), {2}
    harness.orchestrator().tick()
    assert last(harness, line).state == ReleaseState.FAILED
    harness.orchestrator().tick()
    assert numbers(harness) == (1, None, [])


def test_a_line_stays_awake_while_a_release_is_pending(harness, line):
    change_model(harness.database, "m", {"serving": {"replicas": {"min": 0}}})
    harness.orchestrator().tick()
    assert not harness.serving.targets["m"].awake
    harness.serving.loading = {2}
    release_version(harness.database, "m", 2, by="somebody")
    harness.orchestrator().tick()
    assert harness.serving.targets["m"].awake


def test_the_requested_number_of_earlier_versions_is_kept_without_duplicates(harness):
    model_id = harness.add_model(versions=4)
    orchestrator = harness.orchestrator()
    for number in (1, 2, 3, 4):
        harness.finish(orchestrator, harness.add_update(model_id, number))
    roll_back(harness.database, "m", by="somebody")
    for keep, kept in ((0, []), (1, [4]), (2, [4, 2]), (9, [4, 2, 1])):
        change_model(harness.database, "m", {"serving": {"keep": keep}})
        harness.orchestrator().tick()
        assert numbers(harness) == (3, None, kept)
    assert all(isinstance(version, ServedVersion) for version in harness.serving.targets["m"].kept)


def test_observations_are_stored_every_few_seconds(harness, line):
    harness.orchestrator().tick()
    with harness.database.reading() as session:
        seen_at, [replica] = observations.of_model(session, line)
    assert replica.number == 1
    harness.serving.answers["m"] = 7  # changed by hand
    harness.orchestrator().tick()
    with harness.database.transaction() as session:
        assert observations.of_model(session, line)[0] == seen_at
        row = session.get(observations.Observation, line)
        row.observed_at -= timedelta(seconds=6)
    harness.orchestrator().tick()
    assert harness.serving.answers == {"m": 1}
    with harness.database.reading() as session:
        assert observations.of_model(session, line)[0] > seen_at
