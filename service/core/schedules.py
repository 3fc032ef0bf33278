"""Learning-rate schedules: pure numbers from step counts.

Rates are in units of the peak rate H times ``peak_lr``.

The trunk's schedule has no horizon: it warms up and stays at the peak. Any other run may warm up, hold a rate
and decay. The k-th of d decay steps (k = 1 … d) is at x = k / (d + 1), so no batch is ever read at rate 0.
Sources of the shapes: Wang et al. 2024 (arXiv 2410.04103, cosine), Hägele et al. 2024 (2405.18392, 1-sqrt and
linear), Bergsma et al. 2025 (2502.15938, decay to zero), DeepSeek-LLM (2401.02954, multi_step).
"""

import math
from collections.abc import Callable, Mapping, Sequence

from service.core.stage_specs import RunPath

MULTI_STEP_FACTORS = (1.0, 0.316, 0.1)

# (x in (0, 1), floor as a fraction of H, cuts) -> rate as a fraction of H
DecayShape = Callable[[float, float, Sequence[float]], float]


def warmup_steps(requested: int, first_version_steps: int) -> int:
    """Steps of linear warm-up: at most a tenth of the first version, which keeps a step for its branch."""
    return min(requested, math.ceil(first_version_steps / 10), first_version_steps - 1)


def trunk_rate(step: int, peak_lr: float, warmup: int) -> float:
    """Rate of the trunk's ``step`` (1-based, global): linear warm-up to ``peak_lr``, then constant."""
    return peak_lr if step >= warmup else peak_lr * step / warmup


def run_rate(k: int, path: RunPath, peak_lr: float) -> float:
    """Rate of the ``k``-th step (1-based) of a run that is not the trunk: warm-up, then hold, then decay.

    Raises ValueError if the run has no such step.
    """
    if not 1 <= k <= path.steps:
        raise ValueError(f"step {k} is outside a run of {path.steps} steps")
    if k <= path.warmup_steps:
        progress = k / path.warmup_steps
        return peak_lr * (path.warmup_from + (1 - path.warmup_from) * progress)
    k -= path.warmup_steps
    if k <= path.hold_steps:
        return peak_lr * path.level
    x = (k - path.hold_steps) / (path.decay_steps + 1)
    return peak_lr * SCHEDULES[path.shape](x, path.floor, path.cuts)


def _one_minus_sqrt(x: float, floor: float, cuts: Sequence[float]) -> float:
    return floor + (1 - floor) * (1 - math.sqrt(x))


def _linear(x: float, floor: float, cuts: Sequence[float]) -> float:
    return floor + (1 - floor) * (1 - x)


def _cosine(x: float, floor: float, cuts: Sequence[float]) -> float:
    return floor + (1 - floor) * (1 + math.cos(math.pi * x)) / 2


def _inverse(x: float, floor: float, cuts: Sequence[float]) -> float:
    return 1 / (x / floor + (1 - x))


def _multi_step(x: float, floor: float, cuts: Sequence[float]) -> float:
    return MULTI_STEP_FACTORS[sum(x >= cut for cut in cuts)]


SCHEDULES: Mapping[str, DecayShape] = {
    "1-sqrt": _one_minus_sqrt,
    "linear": _linear,
    "cosine": _cosine,
    "inverse": _inverse,
    "multi_step": _multi_step,
}
