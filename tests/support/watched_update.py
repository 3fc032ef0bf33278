"""Observes an update while it trains: over HTTP, in the database, and by its published artifacts."""

from dataclasses import dataclass

from api.client import Client
from api.schemas.updates import Stage as StageDocument
from api.schemas.updates import Update
from service.artifacts import Artifacts
from service.core.plan import own_checkpoint_prefix, trunk_prefix
from service.core.stage_specs import StageKind, TrainStage
from service.core.states import FINISHED_UPDATES, StageState
from service.store import stages
from service.store.database import Database
from service.store.tables import Stage


@dataclass(frozen=True)
class WatchedUpdate:
    client: Client
    database: Database
    artifacts: Artifacts
    update_id: str

    def update(self) -> Update:
        return self.client.update(self.update_id)

    def has_ended(self) -> bool:
        return self.update().state in FINISHED_UPDATES

    def stage(self, kind: StageKind) -> StageDocument:
        [stage] = [stage for stage in self.update().stages if stage.kind == kind]
        return stage

    def row(self, kind: StageKind) -> Stage:
        with self.database.reading() as session:
            return stages.get(session, self.stage(kind).id)

    def spec(self, kind: StageKind) -> TrainStage:
        return TrainStage.model_validate(self.row(kind).spec)

    def failed_attempts(self) -> list[dict[str, object]]:
        """The data of the update's stage.attempt_failed events, oldest first."""
        events = [event.data for event in self.client.events() if event.type == "stage.attempt_failed"]
        return [event for event in events if event["update"] == self.update_id]

    def losses(self, kind: StageKind) -> dict[int, float]:
        """The losses that the stage has reported so far, by step of the line."""
        points = self.client.metrics(self.update_id, self.stage(kind).id)
        return {point.step: point.loss for point in points}

    def checkpoints(self, kind: StageKind) -> list[int]:
        """Steps of the checkpoints that the stage can resume from. For a trunk they include the one it starts at."""
        return sorted(_step_of(key) for key in self.artifacts.keys(_prefix(self.spec(kind))))

    def checkpoints_started(self, kind: StageKind) -> list[int]:
        """Steps of all checkpoints that the stage started to write, published or not. Local artifacts only."""
        return sorted(
            _step_of(folder.name)
            for folder in self.artifacts.root.joinpath(_prefix(self.spec(kind))).iterdir()
        )

    def is_past_a_checkpoint(self, kind: StageKind, after: int = 0) -> bool:
        """Whether the stage runs and has reported steps beyond a checkpoint of its own that is later than ``after``."""
        update = self.update()
        assert update.state not in FINISHED_UPDATES, update
        running = [
            stage for stage in update.stages if stage.kind == kind and stage.state == StageState.RUNNING
        ]
        if not running or running[0].progress is None:
            return False
        spec = self.spec(kind)
        newest = max(self.checkpoints(kind), default=0)
        return newest > max(after, spec.from_step) and spec.from_step + running[0].progress.step > newest


def _prefix(spec: TrainStage) -> str:
    return trunk_prefix(spec.line) if spec.path is None else own_checkpoint_prefix(spec)


def _step_of(key: str) -> int:
    return int(key.rsplit("/", 1)[-1].split("-")[0])
