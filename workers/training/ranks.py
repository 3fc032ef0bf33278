"""What this process is among the training processes. Without ``torch.distributed`` it is the only one."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import distributed

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    rank: int
    world: int
    device: torch.device

    @classmethod
    def current(cls, device: str) -> "Ranks":
        """Join the process group that the caller has set up, on the CUDA device that the caller has set."""
        place = torch.device("cuda", torch.cuda.current_device()) if device == "cuda" else torch.device("cpu")
        if not distributed.is_initialized():
            return cls(0, 1, place)
        return cls(distributed.get_rank(), distributed.get_world_size(), place)

    @property
    def first(self) -> bool:
        return self.rank == 0

    def add(self, *values: float) -> list[float]:
        """Sum each value over the ranks; a collective: every rank calls it equally often."""
        if self.world == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        distributed.all_reduce(tensor)
        return [float(value) for value in tensor.tolist()]

    def from_first(self, compute: Callable[[], T]) -> T:
        """Compute something small on the first rank and have it on all."""
        value = [compute() if self.first else None]
        if self.world > 1:
            distributed.broadcast_object_list(value, src=0, device=self.device)
        return value[0]  # type: ignore[return-value]

    def wait(self) -> None:
        """Return when every rank has come here."""
        self.add(0.0)
