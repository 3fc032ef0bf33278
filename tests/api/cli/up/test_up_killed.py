"""`pathswitch up` starts on the same ports 2 s after kill -9, every time."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from api.cli.up import ports, processes
from api.client import Client
from service.core.retry import MAX_ATTEMPTS
from service.settings import Settings
from service.store.database import Database
from tests.support.stopping import (
    LONG,
    push,
    trained_steps,
    trunk,
    wait_until_it_trains,
    wait_until_released,
)
from tests.support.story import DATASET
from tests.support.up import Up

PAUSE_SECONDS = 2.0  # killed processes still exist then, and hold ports
OFTEN: dict[str, Any] = LONG | {"training": LONG["training"] | {"checkpoint_every": 10}}


class Killed:
    """Starts `up` repeatedly on one home and two ports, and kills it at the end of each block."""

    def __init__(self, home: Path, executor: str) -> None:
        self._home, self._executor = home, executor
        self._ports = tuple(ports.free_ports("127.0.0.1", 2))
        self.seconds: list[float] = []

    @contextmanager
    def up(self) -> Iterator[Up]:
        began = time.monotonic()
        up = Up(self._home, self._ports, PATHSWITCH_EXECUTOR=self._executor)
        up.wait_until_ready()
        self.seconds.append(round(time.monotonic() - began, 1))
        yield up
        up.kill()
        time.sleep(PAUSE_SECONDS)


@pytest.fixture
def database(home: Path) -> Iterator[Database]:
    database = Database(Settings(home=home).database)
    yield database
    database.close()


@pytest.mark.slow
@pytest.mark.ray
def test_up_starts_after_every_kill_and_leaves_no_earlier_process(home: Path) -> None:
    killed, before = Killed(home, "ray"), set()
    for number in range(1, 7):
        with killed.up() as up, Client(up.urls["api"]) as client:
            assert not {process for process in before if processes.alive(process)}
            client.create_dataset(f"d{number}")
            assert len(list(client.datasets())) == number
            assert httpx.get(f"{up.urls['serve']}/models").json()["data"] == []
            before = up.started
    print(f"ready after {killed.seconds} s")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("executor", "kills"), [("local", MAX_ATTEMPTS + 1), pytest.param("ray", 2, marks=pytest.mark.ray)]
)
def test_training_continues_after_any_number_of_kills(
    home: Path, database: Database, executor: str, kills: int
) -> None:
    """Even after more kills than a stage has attempts, because each attempt makes progress."""
    killed = Killed(home, executor)
    with killed.up() as up, Client(up.urls["api"]) as client:
        client.create_dataset(DATASET, holdout_fraction=0.1)
        client.create_model(OFTEN)
        push(client, 1)
        wait_until_released(client, 1)
        push(client, 2)
        wait_until_it_trains(database, 2, attempt=1)
    for attempt in range(2, kills + 1):
        with killed.up():
            wait_until_it_trains(database, 2, attempt=attempt)
    with killed.up() as up, Client(up.urls["api"]) as client:
        wait_until_released(client, 2)
        stage = trunk(database, 2)
    print(f"ready after {killed.seconds} s")
    assert stage is not None
    assert stage.attempt == kills + 1
    spec = stage.spec
    assert trained_steps(database, stage) == list(range(spec["from_step"] + 1, spec["to_step"] + 1))
