"""A rolling upgrade: new code waits until the database is migrated, and old code keeps running."""

import logging

import pytest
import sqlalchemy as sa

from service.core.states import UpdateState
from service.store.migrate import downgrade, head, upgrade
from tests.service.orchestrator.conftest import Harness


@pytest.mark.no_database_faults("checks a log message that is written only once")
def test_new_code_waits_for_its_migrations(harness: Harness, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="service.orchestrator.loop")
    update_id = harness.add_update(harness.add_model())
    behind = f"{int(head()) - 1:04d}"
    harness.database.close()
    downgrade(harness.database.url, behind)
    orchestrator = harness.orchestrator()
    assert not orchestrator.tick()
    assert not orchestrator.tick()
    reason = f"at revision {behind}, and this version needs {head()}: run `pathswitch db upgrade`"
    assert [record.levelname for record in caplog.records if reason in record.message] == ["ERROR"]
    upgrade(harness.database.url)
    assert harness.finish(orchestrator, update_id).state == UpdateState.SUCCEEDED
    assert "the database answers again" in caplog.text


def test_old_code_runs_during_and_after_a_migration(harness: Harness) -> None:
    update_id = harness.add_update(harness.add_model())
    orchestrator = harness.orchestrator()
    orchestrator.tick()
    with harness.database.transaction() as session:
        session.execute(sa.text("ALTER TABLE stages ADD COLUMN node VARCHAR"))
        session.execute(sa.text("ALTER TABLE updates ADD COLUMN urgent BOOLEAN NOT NULL DEFAULT FALSE"))
        session.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    orchestrator.tick()
    harness.expire_leases()
    assert harness.finish(harness.orchestrator(), update_id).state == UpdateState.SUCCEEDED
