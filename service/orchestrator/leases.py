"""The stages that this orchestrator holds, and how far it has read their runs."""

import time
from dataclasses import dataclass

from service.store.tables import Stage


@dataclass
class Lease:
    """A stage held under an epoch.

    ``run_id`` is None for a release stage, which waits for a row and not for a run.

    ``first_step`` is the stage's step from which the current attempt began to train, once it has trained one.
    """

    stage_id: str
    epoch: int
    kind: str
    key: str | None
    run_id: str | None
    first_step: int | None = None


class LeaseTable:
    """Leases by stage id, and poll cursors by run id.

    It also notes when the leases were last renewed, on the monotonic clock. That only saves writes: the
    database's clock decides when a lease expires.
    """

    def __init__(self, owner: str, lease_seconds: float) -> None:
        self.owner = owner
        self.lease_seconds = lease_seconds
        self.stages: dict[str, Lease] = {}
        self.cursors: dict[str, int] = {}
        self.renewed_at = time.monotonic()

    def add(self, stage: Stage) -> None:
        first_step = (stage.progress or {}).get("first_step")
        self.stages[stage.id] = Lease(stage.id, stage.epoch, stage.kind, stage.key, stage.run_id, first_step)

    def drop(self, stage_id: str) -> None:
        lease = self.stages.pop(stage_id, None)
        if lease and lease.run_id and not any(o.run_id == lease.run_id for o in self.stages.values()):
            self.cursors.pop(lease.run_id, None)

    def set_cursor(self, run_id: str, cursor: int) -> None:
        """Note how far a run has been read.

        Ignored for a run that is no longer held: its next holder starts over.
        """
        if any(lease.run_id == run_id for lease in self.stages.values()):
            self.cursors[run_id] = cursor

    def by_run(self) -> dict[str, list[Lease]]:
        runs: dict[str, list[Lease]] = {}
        for lease in self.stages.values():
            if lease.run_id is not None:
                runs.setdefault(lease.run_id, []).append(lease)
        return runs

    def epochs(self) -> dict[str, int]:
        """Stage id -> epoch of every lease."""
        return {lease.stage_id: lease.epoch for lease in self.stages.values()}

    def renewal_is_due(self) -> bool:
        return time.monotonic() - self.renewed_at >= self.lease_seconds / 3

    def set_renewed(self) -> None:
        self.renewed_at = time.monotonic()
