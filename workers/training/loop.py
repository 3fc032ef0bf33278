"""The training loop.

Trunk, branches and other runs share it, so the first loss of a branch equals the trunk's to the bit.
"""

import hashlib
import math
import time
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

from service.artifacts import Artifacts
from service.core.errors import Diverged, Stopped
from service.core.executor import Point
from service.core.manifest import Manifest
from service.core.plan import checkpoint_key
from service.core.schedules import run_rate, trunk_rate, warmup_steps
from service.core.stage_specs import TrainStage
from workers.training.accounting import Accounting
from workers.training.batches import Batches
from workers.training.checkpoint import (
    Snapshot,
    TrainingState,
    load_checkpoint,
    load_start,
    newest_checkpoint,
)
from workers.training.loss import NextTokenLoss
from workers.training.model import line_model
from workers.training.optimizer import build_optimizer, set_beta2
from workers.training.process import keep_freed_memory, numerics_applied
from workers.training.publishing import CheckpointPublisher
from workers.training.ranks import Ranks

# The estimate of the remaining time averages over this many steps.
ETA_STEPS = 20


def train(
    stage: TrainStage,
    *,
    key: str,
    stage_id: str,
    artifacts: Artifacts,
    report: Callable[[Point], None],
    should_stop: Callable[[], bool],
) -> Manifest:
    """Train the stage from its newest checkpoint to ``to_step`` and publish the end under ``key``.

    Every rank of the process group calls this; the first rank publishes and reports. Raises Diverged without
    publishing anything, and Stopped once ``should_stop`` is true on any rank and the step's checkpoint is
    published. ``workers.training.accounting`` describes the manifest's result.
    """
    start_time = time.monotonic()
    line, path = stage.line, stage.path
    ranks = Ranks.current(line.numerics.device)
    cuda_devices = [ranks.device.index] if ranks.device.type == "cuda" else []
    with (
        CheckpointPublisher(artifacts) as publisher,
        numerics_applied(line.numerics),
        torch.random.fork_rng(cuda_devices),
    ):
        keep_freed_memory()
        state, start_key = _load_newest_state(stage, artifacts, ranks)
        accounting = Accounting.start(
            stage, state, start_key, artifacts, num_devices=ranks.world, start_time=start_time
        )
        batches = Batches(stage, artifacts, ranks)
        loss_of = NextTokenLoss(state.model, compiled=line.numerics.compile)
        ddp = DistributedDataParallel(loss_of, broadcast_buffers=False) if ranks.world > 1 else None
        module = loss_of if ddp is None else ddp
        parameters = [parameter for parameter in state.model.parameters() if parameter.requires_grad]
        autocast = torch.autocast(
            ranks.device.type, torch.bfloat16, enabled=line.numerics.precision == "bf16"
        )
        batch_tokens = line.batch_rows * line.sequence_length
        step_seconds: deque[float] = deque(maxlen=ETA_STEPS)

        while state.step < stage.to_step:
            step_start, step = time.monotonic(), state.step + 1
            learning_rate = _learning_rate(stage, step)
            for group in state.optimizer.param_groups:
                group["lr"] = learning_rate
            torch.manual_seed(_dropout_seed(line.seed, step, ranks.rank))

            # Accumulate gradients over this rank's micro-batches. With the last one, DDP averages over ranks.
            loss_sum = torch.zeros((), device=ranks.device)
            micro_batches = batches.of_step(step)
            for number, rows_BT in enumerate(micro_batches, start=1):
                last = number == len(micro_batches)
                with nullcontext() if ddp is None or last else ddp.no_sync():
                    with autocast:
                        loss = module(rows_BT)  # summed over tokens, in nats
                    # The loss is a mean over all tokens: undo DDP's division by the number of ranks.
                    (loss * (ranks.world / batch_tokens)).backward()
                loss_sum += loss.detach()
            grad_norm = clip_grad_norm_(parameters, line.grad_clip).item()
            total_loss, ranks_to_stop = ranks.add(loss_sum.item(), should_stop())
            mean_loss = total_loss / batch_tokens
            if not (math.isfinite(mean_loss) and math.isfinite(grad_norm)):
                raise Diverged(
                    f"step {step}: loss {mean_loss}, gradient norm {grad_norm}, learning rate {learning_rate:.3g}"
                )
            state.optimizer.step()
            state.optimizer.zero_grad(set_to_none=True)
            state.step = step

            step_seconds.append(time.monotonic() - step_start)
            point = Point(
                stage_id=stage_id,
                step=step,
                stage_step=step - stage.from_step,
                total_steps=stage.total_steps,
                loss=mean_loss,
                learning_rate=learning_rate,
                grad_norm=grad_norm,
                tokens_per_second=batch_tokens / step_seconds[-1],
                eta_seconds=(stage.to_step - step) * sum(step_seconds) / len(step_seconds),
            )
            if step > stage.from_step:  # a trunk may have to repeat steps before its own first one
                state.points.append(point.as_row())
                if ranks.first:
                    report(point)
            if step < stage.to_step and (ranks_to_stop or step % stage.checkpoint_every == 0):
                if ranks.first:
                    publisher.wait()
                    publish = publisher.publish if ranks_to_stop else publisher.publish_in_background
                    publish(checkpoint_key(stage, step), Snapshot.of(state), accounting.result(state))
                if ranks_to_stop:
                    raise Stopped(f"stopped at step {step} of {stage.to_step}; its checkpoint is published")

        if ranks.first:
            publisher.wait()
            resumable = path is None or path.resumable
            publisher.publish(key, Snapshot.of(state, resumable=resumable), accounting.result(state))
        ranks.wait()  # until the first rank has published the manifest
        manifest = artifacts.manifest(key)
        assert manifest is not None
        return manifest


def _load_newest_state(
    stage: TrainStage, artifacts: Artifacts, ranks: Ranks
) -> tuple[TrainingState, str | None]:
    """Load the stage's newest state. Returns it with its checkpoint's key, None for the initial weights."""
    model = line_model(stage.line, artifacts).train()
    model.to(ranks.device)
    state = TrainingState(model, build_optimizer(model, stage.line))
    path = stage.path
    if path is not None and path.beta2 is not None:
        set_beta2(state.optimizer, path.beta2)
    start_key = ranks.from_first(lambda: newest_checkpoint(stage, artifacts))
    if start_key is None:
        state.step = stage.from_step if path is not None else 0
    elif path is not None and start_key == stage.start_key:
        folder = artifacts.open(start_key)
        load_start(state, folder, step=stage.from_step, fresh_optimizer=path.fresh_optimizer)
    else:
        load_checkpoint(state, artifacts.open(start_key), points_after=stage.from_step)
    return state, start_key


def _learning_rate(stage: TrainStage, step: int) -> float:
    line = stage.line
    if stage.path is None:
        return trunk_rate(step, line.peak_lr, warmup_steps(line.warmup_steps, stage.ledger[0].steps))
    return run_rate(step - stage.from_step, stage.path, line.peak_lr)


def _dropout_seed(seed: int, step: int, rank: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{step}/{rank}".encode()).digest()[:8], "little")
