"""vLLM itself: whether it is there, and what is made of its types. It is imported only when an engine is."""

import os
from importlib.util import find_spec
from typing import Any

from workers.serving.engine.port import SequenceRequest
from workers.serving.engine.vllm_requests import prompt_tokens, sampling_arguments

NOT_INSTALLED = "vLLM is not installed: pip install 'pathswitch[vllm]'"


def is_installed() -> bool:
    return find_spec("vllm") is not None


def start_engine(arguments: dict[str, Any]) -> Any:
    """An ``AsyncLLMEngine`` on the loop that runs. It takes minutes, and the loop with them."""
    # Its process is never forked from this one, which has threads and may have used the GPU; it reports to nobody.
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    import vllm

    return vllm.AsyncLLMEngine.from_engine_args(vllm.AsyncEngineArgs(**arguments))


def parameters(request: SequenceRequest, end_tokens: frozenset[int]) -> tuple[Any, Any]:
    """Prompt and parameters in vLLM's own types."""
    from vllm import SamplingParams
    from vllm.inputs import tokens_input
    from vllm.sampling_params import RequestOutputKind

    arguments = sampling_arguments(request, end_tokens)
    return tokens_input(prompt_tokens(request)), SamplingParams(
        **arguments, output_kind=RequestOutputKind.DELTA
    )
