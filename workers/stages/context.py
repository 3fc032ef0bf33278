"""What a stage is given beside its spec."""

from collections.abc import Callable
from dataclasses import dataclass

from service.artifacts import Artifacts
from service.core.executor import Point


@dataclass(frozen=True)
class StageContext:
    """``report`` takes progress, of the first training process; ``should_stop`` is asked every step."""

    artifacts: Artifacts
    report: Callable[[Point], None]
    should_stop: Callable[[], bool]
