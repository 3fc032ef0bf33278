"""Have a service train every line of a study, a few lines at a time, and write down each as it is complete."""

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
AWAY_SECONDS = 60.0
CURVE_POINTS = 100


@dataclass
class _Active:
    """A line in training. ``updates``: by data version, in the order in which they are made."""

    line: StudyLine
    model: str
    waiting: list[int]
    updates: dict[int, Update] = field(default_factory=dict)


@dataclass(frozen=True)
class StudyProgress:
    """What there is to tell after a look: the lines in training, and how much of each is done, between 0 and 1."""

    active: dict[str, float]


class StudyRun:
    """``in_flight``: how many lines the service is asked for at once; more than it trains at once, for some wait for others."""

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
        # Names of models, datasets and slices of a service belong to all who use it.
        self._dataset = f"{config.name[:48]}.{data.digest}"
        self._slice_labels = {f"slice-{n}": label for n, label in enumerate(data.labels, 1)} | {
            f"v{n}": label for n, label in enumerate(data.labels, 1)
        }

    def run(self, deadline: float) -> bool:
        """Until every line has a result, or ``time.monotonic`` is past the deadline. Returns whether all have."""
        self._push_data()
        answered = time.monotonic()
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
                        self._keep(name, result)
                answered = time.monotonic()
            except (httpx.TransportError, ApiError) as error:
                refused = isinstance(error, ApiError) and error.problem.status < 500
                if refused or time.monotonic() - answered > AWAY_SECONDS:
                    raise
            self._show(StudyProgress({name: _share(active) for name, active in self._active.items()}))
            time.sleep(POLL_SECONDS)
        return not self._active and next(missing_lines(self._config, self.results), None) is None

    def _push_data(self) -> None:
        """All that is not there yet. The slices first, for their documents are kept out of training."""
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
            raise CliError(f"{body.label} is data version {pushed.row.number} there, not {number}")

    def _begin(self, line: StudyLine) -> _Active:
        """The line's model, and what of it has been trained before."""
        model = f"{digest({'line': line.name})}.{self._data.digest}.{line.name}"[:63]
        if model not in {found.name for found in self._client.models()}:
            self._client.create_model({**line.spec, "name": model, "dataset": self._dataset})
        count = len(self._data.versions)
        waiting = [count] if line.only_newest else list(range(1, count + 1))
        active = _Active(line, model, waiting)
        for number, update in self._asked_for(model).items():
            again = update.state == UpdateState.FAILED
            active.updates[number] = self._client.retry_update(update.id) if again else update
        return active

    def _asked_for(self, model: str) -> dict[int, Update]:
        """By data version. One that was cancelled cannot be tried again: it is as if it had not been asked for."""
        found = self._client.updates(model)
        return {update.data_version: update for update in found if update.state != UpdateState.CANCELLED}

    def _advance(self, active: _Active) -> LineResult | None:
        """Ask for the line's next version where there is none in training; its result once it is complete or has failed."""
        for number in active.waiting:
            update = active.updates.get(number)
            if update is None:
                # It may have been asked for, and the answer lost on its way.
                asked = self._asked_for(active.model).get(number)
                active.updates[number] = asked or self._client.start_update(active.model, data_version=number)
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
        found = []
        for stage in self._client.update(update.id).stages:
            if stage.kind in TRAINING_KINDS:
                points = self._client.metrics(update.id, stage.id)
                found.append(thinned(stage.kind, points))
        return tuple(curve for curve in found if curve.steps)

    def _keep(self, name: str, result: LineResult) -> None:
        self.results = self.results.model_copy(update={"lines": self.results.lines | {name: result}})
        self._save(self.results)


def thinned(kind: StageKind, points: list[MetricPoint], most: int = CURVE_POINTS) -> Curve:
    """Means of the loss over equal stretches of steps, each at its last step and the rate of it."""
    width = max(1, -(-len(points) // most))
    stretches = [points[start : start + width] for start in range(0, len(points), width)]
    return Curve(
        kind=kind,
        steps=tuple(stretch[-1].step for stretch in stretches),
        losses=tuple(round(sum(point.loss for point in stretch) / len(stretch), 4) for stretch in stretches),
        rates=tuple(float(f"{stretch[-1].learning_rate:.4g}") for stretch in stretches),
    )


def _share(active: _Active) -> float:
    done = 0.0
    for number in active.waiting:
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
    return done / len(active.waiting)
