"""Running a study with a service whose stages are scripted: requests, retries and results."""

import time
from collections.abc import Iterator, Mapping
from typing import Any

import httpx
import pytest

from api.cli.errors import CliError
from api.cli.study import runner
from api.cli.study.config import StudyConfig
from api.cli.study.data import StudyData
from api.cli.study.results import LineResult, Results
from api.cli.study.runner import StudyProgress, StudyRun
from api.client import ApiError, Client
from api.schemas.models import Model
from api.schemas.updates import MetricPoint, Update
from service.core.executor import RunError
from service.core.stage_specs import StageKind
from service.core.states import UpdateState
from tests.support.control_plane import ControlPlane
from tests.support.study import FIXED, data_of, no_results, study_of


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "POLL_SECONDS", 0.02)


class Study:
    """A study of two rows on two data versions that no other test uses.

    ``results`` are those of all runs so far.
    """

    def __init__(self, plane: ControlPlane, name: str) -> None:
        self.plane = plane
        self.config: StudyConfig = study_of({"name": "path", "paradigm": FIXED}, name=name)
        texts = [[f"{name} {version} {n}" for n in range(9)] for version in "ab"]
        self.data: StudyData = data_of(*texts, slices=[[f"{name} a"], [f"{name} b"]])
        self.results: Results = no_results(self.config)
        self.shown: list[StudyProgress] = []

    def run(self, client: Client | None = None, *, seconds: float = 60) -> bool:
        run = StudyRun(
            client or self.plane.client,
            self.config,
            self.data,
            self.results,
            in_flight=2,
            save=self._save,
            show=self.shown.append,
        )
        return run.run(time.monotonic() + seconds)

    def _save(self, results: Results) -> None:
        self.results = results

    def updates(self) -> dict[str, list[Update]]:
        """Updates by row, in order of creation."""
        models = [model.name for model in self.plane.client.models() if f".{self.data.digest}." in model.name]
        return {model.split(".")[2]: list(self.plane.client.updates(model)) for model in models}

    def lines(self) -> list[LineResult]:
        return list(self.results.lines.values())

    def errors(self) -> dict[str, str | None]:
        return {line.row: line.error for line in self.lines()}


@pytest.fixture
def study(plane: ControlPlane, name: str) -> Iterator[Study]:
    yield Study(plane, name)
    plane.executor.fail.clear()


COMPLETE = {"scratch": None, "path": None}


def test_every_line_has_every_version_and_no_update_is_requested_twice(study: Study) -> None:
    with study.plane.orchestrated():
        assert study.run()
        assert study.errors() == COMPLETE
        asked = study.updates()
        assert {row: [update.data_version for update in found] for row, found in asked.items()} == {
            "scratch": [1, 2],
            "path": [1, 2],
        }
        for line in study.lines():
            assert [list(version.perplexities) for version in line.versions] == [["v1"], ["v1", "v2"]]
        # An empty results file makes no difference, because the service has everything already.
        measured, study.results = study.results, no_results(study.config)
        assert study.run()
        assert study.results == measured
        assert study.updates() == asked
    assert {name for progress in study.shown for name in progress.active} == set(measured.lines)
    assert all(0 <= share <= 1 for progress in study.shown for share in progress.active.values())


def test_a_from_scratch_tuning_line_trains_only_the_newest_version(study: Study) -> None:
    tuning = {"rows": ["scratch"], "peak_lrs": [0.001, 0.002]}
    study.config = study_of(name=study.config.name, tuning=tuning)
    with study.plane.orchestrated():
        assert study.run()
    made = [(line.only_newest, [version.data_version for version in line.versions]) for line in study.lines()]
    assert sorted(made) == [(False, [1, 2]), (True, [2]), (True, [2])]


def test_lines_in_flight_at_the_deadline_are_continued(study: Study) -> None:
    """The first run makes no progress, because no orchestrator is running."""
    assert not study.run(seconds=2)
    assert study.results.lines == {}
    assert [len(found) for found in study.updates().values()] == [1, 1]
    with study.plane.orchestrated():
        assert study.run()
        assert study.errors() == COMPLETE
        assert [len(found) for found in study.updates().values()] == [2, 2]
        assert study.run(seconds=-1)  # past the deadline, but all lines have results


def test_a_failure_is_recorded_and_retried_in_the_next_run(study: Study) -> None:
    error = RunError("", "worker_lost", "the process is gone", retryable=False)
    study.plane.executor.fail[StageKind.TRAIN_BRANCH].append(error)
    with study.plane.orchestrated():
        assert study.run()
        assert study.errors() == {"scratch": None, "path": "worker_lost: the process is gone"}
        assert study.run()
        assert study.errors() == COMPLETE
    assert [len(found) for found in study.updates().values()] == [2, 2]


def test_a_line_that_diverged_is_not_retried_and_keeps_its_earlier_versions(study: Study) -> None:
    assert not study.run(seconds=2)
    for [update] in study.updates().values():
        study.plane.finish(update.model)
    error = RunError("", "diverged", "the loss is nan at step 7", retryable=False)
    study.plane.executor.fail[StageKind.TRAIN].append(error)
    with study.plane.orchestrated():
        assert study.run()
        assert study.errors() == {"scratch": "diverged: the loss is nan at step 7", "path": None}
        asked = study.updates()
        assert study.run()
        assert study.updates() == asked
    versions = {line.row: [version.data_version for version in line.versions] for line in study.lines()}
    assert versions == {"scratch": [1], "path": [1, 2]}


def test_a_cancelled_update_is_replaced_by_a_new_one(study: Study) -> None:
    assert not study.run(seconds=2)
    [update] = study.updates()["path"]
    study.plane.client.cancel_update(update.id)
    with study.plane.orchestrated():
        assert study.run()
        assert study.errors() == COMPLETE
    states = [update.state for update in study.updates()["path"]]
    assert states == [UpdateState.CANCELLED, UpdateState.SUCCEEDED, UpdateState.SUCCEEDED]


class Interrupted(Client):
    """A client that loses the answer when it first creates a model, starts an update and reads metrics."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.lost: set[str] = set()

    def create_model(self, spec: Mapping[str, Any]) -> Model:
        self._lose("before", "create_model")
        found = super().create_model(spec)
        self._lose("after", "create_model")
        return found

    def start_update(self, model: str, **changes: Any) -> Update:
        found = super().start_update(model, **changes)
        self._lose("after", "start_update")
        return found

    def metrics(self, update_id: str, stage_id: str) -> list[MetricPoint]:
        self._lose("before", "metrics")
        return super().metrics(update_id, stage_id)

    def _lose(self, *what: str) -> None:
        if (key := " ".join(what)) not in self.lost:
            self.lost.add(key)
            raise httpx.ReadTimeout("the answer is lost")


def test_a_short_outage_loses_no_line_and_trains_nothing_twice(study: Study) -> None:
    with study.plane.orchestrated(), Interrupted(study.plane.url) as client:
        assert study.run(client)
        assert len(client.lost) == 4
    assert study.errors() == COMPLETE
    assert [len(found) for found in study.updates().values()] == [2, 2]


def test_a_final_error_ends_the_run(study: Study) -> None:
    base = {"architecture": {"base": "/no/such/base"}}
    study.config = study_of({"name": "path"}, name=study.config.name, model=base)
    with pytest.raises(ApiError) as caught:
        study.run(seconds=5)
    assert caught.value.problem.status == 422


def test_a_dataset_of_the_same_name_with_other_data_is_refused(study: Study) -> None:
    assert not study.run(seconds=-1)
    assert not study.run(seconds=-1)  # the dataset has its own data
    other = Study(study.plane, f"{study.config.name}-other")
    dataset = f"{other.config.name}.{other.data.digest}"
    study.plane.client.create_dataset(dataset, holdout_fraction=0.0)
    study.plane.push(dataset, "another's").raise_for_status()
    with pytest.raises(CliError, match="has v1 as data version 2, not 1"):
        other.run(seconds=-1)
