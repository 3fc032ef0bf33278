"""The rule auto: what a line has measured of its trunk and branches, a loss law fitted to it, and the length that follows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from sqlalchemy.orm import Session

from service.core.auto_length import AutoChoice, Prediction, candidate_lengths, cheapest
from service.core.ledger import LedgerEntry, total_steps
from service.core.paradigms.branching import SHORTEST_BRANCH
from service.core.schedules import SCHEDULES, run_rate, warmup_steps
from service.core.specs import AutoLength, DecaySpec, ParadigmSpec
from service.core.stage_specs import LineSpec, StageKind, TrainStage
from service.planning.loss_law import BranchCurve, LossLaw, TrunkCurve, fit
from service.store import metrics, updates

# Of a stage: enough that the noise of its batches averages out, few enough to read inside a transaction.
_POINTS_PER_STAGE = 4000
# A branch is compared with the trunk step by step where the trunk has read at least so many of its steps.
_FEWEST_PAIRS = 8
# The end of a branch is its last fifth, and at least so many steps: one batch alone is noise.
_END_SHARE, _END_STEPS = 0.2, 4


def choose_length(
    session: Session,
    model_id: str,
    paradigm: ParadigmSpec,
    line: LineSpec,
    ledger: Sequence[LedgerEntry],
    stands_at: int,
) -> AutoChoice | None:
    """The choice for the last version of the ledger; None where the paradigm leaves nothing to choose."""
    if paradigm.name != "path_switching" or not isinstance(paradigm.decay.length, AutoLength):
        return None
    evidence = _evidence(session, model_id, line, ledger)
    if not evidence.branches:
        return AutoChoice(
            steps=None,
            notes={
                "why": "the line has no branch to learn from yet: a tenth of all steps",
                "last_prediction": None,
            },
        )
    try:
        law = fit(evidence.trunk, [branch.curve for branch in evidence.branches])
    except (ValueError, np.linalg.LinAlgError) as error:
        # Losses that no law fits are no reason to have no branch.
        why = f"no law fits what the line has measured ({error}): a tenth of all steps"
        return AutoChoice(steps=None, notes={"why": why, "last_prediction": None})
    return _choice(paradigm.decay, paradigm.decay.length, law, evidence, line, ledger, stands_at)


@dataclass(frozen=True)
class _Branch:
    number: int
    curve: BranchCurve
    predicted_drop: float | None  # what was said of it when it was planned


@dataclass(frozen=True)
class _Evidence:
    trunk: TrunkCurve
    branches: Sequence[_Branch]


def _choice(
    decay: DecaySpec,
    length: AutoLength,
    law: LossLaw,
    evidence: _Evidence,
    line: LineSpec,
    ledger: Sequence[LedgerEntry],
    stands_at: int,
) -> AutoChoice:
    own, end = ledger[-1].steps, total_steps(ledger)
    warmup = warmup_steps(line.warmup_steps, ledger[0].steps)
    new_share = 1.0 - (decay.replay_fraction if decay.replay_budget == "grown" and len(ledger) > 1 else 0.0)
    reach = int((end - max(stands_at, warmup)) / new_share)
    longest = max(1, min(round(length.max * own), reach))
    shortest = min(longest, max(SHORTEST_BRANCH, round(length.min * own)))

    def start(steps: int) -> float:
        return _rate_sum(end - new_share * steps, warmup)

    predictions = [
        Prediction(steps=steps, loss=law.branch_end(start(steps), _rates(decay, steps)))
        for steps in candidate_lengths(shortest, longest)
    ]
    chosen, best = cheapest(predictions, length.tolerance)
    notes = {
        "why": (
            f"of {len(predictions)} lengths from {shortest} to {longest} steps, {best.steps} are predicted to end lowest; "
            f"{chosen.steps} end {np.expm1(chosen.loss - best.loss):.2%} above that in perplexity, "
            f"within {length.tolerance:.2%}"
        ),
        "best_steps": best.steps,
        "tolerance": length.tolerance,
        "predicted_drop": round(_predicted_drop(law, start(chosen.steps), _rates(decay, chosen.steps)), 5),
        "branches": law.num_branches,
        "paired_steps": law.num_paired,
        "law": law.plain(),
        "predictions": [[one.steps, round(one.loss, 5)] for one in predictions],
        "last_prediction": _last_prediction(evidence),
    }
    return AutoChoice(steps=chosen.steps, notes=notes)


def _last_prediction(evidence: _Evidence) -> Mapping[str, Any] | None:
    """How far the newest branch that can be judged ended below the trunk on the same rows, and how far it was to."""
    for branch in reversed(evidence.branches):
        curve = branch.curve
        if branch.predicted_drop is not None and curve.trunk_losses is not None:
            last = _end_of(len(curve.rates))
            at_end = curve.steps > len(curve.rates) - last
            if at_end.any():
                observed = float((curve.trunk_losses - curve.losses)[at_end].mean())
                return {
                    "data_version": branch.number,
                    "predicted_drop": branch.predicted_drop,
                    "observed_drop": round(observed, 5),
                }
    return None


def _predicted_drop(law: LossLaw, start: float, rates: np.ndarray[Any, np.dtype[np.float64]]) -> float:
    """Mean over the end of the branch of how far it is below the trunk at the same step, in nats per token."""
    steps = range(len(rates) - _end_of(len(rates)) + 1, len(rates) + 1)
    drops = [law.trunk(start + step) - law.branch_end(start, rates[:step]) for step in steps]
    return sum(drops) / len(drops)


def _end_of(steps: int) -> int:
    return min(steps, max(_END_STEPS, int(_END_SHARE * steps)))


def _evidence(session: Session, model_id: str, line: LineSpec, ledger: Sequence[LedgerEntry]) -> _Evidence:
    """Of the line's own updates, as far as they have read what the ledger has: excluded data counts for nothing."""
    warmup = warmup_steps(line.warmup_steps, ledger[0].steps)
    trunk: dict[int, float] = {}
    branches: list[tuple[TrainStage, dict[int, float], float | None]] = []
    for row, notes in updates.line_training(session, model_id):
        stage = TrainStage.model_validate(row.spec)
        if stage.ledger != tuple(ledger[: len(stage.ledger)]):
            continue
        points = {point.step: point.loss for point in metrics.thinned_points(session, row, _POINTS_PER_STAGE)}
        if row.kind == StageKind.TRAIN_TRUNK:
            trunk |= points
        elif points:
            branches.append((stage, points, (notes.get("auto") or {}).get("predicted_drop")))
    ends = np.cumsum([entry.steps for entry in ledger])
    # The first steps are far from any law: the warm-up, and as long again.
    steps = np.array([step for step in sorted(trunk) if step > 2 * warmup])
    curve = TrunkCurve(
        steps=steps.astype(float),
        losses=np.array([trunk[step] for step in steps]),
        rate_sums=np.array([_rate_sum(step, warmup) for step in steps]),
        versions=np.searchsorted(ends, steps),
    )
    if not len(steps):
        return _Evidence(curve, [])
    return _Evidence(curve, [_branch(*branch, trunk, warmup) for branch in branches])


def _branch(
    stage: TrainStage, points: dict[int, float], predicted: float | None, trunk: dict[int, float], warmup: int
) -> _Branch:
    path = stage.path
    assert path is not None
    both = sorted(points.keys() & trunk.keys()) if not path.replay_fraction else []
    paired = len(both) >= _FEWEST_PAIRS
    steps = both if paired else sorted(points)
    curve = BranchCurve(
        start=_rate_sum(stage.from_step, warmup),
        rates=np.array([run_rate(k, path, 1.0) for k in range(1, path.steps + 1)]),
        steps=np.array(steps, dtype=float) - stage.from_step,
        losses=np.array([points[step] for step in steps]),
        version=len(stage.ledger) - 1,
        replayed=bool(path.replay_fraction),
        trunk_losses=np.array([trunk[step] for step in steps]) if paired else None,
    )
    return _Branch(stage.ledger[-1].number, curve, predicted)


def _rates(decay: DecaySpec, steps: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Of a decay, as fractions of the peak."""
    shape = SCHEDULES[decay.shape]
    return np.array([shape(k / (steps + 1), decay.floor, decay.cuts) for k in range(1, steps + 1)])


def _rate_sum(step: float, warmup: int) -> float:
    """Sum of the trunk's rates up to a step, in units of the peak: S_1."""
    if step <= warmup:
        return step * (step + 1) / (2 * warmup)
    return step - (warmup - 1) / 2 if warmup else step
