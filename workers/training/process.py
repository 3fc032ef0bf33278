"""What a line's numerics mean for this process: threads, deterministic kernels; and a heap that is kept."""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils.deterministic

from service.core.stage_specs import Numerics

# Parameters of glibc's mallopt.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


@contextmanager
def numerics_applied(numerics: Numerics) -> Iterator[None]:
    """Set what changes bits in this process, and put back what was set before."""
    if numerics.device == "cuda":
        # cuBLAS reads it when it starts, and is deterministic only with a fixed workspace.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    threads = torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    # A module whose attributes are made at run time.
    filling: Any = torch.utils.deterministic
    fill = filling.fill_uninitialized_memory
    torch.set_num_threads(numerics.threads)
    torch.use_deterministic_algorithms(numerics.deterministic)
    # Every tensor is written before it is read; filling each with NaN first costs a pass over memory.
    filling.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)
        filling.fill_uninitialized_memory = fill


def keep_freed_memory() -> None:
    """Have glibc keep what is freed instead of handing it back to the kernel at once; elsewhere do nothing.

    Every large tensor of a step is otherwise mapped afresh and zeroed page by page (7 M parameters, 4,096
    tokens a step: 140,000 page faults and a tenth of the time). The process keeps its peak memory until it
    ends.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 0x7FFFFFFF)
