"""What an engine takes of a device's memory, and what is free of it, before any of it is taken."""

import json
import math
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoConfig

from workers.serving.engine import processes

_CGROUP = Path("/sys/fs/cgroup")
_FLOAT32_BYTES = 4
_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


def this_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def context_length(config: Any) -> int:
    """Of a text model's config. Raises ValueError."""
    length: int | None = getattr(config, "max_position_embeddings", None)
    if not length:
        raise ValueError("config.json has no max_position_embeddings")
    return length


def weight_bytes(folder: Path, device: torch.device, *, widest: int = 8) -> int:
    """Of the weights as they are computed with: as stored, but no number wider than ``widest`` bytes. On a CPU that is
    float32.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder}: no *.safetensors")
    num_bytes = 0
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a mapping
                part = tensors.get_slice(name)
                stored = _BYTES.get(part.get_dtype(), 1)
                each = _FLOAT32_BYTES if device.type == "cpu" else min(stored, widest)
                num_bytes += each * math.prod(part.get_shape())
    return num_bytes


def cache_bytes(folder: Path, device: torch.device, *, num_slots: int, most: int) -> int:
    """Of keys and values for ``num_slots`` sequences as long as the context, at most ``most``."""
    config: Any = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    text = config.get_text_config()
    try:
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        per_token = 2 * text.num_hidden_layers * heads * width
        of_a_sequence = int(per_token * text.max_position_embeddings)
    except AttributeError:  # a kind of model that counts otherwise: then all that it may have
        return most
    each = _FLOAT32_BYTES if device.type == "cpu" else _width(folder)
    return min(most, num_slots * of_a_sequence * each)


def free_bytes(device: torch.device) -> int:
    """Of the device, or of this process's control group where that has less. Of a GPU, beside the context that a process needs
    to use it.
    """
    if device.type == "cuda":
        return _gpu_bytes(device)[0]
    free = _host_bytes("MemAvailable")
    limit, used = _number(_CGROUP / "memory.max"), _number(_CGROUP / "memory.current")
    if limit is not None and used is not None:
        free = min(free, max(limit - used + _reclaimable(), 0))
    return free


def total_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return _gpu_bytes(device)[1]
    return _host_bytes("MemTotal")


def _gpu_bytes(device: torch.device) -> tuple[int, int]:
    """Free, and in all. A process that only asks would keep a context there for good, half a GiB on an H100: where this one
    has none, another is asked and ends.
    """
    if not torch.cuda.is_initialized():
        with ProcessPoolExecutor(max_workers=1, mp_context=processes.context) as pool:
            return pool.submit(torch.cuda.mem_get_info, device).result()
    free, total = torch.cuda.mem_get_info(device)
    # What torch has cached and does not use is free to the next engine, though the driver does not know.
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device), total


def _host_bytes(field: str) -> int:
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(fields[field].split()[0]) << 10


def _reclaimable() -> int:
    """Bytes of files that the control group holds in memory and would give up."""
    try:
        lines = (_CGROUP / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    fields = dict(line.split() for line in lines)
    return int(fields.get("inactive_file", 0)) + int(fields.get("slab_reclaimable", 0))


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # none of that kind, or "max"
        return None


def _width(folder: Path) -> int:
    """Bytes of a number of the type that the export is stored in."""
    config = json.loads((folder / "config.json").read_text())
    named: str = config.get("dtype") or config.get("torch_dtype") or "float32"
    dtype: torch.dtype = getattr(torch, named)
    return dtype.itemsize
