"""A rollout: the new code waits until the database is migrated, and the old code goes on after that."""

import logging

import pytest
import sqlalchemy as sa

from service.core.states import UpdateState
from service.store.migrate import downgrade, head, upgrade


@pytest.mark.no_database_faults("tells by the log why it waits, which is told once")
def test_new_code_waits_for_its_migrations(house, caplog):
    caplog.set_level(logging.INFO, logger="service.orchestrator.loop")
    update_id = house.add_update(house.add_model())
    behind = f"{int(head()) - 1:04d}"
    house.database.close()
    downgrade(house.database.url, behind)
    orchestrator = house.orchestrator()
    assert not orchestrator.tick()
    assert not orchestrator.tick()
    reason = f"at revision {behind}, and this version needs {head()}: run `pathswitch db upgrade`"
    assert [record.levelname for record in caplog.records if reason in record.message] == ["ERROR"]
    upgrade(house.database.url)
    assert house.finish(orchestrator, update_id).state == UpdateState.SUCCEEDED
    assert "the database answers again" in caplog.text


def test_old_code_goes_on_while_the_database_is_migrated_and_after_a_new_start(house):
    update_id = house.add_update(house.add_model())
    orchestrator = house.orchestrator()
    orchestrator.tick()
    with house.database.transaction() as session:
        session.execute(sa.text("ALTER TABLE stages ADD COLUMN node VARCHAR"))
        session.execute(sa.text("ALTER TABLE updates ADD COLUMN urgent BOOLEAN NOT NULL DEFAULT FALSE"))
        session.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    orchestrator.tick()
    house.expire_leases()
    assert house.finish(house.orchestrator(), update_id).state == UpdateState.SUCCEEDED
