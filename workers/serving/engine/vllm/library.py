"""Access to vLLM itself, which is imported only when an engine is loaded."""

import os
from importlib.util import find_spec
from typing import Any

from workers.serving.engine.port import SequenceRequest
from workers.serving.engine.vllm.arguments import prompt_tokens, sampling_arguments

NOT_INSTALLED = "vLLM is not installed: pip install 'pathswitch[vllm]'"


def is_installed() -> bool:
    return find_spec("vllm") is not None


def start_engine(arguments: dict[str, Any]) -> Any:
    """Start an ``AsyncLLMEngine`` on the running event loop, which it blocks for minutes."""
    # Never fork vLLM's process from this one, which has threads and may have used the GPU. Send no usage
    # statistics.
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    import vllm

    return vllm.AsyncLLMEngine.from_engine_args(vllm.AsyncEngineArgs(**arguments))


def prompt_and_parameters(request: SequenceRequest, end_tokens: frozenset[int]) -> tuple[Any, Any]:
    """A request's prompt and sampling parameters as vLLM's types."""
    from vllm import SamplingParams
    from vllm.inputs import tokens_input
    from vllm.sampling_params import RequestOutputKind

    arguments = sampling_arguments(request, end_tokens)
    return tokens_input(prompt_tokens(request)), SamplingParams(
        **arguments, output_kind=RequestOutputKind.DELTA
    )
