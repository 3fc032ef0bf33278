"""A home left by one release, which later releases must take over: made, packed, unpacked and continued.

``python -m tests.support.release_home FOLDER`` writes ``home.tar.xz`` and ``expected.json`` for the code it runs in. Run it once
a release, from the release's own checkout, and commit the folder as ``tests/homes/<version>``.
"""

import json
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from service.artifacts import Artifacts
from service.core.manifest import MANIFEST
from service.core.states import FINISHED_UPDATES
from service.settings import Settings
from service.store.migrate import upgrade
from tests.support.control_plane import ControlPlane, serve
from tests.support.training import texts_of
from workers.local_executor import LocalExecutor
from workers.serving.local_serving import LocalServing

DATASET = MODEL = "news"
HOME, EXPECTED = "home.tar.xz", "expected.json"
DOCUMENTS = 24
ANY_LOSS: dict[str, float] = {"max_new_loss_increase": 50, "max_old_loss_increase": 50}
NO_LOSS: dict[str, float] = {"max_new_loss_increase": -50, "max_old_loss_increase": -50}

# A thousandth of the tiny preset: the home must stay small enough to commit. Bits are those of one thread in fp32.
MICRO: dict[str, Any] = {
    "name": MODEL,
    "dataset": DATASET,
    "architecture": {
        "config": {
            "model_type": "llama",
            "hidden_size": 8,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
        }
    },
    "tokenizer": {"train": {"vocab_size": 264}},
    "training": {
        "sequence_length": 16,
        "batch_tokens": 128,
        "peak_lr": 3e-3,
        "warmup_steps": 3,
        "precision": "fp32",
    },
    "gate": ANY_LOSS,
}


def make_home(home: Path) -> None:
    """Data versions 1 to 4: the first two are released, the third is rejected, the fourth is excluded after its release."""
    with service(home) as (plane, executor, serving):
        plane.client.create_dataset(DATASET, holdout_fraction=0.1)
        plane.client.create_model(MICRO)
        for number in (1, 2, 3, 4):
            plane.client.change_model(MODEL, {"gate": NO_LOSS if number == 3 else ANY_LOSS})
            _push(plane, number)
            plane.finish(MODEL, executor, serving)
        plane.client.exclude_version(DATASET, 4, "the wrong language")


def go_on(home: Path) -> dict[str, Any]:
    """Push data version 5 to a home that ``make_home`` made; what the line is then, without times and ids."""
    with service(home) as (plane, executor, serving):
        _push(plane, 5)
        plane.finish(MODEL, executor, serving)
        return line_of(plane)


def line_of(plane: ControlPlane) -> dict[str, Any]:
    """Every model version, stage and trunk checkpoint of the line, without times and ids."""
    client = plane.client
    versions = client.model_versions(MODEL)
    updates = client.updates(MODEL)
    assert all(update.state in FINISHED_UPDATES for update in updates)
    return {
        "versions": [
            {
                "number": version.number,
                "data_version": version.data_version,
                "state": version.state,
                "final_step": version.final_step,
                "files": {file.path: file.sha256 for file in version.artifact.files},
                "losses": {row.slice: row.loss for row in version.evaluations},
            }
            for version in versions
        ],
        "stages": [
            {
                "data_version": update.data_version,
                "kind": stage.kind,
                "state": stage.state,
                "reused": stage.reused,
            }
            for update in updates
            for stage in update.stages
        ],
        "trunk": [
            {"step": row.step, "data_version": row.data_version, "state": row.state}
            for row in client.checkpoints(MODEL)
        ],
        "artifacts": sorted(
            file.path.removesuffix(f"/{MANIFEST}")
            for file in plane.artifacts.files()
            if file.path.endswith(f"/{MANIFEST}")
        ),
    }


@contextmanager
def service(home: Path) -> Iterator[tuple[ControlPlane, LocalExecutor, LocalServing]]:
    """A control plane on the SQLite database and the local artifacts of a home, upgraded, with workers in this process."""
    settings = Settings(home=home)
    home.mkdir(exist_ok=True)
    upgrade(settings.database)
    artifacts = Artifacts.from_url(settings.artifacts)
    executor, serving = LocalExecutor(artifacts), LocalServing(artifacts, "127.0.0.1", 0)
    try:
        with serve(settings) as plane:
            yield plane, executor, serving
    finally:
        serving.close()
        executor.close()


def unpack(folder: Path, home: Path) -> dict[str, Any]:
    """Lay the packed home of a release at ``home``; what the release recorded of going on from it."""
    with tarfile.open(folder / HOME) as archive:
        archive.extractall(home, filter="data")
    expected: dict[str, Any] = json.loads((folder / EXPECTED).read_text())
    return expected


def _push(plane: ControlPlane, number: int) -> None:
    plane.push(DATASET, *texts_of(number, DOCUMENTS)).raise_for_status()


def _pack(home: Path, file: Path) -> None:
    with tarfile.open(file, "w:xz") as archive:
        for path in sorted(home.rglob("*")):
            archive.add(path, path.relative_to(home).as_posix(), recursive=False)


def _main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch) / "home"
        make_home(home)
        _pack(home, folder / HOME)
        expected = go_on(home)
    (folder / EXPECTED).write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
