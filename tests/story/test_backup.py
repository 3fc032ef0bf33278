"""Backup and restore as documented: a copy taken during an update continues elsewhere to the same bits."""

import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import sqlalchemy as sa

from api.cli import main as command_line
from service.artifacts import open_artifacts
from service.core.stage_specs import StageKind
from service.core.states import StageState
from service.store.tables import Stage
from tests.story.conftest import NewPlane, Workers
from tests.support.control_plane import ControlPlane, serve, settings_of
from tests.support.database import Databases, PostgresDatabases, name_of
from tests.support.postgres import PostgresServer, find_binaries
from tests.support.story import DATASET, DOCUMENTS, SPEC, push_and_release, released
from tests.support.training import texts_of
from workers.executors.local_executor import LocalExecutor
from workers.serving.local_serving import LocalServing

OFTEN = SPEC | {"training": SPEC["training"] | {"checkpoint_every": 3}}


def back_up_sqlite(plane: ControlPlane, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, file = str(plane.settings.home), str(folder / "pathswitch.db")
    monkeypatch.setattr("sys.argv", ["pathswitch", "db", "backup", file, "--home", home])
    with pytest.raises(SystemExit) as ended:
        command_line.main()
    assert ended.value.code in (0, None)


def dump(server: PostgresServer, name: str, file: Path) -> None:
    run_client(server, "pg_dump", "--format=custom", f"--file={file}", name)


def restore(server: PostgresServer, file: Path) -> None:
    run_client(server, "pg_restore", "--create", "--dbname=postgres", str(file))


def run_client(server: PostgresServer, tool: str, *arguments: str) -> None:
    binaries = find_binaries()
    assert binaries is not None
    connection = ["--host=127.0.0.1", f"--port={server.port}", "--username=postgres"]
    subprocess.run([str(binaries / tool), *connection, *arguments], check=True, capture_output=True)


@contextmanager
def stopped_in_the_middle(plane: ControlPlane) -> Iterator[None]:
    """The block runs while the trunk of the plane's second update trains. Afterwards its workers are stopped."""
    artifacts = open_artifacts(plane.settings.artifacts)
    executor, serving = LocalExecutor(artifacts), LocalServing(artifacts, "127.0.0.1", 0)
    try:
        with plane.orchestrated(executor, serving):
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline:
                stages = [stage for update in plane.client.updates("m") for stage in update.stages]
                training = [stage for stage in stages if stage.kind == StageKind.TRAIN_TRUNK]
                if len(training) == 2 and training[1].progress and training[1].progress.step > 4:
                    assert training[1].state == StageState.RUNNING
                    break
                time.sleep(0.005)
            else:
                raise AssertionError("the second trunk did not train")
            yield
    finally:
        serving.close()
        executor.close()


@pytest.mark.slow
def test_a_backup_taken_during_an_update_continues_elsewhere_to_the_same_bits(
    new_plane: NewPlane,
    databases: Databases,
    workers: Workers,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = new_plane()
    whole.client.create_model(OFTEN)
    executor, serving = workers(whole)
    expected = [push_and_release(whole, number, executor, serving) for number in (1, 2, 3)]

    copy = tmp_path / "backup"
    copy.mkdir()
    lost = new_plane()
    lost.client.create_model(OFTEN)
    executor, serving = workers(lost)
    push_and_release(lost, 1, executor, serving)
    lost.push(DATASET, *texts_of(2, DOCUMENTS)).raise_for_status()
    slow_down_steps(monkeypatch)
    with stopped_in_the_middle(lost):
        if isinstance(databases, PostgresDatabases):
            dump(databases.server, name_of(lost.settings.database), copy / "pathswitch.dump")
        else:
            back_up_sqlite(lost, copy, monkeypatch)
        shutil.copytree(lost.settings.home / "artifacts", copy / "artifacts")
    monkeypatch.undo()
    shutil.rmtree(lost.settings.home / "artifacts")

    home = tmp_path / "restored"
    shutil.copytree(copy / "artifacts", home / "artifacts")
    if isinstance(databases, PostgresDatabases):
        url = lost.settings.database
        lost.database.close()
        databases.drop(url)
        restore(databases.server, copy / "pathswitch.dump")
    else:
        url = f"sqlite:///{home / 'pathswitch.db'}"
        shutil.copyfile(copy / "pathswitch.db", home / "pathswitch.db")
    settings = settings_of(home, url)
    with serve(settings) as restored:
        executor, serving = workers(restored)
        assert released(restored, executor, serving, "m").artifact.sha256 == expected[1].artifact.sha256
        with restored.database.reading() as session:
            query = sa.select(Stage).where(Stage.kind == StageKind.TRAIN_TRUNK).order_by(Stage.id)
            _, trunk = session.scalars(query)
        assert trunk.attempt == 2
        assert trunk.result is not None
        # From a checkpoint in the backup.
        assert trunk.result["resumed_from_step"] > trunk.result["from_step"]
        third = push_and_release(restored, 3, executor, serving)
        assert third.artifact.sha256 == expected[2].artifact.sha256
        assert third.evaluations == expected[2].evaluations
        executor.close()


def slow_down_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make each step slow enough that a backup can be taken in between."""
    from workers.training.ranks import Ranks

    add = Ranks.add

    def slowly(self: Ranks, *values: float) -> list[float]:
        threading.Event().wait(0.1)
        return add(self, *values)

    monkeypatch.setattr(Ranks, "add", slowly)
