"""What a model version has answered, as counts that can be added and subtracted: of replicas, and of stretches of time."""

import bisect
from dataclasses import dataclass, fields
from typing import Self

BOUNDS: tuple[float, ...] = tuple(2.0 ** (power / 2 - 10) for power in range(35))
"""Upper ends of the histograms' buckets in seconds: from 1 ms to 128 s, each 1.41 times the one before."""


@dataclass(frozen=True)
class Histogram:
    """``counts`` of values in seconds up to each of BOUNDS, and of those above; ``total`` is their sum."""

    counts: tuple[int, ...] = (0,) * (len(BOUNDS) + 1)
    total: float = 0.0

    @property
    def count(self) -> int:
        return sum(self.counts)

    def observed(self, seconds: float) -> Self:
        at = bisect.bisect_left(BOUNDS, seconds)
        counts = (*self.counts[:at], self.counts[at] + 1, *self.counts[at + 1 :])
        return type(self)(counts, self.total + seconds)

    def median(self) -> float | None:
        """Between the bounds of the bucket that it lies in, by position; None of nothing."""
        below, middle = 0, self.count / 2
        for at, count in enumerate(self.counts):
            if count and below + count >= middle:
                low = BOUNDS[at - 1] if at else 0.0
                high = BOUNDS[min(at, len(BOUNDS) - 1)]
                return low + (high - low) * (middle - below) / count
            below += count
        return None

    def __add__(self, other: Self) -> Self:
        counts = tuple(own + others for own, others in zip(self.counts, other.counts, strict=True))
        return type(self)(counts, self.total + other.total)

    def __sub__(self, other: Self) -> Self:
        counts = tuple(own - others for own, others in zip(self.counts, other.counts, strict=True))
        return type(self)(counts, self.total - other.total)


EMPTY = Histogram()


@dataclass(frozen=True)
class Traffic:
    """Requests that were answered or failed, and what they took. Neither are those that were ``refused`` because too many
    waited, and those whose client had ``departed`` before the end.

    ``first_token``: from the request to its first token. ``per_token``: between a sequence's tokens after the first, its
    mean. ``scored_*``: prompts that were scored on the side, their tokens and the sum of their losses in nats.
    """

    requests: int = 0
    failures: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    first_token: Histogram = EMPTY
    per_token: Histogram = EMPTY
    scored_tokens: int = 0
    scored_loss: float = 0.0
    departed: int = 0
    refused: int = 0

    @property
    def given(self) -> int:
        return self.requests + self.departed

    @property
    def departed_rate(self) -> float:
        return self.departed / self.given if self.given else 0.0

    @property
    def error_rate(self) -> float:
        return self.failures / self.requests if self.requests else 0.0

    @property
    def loss(self) -> float | None:
        return self.scored_loss / self.scored_tokens if self.scored_tokens else None

    def __add__(self, other: Self) -> Self:
        return type(self)(*(getattr(self, name) + getattr(other, name) for name in _NAMES))

    def __sub__(self, other: Self) -> Self:
        return type(self)(*(getattr(self, name) - getattr(other, name) for name in _NAMES))


_NAMES = tuple(field.name for field in fields(Traffic))

NOTHING = Traffic()
