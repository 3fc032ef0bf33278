"""Engines on vLLM load, reject, fail, stall and close like any other engine."""

import asyncio
import math
import queue
import shutil
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.artifacts import Artifacts
from tests.support.tiny_export import CONTEXT_LENGTH, write_tiny_export
from tests.support.waiting import until
from tests.workers.serving.engine.engine_client import (
    check_that_closing_fails_what_is_in_flight,
    finish,
    run,
    sequence,
    text,
)
from tests.workers.serving.engine.vllm import stand_in
from tests.workers.serving.engine.vllm.vllm_engines import (
    HIDDEN_SIZE,
    OPEN_SOCKETS,
    OPTIONS,
    PROMPTS,
    close,
)
from tests.workers.serving.serving_line import COMPLETION, line, settle
from workers.serving.engine.options import EngineOptions
from workers.serving.engine.port import (
    EngineError,
    EngineEvent,
    QueueFull,
    SequenceFailed,
)
from workers.serving.engine.vllm.engine import VllmEngine
from workers.serving.local_serving import LocalServing

pytestmark = OPEN_SOCKETS


def test_a_version_whose_logits_are_not_finite_is_not_loaded(tmp_path: Path, vllm: str) -> None:
    write_tiny_export(tmp_path, seed=1, broken=True, hidden_size=HIDDEN_SIZE)
    with pytest.raises(EngineError, match="not finite"):
        VllmEngine(tmp_path, OPTIONS)


def test_a_folder_that_is_not_an_export_is_rejected(tmp_path: Path, vllm: str) -> None:
    with pytest.raises((OSError, ValueError)):
        VllmEngine(tmp_path, OPTIONS)


def test_an_export_without_weights_is_rejected(folder: Path, tmp_path: Path, vllm: str) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises((OSError, ValueError)):
        VllmEngine(tmp_path, OPTIONS)


def test_a_full_queue_rejects_a_whole_request_and_cancellation_makes_room(folder: Path, vllm: str) -> None:
    engine = VllmEngine(folder, EngineOptions(max_slots=1, kv_cache_bytes=64 << 20, max_waiting=2))
    started = threading.Event()
    begin: Callable[[list[EngineEvent]], None] = lambda _: started.set()  # noqa: E731
    prompt = engine.encode(PROMPTS[0])
    long = sequence(prompt, max_tokens=CONTEXT_LENGTH - len(prompt))
    cancels = [engine.submit([long], begin)]
    assert started.wait(30)
    cancels.append(engine.submit([long, long], begin))
    assert engine.status().num_running == 1
    assert engine.status().num_waiting == 2
    with pytest.raises(QueueFull) as full:
        engine.submit([long], begin)
    assert math.isfinite(full.value.retry_seconds)
    with pytest.raises(QueueFull):
        engine.check_room()
    for cancel in (*cancels, *cancels):
        cancel()
    engine.check_room()
    assert engine.status().num_running == 0
    [events] = run(engine, sequence(prompt, max_tokens=2))
    assert finish(events).num_tokens == 2
    assert engine.status().stalled_seconds == 0.0
    close(engine)


def test_closing_fails_the_sequences_in_flight_and_rejects_more(folder: Path, vllm: str) -> None:
    engine = VllmEngine(folder, OPTIONS)
    cancel, emitted = check_that_closing_fails_what_is_in_flight(engine, engine.encode(PROMPTS[0]))
    cancel()
    close(engine)
    cancel()
    assert not engine.status().alive
    assert emitted.empty()


def test_cancelled_and_stopped_requests_are_aborted_and_finished_ones_are_not(
    fake_vllm: None, folder: Path
) -> None:
    engine = VllmEngine(folder, OPTIONS)
    [fake] = stand_in.engines
    prompt = engine.encode(PROMPTS[0])
    [whole] = run(engine, sequence(prompt, max_tokens=60))
    assert fake.aborted == []
    run(engine, sequence(prompt, max_tokens=60, stop=(text(whole)[5:8],)))
    until(lambda: fake.aborted == ["2"])
    emitted: queue.SimpleQueue[list[EngineEvent]] = queue.SimpleQueue()
    cancel = engine.submit([sequence(prompt, max_tokens=100)], emitted.put)
    emitted.get(timeout=30)
    cancel()
    until(lambda: fake.aborted == ["2", "3"])
    close(engine)
    until(lambda: fake.is_shut_down)


def test_a_request_that_vllm_rejects_fails_that_sequence_only(fake_vllm: None, folder: Path) -> None:
    engine = VllmEngine(folder, OPTIONS)
    prompt = engine.encode(PROMPTS[0])
    bad = sequence(prompt, frequency_penalty=3.0, index=0)
    [[refused], good] = run(engine, bad, sequence(prompt, index=1))
    assert isinstance(refused, SequenceFailed)
    assert refused.message == "ValueError: frequency_penalty: 3.0"
    assert finish(good).num_tokens == 20
    stand_in.engines[-1].fails = MemoryError("no page left")
    [events] = run(engine, sequence(prompt))
    assert events[-1] == SequenceFailed(0, "MemoryError: no page left")
    stand_in.engines[-1].fails = None
    assert finish(run(engine, sequence(prompt))[0]).num_tokens == 20
    close(engine)


def test_an_engine_whose_process_has_ended_is_not_alive(fake_vllm: None, folder: Path) -> None:
    engine = VllmEngine(folder, OPTIONS)
    assert engine.status().alive
    stand_in.engines[-1].dies = True
    [events] = run(engine, sequence(engine.encode(PROMPTS[0])))
    assert events == [SequenceFailed(0, "EngineDeadError: EngineCore encountered an issue.")]
    assert not engine.status().alive
    close(engine)


def test_an_engine_without_progress_is_stalled(
    fake_vllm: None, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = VllmEngine(folder, OPTIONS)
    hold = threading.Event()
    prompt = engine.encode(PROMPTS[0])
    cancel = engine.submit([sequence(prompt, max_tokens=100)], lambda _: _wait(hold))
    until(lambda: engine.status().stalled_seconds > 0.2)
    assert engine.status().cached_tokens >= len(prompt)
    hold.set()
    until(lambda: engine.status().longest_step_seconds >= 0.2)
    cancel()
    until(lambda: engine.status().stalled_seconds == 0.0)
    assert engine.status().cached_tokens == 0
    close(engine)


def test_an_engine_stays_stalled_when_one_of_its_clients_leaves(
    fake_vllm: None, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = VllmEngine(folder, OPTIONS)

    monkeypatch.setattr(stand_in.AsyncLLMEngine, "_outputs", _hangs)
    request = sequence(engine.encode(PROMPTS[0]))
    first, second = (engine.submit([request], lambda _: None) for _ in range(2))
    until(lambda: engine.status().stalled_seconds > 0.3)
    first()
    time.sleep(0.2)
    assert engine.status().stalled_seconds > 0.5
    second()
    until(lambda: engine.status().stalled_seconds == 0.0)
    assert engine.status().longest_step_seconds < 0.3, "a cancelled step has no duration"
    close(engine)


def test_a_loaded_engine_that_does_not_answer_in_time_is_closed(
    fake_vllm: None, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = set(threading.enumerate())
    with monkeypatch.context() as patch:
        patch.setattr(stand_in.AsyncLLMEngine, "_outputs", _hangs)
        with pytest.raises(TimeoutError):
            VllmEngine(folder, OPTIONS, seconds=1.0)
    until(lambda: set(threading.enumerate()) <= before)


def _wait(event: threading.Event) -> None:
    event.wait(10)


async def _hangs(*_: Any) -> AsyncIterator[Any]:
    await asyncio.Event().wait()
    yield


def test_two_versions_are_served_side_by_side(fake_vllm: None, artifacts: Artifacts) -> None:
    serving = LocalServing(artifacts, "127.0.0.1", 0, engine={"engine": "vllm", "max_slots": 4})
    answers = []
    try:
        for number in (1, 2):
            settle(serving, line(number))
            body = COMPLETION | {"temperature": 0, "max_tokens": 8}
            answers.append(httpx.post(f"{serving.url()}/v1/completions", json=body, timeout=30).json())
    finally:
        serving.close()
    assert [answer["system_fingerprint"] for answer in answers] == ["line@1", "line@2"]
    assert answers[0]["choices"] != answers[1]["choices"]
    until(lambda: all(fake.is_shut_down for fake in stand_in.engines))
