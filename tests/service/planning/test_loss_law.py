"""The multi-power law, fitted to losses that follow it, predicts decays that it has not seen."""

import numpy as np
import pytest

from service.planning.loss_law import BranchCurve, LossLaw, TrunkCurve, fit

TRUE = LossLaw(L0=2.5, A=9.0, alpha=0.4, B=0.5, C=0.05, beta=0.55, gamma=0.6, num_branches=0, num_paired=0)
NOISE = 0.08  # nats per token from batch to batch
LEVELS = (0.0, 0.15, -0.1)  # of the text of three data versions
VERSION_STEPS = 300


def one_minus_sqrt(steps: int) -> np.ndarray:
    return 1 - np.sqrt(np.arange(1, steps + 1) / (steps + 1))


def measured(
    lengths: tuple[int, ...], *, paired: bool, seed: int = 0
) -> tuple[TrunkCurve, list[BranchCurve]]:
    """A trunk over as many versions as there are branches, each branch at the end of its version."""
    random = np.random.default_rng(seed)
    steps = np.arange(20, VERSION_STEPS * len(lengths) + 1)
    versions = (steps - 1) // VERSION_STEPS
    # The noise belongs to the batch: trunk and branch share it at the same step.
    noise = dict(zip(steps.tolist(), NOISE * random.standard_normal(len(steps)), strict=True))
    levels = np.array(LEVELS)[versions]
    losses = np.array([TRUE.trunk(step) + noise[step] for step in steps.tolist()]) + levels
    branches = []
    for version, length in enumerate(lengths):
        start, rates = (version + 1) * VERSION_STEPS - length, one_minus_sqrt(length)
        at = [start + step for step in range(1, length + 1)]
        values = [
            TRUE.branch_end(start, rates[:step]) + noise[start + step] + LEVELS[version]
            for step in range(1, length + 1)
        ]
        branches.append(
            BranchCurve(
                start=start,
                rates=rates,
                steps=np.arange(1.0, length + 1),
                losses=np.array(values),
                version=version,
                replayed=False,
                trunk_losses=losses[np.array(at) - 20] if paired else None,
            )
        )
    trunk = TrunkCurve(steps.astype(float), losses, steps.astype(float), versions)
    return trunk, branches


def drop(law: LossLaw, end: int, length: int) -> float:
    """How far a branch that ends at that step is below the trunk."""
    return law.trunk(end) - law.branch_end(end - length, one_minus_sqrt(length))


@pytest.mark.parametrize("seed", range(3))
def test_two_paired_branches_predict_decays_of_other_lengths(seed: int) -> None:
    law = fit(*measured((30, 60), paired=True, seed=seed))
    assert law.num_paired == 90
    for length in (45, 90, 150):
        assert drop(law, 900, length) == pytest.approx(drop(TRUE, 900, length), abs=0.02)


def test_the_priors_keep_a_law_from_one_unpaired_branch_sensible() -> None:
    law = fit(*measured((30,), paired=False))
    assert law.num_paired == 0
    assert 0 < drop(law, 600, 30) < drop(law, 600, 100) < 0.6


def test_the_trunk_is_predicted_past_its_end() -> None:
    law = fit(*measured((30, 60, 90), paired=True))
    assert law.trunk(1500) == pytest.approx(TRUE.trunk(1500), abs=0.08)


def test_summing_a_long_decay_in_pieces_is_accurate() -> None:
    """2,000 steps in 200 pieces, against the exact sum over every step."""
    exact = 0.0
    rates = one_minus_sqrt(2000)
    before = np.concatenate([[1.0], rates[:-1]])
    later = np.concatenate([np.cumsum(rates[::-1])[::-1]])
    x = rates**-TRUE.gamma * (later - rates)
    exact = TRUE.B * float(((before - rates) * (1 - (1 + TRUE.C * x) ** -TRUE.beta)).sum())
    level = TRUE.trunk(5000 + float(rates.sum()))
    assert level - TRUE.branch_end(5000, rates) == pytest.approx(exact, rel=0.02)
