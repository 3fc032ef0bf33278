"""Commands against a running control plane: their output and exit status."""

import gzip
import json
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from api.cli import main as command_line
from service.artifacts import open_artifacts
from service.settings import Settings
from service.store.migrate import upgrade
from tests.support.control_plane import ControlPlane, ndjson

PLAIN_COLUMNS = "  "


class Outcome:
    def __init__(self, status: int, out: str, err: str) -> None:
        self.status = status
        self.out = out
        self.err = err

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Run = Callable[..., Outcome]


@pytest.fixture
def run(plane: ControlPlane, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """A function that runs a command line against the control plane."""

    def run(*arguments: str, url: str = plane.url) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["pathswitch", "--api", url, *arguments])
        status = 0
        try:
            command_line.main()
        except SystemExit as leaving:
            status = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
        out, err = capfd.readouterr()
        return Outcome(status, out, err)

    return run


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """Files of two data versions, the second one compressed."""
    first, second = tmp_path / "1.ndjson", tmp_path / "2.jsonl.gz"
    first.write_bytes(ndjson(*(f"the first version says {number}" for number in range(20))))
    second.write_bytes(gzip.compress(ndjson(*(f"the second version says {number}" for number in range(20)))))
    return [str(first), str(second)]


def test_datasets_are_created_pushed_to_and_listed(run: Run, name: str, files: list[str]) -> None:
    assert run("dataset", "create", name, "--description", "news").out == f"created dataset {name}\n"
    pushed = run("dataset", "push", name, *files, "--json")
    assert (pushed.status, pushed.err) == (0, "")
    assert [(version["number"], version["documents"]) for version in pushed.json] == [(1, 20), (2, 20)]
    listed = run("dataset", "list", name)
    assert [line.split()[0] for line in listed.out.splitlines()] == ["version", "1", "2"]
    assert "\x1b" not in listed.out
    assert (
        next(one for one in run("dataset", "list", "--json").json if one["name"] == name)["latest_version"]
        == 2
    )
    again = run("dataset", "push", name, files[0])
    assert again.status == 0
    assert "already registered as data version 1" in again.err


def test_a_bad_line_is_reported_with_its_file(run: Run, name: str, tmp_path: Path, files: list[str]) -> None:
    run("dataset", "create", name)
    bad = tmp_path / "bad.ndjson"
    bad.write_text('{"text": "good"}\n{"title": "no text"}\n')
    done = run("dataset", "push", name, files[0], str(bad))
    assert done.status == 1
    assert done.out == ""
    title, *findings = done.err.splitlines()
    assert title.startswith(f"pathswitch: {bad}: ")
    assert any("line 2" in finding for finding in findings)


@pytest.mark.parametrize(
    "arguments", [("--label", "x", "a", "b"), ("--format", "csv", "a"), ("nothing.ndjson",)]
)
def test_a_push_that_fails_prints_an_error_and_no_traceback(
    run: Run, name: str, arguments: tuple[str, ...]
) -> None:
    run("dataset", "create", name)
    done = run("dataset", "push", name, *arguments)
    assert done.status == 1
    assert done.err.startswith("pathswitch: ")


def test_standard_input_needs_a_format(
    run: Run, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run("dataset", "create", name)
    content = tmp_path / "content"
    content.write_text("one\fdocument\fafter another")
    for arguments, status in (((), 1), (("--format", "text"), 0)):
        with content.open() as stdin:
            monkeypatch.setattr(sys, "stdin", stdin)
            assert run("dataset", "push", name, "-", *arguments).status == status


def test_a_model_is_created_trained_watched_and_rolled_back(
    run: Run, plane: ControlPlane, name: str, files: list[str]
) -> None:
    run("dataset", "create", name, "--holdout", "0.2")
    run("dataset", "push", name, files[0])
    made = run(
        "model", "create", name, "--dataset", name, "--preset", "tiny", "--set", "training.seed=7", "--json"
    )
    assert made.json["training"]["seed"] == 7
    finishing = threading.Thread(target=plane.finish, args=(name,))
    finishing.start()
    watched = run("update", "watch", "--model", name)
    finishing.join()
    assert watched.status == 0, watched.err
    assert "· succeeded ·" in watched.out.splitlines()[-1]
    assert "release · succeeded" in watched.out

    pushed = run("dataset", "push", name, files[1], "--json").json
    plane.finish(name)
    second = run("update", "watch", pushed[0]["updates"][0], "--json")
    assert second.json["state"] == "succeeded"
    assert [update["data_version"] for update in run("update", "list", name, "--json").json] == [1, 2]
    shown = run("update", "show", second.json["id"])
    assert "trunk" in shown.out
    assert "learning rate" in shown.out

    served = next(one for one in run("model", "list", "--json").json if one["name"] == name)
    assert served["state"]["served_version"] == 2
    versions = run("model", "versions", name)
    assert [line.split()[0] for line in versions.out.splitlines()] == ["version", f"{name}@1", f"{name}@2"]
    assert run("model", "costs", name, "--json").json["ratio_to_from_scratch"] > 0
    assert "from scratch" in run("model", "costs", name, "--tokens", "100000").out
    forgotten = run("model", "forgetting", name, "--of", "perplexity", "--json").json
    assert forgotten["versions"] == [1, 2]
    assert forgotten["backward_transfers"] == [None, forgotten["backward_transfer"]]
    assert {"loss", "perplexity", "bits_per_byte"} < forgotten.keys()
    table = run("model", "forgetting", name).out
    assert table.startswith("Loss on every slice")
    assert "backward transfer" in table
    assert run("model", "forgetting", name, "--of", "bits_per_byte").out.startswith("Bits per byte")
    assert run("model", "forgetting", name, "--of", "speed").status == 2

    checkpoints = run("model", "checkpoints", name, "--json").json
    assert [row["state"] for row in checkpoints] == ["live", "live"]
    assert checkpoints[0]["id"] in run("model", "checkpoints", name).out
    start = ("update", "start", name)
    branch = run(*start, "--branch-from", checkpoints[0]["id"], "--decay", '{"shape": "linear"}', "--json")
    assert (branch.json["one_off"], branch.json["paradigm"]["decay"]["shape"]) == (True, "linear")
    other = run(*start, "--paradigm", '{"name": "from_scratch"}', "--json")
    assert other.json["paradigm"]["name"] == "from_scratch"
    assert run(*start, "--paradigm", "from_scratch").err.startswith(
        "pathswitch: --paradigm is not valid JSON"
    )
    assert run(*start, "--paradigm", "[]").status == 1
    for update in (branch, other):
        run("update", "cancel", update.json["id"])

    back = run("model", "rollback", name, "--reason", "worse", "--no-wait")
    assert (back.status, back.out) == (0, f"version 1 of {name} is being rolled out\n")
    forward = run("model", "release", name, "2", "--no-wait", "--json")
    assert forward.json["version"] == 2
    canary = ("--rollout", "canary", "--set", "share=0.5", "--set", "seconds=0")
    tried = run("model", "release", name, "2", *canary, "--no-wait", "--json").json["rollout"]
    assert (tried["strategy"], tried["share"], tried["min_requests"]) == ("canary", 0.5, 100)
    assert run("model", "release", name, "2", "--rollout", "slowly", "--no-wait").status == 1
    assert run("model", "release", name, "2", "--set", "share=0.5", "--no-wait").status == 1

    changed = run("model", "change", name, "--set", "serving.keep=3", "--set", "auto_release=false", "--json")
    assert (changed.json["serving"]["keep"], changed.json["auto_release"]) == (3, False)
    assert run("model", "change", name, "--set", "training.peak_lr=1").status == 1
    shown = run("model", "serving", name)
    assert shown.out.splitlines()[-1].startswith("Version 2 is released")
    assert run("model", "serving", name, "--json").json["pending"] == 2

    out = run("dataset", "exclude", name, "2", "--reason", "spam").out
    assert out.startswith(f"excluded data version 2 of {name}")
    assert f"{name}" in out.splitlines()[-1]
    again = run("dataset", "exclude", name, "2", "--reason", "spam", "--json").json
    assert again["affected_versions"] == [{"model": name, "number": 2, "state": "released"}]


def test_watching_a_cancelled_update_fails(run: Run, name: str, files: list[str]) -> None:
    run("dataset", "create", name)
    run("dataset", "push", name, files[0])
    run("model", "create", name, "--dataset", name, "--set", "auto_update=false")
    update = run("update", "start", name, "--json").json["id"]
    assert run("update", "cancel", update).out.startswith(f"update {update} is cancelled")
    done = run("update", "watch", update)
    assert done.status == 1
    assert done.err == f"pathswitch: update {update} was cancelled\n"
    assert run("update", "retry", update).status == 1


def test_a_model_from_a_file_with_one_change(run: Run, name: str, tmp_path: Path) -> None:
    run("dataset", "create", name)
    spec = tmp_path / "spec.json"
    spec.write_text(json.dumps({"name": name, "dataset": name, "training": {"seed": 1}}))
    made = run("model", "create", "--file", str(spec), "--set", "training.seed=2", "--json")
    assert made.json["training"]["seed"] == 2
    assert run("model", "create", name, "--file", str(spec)).status == 1
    assert run("model", "create", name).status == 1
    refused = run("model", "create", f"{name}-b", "--dataset", name, "--set", "training.peak_lr=7")
    assert refused.status == 1
    assert "peak_lr" in refused.err


def test_an_unreachable_control_plane_is_reported_with_its_address(run: Run) -> None:
    done = run("dataset", "list", url="http://127.0.0.1:9")
    assert done.status == 1
    assert done.err.startswith("pathswitch: the control plane is not responding at http://127.0.0.1:9")
    assert "pathswitch up" in done.err


def test_an_unknown_model_is_reported_with_status_and_detail(run: Run) -> None:
    done = run("model", "versions", "nobody")
    assert done.status == 1
    assert "(404)" in done.err.splitlines()[0]
    assert "nobody" in done.err


@pytest.mark.parametrize(
    "arguments", [("--help",), ("dataset", "push", "--help"), ("update", "watch", "--help")]
)
def test_help_is_printed(run: Run, arguments: tuple[str, ...]) -> None:
    done = run(*arguments)
    assert done.status == 0
    assert "Usage" in done.out


def test_garbage_is_listed_and_deleted_on_request(run: Run, tmp_path: Path) -> None:
    home = tmp_path / "home"
    upgrade(Settings(home=home).database)
    artifacts = open_artifacts(Settings(home=home).artifacts)
    for key in ("pack/old", "pack/young"):
        with artifacts.writing(key) as directory:
            (directory / "content").write_bytes(b"x" * 20_000)
            artifacts.publish(key, directory, {})
    os.utime(artifacts.root / "pack/old/manifest.json", (0, 0))
    listed = run("gc", "--home", str(home), "--keys")
    assert listed.status == 0, listed.err
    assert "pack/old" in listed.out
    assert "young" not in listed.out
    assert "would be removed: 20.2 kB" in listed.out
    assert artifacts.manifest("pack/old") is not None
    assert run("gc", "--home", str(home), "--delete").out.endswith("removed: 20.2 kB\n")
    assert artifacts.keys("pack") == ["pack/young"]
    assert run("gc", "--home", str(home)).out == "nothing to remove\n"
    assert run("gc", "--home", str(home), "--older-than", "0").status != 0
