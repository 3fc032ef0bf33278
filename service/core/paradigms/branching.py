"""Where a branch leaves the stream and how long it is: the arithmetic that path switching and WSD-S share.

With T_i steps in data version i and E_i = T_1 + … + T_i, branch i has d_i steps and leaves at
b_i = max(b_(i-1), E_i - d_i), where b_1 ≥ the warm-up W (arXiv 2410.04103).
"""

import math
from bisect import bisect_left
from fractions import Fraction
from functools import partial
from typing import Any

from service.core.errors import StageInputInvalid
from service.core.ledger import (
    LedgerEntry,
    ledger_up_to,
    new_rows_before,
    steps_that_end_with,
    total_steps,
    unread_rows,
)
from service.core.paradigm_specs import BranchLength, Decay, DecaySpec, FixedLength, ProportionalLength
from service.core.schedules import warmup_steps
from service.core.spec import Spec
from service.core.stage_specs import LineSpec, RunPath

SHORTEST_BRANCH = 8  # below this a decay is a handful of steps and the shape means nothing
# Branch length under the rule auto, as a fraction of all steps, until there is a branch to learn from.
UNLEARNED_FRACTION = Fraction(1, 10)


class BranchGeometry(Spec):
    """Where a branch leaves the stream, how long it is in steps, and what bounded it.

    The branch reads the new rows of the ``stream_steps`` steps of the stream after ``point``.
    """

    point: int
    steps: int
    stream_steps: int
    replay_fraction: float
    held: str | None  # the bound that set the length: "min", "max" or "shortest"
    clamped: bool  # the line was already past the branch point that the rule would give


def branch_length(
    length: BranchLength, version_steps: int, all_steps: int, chosen: int | None = None
) -> tuple[int, str | None]:
    """Return d_i and the bound that set it, if any. Fractions are exact decimals, so 0.1 of 30 is 3.

    ``chosen`` is the length that the rule auto chose, if it chose one.
    """
    held = None
    if isinstance(length, FixedLength):
        wanted = Fraction(str(length.fraction)) * version_steps
        longest = Fraction(version_steps)
    else:
        if isinstance(length, ProportionalLength):
            wanted = Fraction(str(length.fraction)) * all_steps
        else:
            wanted = Fraction(chosen) if chosen is not None else UNLEARNED_FRACTION * all_steps
        longest = Fraction(str(length.max)) * version_steps
        shortest = Fraction(str(length.min)) * version_steps
        if wanted < shortest:
            wanted, held = shortest, "min"
    steps = math.ceil(wanted)
    if steps < SHORTEST_BRANCH:
        steps, held = SHORTEST_BRANCH, "shortest"
    if steps > longest:
        steps, held = max(1, math.floor(longest)), "max"
    return steps, held


def branch_geometry(
    decay: DecaySpec,
    ledger: tuple[LedgerEntry, ...],
    line_step: int,
    line: LineSpec,
    chosen: int | None = None,
) -> BranchGeometry:
    """b_i and d_i for the last version of the ledger. ``line_step`` is the line's current step in the stream.

    ``chosen`` is the length that the rule auto chose, if it could.
    """
    end = total_steps(ledger)
    length, held = branch_length(decay.length, ledger[-1].steps, end, chosen)
    # The first version has nothing older to replay.
    replay = Fraction(str(decay.replay_fraction)) if len(ledger) > 1 else Fraction(0)
    grown = replay > 0 and decay.replay_budget == "grown"
    wanted = length
    if grown:
        rows = max(1, math.ceil((1 - replay) * length)) * line.batch_rows
        wanted = steps_that_end_with(line, ledger, rows)
    point = max(line_step, warmup_steps(line.warmup_steps, ledger[0].steps), end - wanted)
    clamped = point > end - wanted
    if grown:
        unread = new_rows_before(line, ledger, end) - new_rows_before(line, ledger, point)
        fewest = math.ceil(Fraction(unread, line.batch_rows) / (1 - replay)) if clamped else length
        length = max(fewest, math.ceil(unread / line.batch_rows))
    elif clamped:
        length = end - point
    return BranchGeometry(
        point=point,
        steps=length,
        stream_steps=end - point,
        replay_fraction=float(replay),
        held=held,
        clamped=clamped,
    )


def branch_from_geometry(
    decay: DecaySpec, ledger: tuple[LedgerEntry, ...], point: int, line: LineSpec
) -> BranchGeometry:
    """A requested branch from step ``point`` of the trunk.

    Its length rule refers to the version that the next step lies in. Raises StageInputInvalid if the ledger
    ends before the branch does.
    """
    end = total_steps(ledger)
    if point >= end:
        raise StageInputInvalid(
            f"step {point} is the end of the data: a branch from there has nothing to read"
        )
    until = ledger_up_to(ledger, point + 1)
    length, held = branch_length(decay.length, until[-1].steps, total_steps(until))
    replay = Fraction(str(decay.replay_fraction)) if len(until) > 1 else Fraction(0)
    stream_steps = length
    if replay and decay.replay_budget == "grown":
        unread_before = new_rows_before(line, ledger, point)
        rows = unread_before + max(1, math.ceil((1 - replay) * length)) * line.batch_rows
        stream_steps = bisect_left(range(end + 1), rows, key=partial(new_rows_before, line, ledger)) - point
    if point + stream_steps > end:
        raise StageInputInvalid(
            f"a branch of {length} steps from step {point} reads past the end of data version "
            f"{ledger[-1].number}, step {end}"
        )
    return BranchGeometry(
        point=point,
        steps=length,
        stream_steps=stream_steps,
        replay_fraction=float(replay),
        held=held,
        clamped=False,
    )


def decay_path(
    decay: DecaySpec, geometry: BranchGeometry, *, resumable: bool = False, fresh_optimizer: bool = False
) -> RunPath:
    """The path of a complete decay over the steps of the geometry."""
    return RunPath(
        **decay_fields(decay, geometry.replay_fraction),
        decay_steps=geometry.steps,
        resumable=resumable,
        fresh_optimizer=fresh_optimizer,
        stream_steps=geometry.stream_steps,
    )


def decay_fields(decay: DecaySpec, replay_fraction: float) -> dict[str, Any]:
    """The fields that a run's path copies from its decay, with the run's actual share of replay."""
    # Without replay the budget means nothing: runs with either budget are the same and share a key.
    budget = decay.replay_budget if replay_fraction else "grown"
    return decay.fields_of(Decay) | {"replay_fraction": replay_fraction, "replay_budget": budget}


def geometry_notes(
    decay: DecaySpec, geometry: BranchGeometry, ledger: tuple[LedgerEntry, ...], line: LineSpec
) -> dict[str, object]:
    """The geometry as notes of the update.

    ``unread_rows`` counts the new rows that a kept budget leaves to the trunk.
    """
    notes = geometry.model_dump(mode="json", include={"steps", "held", "clamped", "replay_fraction"})
    unread = 0
    if geometry.replay_fraction and decay.replay_budget == "kept":
        unread = unread_rows(line, ledger, geometry.point, geometry.steps, geometry.replay_fraction)
    return {"branch_" + key: value for key, value in notes.items()} | {"unread_rows": unread}
