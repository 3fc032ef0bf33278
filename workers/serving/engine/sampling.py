"""Logits to tokens and log-probabilities, for many sequences at once. Tensors on the CPU; ``R`` rows, ``V`` vocabulary."""

import random
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from workers.serving.generation import Sampling

LEAST_LOGPROB = -9999.0  # what OpenAI answers for a token that is as good as impossible: JSON has no -inf
GREEDY_BELOW = 1e-5  # a temperature under this overflows the division and is greedy anyway


class Score(NamedTuple):
    """Log-probability of a token in nats, ``LEAST_LOGPROB`` at least, and the likeliest tokens with theirs, best first."""

    logprob: float
    top: list[tuple[int, float]]


class Chooser:
    """How one sequence chooses its tokens: its parameters, its own random numbers, and what it has chosen so far."""

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
        return self.temperature < GREEDY_BELOW

    @property
    def changes_logits(self) -> bool:
        return bool(self._bias or self._counts)

    def change(self, logits_V: Tensor) -> None:
        """In place: ``logit - count * frequency_penalty - (count > 0) * presence_penalty + bias``, as OpenAI documents
        it, the counts being of tokens that were sampled.
        """
        changes = dict(self._bias)
        for token, count in (self._counts or {}).items():
            penalty = count * self._frequency_penalty + self._presence_penalty
            changes[token] = changes.get(token, 0.0) - penalty
        tokens = torch.tensor(list(changes))
        logits_V[tokens] += torch.tensor(list(changes.values()))

    def draw(self) -> float:
        """In [0, 1): one for every token that is not chosen greedily."""
        return self._random.random()

    def took(self, token: int) -> None:
        if self._counts is not None:
            self._counts[token] += 1


def choose(logits_RV: Tensor, choosers: Sequence[Chooser]) -> list[int | None]:
    """A token for every row: the likeliest, or by chance from the smallest set that holds ``top_p`` of the
    probability. None where the logits are not finite.
    """
    changing = [row for row, chooser in enumerate(choosers) if chooser.changes_logits]
    if changing:
        logits_RV = logits_RV.clone()
        for row in changing:
            choosers[row].change(logits_RV[row])
    logits = logits_RV.numpy()
    best_R = logits.argmax(
        -1
    )  # numpy's, which takes a NaN for the largest as well: torch's takes seven times as long
    chosen: list[int | None] = best_R.tolist()
    drawn = [row for row, chooser in enumerate(choosers) if not chooser.is_greedy]
    for nucleus in (False, True):
        rows = [row for row in drawn if (choosers[row].top_p < 1.0) == nucleus]
        if rows:
            tokens = _draw(logits_RV[rows], [choosers[row] for row in rows], nucleus=nucleus)
            for row, drawn_token in zip(rows, tokens, strict=True):
                chosen[row] = drawn_token
    for row, finite in enumerate(np.isfinite(logits[range(len(logits)), best_R])):  # as in ``all_finite``
        if not finite:
            chosen[row] = None
        elif (token := chosen[row]) is not None:
            choosers[row].took(token)
    return chosen


def all_finite(logits_TV: Tensor) -> bool:
    """Whether a token could be chosen from every row: its maximum is NaN where anything is, and infinite where something is or
    all of it is -inf.
    """
    return bool(torch.isfinite(logits_TV.amax(dim=-1)).all())


def score(logits_TV: Tensor, tokens: Sequence[int], num_top: int) -> list[Score]:
    """Score each token under the row of logits that predicts it: the model's own distribution, before
    temperature, penalties and biases.

    A token that is not among the ``num_top`` likeliest comes after them, as OpenAI's completions have it.
    """
    logprobs_TV = torch.log_softmax(logits_TV.float(), dim=-1).clamp_(min=LEAST_LOGPROB)
    chosen_T = logprobs_TV.gather(-1, torch.tensor(tokens)[:, None])[:, 0].tolist()
    top_TK = logprobs_TV.topk(min(num_top, logprobs_TV.shape[-1]), dim=-1)
    scores = []
    for token, logprob, ids, values in zip(
        tokens, chosen_T, top_TK.indices.tolist(), top_TK.values.tolist(), strict=True
    ):
        top = list(zip(ids, values, strict=True))
        if num_top and token not in ids:
            top.append((token, logprob))
        scores.append(Score(logprob, top))
    return scores


def _draw(logits_RV: Tensor, choosers: Sequence[Chooser], *, nucleus: bool) -> list[int]:
    """By inversion: the first token at which the summed probability exceeds a uniform number times their sum."""
    temperature_R1 = torch.tensor([[chooser.temperature] for chooser in choosers])
    probability_RV = torch.softmax(logits_RV / temperature_R1, dim=-1)
    order_RV = None
    if nucleus:
        top_p_R1 = torch.tensor([[chooser.top_p] for chooser in choosers])
        probability_RV, order_RV = probability_RV.sort(dim=-1, descending=True, stable=True)
        beyond_RV = probability_RV.cumsum(-1) - probability_RV >= top_p_R1
        beyond_RV[:, 0] = False  # the likeliest stays, also for top_p 0
        probability_RV.masked_fill_(beyond_RV, 0.0)
    summed_RV = probability_RV.cumsum(-1, dtype=torch.float64)
    uniform_R1 = torch.tensor([[chooser.draw()] for chooser in choosers], dtype=torch.float64)
    position_R1 = torch.searchsorted(summed_RV, uniform_R1 * summed_RV[:, -1:], right=True)
    position_R1.clamp_(max=logits_RV.shape[-1] - 1)  # of a row that is not finite
    tokens_R1 = position_R1 if order_RV is None else order_RV.gather(-1, position_R1)
    tokens: list[int] = tokens_R1[:, 0].tolist()
    return tokens
