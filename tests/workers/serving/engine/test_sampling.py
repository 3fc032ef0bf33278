"""Tokens are chosen from whole rows of numbers, and from no others."""

import math

import pytest
import torch

from workers.serving.engine.sampling import Chooser, all_finite, choose
from workers.serving.generation import Sampling

GREEDY = Sampling(max_tokens=1, temperature=0.0)
WARM = Sampling(max_tokens=1, temperature=1.0)


@pytest.mark.parametrize("sampling", [GREEDY, WARM], ids=["greedy", "warm"])
@pytest.mark.parametrize(
    "spoilt",
    [[1.0, math.nan, 9.0], [1.0, math.inf, 9.0], [-math.inf] * 3, [math.nan] * 3],
    ids=["NaN", "infinite", "all impossible", "all NaN"],
)
def test_only_from_the_row_that_is_spoilt_no_token_is_chosen(spoilt: list[float], sampling: Sampling) -> None:
    logits_RV = torch.tensor([[0.0, 99.0, 0.0], spoilt, [0.0, -math.inf, 99.0]])
    assert choose(logits_RV, [Chooser(sampling, seed) for seed in range(3)]) == [1, None, 2]
    assert not all_finite(logits_RV)
    assert all_finite(logits_RV[[0, 2]])


def test_the_first_of_the_likeliest_is_chosen_greedily() -> None:
    logits_RV = torch.tensor([[0.0, 3.0, 3.0], [3.0, 0.0, 3.0]])
    assert choose(logits_RV, [Chooser(GREEDY, 0), Chooser(GREEDY, 0)]) == [1, 0]
