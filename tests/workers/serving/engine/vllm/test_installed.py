"""The installed vLLM has the interface that our code and the stand-in assume."""

import dataclasses
import inspect
from pathlib import Path

from tests.support.tiny_export import CONTEXT_LENGTH
from tests.workers.serving.engine.engine_client import (
    sequence,
)
from tests.workers.serving.engine.vllm import stand_in
from tests.workers.serving.engine.vllm.vllm_engines import (
    OPEN_SOCKETS,
    OPTIONS,
    needs_vllm,
)
from workers.serving.engine.port import (
    SequenceRequest,
)
from workers.serving.engine.vllm.arguments import engine_arguments, sampling_arguments

pytestmark = OPEN_SOCKETS


@needs_vllm
def test_the_installed_vllm_has_the_interface_of_the_stand_in() -> None:
    import vllm
    from vllm.config import CacheConfig
    from vllm.inputs import TokensInput, tokens_input
    from vllm.logprobs import Logprob
    from vllm.outputs import CompletionOutput, RequestOutput
    from vllm.sampling_params import RequestOutputKind

    real: dict[type, set[str]] = {
        stand_in.AsyncEngineArgs: set(inspect.signature(vllm.AsyncEngineArgs).parameters),
        stand_in.SamplingParams: set(inspect.signature(vllm.SamplingParams).parameters),
        stand_in.RequestOutput: set(inspect.signature(RequestOutput).parameters),
        stand_in.CompletionOutput: set(inspect.signature(CompletionOutput).parameters),
        stand_in.Logprob: set(inspect.signature(Logprob).parameters),
    }
    for ours, theirs in real.items():
        assert {field.name for field in dataclasses.fields(ours)} <= theirs
    defaults = inspect.signature(vllm.SamplingParams).parameters
    for field in dataclasses.fields(stand_in.SamplingParams):
        assert field.name == "output_kind" or field.default == defaults[field.name].default
    assert {kind.name for kind in RequestOutputKind} == {k.name for k in stand_in.RequestOutputKind}
    assert tokens_input([1]) == stand_in.tokens_input([1])
    assert set(stand_in.TokensInput.__annotations__) <= set(TokensInput.__annotations__)
    engine = vllm.AsyncLLMEngine
    names = ("prompt", "sampling_params", "request_id")
    assert tuple(inspect.signature(engine.generate).parameters)[1:4] == names
    assert "engine_args" in inspect.signature(engine.from_engine_args).parameters
    assert callable(engine.shutdown)
    assert isinstance(engine.errored, property)
    assert "kv_cache_size_tokens" in {field.name for field in dataclasses.fields(CacheConfig)}


@needs_vllm
def test_the_installed_vllm_accepts_our_arguments(folder: Path) -> None:
    import vllm

    arguments = engine_arguments(
        folder, OPTIONS, context_length=CONTEXT_LENGTH, cache_bytes=1 << 20, memory_share=0.1
    )
    assert vllm.AsyncEngineArgs(**arguments).kv_cache_memory_bytes == 1 << 20
    requests: list[SequenceRequest] = [
        sequence([1, 2], seed=(1 << 64) - 1, temperature=2.0, top_p=0.0, logit_bias=((1, 100.0),)),
        sequence([1, 2], max_tokens=0, echo=True, num_logprobs=20),
        sequence([1, 2], temperature=1e-9, frequency_penalty=2.0, presence_penalty=-2.0),
    ]
    for request in requests:
        assert vllm.SamplingParams(**sampling_arguments(request, frozenset({0}))).max_tokens >= 1
