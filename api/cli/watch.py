"""Follow an update to its end: a live view on a terminal, one line a change elsewhere.

Level-triggered: it asks again and again how things stand, and waits for a control plane that is away.
"""

import time
from datetime import UTC, datetime
from typing import Protocol

import httpx
from rich.console import Console
from rich.live import Live

from api.cli import watch_view
from api.client import ApiError, Client
from api.schemas.updates import MetricPoint, Stage, Update
from service.core.stage_specs import TRAINING_KINDS
from service.core.states import FINISHED_UPDATES, StageState

POLL_SECONDS = 0.5
AWAY_SECONDS = 60.0
PERCENT_A_LINE = 10


class Screen(Protocol):
    def show(self, update: Update, points: watch_view.Points) -> None: ...


class LiveScreen:
    """Redraws in place."""

    def __init__(self, live: Live, console: Console) -> None:
        self._live = live
        self._console = console

    def show(self, update: Update, points: watch_view.Points) -> None:
        self._live.update(watch_view.view(update, points, _now(), self._console.width), refresh=True)


class LineScreen:
    """Prints what has changed: states, and every tenth of a stage's steps."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._shown: dict[str, tuple[object, ...]] = {}

    def show(self, update: Update, points: watch_view.Points) -> None:
        for stage in update.stages:
            progress = stage.progress
            tenths = (
                progress.step * (100 // PERCENT_A_LINE) // max(1, progress.total_steps) if progress else 0
            )
            # What has only just become possible is no news yet.
            waits = stage.state in (StageState.PENDING, StageState.READY) and stage.error is None
            self._tell(stage.id, (waits, stage.state if not waits else "", stage.attempt, tenths), stage)
        seen = (update.state, update.model_version)
        if self._shown.get(update.id) != seen:
            self._shown[update.id] = seen
            self._print(watch_view.headline(update, _now()).plain)
            if update.error is not None:
                self._print(watch_view.failure(update.error))

    def _tell(self, key: str, seen: tuple[object, ...], stage: Stage) -> None:
        before, self._shown[key] = self._shown.get(key), seen
        if before != seen and not seen[0]:
            self._print(watch_view.line(stage, _now()))

    def _print(self, text: str) -> None:
        self._console.print(f"{datetime.now():%H:%M:%S} {text}", markup=False)


def watch(client: Client, update_id: str, console: Console) -> Update:
    """Show the update until it has ended. Returns it as it is then."""
    if not console.is_terminal:
        return _follow(client, update_id, LineScreen(console))
    with Live(console=console, auto_refresh=False) as live:
        return _follow(client, update_id, LiveScreen(live, console))


def choose(client: Client, model: str | None) -> str | None:
    """Id of the update that someone who names none means: the one that runs, else the next, else the last."""
    models = [model] if model is not None else [one.name for one in client.models()]
    found = [update for name in models for update in client.updates(name)]
    for state in ("running", "pending"):
        chosen = [update for update in found if update.state == state]
        if chosen:
            return chosen[0].id
    return max(found, key=lambda update: update.created_at).id if found else None


def _follow(client: Client, update_id: str, screen: Screen) -> Update:
    """Raises httpx.TransportError or ApiError where there has been no answer for a minute."""
    points: dict[str, list[MetricPoint]] = {}
    settled: set[str] = set()
    answered = time.monotonic()
    while True:
        try:
            update = client.update(update_id)
            _fetch(client, update, points, settled)
            answered = time.monotonic()
        except (httpx.TransportError, ApiError) as error:
            refused = isinstance(error, ApiError) and error.problem.status < 500
            if refused or time.monotonic() - answered > AWAY_SECONDS:
                raise
        else:
            screen.show(update, points)
            if update.state in FINISHED_UPDATES:
                return update
        time.sleep(POLL_SECONDS)


def _fetch(client: Client, update: Update, points: dict[str, list[MetricPoint]], settled: set[str]) -> None:
    """Bring the metrics of training stages up to date. Those of one that succeeded do not change again."""
    for stage in update.stages:
        if stage.kind in TRAINING_KINDS and stage.started_at is not None and stage.id not in settled:
            points[stage.id] = client.metrics(update.id, stage.id)
            if stage.state == StageState.SUCCEEDED:
                settled.add(stage.id)


def _now() -> datetime:
    return datetime.now(UTC)
