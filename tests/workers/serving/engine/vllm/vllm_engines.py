"""Settings of the vLLM engines under test, and what is compared between engines."""

import dataclasses
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import pytest

from tests.support.waiting import until
from tests.workers.serving.engine.engine_client import (
    tokens,
)
from workers.serving.engine.options import EngineOptions
from workers.serving.engine.port import EngineEvent
from workers.serving.engine.vllm.engine import VllmEngine
from workers.serving.generation import Token

PROMPTS = ("The cat sat on", "Grüße", "the dog", "5 €", "")
OPTIONS = EngineOptions(max_slots=4, kv_cache_bytes=64 << 20, max_waiting=4)
HIDDEN_SIZE = 128  # vLLM's attention needs heads of 32

# vLLM leaves its sockets to the garbage collector, which warns during any later test.
OPEN_SOCKETS = [] if find_spec("vllm") is None else [pytest.mark.filterwarnings("default")]
needs_vllm = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")


def close(engine: VllmEngine) -> None:
    engine.close()
    until(lambda: not engine.status().alive)


def assert_alike(ours: Sequence[EngineEvent], theirs: Sequence[EngineEvent]) -> None:
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
