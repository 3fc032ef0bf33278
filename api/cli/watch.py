"""Watches an update until it ends: a live view on a terminal, otherwise one line per change.

It polls the state of the update, and keeps polling through outages of the control plane of up to a minute.
"""

import time
from datetime import UTC, datetime
from typing import Protocol

import httpx
from rich.console import Console
from rich.live import Live

from api.cli import watch_view
from api.client import ApiError, Client
from api.schemas.updates import MetricPoint, Update
from service.core.stage_specs import TRAINING_KINDS
from service.core.states import FINISHED_UPDATES, StageState

POLL_SECONDS = 0.5
MAX_OUTAGE_SECONDS = 60.0
PERCENT_PER_LINE = 10


class Screen(Protocol):
    def show(self, update: Update, points: watch_view.Points) -> None: ...


class LiveScreen:
    """Redraws the view in place."""

    def __init__(self, live: Live, console: Console) -> None:
        self._live = live
        self._console = console

    def show(self, update: Update, points: watch_view.Points) -> None:
        self._live.update(watch_view.view(update, points, _now(), self._console.width), refresh=True)


class LineScreen:
    """Prints a line when a state changes, and at every tenth of a stage's steps."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._shown: dict[str, tuple[object, ...]] = {}

    def show(self, update: Update, points: watch_view.Points) -> None:
        for stage in update.stages:
            progress = stage.progress
            tenths = (
                progress.step * (100 // PERCENT_PER_LINE) // max(1, progress.total_steps) if progress else 0
            )
            # A stage that is pending or ready has nothing to report yet.
            waiting = stage.state in (StageState.PENDING, StageState.READY) and stage.error is None
            if not waiting and self._is_new(stage.id, (stage.state, stage.attempt, tenths)):
                self._print(watch_view.line(stage, _now()))
        if self._is_new(update.id, (update.state, update.model_version)):
            self._print(watch_view.headline(update, _now()).plain)
            if update.error is not None:
                self._print(watch_view.failure(update.error))

    def _is_new(self, key: str, state: tuple[object, ...]) -> bool:
        """Whether the state differs from the last one shown under this key, which it replaces."""
        is_new = self._shown.get(key) != state
        self._shown[key] = state
        return is_new

    def _print(self, text: str) -> None:
        self._console.print(f"{datetime.now():%H:%M:%S} {text}", markup=False)


def watch(client: Client, update_id: str, console: Console) -> Update:
    """Show the update until it ends. Returns its final state."""
    if not console.is_terminal:
        return _follow(client, update_id, LineScreen(console))
    with Live(console=console, auto_refresh=False) as live:
        return _follow(client, update_id, LiveScreen(live, console))


def choose(client: Client, model: str | None) -> str | None:
    """Id of the update to watch by default: the running one, else the next pending one, else the newest."""
    models = [model] if model is not None else [row.name for row in client.models()]
    found = [update for name in models for update in client.updates(name)]
    for state in ("running", "pending"):
        chosen = [update for update in found if update.state == state]
        if chosen:
            return chosen[0].id
    return max(found, key=lambda update: update.created_at).id if found else None


def _follow(client: Client, update_id: str, screen: Screen) -> Update:
    """Raises httpx.TransportError or ApiError if the control plane has not answered for a minute."""
    points: dict[str, list[MetricPoint]] = {}
    complete: set[str] = set()
    last_answer = time.monotonic()
    while True:
        try:
            update = client.update(update_id)
            _fetch_metrics(client, update, points, complete)
            last_answer = time.monotonic()
        except (httpx.TransportError, ApiError) as error:
            is_final = isinstance(error, ApiError) and error.problem.status < 500
            if is_final or time.monotonic() - last_answer > MAX_OUTAGE_SECONDS:
                raise
        else:
            screen.show(update, points)
            if update.state in FINISHED_UPDATES:
                return update
        time.sleep(POLL_SECONDS)


def _fetch_metrics(
    client: Client, update: Update, points: dict[str, list[MetricPoint]], complete: set[str]
) -> None:
    """Update the metrics of training stages. Those of a succeeded stage no longer change."""
    for stage in update.stages:
        if stage.kind in TRAINING_KINDS and stage.started_at is not None and stage.id not in complete:
            points[stage.id] = client.metrics(update.id, stage.id)
            if stage.state == StageState.SUCCEEDED:
                complete.add(stage.id)


def _now() -> datetime:
    return datetime.now(UTC)
