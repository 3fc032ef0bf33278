"""A harness for orchestrator tests: each kind of database, artifacts, scripted ports, and orchestrators to kill."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest
import sqlalchemy as sa

from service.artifacts import Artifacts, LocalArtifacts
from service.core.states import FINISHED_UPDATES, StageState
from service.orchestrator.loop import Orchestrator
from service.store import datasets, updates
from service.store.database import Database, now
from service.store.tables import Dataset, Model, Stage, Update
from tests.support.rows import add_data_version, add_dataset, add_model
from tests.support.scripted import ScriptedExecutor, ScriptedServing

LEASE_SECONDS = 30.0


@dataclass
class Harness:
    database: Database
    artifacts: Artifacts
    executor: ScriptedExecutor
    serving: ScriptedServing = field(default_factory=ScriptedServing)
    starts: int = 0

    def orchestrator(self, database: Database | None = None) -> Orchestrator:
        """A new orchestrator process, with nothing in memory."""
        self.starts += 1
        return Orchestrator(
            database or self.database,
            self.artifacts,
            self.executor,
            self.serving,
            f"o{self.starts}",
            LEASE_SECONDS,
        )

    def add_model(self, name: str = "m", versions: int = 1) -> str:
        """Add a model on the dataset ``d``. Creates the dataset with that many data versions if necessary."""
        with self.database.transaction() as session:
            dataset = session.scalar(sa.select(Dataset).where(Dataset.name == "d"))
            return add_model(session, dataset or add_dataset(session, "d", versions), name).id

    def add_version(self, number: int) -> None:
        with self.database.transaction() as session:
            add_data_version(session, datasets.dataset(session, "d"), number)

    def add_update(self, model_id: str, number: int = 1) -> str:
        with self.database.transaction() as session:
            model = session.get(Model, model_id)
            return updates.add(session, model, datasets.version(session, model.dataset_id, number)).id

    def update(self, update_id: str) -> Update:
        with self.database.reading() as session:
            return updates.update(session, update_id)

    def stages(self, update_id: str) -> dict[str, Stage]:
        with self.database.reading() as session:
            return {stage.name: stage for stage in updates.stages(session, update_id)}

    def stages_running(self, update_id: str) -> set[str]:
        return {stage.kind for stage in self.stages(update_id).values() if stage.state == StageState.RUNNING}

    def finish(self, orchestrator: Orchestrator, update_id: str, ticks: int = 60) -> Update:
        """Tick until the update has ended, skipping the waits between attempts."""
        for _ in range(ticks):
            orchestrator.tick()
            if self.update(update_id).state in FINISHED_UPDATES:
                return self.update(update_id)
            self.skip_waits()
        raise AssertionError({name: stage.state for name, stage in self.stages(update_id).items()})

    def skip_waits(self) -> None:
        with self.database.transaction() as session:
            session.execute(sa.update(Stage).where(Stage.ready_at.is_not(None)).values(ready_at=now(session)))

    def expire_leases(self) -> None:
        with self.database.transaction() as session:
            past = now(session).replace(year=2000)
            session.execute(sa.update(Stage).where(Stage.state == "running").values(lease_until=past))


@pytest.fixture
def harness(database: Database, tmp_path: Path) -> Harness:
    artifacts = LocalArtifacts(tmp_path / "artifacts")
    return Harness(database, artifacts, ScriptedExecutor(artifacts))
