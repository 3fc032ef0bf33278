"""The engine on vLLM against the one on transformers, request by request.

By default on a stand-in with vLLM's interface; where vLLM is installed, on the real one as well, in float32.
"""

import asyncio
import dataclasses
import inspect
import json
import math
import queue
import shutil
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from service.artifacts import Artifacts
from tests.support.tiny_export import CONTEXT_LENGTH, write_tiny_export
from tests.workers.serving.engine import vllm_stand_in
from tests.workers.serving.engine.asking import (
    check_that_closing_fails_what_is_in_flight,
    finish,
    raws,
    run,
    sequence,
    text,
    tokens,
)
from tests.workers.serving.serving_line import COMPLETION, line, settle
from workers.serving.engine import loader, vllm_engine, vllm_library
from workers.serving.engine.export_tokenizer import ExportTokenizer
from workers.serving.engine.options import EngineOptions
from workers.serving.engine.port import (
    EngineError,
    EngineEvent,
    QueueFull,
    SequenceFailed,
    SequenceRequest,
)
from workers.serving.engine.transformers_engine import TransformersEngine, TransformersLoader
from workers.serving.engine.vllm_engine import VllmEngine, VllmLoader
from workers.serving.engine.vllm_requests import (
    SequenceAnswer,
    engine_arguments,
    prompt_tokens,
    sampling_arguments,
)
from workers.serving.generation import FinishReason, Token
from workers.serving.local_serving import LocalServing

PROMPTS = ("The cat sat on", "Grüße", "the dog", "5 €", "")
OPTIONS = EngineOptions(max_slots=4, kv_cache_bytes=64 << 20, max_waiting=4)
HIDDEN_SIZE = 128  # vLLM's attention wants heads of 32

# vLLM leaves sockets to the garbage collector, in whatever test that comes.
pytestmark = [] if find_spec("vllm") is None else [pytest.mark.filterwarnings("default")]
needs_vllm = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export-for-vllm")
    write_tiny_export(folder, seed=1, hidden_size=HIDDEN_SIZE)
    return folder


@pytest.fixture(scope="module", params=["stand-in", pytest.param("vllm", marks=needs_vllm)])
def vllm(request: pytest.FixtureRequest) -> Iterator[str]:
    """Which of them ``import vllm`` finds."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "stand-in":
            vllm_stand_in.put_in_place(patch)
        else:
            # In bfloat16 it would choose other tokens; what is compiled takes minutes on a CPU.
            exact = {"dtype": "float32", "enforce_eager": True}
            patch.setattr(vllm_engine, "engine_arguments", lambda *a, **k: engine_arguments(*a, **k) | exact)
        yield request.param


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    vllm_stand_in.put_in_place(monkeypatch)
    monkeypatch.setattr(vllm_engine, "engine_arguments", engine_arguments)


@pytest.fixture(scope="module")
def engine(folder: Path, vllm: str) -> Iterator[VllmEngine]:
    engine = VllmEngine(folder, OPTIONS)
    yield engine
    _closed(engine)


@pytest.fixture(scope="module")
def reference(folder: Path) -> Iterator[TransformersEngine]:
    engine = TransformersEngine(folder)
    yield engine
    engine.close()


def _closed(engine: VllmEngine) -> None:
    engine.close()
    engine._thread.join(30)
    assert not engine._thread.is_alive()


def _assert_alike(ours: Sequence[EngineEvent], theirs: Sequence[EngineEvent]) -> None:
    assert [dataclasses.replace(event, **_unscored(event)) for event in ours] == [
        dataclasses.replace(event, **_unscored(event)) for event in theirs
    ]
    for one, other in zip(tokens(ours), tokens(theirs), strict=True):
        assert one.logprob == (None if other.logprob is None else pytest.approx(other.logprob, abs=1e-3))
        assert (one.top is None) == (other.top is None)
        if one.top is not None and other.top is not None:
            assert [each.raw for each in one.top] == [each.raw for each in other.top]
            expected = pytest.approx([each.logprob for each in other.top], abs=1e-3)
            assert [each.logprob for each in one.top] == expected


def _unscored(event: EngineEvent) -> dict[str, Any]:
    return {"logprob": None, "top": None} if isinstance(event, Token) else {}


# --- alike -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"num_logprobs": 0},
        {"num_logprobs": 3},
        {"echo": True},
        {"echo": True, "num_logprobs": 0},
        {"echo": True, "num_logprobs": 3},
        {"max_tokens": 0},
        {"max_tokens": 0, "echo": True},
        {"max_tokens": 0, "echo": True, "num_logprobs": 3},
        {"max_tokens": 1},
        {"max_tokens": 100},
        {"top_p": 0.0, "temperature": 2.0},
        {"frequency_penalty": 1.5, "presence_penalty": 0.5, "max_tokens": 40},
        {"logit_bias": ((70, 8.0), (71, -100.0))},
        {"num_logprobs": 2, "logit_bias": ((70, 100.0),)},
    ],
    ids=str,
)
def test_greedy_answers_are_the_same_events(
    engine: VllmEngine, reference: TransformersEngine, asked: dict[str, Any]
) -> None:
    prompts = [engine.encode(prompt) for prompt in PROMPTS]
    assert prompts == [reference.encode(prompt) for prompt in PROMPTS]
    requests = [sequence(prompt, index=index, **asked) for index, prompt in enumerate(prompts)]
    for ours, theirs in zip(run(engine, *requests), run(reference, *requests), strict=True):
        _assert_alike(ours, theirs)


def test_a_prompt_that_fills_the_context_is_scored_to_its_last_token(
    engine: VllmEngine, reference: TransformersEngine
) -> None:
    prompt = (engine.encode(PROMPTS[0]) * CONTEXT_LENGTH)[:CONTEXT_LENGTH]
    request = sequence(prompt, max_tokens=0, echo=True, num_logprobs=2)
    [[ours], [theirs]] = run(engine, request), run(reference, request)
    _assert_alike(ours, theirs)
    assert len(tokens(ours)) == CONTEXT_LENGTH == engine.context_length == reference.context_length


@pytest.mark.parametrize("begin", [0, 3, 5, 8])
def test_a_stop_string_ends_the_answer_before_it(
    engine: VllmEngine, reference: TransformersEngine, begin: int
) -> None:
    prompt = engine.encode(PROMPTS[0])
    [whole] = run(engine, sequence(prompt, max_tokens=60))
    request = sequence(prompt, max_tokens=60, stop=(text(whole)[begin : begin + 3], "nowhere"))
    [[ours], [theirs]] = run(engine, request), run(reference, request)
    _assert_alike(ours, theirs)
    assert finish(ours).reason is FinishReason.STOP
    [after] = run(engine, sequence(prompt, max_tokens=60))
    _assert_alike(after, whole)


def test_the_end_token_ends_the_answer_and_counts_but_is_not_shown(
    folder: Path, tmp_path: Path, vllm: str
) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "generation_config.json").read_text())
    ends = [*range(0, 300, 7), 999_999]  # the last is no token of it
    (tmp_path / "generation_config.json").write_text(json.dumps(config | {"eos_token_id": ends}))
    ours, theirs = VllmEngine(tmp_path, OPTIONS), TransformersEngine(tmp_path)
    requests = [
        sequence(ours.encode(prompt), max_tokens=100, index=index) for index, prompt in enumerate(PROMPTS)
    ]
    answers = run(ours, *requests)
    for one, other in zip(answers, run(theirs, *requests), strict=True):
        _assert_alike(one, other)
    assert FinishReason.STOP in {finish(answer).reason for answer in answers}
    _closed(ours)
    theirs.close()


def test_a_seed_gives_the_same_answer_alone_and_beside_others(engine: VllmEngine) -> None:
    prompt, large = engine.encode(PROMPTS[0]), (1 << 64) - 1  # seeds have 64 bits, without a sign
    [alone] = run(engine, sequence(prompt, temperature=1.0, top_p=0.9, seed=large))
    crowd = [
        sequence(prompt, temperature=1.0, top_p=0.9, seed=large - index, index=index) for index in range(6)
    ]
    answers = run(engine, *crowd)
    assert raws(answers[0]) == raws(alone)
    assert len({tuple(raws(answer)) for answer in answers}) == 6


def test_what_is_drawn_is_drawn_by_the_parameters(
    stand_in: None, folder: Path, reference: TransformersEngine
) -> None:
    """The stand-in draws as the transformers engine does: with the same parameters, the same tokens."""
    engine = VllmEngine(folder, OPTIONS)
    requests = [
        sequence(
            engine.encode(prompt),
            temperature=0.5 + index / 2,
            top_p=1.0 - index / 10,
            seed=7 + index,
            index=index,
            num_logprobs=2,
            frequency_penalty=index / 4,
        )
        for index, prompt in enumerate(PROMPTS[:4])
    ]
    for ours, theirs in zip(run(engine, *requests), run(reference, *requests), strict=True):
        _assert_alike(ours, theirs)
    _closed(engine)


# --- what fails, waits and ends --------------------------------------------------------------------------------------


def test_a_version_whose_logits_are_not_finite_is_not_loaded(tmp_path: Path, vllm: str) -> None:
    write_tiny_export(tmp_path, seed=1, broken=True, hidden_size=HIDDEN_SIZE)
    with pytest.raises(EngineError, match="not finite"):
        VllmEngine(tmp_path, OPTIONS)


def test_a_prompt_whose_scores_are_no_numbers_fails(folder: Path) -> None:
    vocabulary = ExportTokenizer(folder).vocabulary()
    for max_tokens in (0, 1):
        request = sequence([1, 2, 3], max_tokens=max_tokens, echo=True, num_logprobs=1)
        answer = SequenceAnswer(request, vocabulary, frozenset())
        score = SimpleNamespace(logprob=math.nan, rank=1)
        read = [None, *[{token: score} for token in prompt_tokens(request)[1:]]]
        output = SimpleNamespace(prompt_logprobs=read, outputs=[], finished=False)
        with pytest.raises(EngineError, match="not finite"):
            answer.take(output)


def test_a_folder_that_is_no_export_is_refused(tmp_path: Path, vllm: str) -> None:
    with pytest.raises((OSError, ValueError)):
        VllmEngine(tmp_path, OPTIONS)


def test_weights_that_are_missing_are_refused(folder: Path, tmp_path: Path, vllm: str) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises((OSError, ValueError)):
        VllmEngine(tmp_path, OPTIONS)


def test_a_full_queue_refuses_a_request_whole_and_cancelled_ones_make_room(folder: Path, vllm: str) -> None:
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
    _closed(engine)


def test_closing_fails_what_is_in_flight_and_refuses_more(folder: Path, vllm: str) -> None:
    engine = VllmEngine(folder, OPTIONS)
    cancel, emitted = check_that_closing_fails_what_is_in_flight(engine, engine.encode(PROMPTS[0]))
    cancel()
    _closed(engine)
    cancel()
    assert not engine.status().alive
    assert emitted.empty()


def test_what_is_cancelled_or_stopped_is_aborted_and_what_ends_by_itself_is_not(
    stand_in: None, folder: Path
) -> None:
    engine = VllmEngine(folder, OPTIONS)
    [made] = vllm_stand_in.made
    prompt = engine.encode(PROMPTS[0])
    [whole] = run(engine, sequence(prompt, max_tokens=60))
    assert made.aborted == []
    run(engine, sequence(prompt, max_tokens=60, stop=(text(whole)[5:8],)))
    _eventually(lambda: made.aborted == ["2"])
    emitted: queue.SimpleQueue[list[EngineEvent]] = queue.SimpleQueue()
    cancel = engine.submit([sequence(prompt, max_tokens=100)], emitted.put)
    emitted.get(timeout=30)
    cancel()
    _eventually(lambda: made.aborted == ["2", "3"])
    assert not engine._tasks
    _closed(engine)
    assert made.is_shut_down


def test_what_vllm_refuses_fails_that_sequence_only(stand_in: None, folder: Path) -> None:
    engine = VllmEngine(folder, OPTIONS)
    prompt = engine.encode(PROMPTS[0])
    bad = sequence(prompt, frequency_penalty=3.0, index=0)
    [[refused], good] = run(engine, bad, sequence(prompt, index=1))
    assert isinstance(refused, SequenceFailed)
    assert refused.message == "ValueError: frequency_penalty: 3.0"
    assert finish(good).num_tokens == 20
    vllm_stand_in.made[-1].fails = MemoryError("no page left")
    [events] = run(engine, sequence(prompt))
    assert events[-1] == SequenceFailed(0, "MemoryError: no page left")
    vllm_stand_in.made[-1].fails = None
    assert finish(run(engine, sequence(prompt))[0]).num_tokens == 20
    _closed(engine)


def test_an_engine_whose_process_has_ended_says_so(stand_in: None, folder: Path) -> None:
    engine = VllmEngine(folder, OPTIONS)
    assert engine.status().alive
    vllm_stand_in.made[-1].dies = True
    [events] = run(engine, sequence(engine.encode(PROMPTS[0])))
    assert events == [SequenceFailed(0, "EngineDeadError: EngineCore encountered an issue.")]
    assert not engine.status().alive
    _closed(engine)


def test_an_engine_that_does_not_go_on_is_seen_to_stall(
    stand_in: None, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = VllmEngine(folder, OPTIONS)
    hold = threading.Event()
    prompt = engine.encode(PROMPTS[0])
    cancel = engine.submit([sequence(prompt, max_tokens=100)], lambda _: hold.wait(10) and None)
    _eventually(lambda: engine.status().stalled_seconds > 0.2)
    assert engine.status().cached_tokens >= len(prompt)
    hold.set()
    _eventually(lambda: engine.status().longest_turn_seconds >= 0.2)
    cancel()
    _eventually(lambda: engine.status().stalled_seconds == 0.0)
    assert engine.status().cached_tokens == 0
    _closed(engine)


def test_one_that_stalls_does_not_get_well_when_one_of_its_clients_leaves(
    stand_in: None, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = VllmEngine(folder, OPTIONS)

    monkeypatch.setattr(type(engine._engine), "_outputs", _hangs)
    request = sequence(engine.encode(PROMPTS[0]))
    first, second = (engine.submit([request], lambda _: None) for _ in range(2))
    _eventually(lambda: engine.status().stalled_seconds > 0.3)
    first()
    time.sleep(0.2)
    assert engine.status().stalled_seconds > 0.5
    second()
    _eventually(lambda: engine.status().stalled_seconds == 0.0)
    assert engine.status().longest_turn_seconds < 0.3, "how long it would have taken is not known"
    _closed(engine)


def test_one_that_is_loaded_and_does_not_answer_in_time_is_closed(
    stand_in: None, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = set(threading.enumerate())
    with monkeypatch.context() as patch:
        patch.setattr(vllm_stand_in.AsyncLLMEngine, "_outputs", _hangs)
        with pytest.raises(TimeoutError):
            VllmEngine(folder, OPTIONS, seconds=1.0)
    _eventually(lambda: set(threading.enumerate()) <= before)


async def _hangs(*_: Any) -> AsyncIterator[Any]:
    await asyncio.Event().wait()
    yield


def _eventually(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# --- which engine, and how it is configured --------------------------------------------------------------------------


def test_vllm_is_chosen_where_it_is_installed_and_there_is_a_gpu(
    stand_in: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader.torch.cuda, "is_available", lambda: False)
    assert isinstance(loader.engine_loader(0, {}), TransformersLoader)
    monkeypatch.setattr(loader.torch.cuda, "is_available", lambda: True)
    assert isinstance(loader.engine_loader(0, {}), VllmLoader)
    assert isinstance(loader.engine_loader(0, {"engine": "transformers"}), TransformersLoader)
    monkeypatch.setattr(vllm_library, "is_installed", lambda: False)
    assert isinstance(loader.engine_loader(0, {}), TransformersLoader)
    with pytest.raises(ValueError, match="'tgi' is not a valid EngineName"):
        loader.engine_loader(0, {"engine": "tgi"})


def test_options_that_are_not_given_are_the_engines_own(stand_in: None) -> None:
    chosen = loader.engine_loader(0, {"engine": "vllm", "max_waiting": 7})
    assert isinstance(chosen, VllmLoader)
    assert chosen._options == EngineOptions(max_slots=256, max_waiting=7)
    other = loader.engine_loader(0, {"engine": "transformers", "max_slots": 2})
    assert isinstance(other, TransformersLoader)
    assert other._options == EngineOptions(max_slots=2)


def test_asked_for_and_not_installed_it_is_said_what_is_missing(
    folder: Path, artifacts: Artifacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_library, "is_installed", lambda: False)
    chosen = loader.engine_loader(0, {"engine": "vllm"})
    with pytest.raises(EngineError, match=r"pip install 'pathswitch\[vllm\]'"):
        chosen.load(folder, 60)
    with pytest.raises(ValueError, match="vLLM is not installed"):
        LocalServing(artifacts, "127.0.0.1", 0, engine={"engine": "vllm"})


def test_versions_are_served_beside_each_other(stand_in: None, artifacts: Artifacts) -> None:
    serving = LocalServing(artifacts, "127.0.0.1", 0, engine={"engine": "vllm", "max_slots": 4})
    answers = []
    try:
        for number in (1, 2):
            settle(serving, line(number))
            asked = COMPLETION | {"temperature": 0, "max_tokens": 8}
            answers.append(httpx.post(f"{serving.url()}/v1/completions", json=asked, timeout=30).json())
    finally:
        serving.close()
    assert [answer["system_fingerprint"] for answer in answers] == ["line@1", "line@2"]
    assert answers[0]["choices"] != answers[1]["choices"]
    _eventually(lambda: all(made.is_shut_down for made in vllm_stand_in.made))


def test_memory_is_asked_for_so_that_another_version_fits_beside(stand_in: None, folder: Path) -> None:
    engine = VllmEngine(folder, OPTIONS)
    args = vllm_stand_in.made[-1].args
    per_token = 2 * 2 * 2 * (HIDDEN_SIZE // 4) * 4
    assert args.kv_cache_memory_bytes == 5 * CONTEXT_LENGTH * per_token
    assert args.max_num_seqs == 4
    assert args.max_model_len == CONTEXT_LENGTH
    needed = VllmLoader(OPTIONS).needed_bytes(folder)
    assert args.kv_cache_memory_bytes < needed < args.kv_cache_memory_bytes + (3 << 30)
    assert 0 < args.gpu_memory_utilization <= 1
    assert VllmLoader().free_bytes() > 1 << 20
    _closed(engine)


def test_no_parameter_is_left_to_the_export() -> None:
    arguments = sampling_arguments(sequence([1, 2], stop=("x",), seed=-1 & (1 << 64) - 1), frozenset({5, 3}))
    assert arguments["ignore_eos"]
    assert arguments["stop_token_ids"] == [3, 5]
    assert "stop" not in arguments
    assert arguments["seed"] == (1 << 63) - 1
    assert sampling_arguments(sequence([1, 2], max_tokens=0), frozenset())["allowed_token_ids"] == [2]


# --- against the real interface --------------------------------------------------------------------------------------


@needs_vllm
def test_the_real_interface_has_what_is_used_of_it_and_the_stand_in_no_more() -> None:
    import vllm
    from vllm.config import CacheConfig
    from vllm.inputs import TokensInput, tokens_input
    from vllm.logprobs import Logprob
    from vllm.outputs import CompletionOutput, RequestOutput
    from vllm.sampling_params import RequestOutputKind

    real: dict[type, set[str]] = {
        vllm_stand_in.AsyncEngineArgs: set(inspect.signature(vllm.AsyncEngineArgs).parameters),
        vllm_stand_in.SamplingParams: set(inspect.signature(vllm.SamplingParams).parameters),
        vllm_stand_in.RequestOutput: set(inspect.signature(RequestOutput).parameters),
        vllm_stand_in.CompletionOutput: set(inspect.signature(CompletionOutput).parameters),
        vllm_stand_in.Logprob: set(inspect.signature(Logprob).parameters),
    }
    for ours, theirs in real.items():
        assert {field.name for field in dataclasses.fields(ours)} <= theirs
    defaults = inspect.signature(vllm.SamplingParams).parameters
    for field in dataclasses.fields(vllm_stand_in.SamplingParams):
        assert field.name == "output_kind" or field.default == defaults[field.name].default
    assert {kind.name for kind in RequestOutputKind} == {k.name for k in vllm_stand_in.RequestOutputKind}
    assert tokens_input([1]) == vllm_stand_in.tokens_input([1])
    assert set(vllm_stand_in.TokensInput.__annotations__) <= set(TokensInput.__annotations__)
    engine = vllm.AsyncLLMEngine
    names = ("prompt", "sampling_params", "request_id")
    assert tuple(inspect.signature(engine.generate).parameters)[1:4] == names
    assert "engine_args" in inspect.signature(engine.from_engine_args).parameters
    assert callable(engine.shutdown)
    assert isinstance(engine.errored, property)
    assert "kv_cache_size_tokens" in {field.name for field in dataclasses.fields(CacheConfig)}


@needs_vllm
def test_the_real_parameters_take_what_they_are_given(folder: Path) -> None:
    import vllm

    arguments = engine_arguments(
        folder, OPTIONS, context_length=CONTEXT_LENGTH, cache_bytes=1 << 20, memory_share=0.1
    )
    assert vllm.AsyncEngineArgs(**arguments).kv_cache_memory_bytes == 1 << 20
    asked: list[SequenceRequest] = [
        sequence([1, 2], seed=(1 << 64) - 1, temperature=2.0, top_p=0.0, logit_bias=((1, 100.0),)),
        sequence([1, 2], max_tokens=0, echo=True, num_logprobs=20),
        sequence([1, 2], temperature=1e-9, frequency_penalty=2.0, presence_penalty=-2.0),
    ]
    for request in asked:
        assert vllm.SamplingParams(**sampling_arguments(request, frozenset({0}))).max_tokens >= 1
