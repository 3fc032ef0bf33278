"""vLLM gets all settings from our options and requests."""

from pathlib import Path

from tests.support.tiny_export import CONTEXT_LENGTH
from tests.workers.serving.engine.engine_client import (
    sequence,
)
from tests.workers.serving.engine.vllm import stand_in
from tests.workers.serving.engine.vllm.vllm_engines import (
    HIDDEN_SIZE,
    OPEN_SOCKETS,
    OPTIONS,
    close,
)
from workers.serving.engine.vllm.arguments import sampling_arguments
from workers.serving.engine.vllm.engine import VllmEngine
from workers.serving.engine.vllm.loader import VllmLoader

pytestmark = OPEN_SOCKETS


def test_the_memory_setting_leaves_room_for_another_version(fake_vllm: None, folder: Path) -> None:
    engine = VllmEngine(folder, OPTIONS)
    args = stand_in.engines[-1].args
    per_token = 2 * 2 * 2 * (HIDDEN_SIZE // 4) * 4
    assert args.kv_cache_memory_bytes == 5 * CONTEXT_LENGTH * per_token
    assert args.max_num_seqs == 4
    assert args.max_model_len == CONTEXT_LENGTH
    needed = VllmLoader(OPTIONS).needed_bytes(folder)
    assert args.kv_cache_memory_bytes < needed < args.kv_cache_memory_bytes + (3 << 30)
    assert 0 < args.gpu_memory_utilization <= 1
    assert VllmLoader().free_bytes() > 1 << 20
    close(engine)


def test_requests_override_every_sampling_default_of_the_export() -> None:
    arguments = sampling_arguments(sequence([1, 2], stop=("x",), seed=-1 & (1 << 64) - 1), frozenset({5, 3}))
    assert arguments["ignore_eos"]
    assert arguments["stop_token_ids"] == [3, 5]
    assert "stop" not in arguments
    assert arguments["seed"] == (1 << 63) - 1
    assert sampling_arguments(sequence([1, 2], max_tokens=0), frozenset())["allowed_token_ids"] == [2]
