"""Model versions and their exports over HTTP."""

import hashlib
import json
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path

import pytest

from tests.support.control_plane import EXPORT_FILES, ControlPlane

WEIGHTS = "weights/model.safetensors"


@pytest.fixture(scope="module")
def two_versions(plane: ControlPlane) -> str:
    """A model with two versions, the second served."""
    plane.add_dataset("made", ["made a", "made b"])
    plane.add_model("made", "made")
    plane.push("made", "made c", "made d")
    plane.finish("made")
    return "made"


def test_a_version_has_all_documented_fields(plane: ControlPlane, two_versions: str) -> None:
    version = plane.http.get(f"/models/{two_versions}/versions/1").json()
    [checkpoint, _] = plane.client.checkpoints(two_versions)
    [update, _] = plane.client.updates(two_versions)
    assert version == {
        "id": version["id"],
        "model": two_versions,
        "number": 1,
        "data_version": 1,
        "state": "retired",
        "update": update.id,
        "branch_point": {"checkpoint": checkpoint.id, "step": checkpoint.step},
        "final_step": 100,
        "parameters": 1000,
        "evaluations": [
            {"slice": name, "loss": 3.0, "perplexity": 20.0, "bits_per_byte": 1.0, "tokens": 1000}
            for name in ("v1", "v2")
        ],
        "gate": {"passed": True, "reasons": version["gate"]["reasons"]},
        "cost": {
            "tokens": 100 * 2048,
            "flops": 2e9,
            "device_seconds": 2.0,
            "reused_tokens": 0,
        },
        "artifact": version["artifact"],
        "created_at": version["created_at"],
    }
    assert version["gate"]["reasons"]
    artifact = version["artifact"]
    assert artifact["files"] == [
        {"path": path, "sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
        for path, content in EXPORT_FILES.items()
    ]
    assert (Path(artifact["path"]) / WEIGHTS).read_bytes() == EXPORT_FILES[WEIGHTS]
    assert len(artifact["sha256"]) == 64


def test_versions_are_listed_by_number_and_found_by_name(plane: ControlPlane, two_versions: str) -> None:
    page = plane.http.get(f"/models/{two_versions}/versions", params={"limit": 1}).json()
    assert ([row["number"] for row in page["data"]], page["has_more"]) == ([1], True)
    assert [row.number for row in plane.client.model_versions(two_versions)] == [1, 2]
    for number in ("2", "latest", "served"):
        found = plane.http.get(f"/models/{two_versions}/versions/{number}").json()
        assert (found["number"], found["state"]) == (2, "released")


@pytest.mark.parametrize("number", ["3", "0", "-1", "1.0", "newest", "1_0", "99999999999999999999"])
def test_unknown_versions_are_not_found(plane: ControlPlane, two_versions: str, number: str) -> None:
    assert plane.http.get(f"/models/{two_versions}/versions/{number}").status_code == 404
    assert plane.http.get(f"/models/{two_versions}/versions/{number}/files/config.json").status_code == 404


def test_a_model_without_versions_has_none_latest_or_served(plane: ControlPlane, name: str) -> None:
    plane.add_dataset(name)
    plane.client.create_model({"name": name, "dataset": name})
    for number in ("1", "latest", "served"):
        assert plane.http.get(f"/models/{name}/versions/{number}").status_code == 404
    assert plane.http.get(f"/models/{name}/versions").json() == {"data": [], "has_more": False}


def test_files_of_the_export_are_downloaded(plane: ControlPlane, two_versions: str, tmp_path: Path) -> None:
    for path, content in EXPORT_FILES.items():
        answer = plane.http.get(f"/models/{two_versions}/versions/served/files/{path}")
        assert (answer.status_code, answer.content) == (200, content)
        assert answer.headers["ETag"] == f'"{hashlib.sha256(content).hexdigest()}"'
        plane.client.download(two_versions, "latest", path, tmp_path / "file")
        assert (tmp_path / "file").read_bytes() == content


def test_a_file_is_served_in_ranges(plane: ControlPlane, two_versions: str) -> None:
    url, content = f"/models/{two_versions}/versions/1/files/{WEIGHTS}", EXPORT_FILES[WEIGHTS]
    part = plane.http.get(url, headers={"Range": "bytes=1000-1999"})
    assert (part.status_code, part.content) == (206, content[1000:2000])
    assert part.headers["Content-Range"] == f"bytes 1000-1999/{len(content)}"
    rest = plane.http.get(url, headers={"Range": "bytes=-10", "If-Range": part.headers["ETag"]})
    assert (rest.status_code, rest.content) == (206, content[-10:])
    assert plane.http.get(url, headers={"Range": "bytes=9999999-"}).status_code == 416
    head = plane.http.head(url)
    assert (head.status_code, head.headers["Content-Length"]) == (200, str(len(content)))


@pytest.mark.no_database_faults("uses its own connection, which does not retry")
@pytest.mark.parametrize(
    "path",
    [
        "nothing.json",
        "weights",
        "weights/",
        "../manifest.json",
        "%2e%2e/manifest.json",
        "..%2fmanifest.json",
        "weights/../config.json",
        "weights%2f..%2f..%2fmanifest.json",
        "/etc/passwd",
        "%2Fetc%2Fpasswd",
        "config.json%00",
    ],
)
def test_only_files_of_the_export_are_served(plane: ControlPlane, two_versions: str, path: str) -> None:
    # httpx would resolve the dots before sending.
    with closing(HTTPConnection(plane.http.base_url.host, plane.http.base_url.port)) as connection:
        connection.request("GET", f"/api/v1/models/{two_versions}/versions/1/files/{path}")
        answer = connection.getresponse()
        assert answer.status == 404
        assert json.loads(answer.read())["code"] == "not_found"
