"""The rule ``auto``: the shortest branch that is predicted to be nearly as good as the best."""

import math
from collections.abc import Sequence
from typing import Any

from service.core.spec import Spec


class AutoChoice(Spec):
    """A chosen length in steps, None for the rule's fallback, with notes that explain it in the update."""

    steps: int | None
    notes: dict[str, Any]


class Prediction(Spec):
    """Predicted loss, in nats per token, at the end of a branch of ``steps`` steps."""

    steps: int
    loss: float


def cheapest(predictions: Sequence[Prediction], tolerance: float) -> tuple[Prediction, Prediction]:
    """The shortest branch within ``tolerance`` (a fraction) of the lowest perplexity, and the lowest."""
    best = min(predictions, key=lambda prediction: (prediction.loss, prediction.steps))
    limit = best.loss + math.log1p(tolerance)
    good_enough = [prediction for prediction in predictions if prediction.loss <= limit]
    return min(good_enough, key=lambda prediction: prediction.steps), best


def candidate_lengths(shortest: int, longest: int, count: int = 30) -> list[int]:
    """At most ``count`` lengths in geometric progression from ``shortest`` to ``longest``, both included."""
    if longest <= shortest:
        return [longest]
    ratio = (longest / shortest) ** (1 / (count - 1))
    return sorted({round(shortest * ratio**index) for index in range(count)})
