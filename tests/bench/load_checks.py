"""What is measured of a control plane that runs, with the targets it is held to."""

import asyncio
import hashlib
import itertools
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from service.core.specs import ModelSpec
from service.core.stage_specs import StageKind
from service.core.states import StageState, UpdateState
from service.store.columns import new_id
from service.store.database import Database, now
from service.store.tables import Dataset, DataVersion, MetricPoint, Model, Stage, Update
from tests.bench.figure import Figure
from tests.bench.load_http import Load, Request, connection, get, load, post
from tests.bench.upload import ndjson_body
from tests.support.server_process import MemoryWatch, cpu_seconds
from tests.support.specs import PLAIN

CLIENTS = 32
P99_MS = 250.0
PER_SECOND = 300.0
DATASETS = 32
VERSIONS = 100_000
POINTS = 1_000_000
UPLOADS = 64
UPLOAD_BYTES = 64 << 20
UPLOAD_GROWTH = 64 << 20
_BATCH = 5_000


def registrations(url: str, pid: int, num_datasets: int, seconds: float) -> list[Figure]:
    """Small bodies of new documents, each to the next of so many datasets."""
    prefix = f"registered-{num_datasets}"

    async def run() -> tuple[Load, float]:
        for number in range(num_datasets):
            await post(url, "/datasets", {"name": f"{prefix}-{number}"})

        def request(number: int) -> Request:
            texts = (f"document {number} of this load", f"another document {number} of this load")
            body = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)
            return "POST", f"/datasets/{prefix}-{number % num_datasets}/versions", body

        await load(url, 2, 1.0, lambda number: request(10**9 + number))
        cpu = cpu_seconds(pid)
        done = await load(url, CLIENTS, seconds, request)
        return done, cpu_seconds(pid) - cpu

    done, server_cpu = asyncio.run(run())
    created = done.statuses.get(201, 0)
    check = f"registrations to {num_datasets} dataset{'s' if num_datasets > 1 else ''}, c={CLIENTS}"
    return [
        Figure(check, "registrations/s", created / done.seconds, PER_SECOND, at_least=True),
        Figure(check, "server's CPU, ms a request", server_cpu / len(done.latencies) * 1000),
        *_latencies(check, done),
    ]


def _latencies(check: str, done: Load) -> list[Figure]:
    failed = sum(count for status, count in done.statuses.items() if status >= 400)
    return [
        Figure(check, "requests", len(done.latencies)),
        Figure(check, "p50 ms", done.percentile_ms(0.5)),
        Figure(check, "p99 ms", done.percentile_ms(0.99), P99_MS),
        Figure(check, "answers 4xx or 5xx", failed, 0),
        Figure(check, "client's own CPU, ms a request", done.client_ms),
    ]


def add_many_rows(database: Database) -> tuple[str, str]:
    """A dataset of 100,000 data versions, each with its update, and one stage of 1,000,000 points: update and stage."""
    with database.transaction() as session:
        present = now(session)
        dataset = Dataset(name="many", holdout_fraction=0.02, created_at=present)
        session.add(dataset)
        session.flush()
        spec = ModelSpec.model_validate(PLAIN | {"name": "many", "dataset": "many", "auto_update": False})
        model = Model(
            name="many", dataset_id=dataset.id, spec=spec.model_dump(mode="json"), created_at=present
        )
        session.add(model)
        session.flush()
        ids = [new_id("dv") for _ in range(VERSIONS)]
        versions = (
            {
                "id": ids[number],
                "dataset_id": dataset.id,
                "number": number + 1,
                "sha256": f"{number:064x}",
                "bytes": 1000,
                "documents": 10,
                "duplicates": 0,
                "holdout_documents": 1,
                "artifact_key": f"data/{number:064x}",
                "created_at": present,
            }
            for number in range(VERSIONS)
        )
        update_ids = [new_id("upd") for _ in range(VERSIONS)]
        finished = {"created_at": present, "started_at": present, "finished_at": present}
        updates = (
            {
                "id": update_ids[number],
                "model_id": model.id,
                "data_version_id": ids[number],
                "paradigm": spec.paradigm.model_dump(mode="json"),
                "state": UpdateState.SUCCEEDED,
                "notes": {},
                **finished,
            }
            for number in range(VERSIONS)
        )
        stage_id = new_id("stg")
        stage = {
            "id": stage_id,
            "update_id": update_ids[-1],
            "position": 0,
            "name": "train",
            "kind": StageKind.TRAIN_TRUNK,
            "spec": {},
            "needs": [],
            "state": StageState.SUCCEEDED,
            **finished,
        }
        points = (
            {
                "stage_id": stage_id,
                "step": step,
                "loss": 1 / step,
                "learning_rate": 1e-3,
                "grad_norm": 1.0,
                "tokens_per_second": 1e4,
            }
            for step in range(1, POINTS + 1)
        )
        kinds: tuple[tuple[Any, Iterator[dict[str, Any]]], ...] = (
            (DataVersion, versions),
            (Update, updates),
            (Stage, iter([stage])),
            (MetricPoint, points),
        )
        for table, rows in kinds:
            while batch := list(itertools.islice(rows, _BATCH)):
                session.execute(sa.insert(table), batch)
    return update_ids[-1], stage_id


def lists(url: str, database: Database, seconds: float) -> list[Figure]:
    """Pages anywhere in a long list, the last among them, and the points of a long curve; a few clients at once."""
    update, stage = add_many_rows(database)
    with database.reading() as session:
        ids = session.scalars(sa.select(DataVersion.id).order_by(DataVersion.number)).all()[:-1]
    path = "/datasets/many/versions?limit=100"

    async def last_page() -> Any:
        return await get(url, f"{path}&after={ids[-100]}")

    last = asyncio.run(last_page())
    assert (last["data"][-1]["number"], last["has_more"]) == (VERSIONS, False)
    # In strides that end at the last page and begin anew: every part of the list is read.
    places = [f"{path}&after={ids[-100 - 7919 * number % (len(ids) - 100)]}" for number in range(1000)]
    urls = {
        f"pages of {VERSIONS:,} data versions, c=4": [path, *places],
        f"pages of {VERSIONS:,} updates, c=4": ["/models/many/updates?limit=100"],
        f"curve of {POINTS:,} points, c=4": [f"/updates/{update}/metrics?stage={stage}"],
    }
    figures = []
    for check, paths in urls.items():
        figures += _latencies(check, asyncio.run(load(url, 4, seconds, _reading(paths))))
    return figures


def _reading(paths: list[str]) -> Callable[[int], Request]:
    return lambda number: ("GET", paths[number % len(paths)], b"")


def uploads(url: str, pid: int, database: Database) -> list[Figure]:
    """Large bodies at once, each with a first document of its own; every hash is compared with the client's."""
    check = f"{UPLOADS} uploads of {UPLOAD_BYTES >> 20} MiB at once"
    with tempfile.TemporaryFile() as file:
        for chunk in ndjson_body(UPLOAD_BYTES):
            file.write(chunk)
        size = file.tell()
        file.flush()

        async def upload(number: int) -> tuple[int, str, str]:
            first = json.dumps({"text": f"the first of body {number}"}).encode() + b"\n"
            digest = hashlib.sha256(first)
            async with connection(url) as http:
                path = f"/datasets/large-{number}/versions"
                await http.send(http.head("POST", path, len(first) + size) + first)
                place = 0
                while chunk := _read_at(file.fileno(), place):
                    digest.update(chunk)
                    place += len(chunk)
                    await http.send(chunk)
                status, answer = await http.answer()
            return status, digest.hexdigest(), json.loads(answer).get("sha256", "")

        async def run() -> list[tuple[int, str, str]]:
            for number in range(UPLOADS):
                await post(url, "/datasets", {"name": f"large-{number}"})
            async with connection(url) as http:
                await http.request(
                    "POST", "/datasets/large-0/versions", b'{"text": "warm"}\n{"text": "up"}\n'
                )
            with memory:
                return await asyncio.gather(*(upload(number) for number in range(UPLOADS)))

        memory = MemoryWatch(pid)
        answers = asyncio.run(run())
    right = sum(status == 201 and ours == theirs for status, ours, theirs in answers)
    return [
        Figure(check, "right hashes", right, UPLOADS, at_least=True),
        Figure(check, "memory growth, MiB", memory.growth / 2**20, UPLOAD_GROWTH / 2**20),
    ]


def _read_at(descriptor: int, place: int) -> bytes:
    return os.pread(descriptor, 1 << 18, place)


def folder(directory: Path, name: str) -> Path:
    path = directory / name
    path.mkdir()
    return path
