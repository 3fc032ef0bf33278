"""Estimates an engine's memory from its export, and reports the device's free memory."""

import json
import math
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoConfig

from service.core.artifact_files import CONFIG
from workers.serving.engine import processes

_CGROUP = Path("/sys/fs/cgroup")
_FLOAT32_BYTES = 4
_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


def this_device() -> torch.device:
    """The device that this process's engines run on."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def context_length(config: Any) -> int:
    """Context length in a text model's config. Raises ValueError if it is missing."""
    length: int | None = getattr(config, "max_position_embeddings", None)
    if not length:
        raise ValueError(f"{CONFIG} has no max_position_embeddings")
    return length


def weight_bytes(folder: Path, device: torch.device, *, widest: int = 8) -> int:
    """Memory of the weights: float32 on a CPU, otherwise at most ``widest`` bytes a number."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder}: no *.safetensors")
    num_bytes = 0
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a mapping
                tensor = tensors.get_slice(name)
                stored_bytes = _BYTES.get(tensor.get_dtype(), 1)
                number_bytes = _FLOAT32_BYTES if device.type == "cpu" else min(stored_bytes, widest)
                num_bytes += number_bytes * math.prod(tensor.get_shape())
    return num_bytes


def cache_bytes(folder: Path, device: torch.device, *, num_slots: int, max_bytes: int) -> int:
    """Memory of the keys and values of ``num_slots`` sequences of full length, at most ``max_bytes``."""
    config: Any = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    text = config.get_text_config()
    try:
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        per_token = 2 * text.num_hidden_layers * heads * width
        per_sequence = int(per_token * text.max_position_embeddings)
    except AttributeError:  # an architecture with other fields: assume the whole budget
        return max_bytes
    number_bytes = _FLOAT32_BYTES if device.type == "cpu" else _stored_bytes(folder)
    return min(max_bytes, num_slots * per_sequence * number_bytes)


def free_bytes(device: torch.device) -> int:
    """Free memory of the device, or of this process's control group if that is less.

    On a GPU it excludes the context that each process needs to use it.
    """
    if device.type == "cuda":
        return _gpu_bytes(device)[0]
    free = _host_bytes("MemAvailable")
    limit, used = _number(_CGROUP / "memory.max"), _number(_CGROUP / "memory.current")
    if limit is not None and used is not None:
        free = min(free, max(limit - used + _reclaimable(), 0))
    return free


def total_bytes(device: torch.device) -> int:
    """Total memory of the device."""
    if device.type == "cuda":
        return _gpu_bytes(device)[1]
    return _host_bytes("MemTotal")


def _gpu_bytes(device: torch.device) -> tuple[int, int]:
    """Free and total memory of a GPU.

    Asking creates a context that the process keeps until it ends, half a GiB on an H100. A process without a
    context therefore asks through a short-lived one.
    """
    if not torch.cuda.is_initialized():
        with ProcessPoolExecutor(max_workers=1, mp_context=processes.context) as pool:
            return pool.submit(torch.cuda.mem_get_info, device).result()
    free, total = torch.cuda.mem_get_info(device)
    # Memory that torch has cached but does not use is free for the next engine, although the driver counts
    # it.
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device), total


def _host_bytes(field: str) -> int:
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(fields[field].split()[0]) << 10


def _reclaimable() -> int:
    """File cache of the control group that the kernel can reclaim."""
    try:
        lines = (_CGROUP / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    fields = dict(line.split() for line in lines)
    return int(fields.get("inactive_file", 0)) + int(fields.get("slab_reclaimable", 0))


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # no such control group, or "max"
        return None


def _stored_bytes(folder: Path) -> int:
    """Bytes per number in the type that the export is stored in."""
    config = json.loads((folder / CONFIG).read_text())
    name: str = config.get("dtype") or config.get("torch_dtype") or "float32"
    dtype: torch.dtype = getattr(torch, name)
    return dtype.itemsize
