"""Migrations make exactly the tables that the code expects, and go back."""

import sqlalchemy as sa
from alembic import command

from service.store.migrate import alembic_config, downgrade, upgrade


def test_the_tables_and_the_migrations_agree(database):
    command.check(alembic_config(database.url))


def test_down_to_nothing_and_up_again(database):
    database.close()
    downgrade(database.url, "base")
    assert set(sa.inspect(database.engine).get_table_names()) <= {"alembic_version"}
    upgrade(database.url)
    assert "stages" in sa.inspect(database.engine).get_table_names()
