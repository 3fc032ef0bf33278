"""vLLM's outputs that are not numbers fail their sequence."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.workers.serving.engine.engine_client import (
    sequence,
)
from workers.serving.engine.port import (
    EngineError,
)
from workers.serving.engine.text.tokenizer import ExportTokenizer
from workers.serving.engine.vllm.arguments import prompt_tokens
from workers.serving.engine.vllm.outputs import SequenceOutputs


def test_a_prompt_with_nan_scores_fails(folder: Path) -> None:
    vocabulary = ExportTokenizer(folder).vocabulary()
    for max_tokens in (0, 1):
        request = sequence([1, 2, 3], max_tokens=max_tokens, echo=True, num_logprobs=1)
        answer = SequenceOutputs(request, vocabulary, frozenset())
        score = SimpleNamespace(logprob=math.nan, rank=1)
        read = [None, *[{token: score} for token in prompt_tokens(request)[1:]]]
        output = SimpleNamespace(prompt_logprobs=read, outputs=[], finished=False)
        with pytest.raises(EngineError, match="not finite"):
            answer.take(output)
