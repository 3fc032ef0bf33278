"""This process's rank in the training process group. Without ``torch.distributed`` it is the only rank."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import distributed

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """The rank of this process, the number of processes (``world``), and the device that this one trains on."""

    rank: int
    world: int
    device: torch.device

    @classmethod
    def current(cls, device: str) -> "Ranks":
        """Describe this process in the process group and on the CUDA device that its starter has set up."""
        here = torch.device("cuda", torch.cuda.current_device()) if device == "cuda" else torch.device("cpu")
        if not distributed.is_initialized():
            return cls(0, 1, here)
        return cls(distributed.get_rank(), distributed.get_world_size(), here)

    @property
    def first(self) -> bool:
        return self.rank == 0

    def add(self, *values: float) -> list[float]:
        """Sum each value over the ranks. A collective operation: every rank must call it."""
        if self.world == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        distributed.all_reduce(tensor)
        return [float(value) for value in tensor.tolist()]

    def from_first(self, compute: Callable[[], T]) -> T:
        """Compute a small value on the first rank and broadcast it. A collective operation."""
        value = [compute() if self.first else None]
        if self.world > 1:
            distributed.broadcast_object_list(value, src=0, device=self.device)
        return value[0]  # type: ignore[return-value]

    def wait(self) -> None:
        """Block until every rank has called this."""
        self.add(0.0)
