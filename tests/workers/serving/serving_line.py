"""Targets of the model line that the serving tests use."""

import time
from typing import Any

from service.core.serving import ReplicaReport, Residence, ServedTarget, ServedVersion, Trial
from workers.serving.local_serving import LocalServing

PROMPT = "The cat sat on"


def version(number: int, key: str | None = None) -> ServedVersion:
    return ServedVersion(number, key or f"export/{number}")


def line(number: int, key: str | None = None, **rest: Any) -> ServedTarget:
    """Serve that version."""
    return ServedTarget("line", version(number, key), **rest)


def trying(served: int, tried: ServedVersion, **trial: Any) -> ServedTarget:
    """Serve one version while another is on trial."""
    return ServedTarget("line", version(served), Trial(tried, **trial))


def failures(report: ReplicaReport) -> dict[int, str | None]:
    """Return the errors of the versions that could not be loaded, by number."""
    return {version.number: version.error for version in report.versions if version.state == Residence.FAILED}


LINE = line(1)
UNRELEASED = ServedTarget("unreleased", None)
COMPLETION = {"model": "line", "prompt": "a", "max_tokens": 1}


def settle(serving: LocalServing, *targets: ServedTarget) -> None:
    """Apply the targets and wait until every line answers with its version."""
    serving.apply(targets)
    deadline = time.monotonic() + 30
    while any(not _answers_as(serving, target) for target in targets):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _answers_as(serving: LocalServing, target: ServedTarget) -> bool:
    [report] = serving.observe([target.model])[target.model]
    return report.number == (None if target.stable is None else target.stable.number)
