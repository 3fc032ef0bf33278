"""Which of two decisions is the later one: what the database says, or what Serve was told."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

from service.core.serving import ServedTarget
from workers.serving.ray_config import JSON, declared_target

logger = logging.getLogger(__name__)

PATIENCE_SECONDS = 10.0
PATIENCE_LOOKS = 3


@dataclass
class _Ahead:
    since: float
    looks: int = 0


class Sequences:
    """Serve may know of a later decision than a target has: whoever told it had read after us, and so shall we, at the next
    tick. Where it stays ahead, the database has been put back to an earlier state, or somebody has told Serve by hand. Then the
    database is right, and goes on counting from Serve's number, as replicas heed nothing that is older.
    """

    def __init__(self) -> None:
        self._offsets: dict[str, int] = {}
        self._ahead: dict[str, _Ahead] = {}

    def latest(self, targets: Sequence[ServedTarget], details: JSON, now: float) -> list[ServedTarget]:
        """What is to be declared, in Serve's count of sequences. ``now``: a monotonic clock's, in seconds."""
        return [self._latest(target, declared_target(target.model, details), now) for target in targets]

    def offset(self, model: str) -> int:
        """By how much Serve's count is ahead of the database's."""
        return self._offsets.get(model, 0)

    def _latest(self, target: ServedTarget, declared: ServedTarget | None, now: float) -> ServedTarget:
        model = target.model
        own = replace(target, sequence=target.sequence + self.offset(model))
        if declared is None or declared.sequence <= own.sequence:
            self._ahead.pop(model, None)
            return own
        ahead = self._ahead.setdefault(model, _Ahead(now))
        ahead.looks += 1
        if ahead.looks <= PATIENCE_LOOKS or now - ahead.since < PATIENCE_SECONDS:
            return replace(declared, spec=target.spec)
        logger.warning(
            "Serve was told decision %d of %s, the database is at %d and right",
            *(declared.sequence, model, target.sequence),
        )
        del self._ahead[model]
        self._offsets[model] = declared.sequence - target.sequence
        return replace(target, sequence=declared.sequence)
