"""Reads the token rows of a step as this rank's micro-batches."""

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

# Each open pack holds a file descriptor, and the usual limit is 1,024 per process.
OPEN_PACKS = 128


class Batches:
    """Reads a stage's rows from its packs. Verifies a pack when it first reads from it."""

    def __init__(self, stage: TrainStage, artifacts: Artifacts, ranks: Ranks) -> None:
        self._rows = StageRows(stage)
        self._ledger = stage.ledger
        self._micro_rows = stage.line.micro_batch_rows or stage.line.batch_rows
        self._artifacts = artifacts
        self._ranks = ranks
        self._folders: dict[int, Path] = {}  # the verified packs, by position in the ledger
        self._packs: OrderedDict[int, Pack] = OrderedDict()  # the open packs, most recently used last

    def of_step(self, step: int) -> list[Tensor]:
        """This rank's rows of the global ``step``, as micro-batches of shape (rows, sequence_length + 1).

        Rank r of n gets rows r, r + n, r + 2n, …
        """
        rows = self._rows.of_step(step)[self._ranks.rank :: self._ranks.world]
        tokens_BT = np.stack([self._pack(row.version).row(row.number) for row in rows])
        return list(torch.split(torch.from_numpy(tokens_BT).to(self._ranks.device), self._micro_rows))

    def _pack(self, version: int) -> Pack:
        if version not in self._packs:
            if version not in self._folders:
                self._folders[version] = self._artifacts.open(self._ledger[version].pack_key)
            self._packs[version] = Pack(self._folders[version])
            if len(self._packs) > OPEN_PACKS:
                self._packs.popitem(last=False)
        self._packs.move_to_end(version)
        return self._packs[version]
