"""A loss law, fitted to the losses of a line, that predicts where branches of other lengths would end.

The multi-power law (Luo et al. 2025, arXiv 2503.12811): with rates η_1 … η_t and their sums S_k(t) = η_k + …
+ η_t,

L(t) = L0 + A·S_1(t)^-α - B·Σ_k (η_(k-1) - η_k)·G(η_k^-γ · S_k(t)),    G(x) = 1 - (1 + C·x)^-β.

Rates are in units of the peak here, so sums are in steps at the peak, and B is the most that a decay to zero
can gain, in nats per token. Two terms are added to the law: a level for the text of each data version, and
one for replayed rows. Parameters have weak log-normal priors, which matter while there is little to fit and
are soon outweighed by the data. Pairs are the best evidence: if the trunk has read a branch's rows too, the
noise of the batches cancels out.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

Array = NDArray[np.float64]

# Prior median and spread (a factor in either direction) of each parameter.
_PRIORS = {
    "A": (10.0, 10.0),
    "alpha": (0.5, 1.6),
    "B": (0.3, 3.0),
    "C": (0.1, 5.0),
    "beta": (0.5, 1.6),
    "gamma": (0.5, 1.6),
}
_LEVEL_SPREAD = 0.5  # nats per token between the texts of two data versions
_LEAST_SIGMA = 0.003  # nats per token that the law itself leaves unexplained
_BINS = 40
_DECAY_PIECES = 200  # a longer decay is summed in this many pieces


@dataclass(frozen=True)
class TrunkCurve:
    """Losses of trunk steps.

    For each step, ``rate_sums`` has S_1 and ``versions`` the index of the data version it reads.
    """

    steps: Array
    losses: Array
    rate_sums: Array
    versions: NDArray[np.int64]


@dataclass(frozen=True)
class BranchCurve:
    """Losses of measured steps of a decay.

    ``rates`` covers all its steps; ``start`` is the trunk's S_1 at the branch point.
    """

    start: float
    rates: Array
    steps: Array  # 1-based within the branch
    losses: Array
    version: int
    replayed: bool
    trunk_losses: Array | None  # the trunk's losses on the same rows, if it has read them


@dataclass(frozen=True)
class LossLaw:
    """A fitted law. ``num_paired`` counts the decay steps whose rows the trunk has read too."""

    L0: float
    A: float
    alpha: float
    B: float
    C: float
    beta: float
    gamma: float
    num_branches: int
    num_paired: int

    def trunk(self, rate_sum: float) -> float:
        """Loss of the trunk at S_1 = ``rate_sum``, at the level of the first data version's text."""
        return self.L0 + self.A * float(rate_sum**-self.alpha)

    def branch_end(self, start: float, rates: Array) -> float:
        """Loss at the end of a decay, at the level of the first data version's text."""
        terms = _DecayTerms.of(rates, np.array([len(rates)]))
        parameters = np.log([self.A, self.alpha, self.B, self.C, self.beta, self.gamma])
        return float(self.L0 + _run(parameters, start + terms.sums, terms)[0])

    def plain(self) -> dict[str, float]:
        """The parameters, rounded to four digits, for the notes of an update."""
        names = ("L0", "A", "alpha", "B", "C", "beta", "gamma")
        return {name: float(f"{getattr(self, name):.4g}") for name in names}


def fit(trunk: TrunkCurve, branches: Sequence[BranchCurve]) -> LossLaw:
    """The most probable law. Needs the losses of at least one branch."""
    assert branches
    problem = _LeastSquares(trunk, branches)
    best = min(
        (problem.solve(start) for start in problem.starts()), key=lambda solution: float(solution.cost)
    )
    A, alpha, B, C, beta, gamma = map(float, np.exp(best.x[1:7]))
    return LossLaw(
        L0=float(best.x[0]),
        A=A,
        alpha=alpha,
        B=B,
        C=C,
        beta=beta,
        gamma=gamma,
        num_branches=len(branches),
        num_paired=sum(len(branch.steps) for branch in branches if branch.trunk_losses is not None),
    )


@dataclass(frozen=True)
class _DecayTerms:
    """The parts of the law's sum over a decay that do not depend on its parameters.

    Rows are pieces of the decay, columns are the steps at which the loss is predicted.
    """

    drops: Array  # η_(k-1) - η_k of each piece
    rates: Array  # η_k at its end
    later: Array  # pieces × steps: S_k(t), 0 before the piece ends
    reached: NDArray[np.bool_]  # pieces × steps: whether the piece has ended
    sums: Array  # sum of the decay's rates up to each step

    @classmethod
    def of(cls, rates: Array, steps: Array) -> "_DecayTerms":
        """``steps`` are 1-based and ascending."""
        cumulative = np.concatenate([[0.0], np.cumsum(rates)])
        ends = np.unique(np.linspace(1, len(rates), min(len(rates), _DECAY_PIECES)).round().astype(int))
        before = np.concatenate([[1.0], rates[ends[:-1] - 1]])
        at = steps.round().astype(int)
        later = cumulative[at][None, :] - cumulative[ends - 1][:, None]
        reached = ends[:, None] <= at[None, :]
        return cls(
            drops=before - rates[ends - 1],
            rates=rates[ends - 1],
            later=np.where(reached, later, 0.0),
            reached=reached,
            sums=cumulative[at],
        )


def _run(logs: Array, rate_sums: Array, decay: _DecayTerms | None) -> Array:
    """The law without L0. ``logs`` are the logarithms of A, α, B, C, β and γ."""
    A, alpha, B, C, beta, gamma = np.exp(logs)
    level = A * rate_sums**-alpha
    if decay is None:
        return np.asarray(level)
    x = decay.rates[:, None] ** -gamma * decay.later
    gain = np.where(decay.reached, 1 - (1 + C * x) ** -beta, 0.0)
    return np.asarray(level - B * (decay.drops[:, None] * gain).sum(axis=0))


class _LeastSquares:
    """The least-squares problem. Residuals of losses, pairs and priors are in standard deviations."""

    def __init__(self, trunk: TrunkCurve, branches: Sequence[BranchCurve]) -> None:
        numbers = sorted({*trunk.versions.tolist(), *(branch.version for branch in branches)})
        self._level_of = {number: index for index, number in enumerate(numbers[1:])}
        self._has_replay = any(branch.replayed for branch in branches)
        self._trunk = _bins(trunk.losses, _BINS * len(numbers), trunk.rate_sums, trunk.versions.astype(float))
        self._branches = [(branch, *_branch_bins(branch)) for branch in branches if len(branch.steps)]
        lowest = min([trunk.losses.min(), *(branch.losses.min() for branch in branches if len(branch.steps))])
        self._bounds_of_L0 = (0.0, max(0.1, float(lowest)))
        self._medians = np.log([median for median, _ in _PRIORS.values()])
        self._spreads = np.log([spread for _, spread in _PRIORS.values()])

    def starts(self) -> list[Array]:
        """Starting points with a low, a middle and a high L0: a long valley connects them."""
        extra = [0.0] * (len(self._level_of) + self._has_replay)
        top = self._bounds_of_L0[1]
        return [np.array([share * top, *self._medians, *extra]) for share in (0.2, 0.6, 0.9)]

    def solve(self, start: Array) -> Any:
        count = len(start) - 1
        low, high = self._bounds_of_L0
        # Six spreads in either direction: wide enough for any sensible parameter, narrow enough not to
        # overflow.
        lower = [low, *(self._medians - 6 * self._spreads), *([-5.0] * (count - 6))]
        upper = [high + 1e-6, *(self._medians + 6 * self._spreads), *([5.0] * (count - 6))]
        return least_squares(self._residuals, start, bounds=(lower, upper), loss="soft_l1", max_nfev=300)

    def _residuals(self, x: Array) -> Array:
        L0, logs, levels = x[0], x[1:7], x[7:]
        residuals = [(logs - self._medians) / self._spreads, levels / _LEVEL_SPREAD]
        losses, sigmas, sums, versions = self._trunk
        level = np.array([self._level(levels, int(version)) for version in versions])
        residuals.append((L0 + level + _run(logs, sums, None) - losses) / sigmas)
        for branch, means, deviations, terms, trunk_sums in self._branches:
            predicted = _run(logs, branch.start + terms.sums, terms)
            if branch.trunk_losses is not None:
                residuals.append((_run(logs, trunk_sums, None) - predicted - means) / deviations)
            else:
                base = L0 + self._level(levels, branch.version)
                if branch.replayed:
                    base += levels[-1]
                residuals.append((base + predicted - means) / deviations)
        return np.concatenate(residuals)

    def _level(self, levels: Array, version: int) -> float:
        index = self._level_of.get(version)
        return 0.0 if index is None else float(levels[index])


def _branch_bins(branch: BranchCurve) -> tuple[Array, Array, _DecayTerms, Array]:
    """Bins of losses or drops below the trunk: means, standard deviations, decay terms, trunk rate sums."""
    values = branch.losses if branch.trunk_losses is None else branch.trunk_losses - branch.losses
    means, deviations, steps = _bins(values, _BINS, branch.steps)
    steps = steps.round()
    return means, deviations, _DecayTerms.of(branch.rates, steps), branch.start + steps


def _bins(values: Array, count: int, *others: Array) -> tuple[Array, ...]:
    """Means over ``count`` equal bins, their standard deviations, and the means of ``others``."""
    edges = np.array_split(np.arange(len(values)), max(1, min(count, len(values))))
    # The loss hardly changes between neighbouring steps: their difference is the noise of two batches.
    noise = float(np.diff(values).std() / math.sqrt(2)) if len(values) > 2 else 0.1
    means = np.array([values[edge].mean() for edge in edges])
    deviations = np.array([math.hypot(noise / math.sqrt(len(edge)), _LEAST_SIGMA) for edge in edges])
    return means, deviations, *(np.array([other[edge].mean() for edge in edges]) for other in others)
