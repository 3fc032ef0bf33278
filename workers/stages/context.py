"""What a stage receives besides its spec."""

from collections.abc import Callable
from dataclasses import dataclass

from service.artifacts import Artifacts
from service.core.executor import Point


@dataclass(frozen=True)
class StageContext:
    """The artifact store and the link to the executor.

    The first training process calls ``report`` after every step. All stages call ``should_stop`` regularly,
    training at every step, and raise Stopped once it returns true.
    """

    artifacts: Artifacts
    report: Callable[[Point], None]
    should_stop: Callable[[], bool]
