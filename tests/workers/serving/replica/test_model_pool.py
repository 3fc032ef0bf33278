"""The versions that a replica loads: limits of time, speed and memory, and engines that hang."""

import random
import threading
import time
from dataclasses import replace
from unittest.mock import Mock

import pytest

from service.artifacts import Artifacts
from service.core.serving import Residence, ServedTarget
from service.core.serving_specs import LimitsSpec, ServingSpec
from tests.support.waiting import until
from tests.workers.serving.replica.loading import load, wait_until_settled
from tests.workers.serving.replica.requests import ask, generation, number
from tests.workers.serving.scripted_engines import ScriptedLoader
from tests.workers.serving.serving_line import failures, line, trying, version
from workers.serving.engine.port import EngineError
from workers.serving.generation import RequestRejected
from workers.serving.replica.health import MIN_HANG_SECONDS
from workers.serving.replica.model_pool import ModelPool
from workers.serving.replica.replica import Replica
from workers.serving.replica.routing import Router

REQUEST = generation(("a",), max_tokens=3)


@pytest.fixture
def pool(replica: Replica) -> ModelPool:
    return replica.pool


def settled(pool: ModelPool, target: ServedTarget) -> dict[int, Residence]:
    load(pool, target)
    return {report.number: report.state for report in pool.report().versions}


def limited(**limits: float) -> ServingSpec:
    return ServingSpec(limits=LimitsSpec(**limits))


def test_a_load_that_takes_too_long_fails_and_its_late_engine_is_closed(
    replica: Replica, pool: ModelPool, loader: ScriptedLoader
) -> None:
    settled(pool, line(1))
    loader.gate.clear()
    spec = limited(load_seconds=0.3)
    states = settled(pool, replace(trying(1, version(2)), spec=spec))
    assert states == {1: Residence.READY, 2: Residence.FAILED}
    assert failures(pool.report())[2] == "TimeoutError: not loaded and warm after 0.3 s"
    assert Router(pool).acquire_served().version.number == 1
    loader.gate.set()
    until(lambda: len(loader.engines) == 2 and (loader.engines[1]() is None or loader.engine("2").closed))
    assert replica.healthy()


def test_an_engine_that_is_not_warm_in_time_is_closed(pool: ModelPool, loader: ScriptedLoader) -> None:
    settled(pool, line(1))
    loader.hang_at_once = True
    spec = limited(load_seconds=0.5)
    states = settled(pool, replace(trying(1, version(2)), spec=spec))
    assert states == {1: Residence.READY, 2: Residence.FAILED}
    until(lambda: len(loader.engines) == 2 and (loader.engines[1]() is None or loader.engine("2").closed))


def test_a_load_that_is_no_longer_wanted_does_not_delay_another_version(
    pool: ModelPool, loader: ScriptedLoader
) -> None:
    settled(pool, line(1))
    gate = loader.gate = threading.Event()
    pool.set_target(trying(1, version(2)))
    until(lambda: loader.folders == ["1", "2"])
    loader.gate = threading.Event()
    loader.gate.set()
    assert settled(pool, trying(1, version(3))) == {1: Residence.READY, 3: Residence.READY}
    gate.set()


def test_a_version_that_is_slower_than_its_limits_fails(pool: ModelPool) -> None:
    settled(pool, line(1))
    spec = limited(first_token_seconds=1e-6, token_seconds=1e-7)
    states = settled(pool, replace(trying(1, version(2)), spec=spec))
    assert states[2] == Residence.FAILED
    reason = failures(pool.report())[2] or ""
    assert "s to the first token, but the limit is 1e-06 s" in reason
    assert "s per token, but the limit is 1e-07 s" in reason
    fast = replace(trying(1, version(2)), spec=limited(first_token_seconds=30, token_seconds=30))
    pool.set_target(line(1))
    assert settled(pool, fast)[2] == Residence.READY


def test_a_version_that_does_not_fit_beside_the_loaded_ones_is_not_loaded(
    pool: ModelPool, loader: ScriptedLoader
) -> None:
    settled(pool, line(1))
    loader.capacity = 1
    states = settled(pool, trying(1, version(2)))
    assert states == {1: Residence.READY, 2: Residence.FAILED}
    assert failures(pool.report())[2] == (
        "NotEnoughMemory: the version needs 1 MiB in addition to the loaded ones, but only 0 MiB are free"
    )
    assert loader.folders == ["1"]


def test_a_first_version_is_loaded_regardless_of_memory(pool: ModelPool, loader: ScriptedLoader) -> None:
    loader.capacity = 0
    assert settled(pool, line(1)) == {1: Residence.READY}


def test_kept_versions_are_evicted_for_others_but_evict_none_themselves(
    pool: ModelPool, loader: ScriptedLoader
) -> None:
    loader.capacity = 2
    assert settled(pool, line(1, kept=(version(2),))) == {1: Residence.READY, 2: Residence.READY}
    states = settled(pool, replace(trying(1, version(3)), kept=(version(2),)))
    assert states == {1: Residence.READY, 3: Residence.READY, 2: Residence.FAILED}
    assert failures(pool.report())[2] == "unloaded to make room for another version"
    # The version on trial is now served and the served one is kept, so both stay loaded.
    states = settled(pool, line(3, kept=(version(1), version(2))))
    assert states == {3: Residence.READY, 1: Residence.READY, 2: Residence.FAILED}


def test_another_decision_retries_versions_that_could_not_be_loaded(
    pool: ModelPool, loader: ScriptedLoader
) -> None:
    """For example a rollback to an evicted version: its earlier failure must not fail the rollback."""
    loader.capacity = 1
    assert settled(pool, line(1, kept=(version(2),)))[2] == Residence.FAILED
    loader.capacity = 2
    before = pool.report()
    assert settled(pool, replace(trying(1, version(2)), sequence=1))[2] == Residence.READY
    assert (before.sequence, pool.report().sequence) == (0, 1)


def test_when_a_version_on_trial_hangs_the_served_one_answers_its_requests(
    replica: Replica, loader: ScriptedLoader
) -> None:
    load(replica.pool, trying(1, version(2), share=1.0))
    loader.engine("2").hangs = True
    started = time.monotonic()
    assert number(ask(replica, REQUEST)) == 1
    assert time.monotonic() - started < 5
    assert "hung" in (failures(replica.pool.report())[2] or "")
    assert replica.healthy(), "the served version answers"


def test_a_served_version_that_hangs_is_reloaded_and_then_answers_its_requests(
    replica: Replica, loader: ScriptedLoader
) -> None:
    load(replica.pool, line(1))
    hung = loader.engine("1")
    hung.hangs = True
    answer = ask(replica, REQUEST)
    assert number(answer) == 1
    assert not any(isinstance(item, RequestRejected) for item in answer)
    assert loader.folders == ["1", "1"]
    assert hung.closed
    assert replica.healthy()
    replica.pool.close()
    assert isinstance(ask(replica, REQUEST)[0], RequestRejected)


def test_long_steps_are_not_mistaken_for_a_hang(pool: ModelPool, loader: ScriptedLoader) -> None:
    load(pool, line(1))
    engine = loader.engine("1")
    engine.hung_since, engine.hung_seconds = 1.0, MIN_HANG_SECONDS - 1
    model = Router(pool).acquire()
    assert not pool.discard_if_unhealthy(model)
    engine.hung_seconds = MIN_HANG_SECONDS + 1
    assert pool.discard_if_unhealthy(model)
    pool.release(model)


def test_a_retired_version_that_hangs_fails_its_remaining_requests_once(
    pool: ModelPool, loader: ScriptedLoader
) -> None:
    load(pool, line(1))
    model = Router(pool).acquire()
    reasons: list[str] = []
    model.on_lost.add(reasons.append)
    load(pool, line(2))
    engine = loader.engine("1")
    assert not engine.closed
    engine.hung_since = 1.0
    until(lambda: engine.closed)
    assert "hung" in reasons[0]
    time.sleep(1.2)  # until the next check
    assert len(reasons) == 1
    pool.release(model)
    assert pool.report().number == 2
    assert failures(pool.report()) == {}


def test_the_hang_limit_comes_from_the_spec_of_the_line(pool: ModelPool, loader: ScriptedLoader) -> None:
    spec = ServingSpec(limits=LimitsSpec(hang_seconds=3))
    load(pool, replace(line(1), spec=spec))
    engine = loader.engine("1")
    engine.hung_since, engine.hung_seconds = 1.0, 3.5
    until(lambda: engine.closed)


def test_a_lost_served_version_that_cannot_be_reloaded_makes_the_replica_unhealthy(
    artifacts: Artifacts, loader: ScriptedLoader
) -> None:
    """The cause may be the process itself, which Serve replaces when the health check fails."""
    replica = Replica("replica-0", artifacts.open, loader, retry_seconds=1000.0)
    pool = replica.pool
    load(pool, line(1))
    loader.errors.append(MemoryError("no room"))
    loader.gate.clear()
    engine = loader.engine("1")
    engine.hung_since = 1.0
    until(lambda: pool.recovering() is not None)
    assert replica.healthy()
    loader.gate.set()
    until(lambda: not replica.healthy())
    assert pool.recovering() is None
    load(pool, line(2))
    assert replica.healthy(), "the other version answers"
    pool.close()


def test_requests_that_wait_for_the_lost_served_version_are_not_drawn_again_for_the_trial(
    replica: Replica, loader: ScriptedLoader, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(replica.pool, trying(1, version(2), share=0.1))
    loader.gate.clear()
    draw = Mock(return_value=0.5)
    monkeypatch.setattr(random, "random", draw)
    loader.engine("1").hung_since = 1.0
    until(lambda: loader.folders == ["1", "2", "1"])
    threading.Timer(1.0, loader.gate.set).start()
    assert number(ask(replica, REQUEST)) == 1
    assert draw.call_count <= 2, "once for the version, once for a shadow copy"


def test_requests_wait_for_the_next_version_when_the_served_one_is_lost_during_a_rollout(
    replica: Replica, loader: ScriptedLoader
) -> None:
    load(replica.pool, line(1))
    loader.gate.clear()
    replica.pool.set_target(line(2))
    until(lambda: loader.folders == ["1", "2"])
    loader.engine("1").hung_since = 1.0
    until(lambda: replica.pool.report().number is None)
    threading.Timer(1.0, loader.gate.set).start()
    assert number(ask(replica, REQUEST)) == 2
    assert loader.folders == ["1", "2"]


def test_the_next_version_is_retried_at_once_when_the_served_one_is_lost(
    artifacts: Artifacts, loader: ScriptedLoader
) -> None:
    replica = Replica("replica-0", artifacts.open, loader, retry_seconds=1000.0)
    pool = replica.pool
    settled(pool, line(1))
    loader.capacity = 1
    assert settled(pool, line(2)) == {2: Residence.FAILED}
    assert Router(pool).acquire_served().version.number == 1
    loader.engine("1").hung_since = 1.0
    until(lambda: pool.report().number == 2)
    assert replica.healthy()
    pool.close()


def test_a_discarded_engine_rejects_new_requests(pool: ModelPool, loader: ScriptedLoader) -> None:
    load(pool, line(1))
    model = Router(pool).acquire()
    loader.engine("1").hung_since = 1.0
    until(lambda: model.lost)
    with pytest.raises(EngineError):
        model.engine.submit([], lambda _: None)
    pool.release(model)


def test_a_lost_served_version_is_loaded_before_the_one_on_trial(
    pool: ModelPool, loader: ScriptedLoader
) -> None:
    load(pool, line(1))
    loader.gate.clear()
    pool.set_target(trying(1, version(2)))
    until(lambda: loader.folders == ["1", "2"])
    loader.engine("1").hung_since = 1.0
    until(lambda: loader.folders == ["1", "2", "1"])
    loader.gate.set()
    wait_until_settled(pool)
    assert pool.report().number == 1


def test_a_folder_that_is_not_an_export_fails_to_load(pool: ModelPool, artifacts: Artifacts) -> None:
    with artifacts.writing("export/empty") as folder:
        (folder / "config.json").write_text("{}")
        artifacts.publish("export/empty", folder, {})
    assert settled(pool, line(1, "export/empty")) == {1: Residence.FAILED}
    assert "ValueError" in (failures(pool.report())[1] or "")
