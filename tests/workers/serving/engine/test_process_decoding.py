"""What only an engine in its own process can show: it hangs, dies, or is left behind."""

import os
import queue
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from multiprocessing import forkserver
from pathlib import Path

import psutil
import pytest

from tests.support.waiting import until
from tests.workers.serving.engine.asking import finish, run, sequence, text
from workers.serving.engine import processes
from workers.serving.engine.options import EngineOptions
from workers.serving.engine.port import EngineError, EngineEvent, SequenceFailed
from workers.serving.engine.process_decoding import DIED, ProcessDecoding
from workers.serving.engine.transformers_engine import TransformersEngine
from workers.serving.replica.health import unhealthy_reason

ROOT = Path(__file__).parents[4]

PARENT = """
import sys, time
from pathlib import Path
from workers.serving.engine.transformers_engine import TransformersEngine

if __name__ == "__main__":
    engine = TransformersEngine(Path(sys.argv[1]), own_process=True)
    print(engine._decoding._process.pid, flush=True)
    time.sleep(600)
"""


@pytest.fixture
def engine(export: Path) -> Iterator[TransformersEngine]:
    engine = TransformersEngine(export, options=EngineOptions(max_slots=2), own_process=True)
    yield engine
    engine.close()


def process_of(engine: TransformersEngine) -> psutil.Process:
    decoding = engine._decoding
    assert isinstance(decoding, ProcessDecoding)
    return psutil.Process(decoding._process.pid)


def decoding_children() -> list[int]:
    """Of the process that forks them, whatever engine they are of."""
    processes.prepare()
    forking = forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]
    return [child.pid for child in psutil.Process(forking).children()]


def test_it_decodes_elsewhere_and_the_state_is_known_here(engine: TransformersEngine) -> None:
    assert process_of(engine).pid != os.getpid()
    [events] = run(engine, sequence(engine.encode("The cat"), max_tokens=30))
    assert finish(events).num_tokens == 30
    status = engine.status()
    assert (status.alive, status.stalled_seconds, status.num_running) == (True, 0.0, 0)
    assert 0 < status.longest_turn_seconds < 30
    assert status.cached_tokens == len(engine.encode("The cat")) + 29


def test_killed_it_fails_what_is_in_flight_and_is_known_to_be_dead(engine: TransformersEngine) -> None:
    emitted: queue.SimpleQueue[list[EngineEvent]] = queue.SimpleQueue()
    prompt = engine.encode("The cat")
    process = process_of(engine)
    process.suspend()  # or it may be done before it is killed
    cancel = engine.submit([sequence(prompt, index=index, max_tokens=100) for index in range(3)], emitted.put)
    process.send_signal(signal.SIGKILL)
    failed: list[SequenceFailed] = []
    while len(failed) < 3:
        failed += [event for event in emitted.get(timeout=30) if isinstance(event, SequenceFailed)]
    assert [failure.index for failure in failed] == [0, 1, 2]
    assert failed[0].message == f"{DIED} (exit code -9)"
    assert unhealthy_reason(engine.status(), 25.0) == "the engine has died"
    assert engine.status().num_running == 0
    with pytest.raises(EngineError, match=DIED):
        engine.submit([sequence(prompt)], emitted.put)
    cancel()


def test_frozen_it_is_noticed_holds_nobody_and_can_be_closed(engine: TransformersEngine) -> None:
    run(engine, sequence(engine.encode("The cat")))
    process = process_of(engine)
    process.suspend()
    emitted: queue.SimpleQueue[list[EngineEvent]] = queue.SimpleQueue()
    began = time.monotonic()
    # Far more than a pipe holds.
    engine.submit([sequence([index] * 100, index=index) for index in range(2000)], emitted.put)
    assert time.monotonic() - began < 5
    until(lambda: engine.status().stalled_seconds > 0.2)
    engine.close()
    assert isinstance(emitted.get(timeout=30)[0], SequenceFailed)
    until(lambda: not process.is_running())


def test_what_was_cancelled_is_over_there_too(engine: TransformersEngine) -> None:
    prompt = engine.encode("The cat")
    emitted: queue.SimpleQueue[list[EngineEvent]] = queue.SimpleQueue()
    many = [sequence(prompt, index=index, max_tokens=110) for index in range(2000)]  # a minute at least
    cancel = engine.submit(many, emitted.put)
    emitted.get(timeout=30)
    cancel()
    cancel()
    assert engine.status().num_running == 0
    until(lambda: engine.status().stalled_seconds == 0.0)
    began = time.monotonic()
    [events] = run(engine, sequence(prompt, max_tokens=2))
    assert finish(events).num_tokens == 2
    assert time.monotonic() - began < 15


def test_one_that_is_frozen_does_not_get_well_when_its_clients_leave(engine: TransformersEngine) -> None:
    request = sequence(engine.encode("The cat"), max_tokens=3)
    run(engine, request)
    process = process_of(engine)
    process.suspend()
    engine.submit([request], lambda _: None)()
    until(
        lambda: engine.status().stalled_seconds > 0.3
    )  # what it had said before may still have been on its way
    engine.submit([request], lambda _: None)()
    status = engine.status()
    assert status.stalled_seconds > 0.3
    assert status.longest_turn_seconds < 0.3
    process.resume()
    until(lambda: engine.status().stalled_seconds == 0.0)


def test_a_load_that_takes_too_long_is_ended_with_its_process(export: Path) -> None:
    before = set(decoding_children())
    with pytest.raises(TimeoutError, match=r"not loaded after 0\.05 s"):
        TransformersEngine(export, own_process=True, seconds=0.05)
    until(lambda: set(decoding_children()) <= before)


def test_closed_it_ends_even_where_what_forked_it_has_died(export: Path) -> None:
    engine = TransformersEngine(export, own_process=True)
    process = process_of(engine)
    forking = process.parent()
    assert forking is not None
    forking.kill()
    until(lambda: process.ppid() != forking.pid)
    after = TransformersEngine(export, own_process=True)
    engine.close()
    until(lambda: not process.is_running() or process.status() == psutil.STATUS_ZOMBIE)
    assert finish(run(after, sequence(after.encode("The cat"), max_tokens=3))[0]).num_tokens == 3
    after.close()


def test_it_ends_with_the_process_that_started_it_by_kill_9_too(export: Path, tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    with subprocess.Popen(
        [sys.executable, script, export],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    ) as parent:
        assert parent.stdout is not None
        process = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
    process.wait(30)


def test_two_beside_each_other_answer_as_one_alone(engine: TransformersEngine, export: Path) -> None:
    other = TransformersEngine(export, own_process=True)
    request = sequence(engine.encode("The cat"), temperature=1.0, seed=5)
    [first], [second] = run(engine, request), run(other, request)
    assert text(first) == text(second)
    other.close()
    assert text(run(engine, request)[0]) == text(first)
