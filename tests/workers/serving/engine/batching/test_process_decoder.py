"""An engine in its own process may hang, die, or outlive its client, without harm to others."""

import os
import queue
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.support.waiting import until
from tests.workers.serving.engine.engine_client import finish, run, sequence, text
from workers.serving.engine.batching.process_decoder import DIED
from workers.serving.engine.batching.transformers_engine import TransformersEngine
from workers.serving.engine.options import EngineOptions
from workers.serving.engine.port import EngineError, EngineEvent, SequenceFailed
from workers.serving.replica.health import unhealthy_reason

ROOT = Path(__file__).parents[5]

PARENT = """
import sys, time
from pathlib import Path
from workers.serving.engine.batching.transformers_engine import TransformersEngine

if __name__ == "__main__":
    engine = TransformersEngine(Path(sys.argv[1]), own_process=True)
    print("loaded", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def engine(export: Path) -> Iterator[TransformersEngine]:
    engine = TransformersEngine(export, options=EngineOptions(max_slots=2), own_process=True)
    yield engine
    engine.close()


@pytest.fixture
def process(engine: TransformersEngine) -> psutil.Process:
    """The process that decodes for the engine: the newest."""
    return max(decoding_processes(), key=lambda process: process.create_time())


def decoding_processes(pid: int | None = None) -> set[psutil.Process]:
    """Decoding processes are children of the fork server, which is a child of this process, or of ``pid``."""
    return {own for child in psutil.Process(pid).children() for own in child.children()}


def test_its_status_is_known_in_this_process(engine: TransformersEngine) -> None:
    [events] = run(engine, sequence(engine.encode("The cat"), max_tokens=30))
    assert finish(events).num_tokens == 30
    status = engine.status()
    assert (status.alive, status.stalled_seconds, status.num_running) == (True, 0.0, 0)
    assert 0 < status.longest_step_seconds < 30
    assert status.cached_tokens == len(engine.encode("The cat")) + 29


def test_a_killed_engine_fails_its_sequences_and_reports_that_it_is_dead(
    engine: TransformersEngine, process: psutil.Process
) -> None:
    emitted: queue.SimpleQueue[list[EngineEvent]] = queue.SimpleQueue()
    prompt = engine.encode("The cat")
    process.suspend()  # or it may finish before it is killed
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


def test_a_frozen_engine_is_noticed_blocks_no_caller_and_can_be_closed(
    engine: TransformersEngine, process: psutil.Process
) -> None:
    run(engine, sequence(engine.encode("The cat")))
    process.suspend()
    emitted: queue.SimpleQueue[list[EngineEvent]] = queue.SimpleQueue()
    began = time.monotonic()
    # Far more than fits in a pipe.
    engine.submit([sequence([index] * 100, index=index) for index in range(2000)], emitted.put)
    assert time.monotonic() - began < 5
    until(lambda: engine.status().stalled_seconds > 0.2)
    engine.close()
    assert isinstance(emitted.get(timeout=30)[0], SequenceFailed)
    until(lambda: not process.is_running())


def test_cancelled_sequences_end_in_the_process_too(engine: TransformersEngine) -> None:
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


def test_a_frozen_engine_stays_stalled_when_its_clients_leave(
    engine: TransformersEngine, process: psutil.Process
) -> None:
    request = sequence(engine.encode("The cat"), max_tokens=3)
    run(engine, request)
    process.suspend()
    engine.submit([request], lambda _: None)()
    # Messages sent before it was frozen may still arrive.
    until(lambda: engine.status().stalled_seconds > 0.3)
    engine.submit([request], lambda _: None)()
    status = engine.status()
    assert status.stalled_seconds > 0.3
    assert status.longest_step_seconds < 0.3
    process.resume()
    until(lambda: engine.status().stalled_seconds == 0.0)


def test_a_load_that_takes_too_long_ends_with_its_process(export: Path) -> None:
    before = decoding_processes()
    with pytest.raises(TimeoutError, match=r"not loaded after 0\.05 s"):
        TransformersEngine(export, own_process=True, seconds=0.05)
    until(lambda: decoding_processes() <= before)


def test_a_closed_engine_ends_even_if_the_fork_server_has_died(
    engine: TransformersEngine, process: psutil.Process, export: Path
) -> None:
    fork_server = process.parent()
    assert fork_server is not None
    fork_server.kill()
    until(lambda: process.ppid() != fork_server.pid)
    after = TransformersEngine(export, own_process=True)
    engine.close()
    until(lambda: not process.is_running() or process.status() == psutil.STATUS_ZOMBIE)
    assert finish(run(after, sequence(after.encode("The cat"), max_tokens=3))[0]).num_tokens == 3
    after.close()


def test_it_ends_with_its_client_even_by_kill_9(export: Path, tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    with subprocess.Popen(
        [sys.executable, script, export],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    ) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "loaded\n"
        [process] = decoding_processes(parent.pid)
        parent.kill()
    process.wait(30)


def test_two_engines_side_by_side_answer_as_one_alone(engine: TransformersEngine, export: Path) -> None:
    other = TransformersEngine(export, own_process=True)
    request = sequence(engine.encode("The cat"), temperature=1.0, seed=5)
    [first], [second] = run(engine, request), run(other, request)
    assert text(first) == text(second)
    other.close()
    assert text(run(engine, request)[0]) == text(first)
