"""Samples and scores tokens for many sequences at once.

Tensors are on the CPU: ``R`` rows, ``V`` vocabulary.
"""

import random
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from workers.serving.engine.text.token_writer import LEAST_LOGPROB, TokenScore
from workers.serving.generation import Sampling

MIN_TEMPERATURE = 1e-5  # below this the division overflows, and sampling is greedy anyway


class Sampler:
    """One sequence's sampling parameters, random numbers and token counts."""

    def __init__(self, sampling: Sampling, seed: int) -> None:
        self.temperature = sampling.temperature
        self.top_p = sampling.top_p
        self._bias = dict(sampling.logit_bias)
        self._frequency_penalty = sampling.frequency_penalty
        self._presence_penalty = sampling.presence_penalty
        self._counts: Counter[int] | None = None
        if sampling.frequency_penalty or sampling.presence_penalty:
            self._counts = Counter()
        self._random = random.Random(seed)

    @property
    def is_greedy(self) -> bool:
        return self.temperature < MIN_TEMPERATURE

    @property
    def changes_logits(self) -> bool:
        return bool(self._bias or self._counts)

    def change(self, logits_V: Tensor) -> None:
        """Apply penalties and biases in place, as OpenAI documents them, with counts of sampled tokens:
        ``logit - count * frequency_penalty - (count > 0) * presence_penalty + bias``.
        """
        changes = dict(self._bias)
        for token, count in (self._counts or {}).items():
            penalty = count * self._frequency_penalty + self._presence_penalty
            changes[token] = changes.get(token, 0.0) - penalty
        tokens = torch.tensor(list(changes))
        logits_V[tokens] += torch.tensor(list(changes.values()))

    def draw(self) -> float:
        """A random number in [0, 1). Every token that is not greedy takes one."""
        return self._random.random()

    def record(self, token: int) -> None:
        """Count a sampled token for the penalties."""
        if self._counts is not None:
            self._counts[token] += 1


def sample(logits_RV: Tensor, samplers: Sequence[Sampler]) -> list[int | None]:
    """Sample a token for every row; None for a row whose logits are not finite.

    Greedy rows take the most likely token, others draw from the smallest set that holds ``top_p`` of the
    probability.
    """
    changed = [row for row, sampler in enumerate(samplers) if sampler.changes_logits]
    if changed:
        logits_RV = logits_RV.clone()
        for row in changed:
            samplers[row].change(logits_RV[row])
    logits = logits_RV.numpy()
    # numpy's argmax returns a NaN's position too, and takes a seventh of torch's time.
    best_R = logits.argmax(-1)
    tokens: list[int | None] = best_R.tolist()
    random_rows = [row for row, sampler in enumerate(samplers) if not sampler.is_greedy]
    for nucleus in (False, True):
        rows = [row for row in random_rows if (samplers[row].top_p < 1.0) == nucleus]
        if rows:
            drawn = _draw(logits_RV[rows], [samplers[row] for row in rows], nucleus=nucleus)
            for row, token in zip(rows, drawn, strict=True):
                tokens[row] = token
    # As in ``all_finite``, the maximum shows whether the row is finite.
    for row, finite in enumerate(np.isfinite(logits[range(len(logits)), best_R])):
        if not finite:
            tokens[row] = None
        elif (sampled := tokens[row]) is not None:
            samplers[row].record(sampled)
    return tokens


def all_finite(logits_TV: Tensor) -> bool:
    """Whether every row can be sampled.

    A row's maximum is NaN if any logit is, and infinite if any logit is +inf or all are -inf.
    """
    return bool(torch.isfinite(logits_TV.amax(dim=-1)).all())


def score(logits_TV: Tensor, tokens: Sequence[int], num_top: int) -> list[TokenScore]:
    """Score each token under its row of logits, before temperature, penalties and biases.

    A token outside the ``num_top`` most likely ones is listed after them, as in OpenAI's completions.
    """
    logprobs_TV = torch.log_softmax(logits_TV.float(), dim=-1).clamp_(min=LEAST_LOGPROB)
    logprobs = logprobs_TV.gather(-1, torch.tensor(tokens)[:, None])[:, 0].tolist()
    top_TK = logprobs_TV.topk(min(num_top, logprobs_TV.shape[-1]), dim=-1)
    scores = []
    for token, logprob, ids, values in zip(
        tokens, logprobs, top_TK.indices.tolist(), top_TK.values.tolist(), strict=True
    ):
        top = list(zip(ids, values, strict=True))
        if num_top and token not in ids:
            top.append((token, logprob))
        scores.append(TokenScore(logprob, top))
    return scores


def score_sampled(
    logits_RV: Tensor, tokens: Sequence[int | None], num_top: Sequence[int | None]
) -> list[TokenScore | None]:
    """Scores of sampled tokens; None for rows without a token or with ``num_top`` None."""
    scores: list[TokenScore | None] = [None] * len(tokens)
    rows_by_num_top: dict[int, list[int]] = {}
    for row, (token, wanted) in enumerate(zip(tokens, num_top, strict=True)):
        if wanted is not None and token is not None:
            rows_by_num_top.setdefault(wanted, []).append(row)
    for wanted, rows in rows_by_num_top.items():
        sampled = [token for row in rows if (token := tokens[row]) is not None]
        for row, row_score in zip(rows, score(logits_RV[rows], sampled, wanted), strict=True):
            scores[row] = row_score
    return scores


def _draw(logits_RV: Tensor, samplers: Sequence[Sampler], *, nucleus: bool) -> list[int]:
    """Sample by inversion of the cumulative distribution."""
    temperature_R1 = torch.tensor([[sampler.temperature] for sampler in samplers])
    probability_RV = torch.softmax(logits_RV / temperature_R1, dim=-1)
    order_RV = None
    if nucleus:
        top_p_R1 = torch.tensor([[sampler.top_p] for sampler in samplers])
        probability_RV, order_RV = probability_RV.sort(dim=-1, descending=True, stable=True)
        outside_RV = probability_RV.cumsum(-1) - probability_RV >= top_p_R1
        outside_RV[:, 0] = False  # the most likely token stays, even with top_p 0
        probability_RV.masked_fill_(outside_RV, 0.0)
    cumulative_RV = probability_RV.cumsum(-1, dtype=torch.float64)
    uniform_R1 = torch.tensor([[sampler.draw()] for sampler in samplers], dtype=torch.float64)
    position_R1 = torch.searchsorted(cumulative_RV, uniform_R1 * cumulative_RV[:, -1:], right=True)
    position_R1.clamp_(max=logits_RV.shape[-1] - 1)  # beyond the end if the row is not finite
    tokens_R1 = position_R1 if order_RV is None else order_RV.gather(-1, position_R1)
    tokens: list[int] = tokens_R1[:, 0].tolist()
    return tokens
