"""The gate: whether a candidate may replace the served version, and why. Losses are in nats per token."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from service.core.spec import Spec
from service.core.specs import GateSpec


class GateVerdict(Spec):
    """``reasons`` lists every failed check, or, if the candidate passed, every check."""

    passed: bool
    reasons: tuple[str, ...]


def losses_by_slice(evaluations: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Slice name -> loss, from stored evaluations.

    A loss that is stored as null was not finite and comes back as NaN.
    """
    return {row["slice"]: math.nan if row["loss"] is None else row["loss"] for row in evaluations}


def judge(
    gate: GateSpec,
    candidate: Mapping[str, float],
    served: Mapping[str, float] | None,
    newest_slice: str | None,
    backward_transfer: float | None = None,
) -> GateVerdict:
    """Compare the losses of the candidate with those of the served version, slice by slice.

    ``served`` is None for a first version, which has nothing to compare with. A loss that is not finite never
    passes. A slice on which the served version was not measured cannot be compared; the reasons mention it.
    ``backward_transfer`` is the candidate's, None for a first version.
    """
    failures: list[str] = []
    remarks: list[str] = []
    if newest_slice is None:
        remarks.append("the data version has no holdout: there is no newest slice to judge by")
    for name, loss in candidate.items():
        if not math.isfinite(loss):
            failures.append(f"{name}: the loss is {loss}")
            continue
        if served is None:
            continue
        before = served.get(name)
        if before is None:
            remarks.append(f"{name}: {loss:.4f}, the served version was not measured on it")
            continue
        is_newest = name == newest_slice
        allowed = gate.max_new_loss_increase if is_newest else gate.max_old_loss_increase
        text = f"{name}: {loss:.4f}, {loss - before:+.4f} against the served version, allowed {allowed:+.4f}"
        if math.isfinite(before) and loss - before > allowed:
            failures.append(text)
        else:
            remarks.append(text)
    limit = gate.max_backward_transfer
    if limit is not None and backward_transfer is None:
        remarks.append("backward transfer: none, no older slice was measured when it was new")
    elif limit is not None and backward_transfer is not None:
        text = f"backward transfer: {backward_transfer:+.4f} nats per token, allowed {limit:+.4f}"
        if backward_transfer <= limit:  # false for NaN
            remarks.append(text)
        else:
            failures.append(text)
    if served is None:
        remarks.append("first version: there is no served version to compare with")
    return GateVerdict(passed=not failures, reasons=tuple(failures or remarks))
