"""Logits to tokens and log-probabilities. Pure functions of tensors on the CPU; ``V`` is the vocabulary."""

from typing import NamedTuple

import torch
from torch import Tensor

GREEDY_BELOW = 1e-5  # a temperature under this overflows the division and is greedy anyway


class Score(NamedTuple):
    """Log-probability of a token in nats, and the likeliest tokens with theirs, best first."""

    logprob: float
    top: list[tuple[int, float]]


def choose(logits_V: Tensor, *, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """Pick a token: the likeliest, or by chance from the smallest set that holds ``top_p`` of the
    probability.
    """
    if temperature < GREEDY_BELOW:
        return int(logits_V.argmax())
    probabilities_V = torch.softmax(logits_V / temperature, dim=-1)
    if top_p >= 1.0:
        return int(torch.multinomial(probabilities_V, 1, generator=generator))
    ordered_V, order_V = probabilities_V.sort(descending=True, stable=True)
    beyond_V = ordered_V.cumsum(-1) - ordered_V >= top_p
    beyond_V[0] = False  # the likeliest stays, also for top_p 0
    choice = torch.multinomial(ordered_V.masked_fill(beyond_V, 0.0), 1, generator=generator)
    return int(order_V[choice].item())


def score(logits_TV: Tensor, tokens_T: Tensor, num_top: int) -> list[Score]:
    """Score each token under the row of logits that predicts it: the model's own distribution, before
    temperature.

    A token that is not among the ``num_top`` likeliest comes after them, as OpenAI answers it.
    """
    logprobs_TV = torch.log_softmax(logits_TV.float(), dim=-1)
    chosen_T = logprobs_TV.gather(-1, tokens_T[:, None])[:, 0].tolist()
    top_TK = logprobs_TV.topk(min(num_top, logprobs_TV.shape[-1]), dim=-1)
    scores = []
    for token, logprob, ids, values in zip(
        tokens_T.tolist(), chosen_T, top_TK.indices.tolist(), top_TK.values.tolist(), strict=True
    ):
        top = list(zip(ids, values, strict=True))
        if num_top and token not in ids:
            top.append((token, logprob))
        scores.append(Score(logprob, top))
    return scores
