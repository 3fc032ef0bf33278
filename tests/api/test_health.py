"""Liveness, readiness and Prometheus metrics."""

import socket
from pathlib import Path

import pytest
import sqlalchemy as sa
from prometheus_client.parser import text_string_to_metric_families

from api.client import ApiError
from api.main import create_app
from api.routes.health import ray_endpoint
from service.settings import Settings
from service.store.database import Database
from service.store.migrate import downgrade, head, upgrade
from tests.support.control_plane import ControlPlane, ask
from tests.support.ports import free_port


def test_a_control_plane_is_ready_if_all_parts_answer(each_plane: ControlPlane) -> None:
    assert each_plane.root.get("/healthz").json()["status"] == "alive"
    answer = each_plane.root.get("/readyz")
    assert (answer.status_code, answer.json()) == (
        200,
        {"status": "ready", "parts": ["database", "artifacts"]},
    )
    assert each_plane.client.ready().status == "ready"


def test_parts_that_do_not_answer_are_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    settings = Settings(
        home=tmp_path,
        database_url="postgresql+psycopg://nobody@127.0.0.1:1/none",
        artifacts_url=(tmp_path / "file").as_uri(),
        ray_address=f"127.0.0.1:{free_port()}",
    )
    app = create_app(settings)
    assert ask(app, "/healthz").status_code == 200
    answer = ask(app, "/readyz")
    assert (answer.status_code, answer.json()["code"]) == (503, "unavailable")
    assert [item["location"] for item in answer.json()["errors"]] == ["database", "artifacts", "ray"]
    assert answer.headers["Retry-After"] == "1"


def test_a_database_without_the_newest_migrations_is_not_ready(database: Database, tmp_path: Path) -> None:
    database.close()
    downgrade(database.url, "0001")
    app = create_app(Settings(home=tmp_path, database_url=database.url))
    answer = ask(app, "/readyz")
    assert answer.status_code == 503
    assert answer.json()["detail"] == "not ready: database"
    assert answer.json()["errors"] == [
        {
            "location": "database",
            "message": f"the database is at revision 0001, and this version needs {head()}: run `pathswitch db upgrade`",
        }
    ]
    upgrade(database.url)
    assert ask(app, "/readyz").status_code == 200
    with database.transaction() as session:
        session.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    assert ask(app, "/readyz").status_code == 200, (
        "an older version of the code must stay ready during an upgrade"
    )
    app.state.services.database.close()


def test_ray_is_checked_if_it_is_configured(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        settings = Settings(home=tmp_path, ray_address=address)
        upgrade(settings.database)
        assert ask(create_app(settings), "/readyz").json()["parts"] == ["database", "artifacts", "ray"]


@pytest.mark.parametrize(
    ("address", "endpoint"),
    [
        (None, None),
        ("auto", None),
        ("local", None),
        ("10.0.0.1:6379", ("10.0.0.1", 6379)),
        ("head", ("head", 6379)),
        ("ray://head:10001", ("head", 10001)),
        ("http://head:8265", ("head", 8265)),
        ("[::1]:6379", ("::1", 6379)),
    ],
)
def test_host_and_port_of_ray_addresses(address: str | None, endpoint: tuple[str, int] | None) -> None:
    assert ray_endpoint(address) == endpoint


def test_metrics_count_requests_and_the_queue(each_plane: ControlPlane, name: str) -> None:
    each_plane.add_dataset(name, [f"{name} a", "b"])
    each_plane.add_model(name, name)
    each_plane.http.get("/datasets/nobody")
    page = each_plane.root.get("/metrics")
    assert page.headers["Content-Type"].startswith("text/plain")
    samples = {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(page.text)
        for sample in family.samples
    }
    route = "/datasets/{dataset}"
    assert samples["pathswitch_http_requests_total", route, "404", "GET"] >= 1
    assert samples["pathswitch_http_request_seconds_count", route, "GET"] >= 1
    assert samples["pathswitch_updates", "succeeded"] >= 1
    assert samples["pathswitch_stages", "succeeded", "train_trunk"] >= 1
    assert samples["pathswitch_releases", "live"] >= 1
    assert samples["pathswitch_stage_seconds_count", "gate"] >= 1
    assert samples["pathswitch_stage_seconds_sum", "gate"] >= 0
    named = [line for line in page.text.splitlines() if name in line]
    assert all(line.startswith("pathswitch_release_timestamp_seconds{") for line in named), (
        "names of objects must not be labels"
    )


def test_metrics_show_when_a_version_was_released(each_plane: ControlPlane, name: str) -> None:
    each_plane.add_dataset(name, [f"{name} a", "b"])
    each_plane.add_model(name, name)
    [released] = each_plane.client.releases(name)
    for family in text_string_to_metric_families(each_plane.root.get("/metrics").text):
        for sample in family.samples:
            if sample.name == "pathswitch_release_timestamp_seconds" and sample.labels["model"] == name:
                assert sample.labels == {"model": name, "version": "1", "state": "live"}
                assert released.released_at is not None
                assert sample.value == pytest.approx(released.released_at.timestamp(), abs=1e-3)
                return
    pytest.fail("no timestamp of the release")


def test_the_client_reports_parts_that_are_not_ready(
    plane: ControlPlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("service.artifacts.Artifacts.check", broken)
    with pytest.raises(ApiError) as caught:
        plane.client.ready()
    assert caught.value.problem.errors is not None
    assert [(item.location, item.message) for item in caught.value.problem.errors] == [
        ("artifacts", "disk full")
    ]
    assert caught.value.retry_after == 1
