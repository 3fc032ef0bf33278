"""The rule auto: fit a loss law to the line's measurements and choose a branch length by its predictions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from sqlalchemy.orm import Session

from service.core.auto_length import AutoChoice, Prediction, candidate_lengths, cheapest
from service.core.ledger import LedgerEntry, total_steps
from service.core.paradigm_specs import AutoLength, DecaySpec, ParadigmSpec
from service.core.paradigms.branching import SHORTEST_BRANCH
from service.core.schedules import SCHEDULES, run_rate, warmup_steps
from service.core.stage_specs import LineSpec, StageKind, TrainStage
from service.planning.loss_law import Array, BranchCurve, LossLaw, TrunkCurve, fit
from service.store import metrics, updates

# Enough points per stage to average out the noise of its batches, few enough to read inside a transaction.
_POINTS_PER_STAGE = 4000
# A branch is compared with the trunk step by step if the trunk has read at least this many of its steps.
_FEWEST_PAIRS = 8
# The end of a branch is its last fifth, but at least four steps, because a single batch is noise.
_END_SHARE, _END_STEPS = 0.2, 4


def choose_length(
    session: Session,
    model_id: str,
    paradigm: ParadigmSpec,
    line: LineSpec,
    ledger: Sequence[LedgerEntry],
    trunk_step: int,
) -> AutoChoice | None:
    """The choice for the last version of the ledger; None if the paradigm does not use the rule auto."""
    if paradigm.name != "path_switching" or not isinstance(paradigm.decay.length, AutoLength):
        return None
    evidence = _evidence(session, model_id, line, ledger)
    if not evidence.branches:
        return AutoChoice(
            steps=None,
            notes={
                "why": "the line has no branch to learn from yet: the length is a tenth of all steps",
                "last_prediction": None,
            },
        )
    try:
        law = fit(evidence.trunk, [branch.curve for branch in evidence.branches])
    except (ValueError, np.linalg.LinAlgError) as error:
        # The branch must be trained even if no law fits the losses.
        why = f"no loss law fits the line's losses ({error}): the length is a tenth of all steps"
        return AutoChoice(steps=None, notes={"why": why, "last_prediction": None})
    return _choice(paradigm.decay, paradigm.decay.length, law, evidence, line, ledger, trunk_step)


@dataclass(frozen=True)
class _Branch:
    data_version: int
    curve: BranchCurve
    predicted_drop: float | None  # as predicted when the branch was planned


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
    trunk_step: int,
) -> AutoChoice:
    own, end = ledger[-1].steps, total_steps(ledger)
    warmup = warmup_steps(line.warmup_steps, ledger[0].steps)
    new_share = 1.0 - (decay.replay_fraction if decay.replay_budget == "grown" and len(ledger) > 1 else 0.0)
    reach = int((end - max(trunk_step, warmup)) / new_share)
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
            f"of {len(predictions)} lengths from {shortest} to {longest} steps, {best.steps} steps have the lowest "
            f"predicted perplexity; {chosen.steps} steps end {np.expm1(chosen.loss - best.loss):.2%} above it, "
            f"within the tolerance of {length.tolerance:.2%}"
        ),
        "best_steps": best.steps,
        "tolerance": length.tolerance,
        "predicted_drop": round(_predicted_drop(law, start(chosen.steps), _rates(decay, chosen.steps)), 5),
        "branches": law.num_branches,
        "paired_steps": law.num_paired,
        "law": law.plain(),
        "predictions": [[prediction.steps, round(prediction.loss, 5)] for prediction in predictions],
        "last_prediction": _last_prediction(evidence),
    }
    return AutoChoice(steps=chosen.steps, notes=notes)


def _last_prediction(evidence: _Evidence) -> Mapping[str, Any] | None:
    """Predicted and observed drop below the trunk, for the newest branch that has both, in nats per token."""
    for branch in reversed(evidence.branches):
        curve = branch.curve
        if branch.predicted_drop is not None and curve.trunk_losses is not None:
            at_end = curve.steps > len(curve.rates) - _num_end_steps(len(curve.rates))
            if at_end.any():
                observed = float((curve.trunk_losses - curve.losses)[at_end].mean())
                return {
                    "data_version": branch.data_version,
                    "predicted_drop": branch.predicted_drop,
                    "observed_drop": round(observed, 5),
                }
    return None


def _predicted_drop(law: LossLaw, start: float, rates: Array) -> float:
    """Mean drop of the end of a branch below the trunk at the same steps, in nats per token."""
    steps = range(len(rates) - _num_end_steps(len(rates)) + 1, len(rates) + 1)
    drops = [law.trunk(start + step) - law.branch_end(start, rates[:step]) for step in steps]
    return sum(drops) / len(drops)


def _num_end_steps(steps: int) -> int:
    return min(steps, max(_END_STEPS, int(_END_SHARE * steps)))


def _evidence(session: Session, model_id: str, line: LineSpec, ledger: Sequence[LedgerEntry]) -> _Evidence:
    """Losses from the line's own updates.

    A stage whose ledger differs has read data that is excluded now, and is left out.
    """
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
    # The law does not hold for the first steps: leave out twice the warm-up.
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
    shared_steps = sorted(points.keys() & trunk.keys()) if not path.replay_fraction else []
    paired = len(shared_steps) >= _FEWEST_PAIRS
    steps = shared_steps if paired else sorted(points)
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


def _rates(decay: DecaySpec, steps: int) -> Array:
    """Rates of a decay, as fractions of the peak."""
    shape = SCHEDULES[decay.shape]
    return np.array([shape(k / (steps + 1), decay.floor, decay.cuts) for k in range(1, steps + 1)])


def _rate_sum(step: float, warmup: int) -> float:
    """S_1: the sum of the trunk's rates up to a step, in units of the peak."""
    if step <= warmup:
        return step * (step + 1) / (2 * warmup)
    return step - (warmup - 1) / 2 if warmup else step
