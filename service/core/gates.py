"""The gate: whether a candidate may take over from the served version, and why, in nats per token on every slice."""

import math
from collections.abc import Mapping

from service.core.spec import Spec
from service.core.specs import GateSpec


class Verdict(Spec):
    passed: bool
    reasons: tuple[str, ...]


def judge(
    gate: GateSpec,
    candidate: Mapping[str, float],
    served: Mapping[str, float] | None,
    newest_slice: str | None,
    backward_transfer: float | None = None,
) -> Verdict:
    """Compare losses by slice name. ``served`` is None for a first version, which has nothing to lose against.

    A loss that is not finite never passes. A slice on which the served version was never measured cannot be compared,
    and the reasons say so. ``backward_transfer`` is the candidate's; a first version has none.
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
        newest = name == newest_slice
        allowed = gate.max_new_loss_increase if newest else gate.max_old_loss_increase
        text = f"{name}: {loss:.4f}, {loss - before:+.4f} against the served version, allowed {allowed:+.4f}"
        if math.isfinite(before) and loss - before > allowed:
            failures.append(text)
        else:
            remarks.append(text)
    most = gate.max_backward_transfer
    if most is not None and backward_transfer is None:
        remarks.append("backward transfer: none, no older slice was measured when it was new")
    elif most is not None and backward_transfer is not None:
        text = f"backward transfer: {backward_transfer:+.4f} nats per token, allowed {most:+.4f}"
        if backward_transfer <= most:  # false of NaN
            remarks.append(text)
        else:
            failures.append(text)
    if served is None:
        remarks.append("first version: nothing is served that it could be worse than")
    return Verdict(passed=not failures, reasons=tuple(failures or remarks))
