"""The cost of training, and how a line compares with other ways of training the same versions.

Closed forms follow Wang et al. 2024 (arXiv 2410.04103). Data version i has T_i steps, and E_i = T_1 + … +
T_i.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from service.core.stage_specs import TrainStage


def training_flops(
    *, non_embedding: int, output_head: int, layers: int, hidden: int, context: int, tokens: int
) -> float:
    """Forward and backward FLOPs of ``tokens`` tokens: 6·(non-embedding + output head)·tokens + attention.

    The first two arguments count parameters. Attention counts as 6·layers·hidden·context·tokens, half of the
    usual 12·…, because the causal kernels skip the masked half. A tied output head counts, because it is a matrix
    product; an embedding is only a lookup.
    """
    return 6.0 * (non_embedding + output_head) * tokens + 6.0 * layers * hidden * context * tokens


@dataclass(frozen=True)
class Amount:
    """An amount of training. ``device_seconds`` is the number of devices times the wall-clock seconds."""

    tokens: int = 0
    flops: float = 0.0
    device_seconds: float = 0.0

    def __add__(self, other: "Amount") -> "Amount":
        return Amount(
            self.tokens + other.tokens,
            self.flops + other.flops,
            self.device_seconds + other.device_seconds,
        )

    def scaled_to(self, tokens: int) -> "Amount":
        """The cost of ``tokens`` tokens at this amount's cost per token; zero if it has no tokens."""
        share = tokens / self.tokens if self.tokens else 0.0
        return Amount(tokens, self.flops * share, self.device_seconds * share)


@dataclass(frozen=True)
class StageCost:
    """The cost of a whole training stage, and of the part that was newly trained. The rest was reused."""

    whole: Amount
    anew: Amount

    @property
    def reused(self) -> Amount:
        tokens = max(0, self.whole.tokens - self.anew.tokens)
        return self.whole.scaled_to(tokens)


def stage_cost(stage: TrainStage, result: Mapping[str, Any], *, reused: bool) -> StageCost:
    """The cost of a stage, given the ``result`` of the training that published its end.

    That training may be another stage's and may have begun at another step. ``trained_tokens`` and
    ``device_seconds`` of the result cover the same steps: the steps since the checkpoint it started
    from, plus the steps of its own earlier attempts. Their ratio is the cost per token for the whole stage.
    """
    line = stage.line
    published = Amount(result["tokens"], result["flops"])
    trained = result.get("trained_tokens", published.tokens)
    anew = Amount(trained, published.scaled_to(trained).flops, result["device_seconds"])
    whole = anew.scaled_to(stage.total_steps * line.batch_rows * line.sequence_length)
    return StageCost(whole, Amount() if reused else anew)


def from_scratch(ends: Sequence[int]) -> int:
    """Σ E_i: every version trains on all data up to it. T·N(N+1)/2 for N equal versions.

    ``ends`` are the E_i of the versions that a line made, in steps or tokens. A line whose first
    version came after three data versions starts with E_3, because training from scratch would not have made
    the first two versions either.
    """
    return sum(ends)


def continual(ends: Sequence[int]) -> int:
    """E_N: every version trains once on the data that is new since the version before it.

    T·N for N equal versions.
    """
    return max(ends, default=0)


def path_switching(ends: Sequence[int], branches: Sequence[int]) -> int:
    """E_N + Σ_(i<N) d_i: the trunk reads again what every branch but the last has read.

    ``branches`` are the d_i. Exact if no branch is clamped and none replays. T·(N + a(N-1)) with d = aT.
    """
    return max(ends, default=0) + sum(branches[:-1])
