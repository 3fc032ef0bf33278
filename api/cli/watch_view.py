"""Renders an update: stages, progress, and charts of the learning rate and the loss.

Pure functions from an update, the metrics of its training stages and the current time.
"""

from collections.abc import Mapping, Sequence
from datetime import datetime

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from api.cli.chart import Series, chart
from api.cli.output import count, duration, loss, new_table, rate
from api.schemas.updates import Failure, MetricPoint, Stage, Update
from service.core.stage_specs import TRAINING_KINDS, StageKind
from service.core.states import StageState, UpdateState

Points = Mapping[str, Sequence[MetricPoint]]
"""Metric points by stage id."""

STYLES: Mapping[StageState | UpdateState, str] = {
    StageState.PENDING: "dim",
    StageState.READY: "cyan",
    StageState.RUNNING: "yellow",
    StageState.SUCCEEDED: "green",
    StageState.FAILED: "bold red",
    StageState.CANCELLED: "magenta",
    UpdateState.PENDING: "dim",
    UpdateState.RUNNING: "yellow",
    UpdateState.SUCCEEDED: "green",
    UpdateState.REJECTED: "bold red",
    UpdateState.FAILED: "bold red",
    UpdateState.CANCELLED: "magenta",
}
TRUNK_STYLE, BRANCH_STYLE = "blue", "green"
CHART_ROWS = 7
CHART_WIDTH = 44
BAR_WIDTH = 16
NARROW = 2 * CHART_WIDTH


def view(update: Update, points: Points, now: datetime, width: int) -> RenderableType:
    """The complete view, for a terminal of that width."""
    parts: list[RenderableType] = [headline(update, now), stages(update, now)]
    if any(points.values()):
        parts.append(charts(update, points, width))
    parts += [Text(text, style="red") for text in failures(update)]
    return Group(*parts)


def headline(update: Update, now: datetime) -> Text:
    text = Text.assemble(
        (update.model, "bold"), f" · data version {update.data_version} · update {update.id} · ",
        (update.state, STYLES[update.state]),
    )  # fmt: skip
    if update.started_at is not None:
        text.append(f" · {duration(_elapsed(update.started_at, update.finished_at, now))}")
    if update.model_version is not None:
        text.append(f" · version {update.model_version}")
    return text


def stages(update: Update, now: datetime) -> Table:
    table = new_table(
        *("stage", "state", ">attempt", ">time", "progress", ">step", ">loss", ">lr", ">tokens/s", ">left")
    )
    for stage in update.stages:
        progress = stage.progress
        cells: list[RenderableType] = [
            stage.name,
            Text("reused" if stage.reused else stage.state, style=STYLES[stage.state]),
            str(stage.attempt) if stage.attempt > 1 else "",
            duration(_elapsed(stage.started_at, stage.finished_at, now)) if stage.started_at else "",
        ]
        if progress is not None:
            cells += [
                ProgressBar(total=progress.total_steps, completed=progress.step, width=BAR_WIDTH),
                f"{progress.step:,}/{progress.total_steps:,}",
                loss(progress.loss),
                rate(progress.learning_rate),
                count(progress.tokens_per_second),
                duration(progress.eta_seconds) if stage.state == StageState.RUNNING else "",
            ]
        table.add_row(*cells)
    return table


def charts(update: Update, points: Points, width: int) -> RenderableType:
    """Learning rate and loss over the line's steps, of the trunk and the branch that leaves it."""
    chart_width = min(CHART_WIDTH, width - 1)
    rates = [
        Series([(p.step, p.learning_rate) for p in found], style) for style, found in paths(update, points)
    ]
    losses = [Series([(p.step, p.loss) for p in found], style) for style, found in paths(update, points)]
    left = Group(*chart("learning rate", rates, chart_width, CHART_ROWS, from_zero=True))
    right = Group(*chart("loss", losses, chart_width, CHART_ROWS))
    legend = Text.assemble(" " * 9, ("━ trunk ", TRUNK_STYLE), ("━ branch", BRANCH_STYLE))
    if width < NARROW:
        return Group(left, right, legend)
    grid = Table.grid(padding=(0, 1))
    grid.add_row(left, right)
    return Group(grid, legend)


def paths(update: Update, points: Points) -> list[tuple[str, Sequence[MetricPoint]]]:
    """Style and points of each training stage, in order. A branch starts with the last point of its trunk."""
    found: list[tuple[str, Sequence[MetricPoint]]] = []
    trunk_end: list[MetricPoint] = []
    for stage in update.stages:
        own = list(points.get(stage.id, ()))
        if stage.kind not in TRAINING_KINDS or not own:
            continue
        if stage.kind == StageKind.TRAIN_TRUNK:
            found.append((TRUNK_STYLE, own))
            trunk_end = own[-1:]
        else:
            found.append((BRANCH_STYLE, [*trunk_end, *own]))
    return found


def failures(update: Update) -> list[str]:
    """Errors of all stages that failed, even if they are retried, and any other error of the update."""
    found = [
        f"{stage.name}: {failure(stage.error.model_copy(update={'stage': None}))}"
        for stage in update.stages
        if stage.error is not None and stage.state != StageState.SUCCEEDED
    ]
    own = failure(update.error) if update.error is not None else None
    return found if own is None or own in found else [*found, own]


def failure(error: Failure) -> str:
    where = f"{error.stage}: " if error.stage else ""
    return f"{where}{error.code}: {error.detail}"


def line(stage: Stage, now: datetime) -> str:
    """One line about a stage, for logs."""
    words = [stage.name, "reused" if stage.reused else str(stage.state)]
    if stage.attempt > 1:
        words.append(f"attempt {stage.attempt}")
    if stage.progress is not None:
        progress = stage.progress
        words.append(f"step {progress.step:,}/{progress.total_steps:,}")
        words.append(f"loss {loss(progress.loss)}")
        words.append(f"lr {rate(progress.learning_rate)}")
        words.append(f"{count(progress.tokens_per_second)} tokens/s")
        if stage.state == StageState.RUNNING:
            words.append(f"{duration(progress.eta_seconds)} left")
    if stage.started_at is not None and stage.finished_at is not None:
        words.append(duration(_elapsed(stage.started_at, stage.finished_at, now)))
    if stage.error is not None and stage.state != StageState.SUCCEEDED:
        words.append(failure(stage.error))
    return " · ".join(words)


def _elapsed(start: datetime, end: datetime | None, now: datetime) -> float:
    """Seconds from start to end, at least 0 because the clocks of two machines may differ."""
    return max(0.0, ((end or now) - start).total_seconds())
