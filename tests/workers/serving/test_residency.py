"""What a replica holds: the limits of time, speed and memory, and versions that hang."""

import asyncio
import threading
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest

from service.artifacts import Artifacts
from service.core.serving import Residence, ServedTarget
from service.core.serving_specs import LimitsSpec, ServingSpec
from tests.support.waiting import until
from tests.workers.serving.scripted_engines import Loader
from tests.workers.serving.serving_line import failures, line, trying, version
from workers.serving import residency
from workers.serving.engine.port import EngineError, EngineStatus
from workers.serving.generation import Answer, Generation, Refused, Sampling, Started
from workers.serving.replica import Replica
from workers.serving.residency import Residency


@pytest.fixture
def residents(artifacts: Artifacts, loader: Loader) -> Iterator[Residency]:
    residents = Residency("replica-0", artifacts.open, loader)
    yield residents
    residents.close()


def settled(residents: Residency, target: ServedTarget) -> dict[int, Residence]:
    residents.set_target(target)
    assert residents.wait_until_settled(30)
    return {held.number: held.state for held in residents.report().versions}


def limited(**limits: float) -> ServingSpec:
    return ServingSpec(limits=LimitsSpec(**limits))


def test_a_load_that_takes_too_long_is_given_up_and_what_comes_of_it_late_is_closed(
    residents: Residency, loader: Loader
) -> None:
    settled(residents, line(1))
    loader.gate.clear()
    spec = limited(load_seconds=0.3)
    held = settled(residents, replace(trying(1, version(2)), spec=spec))
    assert held == {1: Residence.READY, 2: Residence.FAILED}
    assert failures(residents.report())[2] == "TimeoutError: not loaded and warm after 0.3 s"
    assert residents.take().version.number == 1
    loader.gate.set()
    until(lambda: len(loader.engines) == 2 and (loader.engines[1]() is None or loader.engine("2").closed))
    assert residents.healthy()


def test_one_that_is_loaded_and_does_not_get_warm_in_time_is_closed(
    residents: Residency, loader: Loader
) -> None:
    settled(residents, line(1))
    loader.hang_at_once = True
    spec = limited(load_seconds=0.5)
    held = settled(residents, replace(trying(1, version(2)), spec=spec))
    assert held == {1: Residence.READY, 2: Residence.FAILED}
    until(lambda: len(loader.engines) == 2 and (loader.engines[1]() is None or loader.engine("2").closed))


def test_another_version_need_not_wait_for_a_load_that_nobody_wants_any_more(
    residents: Residency, loader: Loader
) -> None:
    settled(residents, line(1))
    gate = loader.gate = threading.Event()
    residents.set_target(trying(1, version(2)))
    until(lambda: loader.folders == ["1", "2"])
    loader.gate = threading.Event()
    loader.gate.set()
    assert settled(residents, trying(1, version(3))) == {1: Residence.READY, 3: Residence.READY}
    gate.set()


def test_one_that_is_slower_than_its_limits_is_not_taken(residents: Residency) -> None:
    settled(residents, line(1))
    spec = limited(first_token_seconds=1e-6, token_seconds=1e-7)
    held = settled(residents, replace(trying(1, version(2)), spec=spec))
    assert held[2] == Residence.FAILED
    reason = failures(residents.report())[2] or ""
    assert "s to the first token, 1e-06 s are allowed" in reason
    assert "s per token, 1e-07 s are allowed" in reason
    fast = replace(trying(1, version(2)), spec=limited(first_token_seconds=30, token_seconds=30))
    residents.set_target(line(1))
    assert settled(residents, fast)[2] == Residence.READY


def test_without_room_beside_what_is_loaded_it_is_not_begun(residents: Residency, loader: Loader) -> None:
    settled(residents, line(1))
    loader.room = 1
    held = settled(residents, trying(1, version(2)))
    assert held == {1: Residence.READY, 2: Residence.FAILED}
    assert failures(residents.report())[2] == (
        "NotEnoughMemory: 1 MiB are needed beside what is loaded, 0 MiB are free"
    )
    assert loader.folders == ["1"]


def test_a_first_version_is_tried_whatever_the_room(residents: Residency, loader: Loader) -> None:
    loader.room = 0
    assert settled(residents, line(1)) == {1: Residence.READY}


def test_kept_versions_make_room_and_are_not_loaded_at_the_cost_of_others(
    residents: Residency, loader: Loader
) -> None:
    loader.room = 2
    assert settled(residents, line(1, kept=(version(2),))) == {1: Residence.READY, 2: Residence.READY}
    held = settled(residents, replace(trying(1, version(3)), kept=(version(2),)))
    assert held == {1: Residence.READY, 3: Residence.READY, 2: Residence.FAILED}
    assert failures(residents.report())[2] == "let go of to make room"
    # The next is served, the one before kept: what is loaded stays.
    held = settled(residents, line(3, kept=(version(1), version(2))))
    assert held == {3: Residence.READY, 1: Residence.READY, 2: Residence.FAILED}


def test_another_decision_asks_again_for_what_could_not_be_held(residents: Residency, loader: Loader) -> None:
    """Back to a kept version that had to be let go: what was said of it before is not what comes of it now."""
    loader.room = 1
    assert settled(residents, line(1, kept=(version(2),)))[2] == Residence.FAILED
    loader.room = 2
    before = residents.report()
    assert settled(residents, replace(trying(1, version(2)), sequence=1))[2] == Residence.READY
    assert (before.sequence, residents.report().sequence) == (0, 1)


def collect(replica: Replica, request: Generation) -> list[Answer]:
    async def all_of_it() -> list[Answer]:
        return [item async for batch in replica.generate(request) for item in batch]

    return asyncio.run(all_of_it())


def test_one_on_trial_that_hangs_is_given_up_and_what_it_was_asked_is_answered(
    artifacts: Artifacts, loader: Loader
) -> None:
    replica = Replica("replica-0", artifacts.open, loader)
    replica.set_target(trying(1, version(2), share=1.0))
    assert replica.wait_until_settled(30)
    loader.engine("2").hangs = True
    began = time.monotonic()
    first, *_ = collect(replica, Generation("line", ("a",), Sampling(max_tokens=3)))
    assert isinstance(first, Started)
    assert first.number == 1
    assert time.monotonic() - began < 5
    assert "hung" in (failures(replica.report())[2] or "")
    assert replica.healthy(), "the served version answers"
    replica.close()


def test_a_served_version_that_hangs_is_loaded_anew_and_what_it_was_asked_is_answered(
    artifacts: Artifacts, loader: Loader
) -> None:
    replica = Replica("replica-0", artifacts.open, loader)
    replica.set_target(line(1))
    assert replica.wait_until_settled(30)
    hung = loader.engine("1")
    hung.hangs = True
    answer = collect(replica, Generation("line", ("a",), Sampling(max_tokens=3)))
    assert isinstance(answer[0], Started)
    assert not any(isinstance(item, Refused) for item in answer)
    assert loader.folders == ["1", "1"]
    assert hung.closed
    assert replica.healthy()
    replica.close()
    answer = collect(replica, Generation("line", ("a",), Sampling(max_tokens=3)))
    assert isinstance(answer[0], Refused)


def test_long_turns_are_not_taken_for_a_hang(residents: Residency, loader: Loader) -> None:
    residents.set_target(line(1))
    assert residents.wait_until_settled(30)
    engine = loader.engine("1")
    engine.hung_since, engine.hung_seconds = 1.0, residency.HUNG_SECONDS - 1
    resident = residents.take()
    assert not residents.give_up_if_ill(resident)
    engine.hung_seconds = residency.HUNG_SECONDS + 1
    assert residents.give_up_if_ill(resident)
    residents.give_back(resident)


@pytest.mark.parametrize(
    ("longest", "limit", "patience"),
    [
        (0.0, 25.0, 10.0),
        (0.9, 25.0, 10.0),
        (2.0, 25.0, 20.0),
        (60.0, 25.0, 25.0),
        (60.0, 90.0, 90.0),
        (0.1, 3.0, 3.0),
    ],
)
def test_what_is_usual_decides_what_is_a_hang_within_a_limit(
    longest: float, limit: float, patience: float
) -> None:
    status = EngineStatus(
        alive=True,
        stalled_seconds=patience - 0.1,
        longest_step_seconds=longest,
        num_running=1,
        num_waiting=0,
        cached_tokens=0,
        cache_tokens=0,
    )
    assert residency.why_ill(status, limit) is None
    assert residency.why_ill(replace(status, stalled_seconds=patience + 0.1), limit) is not None


def test_one_that_hangs_after_it_was_let_go_of_fails_what_it_still_answers(
    residents: Residency, loader: Loader
) -> None:
    residents.set_target(line(1))
    assert residents.wait_until_settled(30)
    resident = residents.take()
    told: list[str] = []
    resident.given_up.add(told.append)
    residents.set_target(line(2))
    assert residents.wait_until_settled(30)
    engine = loader.engine("1")
    assert not engine.closed
    engine.hung_since = 1.0
    until(lambda: engine.closed)
    assert "hung" in told[0]
    time.sleep(1.2)  # another look
    assert len(told) == 1
    residents.give_back(resident)
    assert residents.report().number == 2
    assert failures(residents.report()) == {}


def test_how_long_a_turn_may_be_is_the_lines_own(residents: Residency, loader: Loader) -> None:
    spec = ServingSpec(limits=LimitsSpec(hang_seconds=3))
    residents.set_target(replace(line(1), spec=spec))
    assert residents.wait_until_settled(30)
    engine = loader.engine("1")
    engine.hung_since, engine.hung_seconds = 1.0, 3.5
    until(lambda: engine.closed)


def test_a_served_version_that_is_lost_and_cannot_be_loaded_anew_makes_the_replica_ill(
    artifacts: Artifacts, loader: Loader
) -> None:
    """It may be for the process: whoever asks for its health ends it."""
    residents = Residency("replica-0", artifacts.open, loader, retry_seconds=1000.0)
    residents.set_target(line(1))
    assert residents.wait_until_settled(30)
    loader.errors.append(MemoryError("no room"))
    loader.gate.clear()
    engine = loader.engine("1")
    engine.hung_since = 1.0
    until(lambda: residents.recovers)
    assert residents.healthy()
    loader.gate.set()
    until(lambda: not residents.healthy())
    assert not residents.recovers
    residents.set_target(line(2))
    assert residents.wait_until_settled(30)
    assert residents.healthy(), "the other version answers"
    residents.close()


def test_requests_wait_for_what_is_lost_and_are_not_drawn_again_for_what_is_tried(
    artifacts: Artifacts, loader: Loader, monkeypatch: pytest.MonkeyPatch
) -> None:
    replica = Replica("replica-0", artifacts.open, loader)
    replica.set_target(trying(1, version(2), share=0.1))
    assert replica.wait_until_settled(30)
    loader.gate.clear()
    draws: list[float] = []
    monkeypatch.setattr(residency.random, "random", lambda: draws.append(0.5) or 0.5)
    loader.engine("1").hung_since = 1.0
    until(lambda: loader.folders == ["1", "2", "1"])
    threading.Timer(1.0, loader.gate.set).start()
    answer = collect(replica, Generation("line", ("a",), Sampling(max_tokens=3)))
    assert isinstance(answer[0], Started)
    assert answer[0].number == 1
    assert len(draws) <= 2, "once for a version, once for a copy"
    replica.close()


def test_where_what_answers_is_lost_in_a_rollout_requests_wait_for_the_next_version(
    artifacts: Artifacts, loader: Loader
) -> None:
    replica = Replica("replica-0", artifacts.open, loader)
    replica.set_target(line(1))
    assert replica.wait_until_settled(30)
    loader.gate.clear()
    replica.set_target(line(2))
    until(lambda: loader.folders == ["1", "2"])
    loader.engine("1").hung_since = 1.0
    until(lambda: replica.report().number is None)
    threading.Timer(1.0, loader.gate.set).start()
    answer = collect(replica, Generation("line", ("a",), Sampling(max_tokens=3)))
    assert isinstance(answer[0], Started)
    assert answer[0].number == 2
    assert loader.folders == ["1", "2"]
    replica.close()


def test_where_what_answers_is_lost_the_next_version_is_tried_again_though_it_had_failed(
    artifacts: Artifacts, loader: Loader
) -> None:
    residents = Residency("replica-0", artifacts.open, loader, retry_seconds=1000.0)
    settled(residents, line(1))
    loader.room = 1
    assert settled(residents, line(2)) == {2: Residence.FAILED}
    assert residents.take().version.number == 1
    loader.engine("1").hung_since = 1.0
    until(lambda: residents.report().number == 2)
    assert residents.healthy()
    residents.close()


def test_who_is_about_to_ask_an_engine_that_is_given_up_is_refused(
    residents: Residency, loader: Loader
) -> None:
    residents.set_target(line(1))
    assert residents.wait_until_settled(30)
    resident = residents.take()
    loader.engine("1").hung_since = 1.0
    until(lambda: resident.lost)
    with pytest.raises(EngineError):
        resident.engine.submit([], lambda _: None)
    residents.give_back(resident)


def test_what_is_lost_is_loaded_before_what_is_only_tried(residents: Residency, loader: Loader) -> None:
    residents.set_target(line(1))
    assert residents.wait_until_settled(30)
    loader.gate.clear()
    residents.set_target(trying(1, version(2)))
    until(lambda: loader.folders == ["1", "2"])
    loader.engine("1").hung_since = 1.0
    until(lambda: loader.folders == ["1", "2", "1"])
    loader.gate.set()
    assert residents.wait_until_settled(30)
    assert residents.report().number == 1


def test_a_folder_that_is_no_export_is_no_version(residents: Residency, artifacts: Artifacts) -> None:
    with artifacts.writing("export/empty") as folder:
        (folder / "config.json").write_text("{}")
        artifacts.publish("export/empty", folder, {})
    assert settled(residents, line(1, "export/empty")) == {1: Residence.FAILED}
    assert "ValueError" in (failures(residents.report())[1] or "")
