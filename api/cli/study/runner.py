"""Trains the lines of a study on a service, a few at a time, and saves the result of each finished line."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import httpx

from api.cli.errors import CliError
from api.cli.study.config import StudyConfig, digest
from api.cli.study.data import DataFile, StudyData
from api.cli.study.lines import StudyLine, missing_lines
from api.cli.study.results import Curve, LineResult, Measured, Results
from api.client import ApiError, Client
from api.schemas.updates import MetricPoint, Update
from service.core.stage_specs import TRAINING_KINDS, StageKind
from service.core.states import FINISHED_UPDATES, UpdateState

POLL_SECONDS = 0.5
MAX_OUTAGE_SECONDS = 60.0
CURVE_POINTS = 100


@dataclass
class _Active:
    """A line in training.

    ``pending`` are the data versions to train, ``updates`` the updates by data version.
    """

    line: StudyLine
    model: str
    pending: list[int]
    updates: dict[int, Update] = field(default_factory=dict)


@dataclass(frozen=True)
class StudyProgress:
    """The lines in training, and how much of each is done, from 0 to 1."""

    active: dict[str, float]


class StudyRun:
    """One run of a study.

    It keeps ``in_flight`` lines in training. Some of them wait for a trunk that they share with others.
    """

    def __init__(
        self,
        client: Client,
        config: StudyConfig,
        data: StudyData,
        results: Results,
        *,
        in_flight: int,
        save: Callable[[Results], None],
        show: Callable[[StudyProgress], None],
    ) -> None:
        self._client = client
        self._config = config
        self._data = data
        self.results = results
        self._in_flight = in_flight
        self._save = save
        self._show = show
        self._active: dict[str, _Active] = {}
        # Other users of the service have models and datasets too, so the names must be unique.
        self._dataset = f"{config.name[:48]}.{data.digest}"
        self._slice_labels = {f"slice-{n}": label for n, label in enumerate(data.labels, 1)} | {
            f"v{n}": label for n, label in enumerate(data.labels, 1)
        }

    def run(self, deadline: float) -> bool:
        """Train until every line has a result or ``time.monotonic()`` passes the deadline.

        Returns whether every line has one.
        """
        self._push_data()
        last_answer = time.monotonic()
        tried: set[str] = set()
        while time.monotonic() < deadline:
            try:
                while len(self._active) < self._in_flight:
                    waiting = missing_lines(self._config, self.results)
                    line = next((line for line in waiting if line.name not in tried), None)
                    if line is None:
                        break
                    self._active[line.name] = self._begin(line)
                    tried.add(line.name)
                if not self._active:
                    return True
                for name, active in list(self._active.items()):
                    if (result := self._advance(active)) is not None:
                        del self._active[name]
                        self._save_result(name, result)
                last_answer = time.monotonic()
            except (httpx.TransportError, ApiError) as error:
                is_final = isinstance(error, ApiError) and error.problem.status < 500
                if is_final or time.monotonic() - last_answer > MAX_OUTAGE_SECONDS:
                    raise
            self._show(StudyProgress({name: _fraction_done(active) for name, active in self._active.items()}))
            time.sleep(POLL_SECONDS)
        return not self._active and next(missing_lines(self._config, self.results), None) is None

    def _push_data(self) -> None:
        """Create the dataset and push all data.

        Slices come first, because their documents are kept out of training.
        """
        known = {dataset.name for dataset in self._client.datasets()}
        if self._dataset not in known:
            fraction = 0.0 if self._data.slices else None
            self._client.create_dataset(
                self._dataset, description=f"study {self._config.name}", holdout_fraction=fraction
            )
        for number, body in enumerate(self._data.slices, 1):
            self._client.push_slice(
                self._dataset,
                f"slice-{number}",
                [body.content],
                data_version=number,
                format=body.format,
                encoding=body.encoding,
            )
        for number, body in enumerate(self._data.versions, 1):
            self._push_version(number, body)

    def _push_version(self, number: int, body: DataFile) -> None:
        pushed = self._client.push_version(
            self._dataset, [body.content], format=body.format, encoding=body.encoding, label=body.label
        )
        if pushed.row.number != number:
            raise CliError(
                f"dataset {self._dataset} has {body.label} as data version {pushed.row.number}, not {number}",
                "Something other than the study changed it. Use another service or home.",
            )

    def _begin(self, line: StudyLine) -> _Active:
        """Create the line's model unless it exists, and pick up its updates. Failed updates are retried."""
        model = f"{digest({'line': line.name})}.{self._data.digest}.{line.name}"[:63]
        if model not in {found.name for found in self._client.models()}:
            self._client.create_model({**line.spec, "name": model, "dataset": self._dataset})
        count = len(self._data.versions)
        pending = [count] if line.only_newest else list(range(1, count + 1))
        active = _Active(line, model, pending)
        for number, update in self._existing_updates(model).items():
            failed = update.state == UpdateState.FAILED
            active.updates[number] = self._client.retry_update(update.id) if failed else update
        return active

    def _existing_updates(self, model: str) -> dict[int, Update]:
        """Updates by data version, without cancelled ones, which cannot be retried."""
        found = self._client.updates(model)
        return {update.data_version: update for update in found if update.state != UpdateState.CANCELLED}

    def _advance(self, active: _Active) -> LineResult | None:
        """Start the line's next update if none is running.

        Returns the result when the line is complete or has failed.
        """
        for number in active.pending:
            update = active.updates.get(number)
            if update is None:
                # The update may exist already, if the answer to an earlier request was lost.
                existing = self._existing_updates(active.model).get(number)
                active.updates[number] = existing or self._client.start_update(
                    active.model, data_version=number
                )
                return None
            if update.state not in FINISHED_UPDATES:
                update = active.updates[number] = self._client.update(update.id)
            if update.state not in FINISHED_UPDATES:
                return None
            if update.state in (UpdateState.FAILED, UpdateState.CANCELLED):
                error = update.error
                return self._result(active, f"{error.code}: {error.detail}" if error else str(update.state))
        return self._result(active, None)

    def _result(self, active: _Active, error: str | None) -> LineResult:
        line = active.line
        with_curves = line.seed == self._config.seeds[0]
        costs = {cost.data_version: cost for cost in self._client.costs(active.model).versions}
        versions = []
        for version in self._client.model_versions(active.model):
            cost = costs[version.data_version]
            update = active.updates[version.data_version]
            by_label = {self._slice_labels[row.slice]: row for row in version.evaluations}
            versions.append(
                Measured(
                    data_version=version.data_version,
                    losses={label: row.loss for label, row in by_label.items()},
                    perplexities={label: row.perplexity for label, row in by_label.items()},
                    bits_per_byte={label: row.bits_per_byte for label, row in by_label.items()},
                    tokens=cost.tokens,
                    flops=cost.flops,
                    device_seconds=cost.device_seconds,
                    from_scratch_tokens=cost.from_scratch_tokens,
                    branch_point=version.branch_point.step,
                    final_step=version.final_step,
                    notes=update.notes,
                    curves=self._curves(update) if with_curves else (),
                )
            )
        return LineResult(
            row=line.row.name,
            seed=line.seed,
            peak_lr=line.peak_lr,
            only_newest=line.only_newest,
            versions=tuple(versions),
            error=error,
        )

    def _curves(self, update: Update) -> tuple[Curve, ...]:
        curves = []
        for stage in self._client.update(update.id).stages:
            if stage.kind in TRAINING_KINDS:
                points = self._client.metrics(update.id, stage.id)
                curves.append(thin_curve(stage.kind, points))
        return tuple(curve for curve in curves if curve.steps)

    def _save_result(self, name: str, result: LineResult) -> None:
        self.results = self.results.model_copy(update={"lines": self.results.lines | {name: result}})
        self._save(self.results)


def thin_curve(kind: StageKind, points: list[MetricPoint], max_points: int = CURVE_POINTS) -> Curve:
    """Thin a curve to mean losses over windows of steps. Each point is at the last step of its window."""
    width = max(1, -(-len(points) // max_points))
    windows = [points[start : start + width] for start in range(0, len(points), width)]
    return Curve(
        kind=kind,
        steps=tuple(window[-1].step for window in windows),
        losses=tuple(round(sum(point.loss for point in window) / len(window), 4) for window in windows),
        rates=tuple(float(f"{window[-1].learning_rate:.4g}") for window in windows),
    )


def _fraction_done(active: _Active) -> float:
    """Fraction of the line that is done. The training steps of an update count for 0.9 of it."""
    done = 0.0
    for number in active.pending:
        update = active.updates.get(number)
        if update is None:
            break
        if update.state in FINISHED_UPDATES:
            done += 1
            continue
        steps = [
            (stage.progress.step, stage.progress.total_steps) for stage in update.stages if stage.progress
        ]
        total = sum(total for _, total in steps)
        done += sum(step for step, _ in steps) / total * 0.9 if total else 0.0
        break
    return done / len(active.pending)
