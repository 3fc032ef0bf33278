"""The training loop: one for the trunk and every other run, so a branch's first step has the trunk's loss to the bit."""

import hashlib
import math
import time
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

from service.artifacts import Artifacts
from service.core.costs import training_flops
from service.core.errors import Diverged, Stopped
from service.core.executor import Point
from service.core.manifest import Manifest
from service.core.plan import checkpoint_key
from service.core.schedules import run_rate, trunk_rate, warmup_steps
from service.core.stage_specs import TrainStage
from workers.training.batches import Batches
from workers.training.checkpoint import (
    Snapshot,
    TrainingState,
    load_checkpoint,
    load_start,
    newest_checkpoint,
)
from workers.training.loss import NextTokenLoss
from workers.training.model import count_parameters, line_model
from workers.training.optimizer import build_optimizer, set_beta2
from workers.training.process import keep_freed_memory, numerics_applied
from workers.training.publishing import CheckpointPublisher
from workers.training.ranks import Ranks


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

    Every rank of the process group, where there is one, calls this; the first one writes and reports. Raises
    Diverged, which publishes nothing, and Stopped, once ``should_stop`` says so on any rank and the
    checkpoint of the step is published.
    """
    line, path = stage.line, stage.path
    ranks = Ranks.current(line.numerics.device)
    began = time.monotonic()
    with (
        CheckpointPublisher(artifacts) as publisher,
        numerics_applied(line.numerics),
        torch.random.fork_rng(_cuda_devices(ranks)),
    ):
        keep_freed_memory()
        state, start = _start(stage, artifacts, ranks)
        resumed_from = state.step
        carried_tokens, carried_seconds = _carried(stage, start, artifacts)
        counts, config = count_parameters(state.model), state.model.config
        batches = Batches(stage, artifacts, ranks)
        loss_of = NextTokenLoss(state.model, compiled=line.numerics.compile)
        ddp = DistributedDataParallel(loss_of, broadcast_buffers=False) if ranks.world > 1 else None
        module = loss_of if ddp is None else ddp
        parameters = [parameter for parameter in state.model.parameters() if parameter.requires_grad]
        autocast = torch.autocast(
            ranks.device.type, torch.bfloat16, enabled=line.numerics.precision == "bf16"
        )
        batch_tokens = line.batch_rows * line.sequence_length
        seconds: deque[float] = deque(maxlen=20)

        def result() -> dict[str, Any]:
            tokens = max(0, state.step - stage.from_step) * batch_tokens
            return {
                "from_step": stage.from_step,
                "resumed_from_step": resumed_from,
                "step": state.step,
                "first_loss": state.points[0]["loss"] if state.points else None,
                "loss": state.points[-1]["loss"] if state.points else None,
                "tokens": tokens,
                "flops": training_flops(
                    non_embedding=counts.non_embedding,
                    output_head=counts.output_head,
                    layers=config.num_hidden_layers,
                    hidden=config.hidden_size,
                    context=line.sequence_length,
                    tokens=tokens,
                ),
                # Of the same steps: those of earlier attempts up to the checkpoint, and those since.
                "trained_tokens": carried_tokens + (state.step - resumed_from) * batch_tokens,
                "device_seconds": carried_seconds + ranks.world * (time.monotonic() - began),
                "carried_device_seconds": carried_seconds,
                "devices": ranks.world,
                "parameters": asdict(counts),
            }

        while state.step < stage.to_step:
            started, step = time.monotonic(), state.step + 1
            rate = _rate(stage, step)
            for group in state.optimizer.param_groups:
                group["lr"] = rate
            torch.manual_seed(_dropout_seed(line.seed, step, ranks.rank))
            loss_sum = torch.zeros((), device=ranks.device)
            micro_batches = batches.of_step(step)
            for number, rows in enumerate(micro_batches, start=1):
                last = number == len(micro_batches)
                with nullcontext() if ddp is None or last else ddp.no_sync():
                    with autocast:
                        loss = module(rows)
                    # DDP averages gradients over the ranks, the mean is over tokens: times the ranks.
                    (loss * (ranks.world / batch_tokens)).backward()
                loss_sum += loss.detach()
            grad_norm = clip_grad_norm_(parameters, line.grad_clip).item()
            total, stops = ranks.add(loss_sum.item(), should_stop())
            mean_loss = total / batch_tokens
            if not (math.isfinite(mean_loss) and math.isfinite(grad_norm)):
                raise Diverged(
                    f"step {step}: loss {mean_loss}, gradient norm {grad_norm}, learning rate {rate:.3g}"
                )
            state.optimizer.step()
            state.optimizer.zero_grad(set_to_none=True)
            state.step = step
            seconds.append(time.monotonic() - started)
            point = Point(
                stage_id=stage_id,
                step=step,
                stage_step=step - stage.from_step,
                total_steps=stage.total_steps,
                loss=mean_loss,
                learning_rate=rate,
                grad_norm=grad_norm,
                tokens_per_second=batch_tokens / seconds[-1],
                eta_seconds=(stage.to_step - step) * sum(seconds) / len(seconds),
            )
            if step > stage.from_step:  # not where the stage had to go back behind its own beginning
                state.points.append(_metrics_row(point))
                if ranks.first:
                    report(point)
            if step < stage.to_step and (stops or step % stage.checkpoint_every == 0):
                if ranks.first:
                    publisher.wait()
                    publish = publisher.publish if stops else publisher.publish_in_background
                    publish(checkpoint_key(stage, step), Snapshot.of(state), result())
                if stops:
                    raise Stopped(f"stopped at step {step} of {stage.to_step}; its checkpoint is published")
        if ranks.first:
            publisher.wait()
            publisher.publish(key, Snapshot.of(state, resumable=path is None or path.resumable), result())
        ranks.wait()  # for the first one's manifest
        manifest = artifacts.manifest(key)
        assert manifest is not None
        return manifest


def _start(stage: TrainStage, artifacts: Artifacts, ranks: Ranks) -> tuple[TrainingState, str | None]:
    """The stage's newest state, and the key of the checkpoint that it is from; None for initial weights."""
    model = line_model(stage.line, artifacts).train()
    model.to(ranks.device)
    state = TrainingState(model, build_optimizer(model, stage.line))
    path = stage.path
    if path is not None and path.beta2 is not None:
        set_beta2(state.optimizer, path.beta2)
    start = ranks.from_first(lambda: newest_checkpoint(stage, artifacts))
    if start is None:
        state.step = stage.from_step if path is not None else 0
    elif path is not None and start == stage.start_key:
        load_start(state, artifacts.open(start), step=stage.from_step, fresh_optimizer=path.fresh_optimizer)
    else:
        load_checkpoint(state, artifacts.open(start), points_after=stage.from_step)
    return state, start


def _carried(stage: TrainStage, start: str | None, artifacts: Artifacts) -> tuple[int, float]:
    """Tokens and device-seconds that earlier attempts at this stage have spent on what is resumed from."""
    manifest = artifacts.manifest(start) if start is not None and start != stage.start_key else None
    if manifest is None or manifest.result.get("from_step") != stage.from_step:
        return 0, 0.0  # another stage's
    return manifest.result.get("trained_tokens", 0), manifest.result["device_seconds"]


def _rate(stage: TrainStage, step: int) -> float:
    line = stage.line
    if stage.path is None:
        return trunk_rate(step, line.peak_lr, warmup_steps(line.warmup_steps, stage.ledger[0].steps))
    return run_rate(step - stage.from_step, stage.path, line.peak_lr)


def _dropout_seed(seed: int, step: int, rank: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{step}/{rank}".encode()).digest()[:8], "little")


def _metrics_row(point: Point) -> dict[str, float | int]:
    return {
        "step": point.step,
        "loss": point.loss,
        "learning_rate": point.learning_rate,
        "grad_norm": point.grad_norm,
        "tokens_per_second": point.tokens_per_second,
    }


def _cuda_devices(ranks: Ranks) -> list[int]:
    return [ranks.device.index] if ranks.device.type == "cuda" else []
