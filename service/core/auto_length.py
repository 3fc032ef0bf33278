"""A branch length that chooses itself: the cheapest that is predicted to be nearly as good as the best."""

import math
from collections.abc import Sequence
from typing import Any

from service.core.spec import Spec


class AutoChoice(Spec):
    """``steps`` None: nothing to learn from yet, the rule's own fallback holds. ``notes`` say why, for the update's."""

    steps: int | None
    notes: dict[str, Any]


class Prediction(Spec):
    """Loss in nats per token at the end of a branch of so many steps."""

    steps: int
    loss: float


def cheapest(predictions: Sequence[Prediction], tolerance: float) -> tuple[Prediction, Prediction]:
    """The shortest branch whose perplexity is within ``tolerance`` (a fraction) of the best one's; and the best one."""
    best = min(predictions, key=lambda one: (one.loss, one.steps))
    limit = best.loss + math.log1p(tolerance)
    return min((one for one in predictions if one.loss <= limit), key=lambda one: one.steps), best


def candidate_lengths(shortest: int, longest: int, count: int = 30) -> list[int]:
    """Lengths to choose from, each about as much longer than the one before, both ends included."""
    if longest <= shortest:
        return [longest]
    ratio = (longest / shortest) ** (1 / (count - 1))
    return sorted({round(shortest * ratio**index) for index in range(count)})
