"""Applies a line's numerics (threads, deterministic kernels) to this process, and tunes its heap."""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils.deterministic

from service.core.stage_specs import Numerics

# Options of glibc's mallopt (malloc.h).
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


@contextmanager
def numerics_applied(numerics: Numerics) -> Iterator[None]:
    """Apply the process-wide settings that change bits, and restore the previous ones at the end."""
    if numerics.device == "cuda":
        # cuBLAS is deterministic only with a fixed workspace, and reads this variable when it starts.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    threads = torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    settings: Any = torch.utils.deterministic  # its attributes exist only at run time
    fill = settings.fill_uninitialized_memory
    torch.set_num_threads(numerics.threads)
    torch.use_deterministic_algorithms(numerics.deterministic)
    # Every tensor is written before it is read: filling new ones with NaN would waste memory bandwidth.
    settings.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)
        settings.fill_uninitialized_memory = fill


def keep_freed_memory() -> None:
    """Make glibc keep freed memory instead of returning it to the kernel. Does nothing without glibc.

    Otherwise the kernel maps and zeroes every large tensor of every step again: with 7 M parameters and 4,096
    tokens per step, 140,000 page faults and a tenth of the time. The process keeps its peak memory until it
    ends.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 0x7FFFFFFF)
