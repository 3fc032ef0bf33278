"""Decides which target is newer: the one in the database, or the one declared to Serve."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

from service.core.serving import ServedTarget
from workers.serving.ray.declaration import JSON, declared_target

logger = logging.getLogger(__name__)

PATIENCE_SECONDS = 10.0
PATIENCE_POLLS = 3


@dataclass
class _Ahead:
    since: float
    polls: int = 0


class Sequences:
    """Reconciles the sequence numbers of the database with those that Serve has seen.

    Serve may have a higher sequence than the target if another orchestrator read the database after us; at
    the next tick we will read the same. If Serve stays ahead, the database was restored from a backup or
    Serve was changed by hand. The database then wins, and its sequences are offset by the difference, because
    replicas ignore older ones.
    """

    def __init__(self) -> None:
        self._offsets: dict[str, int] = {}
        self._ahead: dict[str, _Ahead] = {}

    def latest(self, targets: Sequence[ServedTarget], details: JSON, now: float) -> list[ServedTarget]:
        """Return the targets to declare, with Serve's sequence numbers. ``now`` is a monotonic clock's time."""
        return [self._latest(target, declared_target(target.model, details), now) for target in targets]

    def offset(self, model: str) -> int:
        """Return how far Serve's sequence is ahead of the database's."""
        return self._offsets.get(model, 0)

    def _latest(self, target: ServedTarget, declared: ServedTarget | None, now: float) -> ServedTarget:
        model = target.model
        shifted = replace(target, sequence=target.sequence + self.offset(model))
        if declared is None or declared.sequence <= shifted.sequence:
            self._ahead.pop(model, None)
            return shifted
        ahead = self._ahead.setdefault(model, _Ahead(now))
        ahead.polls += 1
        if ahead.polls <= PATIENCE_POLLS or now - ahead.since < PATIENCE_SECONDS:
            return replace(declared, spec=target.spec)
        logger.warning(
            "Serve has decision %d of %s but the database is at %d; continuing from the database",
            *(declared.sequence, model, target.sequence),
        )
        del self._ahead[model]
        self._offsets[model] = declared.sequence - target.sequence
        return replace(target, sequence=declared.sequence)
