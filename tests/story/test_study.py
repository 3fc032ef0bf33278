"""A whole study with real training: every line has results, nothing trains twice, reruns are identical."""

import math
import time
from pathlib import Path
from typing import Any

import pytest

from api.cli.study import runner
from api.cli.study.analysis import Analysis
from api.cli.study.config import StudyConfig
from api.cli.study.lines import num_lines, peak_of
from api.cli.study.results import Results, open_results
from api.cli.study.runner import StudyRun
from service.core.stage_specs import StageKind
from tests.story.conftest import NewPlane, Workers
from tests.support.control_plane import ControlPlane
from tests.support.story import DOCUMENTS, SPEC
from tests.support.study import data_of
from tests.support.training import texts_of

pytestmark = pytest.mark.slow_on_postgres

PEAKS = (3e-3, 6e-3)
LENGTH = {"rule": "fixed", "fraction": 0.4}
CONFIG = StudyConfig.model_validate(
    {
        "name": "micro",
        "model": {
            "architecture": SPEC["architecture"],
            "tokenizer": SPEC["tokenizer"],
            "training": {
                "sequence_length": 32,
                "batch_tokens": 256,
                "warmup_steps": 3,
                "replay_fraction": 0.0,
            },
        },
        "rows": [
            {"name": "scratch", "paradigm": {"name": "from_scratch", "schedule": "wsd"}, "peak_of": "path"},
            {"name": "path", "paradigm": {"name": "path_switching", "decay": {"length": LENGTH}}},
            # It merges checkpoints from the step at which `path` branches off, so that both share the trunk before it.
            {"name": "merge", "paradigm": {"name": "merge", "k": 3, "span": LENGTH}, "peak_of": "path"},
        ],
        "baselines": ["scratch"],
        "tuning": {"rows": ["path"], "peak_lrs": PEAKS},
    }
)
TEXTS = {seed: texts_of(seed, DOCUMENTS) for seed in (1, 2)}
# The last six texts of each version are its slice.
DATA = data_of(*(texts[:-6] for texts in TEXTS.values()), slices=[texts[-6:] for texts in TEXTS.values()])
UNTRAINED = 320  # perplexity of a uniform guess over this vocabulary


def run(plane: ControlPlane, results: Results, *, deadline: float = math.inf) -> tuple[bool, Results]:
    saved = [results]
    study = StudyRun(
        plane.client,
        CONFIG,
        DATA,
        results,
        in_flight=3,
        save=saved.append,
        show=lambda progress: None,
    )
    complete = study.run(deadline)
    assert study.results == saved[-1]
    return complete, study.results


def asked_of(plane: ControlPlane) -> list[str]:
    """Ids of all updates of the service."""
    return [update.id for model in plane.client.models() for update in plane.client.updates(model.name)]


def without_clocks(results: Results) -> Any:
    plain = results.model_dump()
    for line in plain["lines"].values():
        for version in line["versions"]:
            del version["device_seconds"]
    return plain


@pytest.mark.slow
def test_a_study_measures_every_line_trains_none_twice_and_is_reproducible(
    new_plane: NewPlane, workers: Workers, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(runner, "POLL_SECONDS", 0.05)
    nothing = open_results(tmp_path, CONFIG, DATA)
    plane = new_plane()
    assert run(plane, nothing, deadline=time.monotonic()) == (False, nothing)
    with plane.orchestrated(*workers(plane)):
        complete, results = run(plane, nothing)
        assert complete
        assert len(results.lines) == num_lines(CONFIG, results) == 4
        asked = asked_of(plane)
        assert len(asked) == 2 * 4
        assert run(plane, results) == (True, results)
    assert run(plane, results, deadline=time.monotonic()) == (True, results)
    part = results.model_copy(update={"lines": dict(list(results.lines.items())[:3])})
    assert run(plane, part, deadline=time.monotonic()) == (False, part)
    assert asked_of(plane) == asked

    for line in results.lines.values():
        assert (line.error, line.seed) == (None, 0)
        assert [version.data_version for version in line.versions] == [1, 2]
        for number, version in enumerate(line.versions, 1):
            slices = [f"v{n}" for n in range(1, number + 1)]
            assert list(version.losses) == list(version.perplexities) == list(version.bits_per_byte) == slices
            for name, loss in version.losses.items():
                perplexity = version.perplexities[name]
                assert loss is not None
                assert perplexity is not None
                assert perplexity == pytest.approx(math.exp(loss))
                assert perplexity < UNTRAINED / 1.5
            assert version.tokens > 0

    # Merging shares the trunk of the line with the best peak rate, which is the study's path-switching line.
    best = peak_of(CONFIG, CONFIG.row("merge"), results)
    assert best in PEAKS
    assert {(line.row, line.peak_lr) for line in results.lines.values()} == {
        ("scratch", best),
        ("merge", best),
        *(("path", peak_lr) for peak_lr in PEAKS),
    }
    analysis = Analysis(results)
    merge, path = analysis.line("merge"), analysis.line("path")
    assert merge is not None
    assert path is not None
    end, branch_point = merge.versions[-1].final_step, path.versions[-1].branch_point
    for row, last in (("merge", end), ("path", branch_point)):
        trunk = analysis.trunk(row)
        assert [step for curve in trunk for step in curve.steps] == list(range(1, last + 1))
        assert {curve.kind for curve in trunk} == {StageKind.TRAIN_TRUNK}
    # Every step of every stage has its point, even if another line trained it.
    [model] = [model.name for model in plane.client.models() if ".merge." in model.name]
    reused = []
    for version, update in zip(merge.versions, plane.client.updates(model), strict=True):
        stages = [stage for stage in update.stages if stage.kind == StageKind.TRAIN_TRUNK]
        assert len(version.curves) == len(stages)
        for curve in version.curves:
            assert list(curve.steps) == list(range(curve.steps[0], curve.steps[-1] + 1))
        reused += [stage.reused for stage in stages]
    assert reused[0]
    assert not all(reused)
    for summary in analysis.rows:
        assert summary.final.gap is not None
        assert summary.final.backward_transfer is not None
    ratios = {summary.row.name: summary.final.cost_ratio for summary in analysis.rows}
    assert ratios["scratch"] == pytest.approx(1)
    assert ratios["path"] == pytest.approx(analysis.closed_form_ratio("path"))
    assert ratios["merge"] < ratios["path"] < 1

    elsewhere = new_plane()
    with elsewhere.orchestrated(*workers(elsewhere)):
        complete, again = run(elsewhere, nothing)
    assert complete
    assert without_clocks(again) == without_clocks(results)
