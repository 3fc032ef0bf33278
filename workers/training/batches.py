"""The token rows of every step, as this rank's micro-batches."""

from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from service.artifacts import Artifacts
from service.core.stage_specs import TrainStage
from workers.data.pack import Pack
from workers.data.rows import StageRows
from workers.training.ranks import Ranks

# Each holds a file open, and a process may often have no more than a thousand.
OPEN_PACKS = 128


class Batches:
    """Reads a stage's rows from its packs, each verified when it is first read from."""

    def __init__(self, stage: TrainStage, artifacts: Artifacts, ranks: Ranks) -> None:
        self._rows = StageRows(stage)
        self._ledger = stage.ledger
        self._micro_rows = stage.line.micro_batch_rows or stage.line.batch_rows
        self._artifacts = artifacts
        self._ranks = ranks
        self._folders: dict[int, Path] = {}  # of packs that were verified
        self._packs: OrderedDict[int, Pack] = OrderedDict()  # those that are open, the last used at the end

    def of_step(self, step: int) -> list[Tensor]:
        """This rank's rows of the global ``step``, every ``world``-th, of shape (rows, length + 1)."""
        rows = self._rows.of_step(step)[self._ranks.rank :: self._ranks.world]
        tokens = np.stack([self._pack(row.version).row(row.number) for row in rows])
        return list(torch.split(torch.from_numpy(tokens).to(self._ranks.device), self._micro_rows))

    def _pack(self, version: int) -> Pack:
        if version not in self._packs:
            if version not in self._folders:
                self._folders[version] = self._artifacts.open(self._ledger[version].pack_key)
            self._packs[version] = Pack(self._folders[version])
            if len(self._packs) > OPEN_PACKS:
                self._packs.popitem(last=False)
        self._packs.move_to_end(version)
        return self._packs[version]
