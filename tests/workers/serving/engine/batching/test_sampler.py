"""Tokens are sampled from finite logits only."""

import math

import pytest
import torch

from workers.serving.engine.batching.sampler import Sampler, all_finite, sample
from workers.serving.generation import Sampling

GREEDY = Sampling(max_tokens=1, temperature=0.0)
WARM = Sampling(max_tokens=1, temperature=1.0)


@pytest.mark.parametrize("sampling", [GREEDY, WARM], ids=["greedy", "warm"])
@pytest.mark.parametrize(
    "row",
    [[1.0, math.nan, 9.0], [1.0, math.inf, 9.0], [-math.inf] * 3, [math.nan] * 3],
    ids=["NaN", "infinite", "all impossible", "all NaN"],
)
def test_only_the_row_that_is_not_finite_gets_no_token(row: list[float], sampling: Sampling) -> None:
    logits_RV = torch.tensor([[0.0, 99.0, 0.0], row, [0.0, -math.inf, 99.0]])
    assert sample(logits_RV, [Sampler(sampling, seed) for seed in range(3)]) == [1, None, 2]
    assert not all_finite(logits_RV)
    assert all_finite(logits_RV[[0, 2]])


def test_greedy_sampling_takes_the_first_of_equally_likely_tokens() -> None:
    logits_RV = torch.tensor([[0.0, 3.0, 3.0], [3.0, 0.0, 3.0]])
    assert sample(logits_RV, [Sampler(GREEDY, 0), Sampler(GREEDY, 0)]) == [1, 0]
