"""What this orchestrator holds: stage by stage the epoch it claimed under, the run, and how far it has read it."""

import time
from dataclasses import dataclass

from service.store.tables import Stage


@dataclass
class Held:
    """``key`` is None for a release, which waits for a row rather than for a run.

    ``first_step`` is the step of the stage that the present attempt began with, once it has trained one.
    """

    stage_id: str
    epoch: int
    kind: str
    key: str | None
    run_id: str | None
    first_step: int | None = None


class Holding:
    """Held stages by id, poll cursors by run, and when the leases were last renewed (monotonic: only to be frugal)."""

    def __init__(self, owner: str, lease_seconds: float) -> None:
        self.owner = owner
        self.lease_seconds = lease_seconds
        self.stages: dict[str, Held] = {}
        self.cursors: dict[str, int] = {}
        self._renewed = time.monotonic()

    def add(self, stage: Stage) -> None:
        first_step = (stage.progress or {}).get("first_step")
        self.stages[stage.id] = Held(stage.id, stage.epoch, stage.kind, stage.key, stage.run_id, first_step)

    def drop(self, stage_id: str) -> None:
        held = self.stages.pop(stage_id, None)
        if held and held.run_id and not any(other.run_id == held.run_id for other in self.stages.values()):
            self.cursors.pop(held.run_id, None)

    def has_read(self, run_id: str, cursor: int) -> None:
        """Keep how far a run was read, as long as it is held: who holds it anew has to read it from its beginning."""
        if any(held.run_id == run_id for held in self.stages.values()):
            self.cursors[run_id] = cursor

    def by_run(self) -> dict[str, list[Held]]:
        runs: dict[str, list[Held]] = {}
        for held in self.stages.values():
            if held.run_id is not None:
                runs.setdefault(held.run_id, []).append(held)
        return runs

    def renewal_is_due(self) -> bool:
        return time.monotonic() - self._renewed >= self.lease_seconds / 3

    def renewed(self) -> None:
        self._renewed = time.monotonic()
