"""What training costs: in floating point operations, and a line of versions beside other ways of making them.

Closed forms after Wang et al. 2024 (arXiv 2410.04103), with T_i steps in data version i and E_i = T_1 + … +
T_i.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from service.core.stage_specs import TrainStage


def training_flops(
    *, non_embedding: int, output_head: int, layers: int, hidden: int, context: int, tokens: int
) -> float:
    """FLOPs, both ways, of training on ``tokens``: 6·(non-embedding + output head)·tokens + attention.

    Attention is counted as 6·layers·hidden·context·tokens: half of 12·…, because the causal kernels that
    are used skip the masked half. A tied output head counts as an output head: it is multiplied with, an
    embedding only looked up.
    """
    return 6.0 * (non_embedding + output_head) * tokens + 6.0 * layers * hidden * context * tokens


@dataclass(frozen=True)
class Amount:
    """``device_seconds``: devices × wall-clock of training."""

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
        """What ``tokens`` take at this amount's own rates per token, where it has tokens to go by."""
        share = tokens / self.tokens if self.tokens else 0.0
        return Amount(tokens, self.flops * share, self.device_seconds * share)


@dataclass(frozen=True)
class StageCost:
    """All that a training stage takes, and what of it was trained anew: the rest had been trained already."""

    whole: Amount
    anew: Amount

    @property
    def reused(self) -> Amount:
        tokens = max(0, self.whole.tokens - self.anew.tokens)
        return self.whole.scaled_to(tokens)


def stage_cost(stage: TrainStage, result: Mapping[str, Any], *, reused: bool) -> StageCost:
    """By the ``result`` of the training that published the stage's end, whoever's that was and wherever it began.

    ``trained_tokens`` and ``device_seconds`` of the result are of the same steps: those since the checkpoint that it
    began at, and those of its own earlier attempts before. They give the rates for all tokens of the stage.
    """
    line = stage.line
    published = Amount(result["tokens"], result["flops"])
    trained = result.get("trained_tokens", published.tokens)
    anew = Amount(trained, published.scaled_to(trained).flops, result["device_seconds"])
    whole = anew.scaled_to(stage.total_steps * line.batch_rows * line.sequence_length)
    return StageCost(whole, Amount() if reused else anew)


def from_scratch(ends: Sequence[int]) -> int:
    """Σ E_i: every version trains on all data up to it. T·N(N+1)/2 for N equal versions.

    ``ends`` are E_i of the versions that a line made, in steps or tokens. A line whose first version came
    when there were three data versions begins with E_3: the first two are part of what it trained on, but
    as it made no version of them alone, it would not have from scratch either.
    """
    return sum(ends)


def continual(ends: Sequence[int]) -> int:
    """E_N: every version trains on what is new since the last one, once. T·N for N equal versions."""
    return max(ends, default=0)


def path_switching(ends: Sequence[int], branches: Sequence[int]) -> int:
    """E_N + Σ_(i<N) d_i: the trunk reads everything once, and again what every branch but the last has read.

    ``branches`` are the d_i. Holds where no branch is clamped and none replays. T·(N + a(N-1)) with d = aT.
    """
    return max(ends, default=0) + sum(branches[:-1])
