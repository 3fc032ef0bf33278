"""Accounts for a training stage: the ``result`` in the manifest of its checkpoints and of its end."""

import time
from dataclasses import asdict, dataclass
from typing import Any, Self

from service.artifacts import Artifacts
from service.core.costs import training_flops
from service.core.stage_specs import TrainStage
from workers.training.checkpoint import TrainingState
from workers.training.model import ParameterCounts, count_parameters


@dataclass(frozen=True)
class Accounting:
    """Measures the cost of this attempt. ``earlier_…`` are the costs of the attempts before it."""

    stage: TrainStage
    parameters: ParameterCounts
    num_devices: int
    start_time: float  # time.monotonic() at the start of the attempt
    resumed_from_step: int
    earlier_tokens: int
    earlier_device_seconds: float

    @classmethod
    def start(
        cls,
        stage: TrainStage,
        state: TrainingState,
        start_key: str | None,
        artifacts: Artifacts,
        *,
        num_devices: int,
        start_time: float,
    ) -> Self:
        """Start counting. ``start_key`` names the checkpoint of ``state``; None means initial weights."""
        manifest = None
        if start_key is not None and start_key != stage.start_key:
            manifest = artifacts.manifest(start_key)
        # Empty unless an earlier attempt at this very stage wrote the checkpoint.
        earlier: dict[str, Any] = {}
        if manifest is not None and manifest.result.get("from_step") == stage.from_step:
            earlier = manifest.result
        return cls(
            stage,
            count_parameters(state.model),
            num_devices,
            start_time,
            resumed_from_step=state.step,
            earlier_tokens=earlier.get("trained_tokens", 0),
            earlier_device_seconds=earlier.get("device_seconds", 0.0),
        )

    def result(self, state: TrainingState) -> dict[str, Any]:
        """Return the result as of ``state``.

        ``tokens`` and ``flops`` cover the stage's own steps, from ``from_step`` on. ``trained_tokens`` and
        ``device_seconds`` cover the steps of all attempts that led to ``state``, including repeated steps
        before ``from_step``.
        """
        line, config = self.stage.line, state.model.config
        batch_tokens = line.batch_rows * line.sequence_length
        tokens = max(0, state.step - self.stage.from_step) * batch_tokens
        attempt_seconds = time.monotonic() - self.start_time
        return {
            "from_step": self.stage.from_step,
            "resumed_from_step": self.resumed_from_step,
            "step": state.step,
            "first_loss": state.points[0]["loss"] if state.points else None,
            "loss": state.points[-1]["loss"] if state.points else None,
            "tokens": tokens,
            "flops": training_flops(
                non_embedding=self.parameters.non_embedding,
                output_head=self.parameters.output_head,
                layers=config.num_hidden_layers,
                hidden=config.hidden_size,
                context=line.sequence_length,
                tokens=tokens,
            ),
            "trained_tokens": self.earlier_tokens + (state.step - self.resumed_from_step) * batch_tokens,
            "device_seconds": self.earlier_device_seconds + self.num_devices * attempt_seconds,
            "carried_device_seconds": self.earlier_device_seconds,
            "devices": self.num_devices,
            "parameters": asdict(self.parameters),
        }
