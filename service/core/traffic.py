"""Traffic of a model version: counts that can be summed over replicas and subtracted to cover a period."""

import bisect
from dataclasses import dataclass, fields
from typing import Self

BOUNDS: tuple[float, ...] = tuple(2.0 ** (power / 2 - 10) for power in range(35))
"""Upper bounds of the histogram buckets in seconds: from 1 ms to 128 s, each 1.41 times the one before."""


@dataclass(frozen=True)
class Histogram:
    """``counts``: one per bucket of BOUNDS, and one for larger values. ``total``: sum of the values in s."""

    counts: tuple[int, ...] = (0,) * (len(BOUNDS) + 1)
    total: float = 0.0

    @property
    def count(self) -> int:
        return sum(self.counts)

    def observed(self, seconds: float) -> Self:
        bucket = bisect.bisect_left(BOUNDS, seconds)
        counts = (*self.counts[:bucket], self.counts[bucket] + 1, *self.counts[bucket + 1 :])
        return type(self)(counts, self.total + seconds)

    def median(self) -> float | None:
        """Interpolate within the median's bucket; None if there are no values."""
        below, middle = 0, self.count / 2
        for bucket, count in enumerate(self.counts):
            if count and below + count >= middle:
                low = BOUNDS[bucket - 1] if bucket else 0.0
                high = BOUNDS[min(bucket, len(BOUNDS) - 1)]
                return low + (high - low) * (middle - below) / count
            below += count
        return None

    def __add__(self, other: Self) -> Self:
        counts = tuple(a + b for a, b in zip(self.counts, other.counts, strict=True))
        return type(self)(counts, self.total + other.total)

    def __sub__(self, other: Self) -> Self:
        counts = tuple(a - b for a, b in zip(self.counts, other.counts, strict=True))
        return type(self)(counts, self.total - other.total)


EMPTY = Histogram()


@dataclass(frozen=True)
class Traffic:
    """Counts and latencies of requests. ``requests`` counts answered and failed requests.

    ``refused``: rejected because too many were waiting. ``departed``: the client disconnected before the end.
    Neither is part of ``requests``. ``first_token``: time from the request to its first token. ``per_token``:
    mean time between a sequence's tokens after the first. ``scored_*``: tokens of prompts scored for a trial,
    and their total loss in nats.
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
    def accepted(self) -> int:
        return self.requests + self.departed

    @property
    def departed_rate(self) -> float:
        return self.departed / self.accepted if self.accepted else 0.0

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
