"""A whole update in one process, with real stages and a real server: data in, the new model version answers."""

import time
from pathlib import Path

import httpx
import pytest

from service.artifacts import Artifacts
from service.core.specs import ModelSpec
from service.core.states import FINISHED_UPDATES, UpdateState
from service.create_model import create_model
from service.orchestrator.loop import Orchestrator
from service.run_update import start_update
from service.store import models, updates
from service.store.database import Database, now
from service.store.migrate import upgrade
from service.store.tables import Dataset, DataVersion
from tests.support.training import SMALL_CONFIG, publish_documents, texts_of
from workers.local_executor import LocalExecutor
from workers.serving.local_serving import LocalServing

PATIENCE_SECONDS = 120.0
SPEC = ModelSpec.model_validate(
    {
        "name": "m",
        "dataset": "d",
        "architecture": {"config": SMALL_CONFIG},
        "tokenizer": {"train": {"vocab_size": 320}},
        "training": {"sequence_length": 32, "batch_tokens": 256, "peak_lr": 3e-3, "warmup_steps": 3},
        "gate": {"max_new_loss_increase": 5, "max_old_loss_increase": 5},
        "auto_update": False,
    }
)


def run_two_updates(home: Path) -> list[tuple[str, list[dict[str, object]]]]:
    """Two data versions become two served model versions; what each is, as hashes of its files and its losses."""
    url = f"sqlite:///{home / 'pathswitch.db'}"
    home.mkdir()
    upgrade(url)
    database, artifacts = Database(url), Artifacts(home / "artifacts")
    executor, serving = LocalExecutor(artifacts), LocalServing(artifacts, "127.0.0.1", 0)
    orchestrator = Orchestrator(database, artifacts, executor, serving, "o")
    try:
        with database.transaction() as session:
            dataset = Dataset(name="d", holdout_fraction=0.1, created_at=now(session))
            session.add(dataset)
            session.flush()
            dataset_id = dataset.id
        model_id = create_model(database, artifacts, (), SPEC).id
        made = []
        for number in (1, 2):
            key = publish_documents(artifacts, texts_of(number, 60))
            with database.transaction() as session:
                session.add(
                    DataVersion(
                        dataset_id=dataset_id,
                        number=number,
                        sha256=f"s{number}",
                        bytes=1,
                        documents=60,
                        duplicates=0,
                        holdout_documents=6,
                        artifact_key=key,
                        created_at=now(session),
                    )
                )
            finish(database, orchestrator, start_update(database, "m").id)
            answer = httpx.post(
                f"{serving.url()}/v1/completions",
                json={"model": "m", "prompt": "a", "max_tokens": 4},
                timeout=60,
            )
            assert answer.status_code == 200
            assert answer.json()["system_fingerprint"] == f"m@{number}"
            with database.reading() as session:
                version = models.version(session, model_id, number)
                manifest = artifacts.manifest(version.export_key)
                assert manifest is not None
                made.append(
                    (manifest.sha256, [row for row in version.evaluations if row["slice"] == f"v{number}"])
                )
        return made
    finally:
        serving.close()
        executor.close()
        database.close()


def finish(database: Database, orchestrator: Orchestrator, update_id: str) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        if not orchestrator.tick():
            time.sleep(0.05)
        with database.reading() as session:
            row = updates.update(session, update_id)
        if row.state in FINISHED_UPDATES:
            assert row.state == UpdateState.SUCCEEDED, row.error
            return
    pytest.fail("the update did not end")


def test_two_data_versions_become_served_model_versions_and_equal_runs_are_equal_to_the_bit(
    tmp_path: Path,
) -> None:
    first = run_two_updates(tmp_path / "first")
    assert run_two_updates(tmp_path / "second") == first
    assert first[0][0] != first[1][0]
