"""Estimates the memory of a vLLM engine before it is loaded."""

from pathlib import Path

from workers.serving.engine import memory
from workers.serving.engine.options import EngineOptions

# vLLM's cache is paged: a slot takes only the memory of its tokens, so many slots are cheap.
DEFAULTS = EngineOptions(max_slots=256, max_waiting=256)
NUMBER_BYTES = 2  # per weight: vLLM computes float32 exports in bfloat16 (``dtype`` "auto")
OVERHEAD_BYTES = 2 << 30  # estimate for the process's context, activations and CUDA graphs


def cache_bytes(folder: Path, options: EngineOptions) -> int:
    """Memory of the KV cache, with one sequence to spare: pages are partly empty, and vLLM reserves one."""
    return memory.cache_bytes(
        folder, memory.this_device(), num_slots=options.max_slots + 1, max_bytes=options.kv_cache_bytes
    )


def needed_bytes(folder: Path, options: EngineOptions) -> int:
    """Memory of the whole engine."""
    weights = memory.weight_bytes(folder, memory.this_device(), widest=NUMBER_BYTES)
    return weights + cache_bytes(folder, options) + OVERHEAD_BYTES
