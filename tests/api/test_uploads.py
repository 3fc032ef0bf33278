"""Uploading data versions over HTTP: formats, encodings, and refusals."""

import gzip
import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path

import httpx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from api.client import ApiError, DataFormat
from tests.support.control_plane import ControlPlane, ndjson
from tests.support.s3 import BUCKET, s3_server

NDJSON = "application/x-ndjson"
TEXT = "text/plain"
PARQUET = "application/vnd.apache.parquet"


def parquet(*texts: str) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table({"text": list(texts)}), file)
    return file.getvalue()


def post(
    plane: ControlPlane, dataset: str, body: bytes, content_type: str = NDJSON, **headers: str
) -> httpx.Response:
    return plane.http.post(
        f"/datasets/{dataset}/versions",
        content=body,
        headers={"Content-Type": content_type, **{k.replace("_", "-"): v for k, v in headers.items()}},
    )


def test_a_data_version_is_registered_and_shown(each_plane: ControlPlane, name: str) -> None:
    each_plane.add_dataset(name, holdout_fraction=0.25)
    body = ndjson(*(f"document {number}" for number in range(8)), "document 0")
    answer = each_plane.http.post(
        f"/datasets/{name}/versions",
        params={"label": "the first"},
        content=body,
        headers={"Content-Type": NDJSON},
    )
    assert answer.status_code == 201
    row = answer.json()
    assert row == {
        "id": row["id"],
        "dataset": name,
        "number": 1,
        "label": "the first",
        "state": "ready",
        "excluded_at": None,
        "excluded_reason": None,
        "sha256": hashlib.sha256(body).hexdigest(),
        "bytes": len(body),
        "documents": 9,
        "duplicates": 1,
        "holdout_documents": 2,
        "created_at": row["created_at"],
        "updates": [],
    }
    assert row["created_at"].endswith("Z")
    assert each_plane.http.get(f"/datasets/{name}/versions/1").json() == row
    assert each_plane.http.get(f"/datasets/{name}").json()["latest_version"] == 1
    assert each_plane.http.get(f"/datasets/{name}/versions/2").status_code == 404


@pytest.mark.parametrize("encoding", [None, "gzip", "zstd"])
@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        (NDJSON, ndjson("one", "two")),
        (f"{NDJSON}; charset=utf-8", ndjson("one", "two")),
        (TEXT, b"one\ftwo"),
        (PARQUET, parquet("one", "two")),
    ],
)
def test_every_format_is_accepted_in_every_encoding(
    plane: ControlPlane, name: str, content_type: str, body: bytes, encoding: str | None
) -> None:
    plane.add_dataset(name)
    encoders: dict[str | None, Callable[[bytes], bytes]] = {
        None: bytes,
        "gzip": gzip.compress,
        "zstd": zstandard.compress,
    }
    encode = encoders[encoding]
    headers = {"Content_Encoding": encoding} if encoding else {}
    answer = post(plane, name, encode(body), content_type, **headers)
    assert answer.status_code == 201, answer.text
    row = answer.json()
    assert (row["documents"], row["bytes"], row["sha256"]) == (
        2,
        len(body),
        hashlib.sha256(body).hexdigest(),
    )


def test_the_same_content_is_the_same_row_in_any_encoding(each_plane: ControlPlane, name: str) -> None:
    each_plane.add_dataset(name)
    first = post(each_plane, name, ndjson("a", "b"))
    again = post(each_plane, name, gzip.compress(ndjson("a", "b")), Content_Encoding="gzip")
    assert (first.status_code, again.status_code) == (201, 200)
    assert again.json() == first.json()
    assert len(each_plane.http.get(f"/datasets/{name}/versions").json()["data"]) == 1


def test_documents_of_earlier_versions_count_as_duplicates(each_plane: ControlPlane, name: str) -> None:
    each_plane.add_dataset(name, ["a", "b", "c"])
    row = post(each_plane, name, ndjson("c", "d", "e", "e")).json()
    assert (row["number"], row["documents"], row["duplicates"]) == (2, 4, 2)


def test_a_body_without_new_documents_is_refused_and_not_stored(each_plane: ControlPlane, name: str) -> None:
    each_plane.add_dataset(name, ["a", "b"])
    answer = post(each_plane, name, ndjson("b", "a"))
    assert (answer.status_code, answer.json()["code"]) == (422, "nothing_new")
    assert len(each_plane.http.get(f"/datasets/{name}/versions").json()["data"]) == 1


def test_bad_content_is_reported_by_line_and_not_stored(plane: ControlPlane, name: str) -> None:
    plane.add_dataset(name)
    lines = [b'{"text": "good"}', b"not json", b'{"no": "text"}', b'{"text": 5}']
    answer = post(plane, name, b"\n".join(lines))
    assert answer.status_code == 422
    problem = answer.json()
    assert problem["code"] == "bad_content"
    assert [item["location"] for item in problem["errors"]] == ["line 2", "line 3", "line 4"]
    assert plane.http.get(f"/datasets/{name}/versions").json()["data"] == []
    assert not list(Path(plane.artifacts.root).glob(".ingest-*"))


def test_at_most_20_errors_are_reported(plane: ControlPlane, name: str) -> None:
    plane.add_dataset(name)
    answer = post(plane, name, b"not json\n" * 100_000)
    assert answer.status_code == 422
    assert len(answer.json()["errors"]) == 20


@pytest.mark.parametrize(
    "body", [b"", b"\n\n", gzip.compress(b"")[:5]], ids=["empty", "no documents", "cut short"]
)
def test_bodies_without_documents_are_refused(plane: ControlPlane, name: str, body: bytes) -> None:
    plane.add_dataset(name)
    headers = {"Content_Encoding": "gzip"} if body.startswith(b"\x1f\x8b") else {}
    answer = post(plane, name, body, **headers)
    assert (answer.status_code, answer.json()["code"]) == (422, "bad_content")


@pytest.mark.parametrize(
    ("content_type", "encoding"),
    [
        ("application/pdf", None),
        ("", None),
        ("text/plain; charset=latin-1", None),
        (NDJSON, "br"),
        (NDJSON, "gzip, gzip"),
    ],
)
def test_unknown_types_and_encodings_are_415(
    plane: ControlPlane, name: str, content_type: str, encoding: str | None
) -> None:
    plane.add_dataset(name)
    headers = {"Content_Encoding": encoding} if encoding else {}
    answer = post(plane, name, ndjson("a"), content_type, **headers)
    assert (answer.status_code, answer.json()["code"]) == (415, "unsupported_media_type")


def test_a_large_body_for_an_unknown_dataset_is_answered(plane: ControlPlane) -> None:
    """The server answers before it reads the body, and the client gets the answer while it still sends."""
    body = ndjson("x" * 1000) * 60_000
    answer = post(plane, "unknown", body)
    assert (answer.status_code, answer.json()["code"]) == (404, "not_found")


def test_data_is_read_from_under_the_import_roots(plane: ControlPlane, name: str) -> None:
    plane.add_dataset(name)
    folder = plane.settings.import_roots[0]
    (folder / f"{name}.jsonl.gz").write_bytes(gzip.compress(ndjson("a", "b")))
    version, created = plane.client.import_version(
        name, (folder / f"{name}.jsonl.gz").as_uri(), label="imported"
    )
    assert created
    assert (version.documents, version.label) == (2, "imported")
    (folder / name).write_bytes(b"c\fd")
    without_suffix = (folder / name).as_uri()
    with pytest.raises(ApiError, match="format"):
        plane.client.import_version(name, without_suffix)
    assert plane.client.import_version(name, without_suffix, format=DataFormat.TEXT).row.documents == 2


def test_an_s3_object_is_read_by_its_uri(plane: ControlPlane, name: str) -> None:
    plane.add_dataset(name)
    body = ndjson(*(f"{name} {number}" for number in range(3000)))
    with s3_server() as s3:
        s3.client.put_object(Bucket=BUCKET, Key="in/a b.ndjson", Body=body)
        row, created = plane.client.import_version(name, f"s3://{BUCKET}/in/a%20b.ndjson")
        assert (row.bytes, row.documents, created) == (len(body), 3000, True)
        with pytest.raises(ApiError, match="does not exist"):
            plane.client.import_version(name, f"s3://{BUCKET}/in/b.ndjson")


@pytest.mark.parametrize(
    "body",
    [
        b'{"uri": "file:///etc/hostname.txt"}',
        b'{"uri": "https://example.org/a.ndjson"}',
        b'{"uri": "s3://bucket"}',
        b'{"uri": "a.ndjson", "colour": "red"}',
        b'{"format": "text"}',
        b'{"uri": "file:///a", "format": "pdf"}',
        b"not json",
        b'{"uri": "' + b"a" * (1 << 17) + b'"}',
    ],
)
def test_uris_that_cannot_be_read_are_refused(plane: ControlPlane, name: str, body: bytes) -> None:
    plane.add_dataset(name)
    answer = post(plane, name, body, "application/json")
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request")


def test_versions_are_paged_by_number(each_plane: ControlPlane, name: str) -> None:
    each_plane.add_dataset(name, *([f"text {number}"] for number in range(5)))
    path = f"/datasets/{name}/versions"
    first = each_plane.http.get(path, params={"limit": 2}).json()
    assert ([row["number"] for row in first["data"]], first["has_more"]) == ([1, 2], True)
    rest = each_plane.http.get(path, params={"after": first["data"][-1]["id"]}).json()
    assert ([row["number"] for row in rest["data"]], rest["has_more"]) == ([3, 4, 5], False)


def test_a_new_version_starts_an_update_of_every_model_that_follows(
    each_plane: ControlPlane, name: str
) -> None:
    each_plane.add_dataset(name)
    for model, follows in (("a", True), ("b", False), ("c", True)):
        each_plane.client.create_model({"name": f"{name}-{model}", "dataset": name, "auto_update": follows})
    row = each_plane.push(name, "one", "two").json()
    updates = [each_plane.client.update(update_id) for update_id in row["updates"]]
    assert {update.model for update in updates} == {f"{name}-a", f"{name}-c"}
    assert {(update.state, update.data_version) for update in updates} == {("pending", 1)}
    # The same content again is the same row, and starts no update.
    assert each_plane.push(name, "one", "two").json() == row


def test_the_client_pushes_files_and_chunks_and_reports_progress(
    plane: ControlPlane, name: str, tmp_path: Path
) -> None:
    plane.add_dataset(name)
    path = tmp_path / "news.ndjson.zst"
    path.write_bytes(zstandard.compress(ndjson("a", "b")))
    sent: list[int] = []
    version, created = plane.client.push_version(name, path, label="file", progress=sent.append)
    assert (version.documents, version.label, created) == (2, "file", True)
    assert sum(sent) == path.stat().st_size
    chunks = (json.dumps({"text": f"chunk {number}"}).encode() + b"\n" for number in range(3))
    assert plane.client.push_version(name, chunks, format=DataFormat.NDJSON).row.documents == 3
