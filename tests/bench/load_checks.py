"""Measurements of a running control plane, with their targets."""

import asyncio
import hashlib
import itertools
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from service.artifacts import Artifacts
from service.core.artifact_files import HASHES
from service.core.manifest import MANIFEST, FileEntry, Manifest
from service.core.specs import ModelSpec
from service.core.stage_specs import StageKind
from service.core.states import StageState, UpdateState
from service.ingest.documents import document_hash
from service.store import datasets
from service.store.columns import new_id
from service.store.database import Database, now
from service.store.tables import Dataset, DataVersion, MetricPoint, Model, Stage, Update
from tests.bench.figure import Figure
from tests.bench.load_http import Load, Request, connection, get, load, post
from tests.bench.upload import ndjson_body
from tests.support.server_process import MemoryWatch, cpu_seconds
from tests.support.specs import PLAIN

CLIENTS = 32
P99_MS = 250.0  # of lists and curves
PER_SECOND = 60.0
REGISTRATION_P99_MS = 1000.0
OLD_VERSIONS = 10_000
MIN_RATIO = 0.8  # "no slower", with room for chance
DATASETS = 32
VERSIONS = 100_000
POINTS = 1_000_000
UPLOADS = 64
UPLOAD_BYTES = 64 << 20
UPLOAD_GROWTH = 64 << 20
_BATCH = 5_000


def registrations(
    url: str, pid: int, database: Database, artifacts: Artifacts, seconds: float
) -> list[Figure]:
    """Register small bodies in one dataset, in several, and in one with 10,000 data versions."""
    one = _Registrations(f"registrations in 1 dataset, c={CLIENTS}", ["one"])
    many = _Registrations(f"registrations in {DATASETS} datasets, c={CLIENTS}", _names("many", DATASETS))
    large = _Registrations(f"registrations, {OLD_VERSIONS:,} versions, c={CLIENTS}", ["large"])
    figures = [*one.run(url, pid, seconds), *many.run(url, pid, seconds)]
    asyncio.run(post(url, "/datasets", {"name": "large"}))
    add_old_versions(database, artifacts, "large")
    figures += large.run(url, pid, seconds)
    ratio = large.per_second / one.per_second
    return [*figures, Figure(large.check, "rate, of that in a new dataset", ratio, MIN_RATIO, at_least=True)]


class _Registrations:
    """Small bodies, registered in turn in each of some datasets."""

    def __init__(self, check: str, datasets: list[str]) -> None:
        self.check = check
        self._datasets = datasets
        self.per_second = 0.0

    def run(self, url: str, pid: int, seconds: float) -> list[Figure]:
        result, server_cpu = asyncio.run(self._load(url, pid, seconds))
        self.per_second = result.statuses.get(201, 0) / result.seconds
        return [
            Figure(self.check, "registrations/s", self.per_second, PER_SECOND, at_least=True),
            Figure(self.check, "server's CPU, ms a request", server_cpu / len(result.latencies) * 1000),
            *_latencies(self.check, result, REGISTRATION_P99_MS),
        ]

    async def _load(self, url: str, pid: int, seconds: float) -> tuple[Load, float]:
        for name in self._datasets:
            async with connection(url) as http:  # which may exist already
                await http.request(
                    "POST", "/datasets", json.dumps({"name": name}).encode(), "application/json"
                )
        await load(url, 2, 1.0, lambda number: self._request(10**9 + number))
        cpu = cpu_seconds(pid)
        result = await load(url, CLIENTS, seconds, self._request)
        return result, cpu_seconds(pid) - cpu

    def _request(self, number: int) -> Request:
        texts = (f"document {number} of this load", f"another document {number} of this load")
        body = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)
        return "POST", f"/datasets/{self._datasets[number % len(self._datasets)]}/versions", body


def _names(prefix: str, count: int) -> list[str]:
    return [f"{prefix}-{number}" for number in range(count)]


def add_old_versions(database: Database, artifacts: Artifacts, name: str) -> None:
    """Add data versions of two documents each, with artifacts that are not synced to disk, to save time."""
    rows = []
    with database.transaction() as session:
        dataset, created_at = datasets.dataset(session, name), now(session)
        for number in range(1, OLD_VERSIONS + 1):
            hashes = sorted(document_hash(f"old document {number}.{index}") for index in range(2))
            sha256 = hashlib.sha256(b"".join(hashes)).hexdigest()
            file = FileEntry.holding(HASHES, b"".join(hashes))
            manifest = Manifest(key=f"data/{sha256}", directory="w-old", files=(file,), result={})
            folder_of_key = artifacts.root / manifest.key
            folder_of_key.mkdir(parents=True)
            (folder_of_key / MANIFEST).write_bytes(manifest.to_json())
            rows.append(_version_row(dataset.id, number, sha256, 2, created_at))
        session.execute(sa.insert(DataVersion), rows)


def _version_row(
    dataset_id: str, number: int, sha256: str, documents: int, created_at: datetime
) -> dict[str, Any]:
    return {
        "id": new_id("dv"),
        "dataset_id": dataset_id,
        "number": number,
        "sha256": sha256,
        "bytes": 1000,
        "documents": documents,
        "duplicates": 0,
        "holdout_documents": 1,
        "artifact_key": f"data/{sha256}",
        "created_at": created_at,
    }


def _latencies(check: str, result: Load, p99_ms: float = P99_MS) -> list[Figure]:
    failed = sum(count for status, count in result.statuses.items() if status >= 400)
    return [
        Figure(check, "requests", len(result.latencies)),
        Figure(check, "p50 ms", result.percentile_ms(0.5)),
        Figure(check, "p99 ms", result.percentile_ms(0.99), p99_ms),
        Figure(check, "answers 4xx or 5xx", failed, 0),
        Figure(check, "client's own CPU, ms a request", result.client_ms),
    ]


def add_many_rows(database: Database) -> tuple[str, str]:
    """Add 100,000 data versions and updates, and a stage of 1,000,000 points: ids of its update and itself."""
    with database.transaction() as session:
        created_at = now(session)
        dataset = Dataset(name="many", holdout_fraction=0.02, created_at=created_at)
        session.add(dataset)
        session.flush()
        spec = ModelSpec.model_validate(PLAIN | {"name": "many", "dataset": "many", "auto_update": False})
        model = Model(
            name="many", dataset_id=dataset.id, spec=spec.model_dump(mode="json"), created_at=created_at
        )
        session.add(model)
        session.flush()
        versions = [
            _version_row(dataset.id, number + 1, f"{number:064x}", 10, created_at)
            for number in range(VERSIONS)
        ]
        update_ids = [new_id("upd") for _ in range(VERSIONS)]
        finished = {"created_at": created_at, "started_at": created_at, "finished_at": created_at}
        updates = (
            {
                "id": update_ids[number],
                "model_id": model.id,
                "data_version_id": versions[number]["id"],
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
            (DataVersion, iter(versions)),
            (Update, updates),
            (Stage, iter([stage])),
            (MetricPoint, points),
        )
        for table, rows in kinds:
            while batch := list(itertools.islice(rows, _BATCH)):
                session.execute(sa.insert(table), batch)
    return update_ids[-1], stage_id


def lists(url: str, database: Database, seconds: float) -> list[Figure]:
    """Read pages all over a long list, and the points of a long curve, with a few clients."""
    update, stage = add_many_rows(database)
    with database.reading() as session:
        ids = session.scalars(sa.select(DataVersion.id).order_by(DataVersion.number)).all()[:-1]
    path = "/datasets/many/versions?limit=100"

    async def last_page() -> Any:
        return await get(url, f"{path}&after={ids[-100]}")

    last = asyncio.run(last_page())
    assert (last["data"][-1]["number"], last["has_more"]) == (VERSIONS, False)
    # Strides over the whole list.
    pages_of_list = [f"{path}&after={ids[-100 - 7919 * number % (len(ids) - 100)]}" for number in range(1000)]
    urls = {
        f"pages of {VERSIONS:,} data versions, c=4": [path, *pages_of_list],
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
    """Send large bodies at once, each starting with another document, and compare their hashes."""
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
                position = 0
                while chunk := os.pread(file.fileno(), 1 << 18, position):
                    digest.update(chunk)
                    position += len(chunk)
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
    correct = sum(status == 201 and sent == stored for status, sent, stored in answers)
    return [
        Figure(check, "correct hashes", correct, UPLOADS, at_least=True),
        Figure(check, "memory growth, MiB", memory.growth / 2**20, UPLOAD_GROWTH / 2**20),
    ]


def folder(directory: Path, name: str) -> Path:
    path = directory / name
    path.mkdir()
    return path
