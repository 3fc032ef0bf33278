"""Training over Ray that records the rows it reads: ``python -m tests.support.recorded_rows <run id> <url>``.

It replaces ``workers.executors.ray_job`` through the interpreter that a RayExecutor is given. Every rank writes a line per step to
its own file beside the artifacts, which survives a SIGKILL.
"""

import hashlib
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from service.artifacts import Artifacts, open_artifacts
from service.core.stage_specs import TrainStage
from workers.executors import ray_job
from workers.training.batches import Batches
from workers.training.ranks import Ranks

FOLDER = "rows-read"


@dataclass(frozen=True)
class RankRows:
    """The rows that one rank read for one step: a hash of each row's tokens, in order."""

    step: int
    rank: int
    world: int
    rows: tuple[str, ...]


def interpreter(path: Path) -> str:
    """Write an executable that starts the recording job in place of ``python -m workers.executors.ray_job``."""
    path.write_text(f'#!/bin/sh\nshift 2\nexec {sys.executable} -m {__name__} "$@"\n')
    path.chmod(0o755)
    return str(path)


def rows_read(artifacts: Artifacts) -> list[list[RankRows]]:
    """The recorded rows, one list per rank and attempt, in the order in which the ranks started."""
    files = sorted((artifacts.root.parent / FOLDER).iterdir(), key=lambda file: int(file.stem.split("-")[0]))
    reads = [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
    return [[RankRows(**(read | {"rows": tuple(read["rows"])})) for read in one] for one in reads]


def rows_of(artifacts: Artifacts, stage: TrainStage, steps: Sequence[int]) -> dict[int, tuple[str, ...]]:
    """The rows of these steps of the stage, in the order in which ranks receive them."""
    batches = Batches(stage, artifacts, Ranks(0, 1, torch.device("cpu")))
    return {step: _hashes(batches.of_step(step)) for step in steps}


def main(run_id: str, artifacts_url: str) -> None:
    ray_job.train_chain = recorded_chain
    ray_job.main(run_id, artifacts_url)


def recorded_chain(config: dict[str, Any]) -> None:
    """Runs in a rank's own process, so the patched method disappears with the process."""
    folder = open_artifacts(config["artifacts_url"]).root.parent / FOLDER
    folder.mkdir(exist_ok=True)
    of_step = Batches.of_step
    with (folder / f"{time.monotonic_ns()}-{os.getpid()}.jsonl").open("a", buffering=1) as file:

        def recorded(batches: Batches, step: int) -> list[torch.Tensor]:
            tokens = of_step(batches, step)
            ranks = batches._ranks
            print(json.dumps(vars(RankRows(step, ranks.rank, ranks.world, _hashes(tokens)))), file=file)
            return tokens

        Batches.of_step = recorded  # type: ignore[method-assign]
        ray_job.train_chain(config)


def _hashes(micro_batches: Sequence[torch.Tensor]) -> tuple[str, ...]:
    rows = [row for batch in micro_batches for row in batch.numpy()]
    return tuple(hashlib.sha256(row.tobytes()).hexdigest()[:16] for row in rows)


if __name__ == "__main__":
    # Import it under its own name, under which the ranks' processes import it.
    from tests.support import recorded_rows

    recorded_rows.main(*sys.argv[1:])
