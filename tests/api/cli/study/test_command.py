"""`pathswitch study` with a running service: what it writes and prints, and how it continues."""

import json
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from api.cli.errors import CliError
from api.cli.study import runner
from api.cli.study.command import Options, study
from api.cli.study.results import read_results
from service.core.executor import RunError
from service.core.stage_specs import StageKind
from tests.support.control_plane import ControlPlane
from tests.support.study import FIXED, plain_study, write_documents


@pytest.fixture(autouse=True)
def _restore_sigterm(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Restore the SIGTERM handler, which the command replaces in this process."""
    monkeypatch.setattr(runner, "POLL_SECONDS", 0.02)
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def options(plane: ControlPlane, folder: Path, name: str, minutes: float | None = 1) -> Options:
    """Options of a study of two rows, on text that no other test uses."""
    (folder / "study.json").write_text(
        json.dumps(plain_study({"name": "path", "paradigm": FIXED}, name=name))
    )
    for number in (1, 2):
        for part in ("train", "validation"):
            documents = [{"text": f"{name} {part} {number} {n}"} for n in range(9)]
            write_documents(folder / "data" / part / f"v{number}.ndjson", documents)
    return Options(
        config=folder / "study.json",
        data=folder / "data",
        out=folder / "out",
        home=folder / "home",
        api=plane.url,
        processes=1,
        versions=None,
        cut=None,
        minutes=minutes,
    )


def test_a_study_prints_every_line_writes_a_report_and_continues_where_it_stopped(
    plane: ControlPlane, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(CliError) as caught:
        study(options(plane, tmp_path, name, minutes=0))
    assert caught.value.title == "only 0 of 2 lines are trained"
    assert str(tmp_path / "out") in caught.value.detail
    assert capsys.readouterr().out == ""

    plane.executor.fail[StageKind.TRAIN_BRANCH].append(RunError("", "worker_lost", "gone", retryable=False))
    with plane.orchestrated():
        with pytest.raises(CliError) as failed:
            study(options(plane, tmp_path, name))
        [(model, reason)] = failed.value.errors
        assert re.fullmatch(r"path\.s0\.[0-9a-f]{8}", model)
        assert reason == "worker_lost: gone"
        output = capsys.readouterr().out.splitlines()
        assert len(output) == 4
        lines = {re.sub(r"^[\d:]+ ", "", line) for line in output[:2]}
        assert {line.partition(" ")[0] for line in lines} == {"1/2", "2/2"}
        assert {line.partition(" ")[2] for line in lines} == {
            "path, seed 0, peak 0.002: worker_lost: gone",
            "scratch, seed 0, peak 0.002: mean perplexity 20.00, trained in 2.0 s",
        }
        report = tmp_path / "out" / "report.md"
        assert output[2] == f"Wrote {report} and report.html in the same folder."
        assert output[3] == f"{model}: {reason}"
        first = report.read_text()

        study(options(plane, tmp_path, name))
        [line, wrote] = capsys.readouterr().out.splitlines()
        assert "2/2 path, seed 0, peak 0.002: mean perplexity 20.00, trained in" in line
        assert wrote == output[2]
        study(options(plane, tmp_path, name))
        assert capsys.readouterr().out.splitlines() == [wrote]
    assert "| path |" not in first
    assert "| path |" in report.read_text()
    results = read_results(tmp_path / "out" / "results.json")
    assert [part.lines for part in results.parts] == [2, 1]
    assert report.read_text().count(f"`{results.parts[0].command}` trained ") == 2
