"""Measures the hardware of a training process: everything about it that changes bits."""

import os
import time
from pathlib import Path

import torch

from service.core.executor import Capabilities

# Without one of these instructions a CPU emulates bf16 products, several times slower than fp32.
_BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16"})


def measure_capabilities(workers: int) -> Capabilities:
    """Describe one of ``workers`` training processes that share this machine's cores."""
    threads = max(1, len(os.sched_getaffinity(0)) // workers)
    if torch.cuda.is_available():
        return Capabilities(
            "cuda", bf16=torch.cuda.is_bf16_supported(including_emulation=False), threads=threads
        )
    return Capabilities("cpu", bf16=bool(_BF16_FLAGS & cpu_flags()) and bf16_is_faster(), threads=threads)


def cpu_flags() -> set[str]:
    """The instruction sets of this CPU, as the kernel names them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except FileNotFoundError:
        return set()
    return {flag for line in lines if line.startswith("flags") for flag in line.split(":", 1)[1].split()}


def bf16_is_faster() -> bool:
    """Measure whether this CPU multiplies matrices faster in bf16 than in fp32."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _matmul_seconds(torch.bfloat16) < _matmul_seconds(torch.float32)
    finally:
        torch.set_num_threads(threads)


def _matmul_seconds(dtype: torch.dtype) -> float:
    """CPU seconds of this thread for the fastest of five matrix products as large as a small model's.

    Wall-clock time would depend on the load of the machine and could resolve two equal lines to different
    bits.
    """
    a, b = torch.ones(1024, 512, dtype=dtype), torch.ones(512, 512, dtype=dtype)
    fastest = float("inf")
    for _ in range(5):
        start = time.thread_time()
        a @ b
        fastest = min(fastest, time.thread_time() - start)
    return fastest
