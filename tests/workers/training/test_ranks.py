"""Two training processes together read the same rows as one, and get the same losses."""

import json
import os
from pathlib import Path

import pytest
import torch
from torch import distributed, multiprocessing

from service.artifacts import open_artifacts
from service.core.errors import Stopped
from service.core.ledger import steps_of
from service.core.stage_specs import TrainStage
from tests.support.training import SmallLine, Trainer, trunk_stage
from workers.training.batches import Batches
from workers.training.ranks import Ranks

WORLD = 2


@pytest.fixture
def uneven(small: SmallLine) -> SmallLine:
    """Batches of seven rows: four for the first rank and three for the second, each in two micro-batches."""
    line = small.line.model_copy(update={"batch_rows": 7, "micro_batch_rows": 2})
    ledger = tuple(
        entry.model_copy(update={"steps": steps_of(entry.rows, 7, line.epochs)}) for entry in small.ledger
    )
    return SmallLine(line, ledger, small.data_keys)


def test_ranks_divide_the_rows_of_every_step_among_them(uneven: SmallLine, trainer: Trainer) -> None:
    stage = trunk_stage(uneven, 9)
    cpu = torch.device("cpu")
    whole = Batches(stage, trainer.artifacts, Ranks(0, 1, cpu))
    for world in (2, 3, 7):
        shares = [Batches(stage, trainer.artifacts, Ranks(rank, world, cpu)) for rank in range(world)]
        for step in (1, 8, 9):
            dealt = torch.empty(7, 33, dtype=torch.int64)
            for rank, share in enumerate(shares):
                dealt[rank::world] = torch.cat(share.of_step(step))
            assert torch.equal(dealt, torch.cat(whole.of_step(step)))


def test_two_processes_train_like_one(
    uneven: SmallLine, trainer: Trainer, other_trainer: Trainer, tmp_path: Path
) -> None:
    """Only the second rank asks to stop; both resume; then one process continues alone."""
    stage = trunk_stage(uneven, 8)
    multiprocessing.spawn(
        _train_on_rank, args=(str(tmp_path), trainer.artifacts.url, stage.model_dump_json()), nprocs=WORLD
    )
    together = json.loads((tmp_path / "losses.json").read_text())
    assert [row["step"] for row in together] == list(range(1, 9))
    longer = trunk_stage(uneven, 12)
    assert trainer.trunk(longer).result["resumed_from_step"] == 8
    together += [{"loss": p.loss, "grad_norm": p.grad_norm} for p in trainer.points]
    other_trainer.trunk(longer)
    for row, alone in zip(together, other_trainer.points, strict=True):
        assert row["loss"] == pytest.approx(alone.loss, rel=1e-4)
        assert row["grad_norm"] == pytest.approx(alone.grad_norm, rel=1e-2)


def _train_on_rank(rank: int, folder: str, artifacts_url: str, stage_json: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    stage = TrainStage.model_validate_json(stage_json)
    # Only the first rank reports points, so the second cannot count steps and asks to stop at once.
    trainer = Trainer(open_artifacts(artifacts_url), stop_at=1 if rank == 1 else None)
    with pytest.raises(Stopped, match="stopped at step 1 "):
        trainer.trunk(stage)
    trainer.stop_at = None
    manifest = trainer.trunk(stage)
    assert manifest.result["resumed_from_step"] == 1
    assert manifest.result["devices"] == WORLD
    assert bool(trainer.points) == (rank == 0)
    if rank == 0:
        metrics = trainer.artifacts.open(manifest.key) / "metrics.jsonl"
        rows = [json.loads(line) for line in metrics.read_text().splitlines()]
        Path(folder, "losses.json").write_text(json.dumps(rows))
    distributed.destroy_process_group()
