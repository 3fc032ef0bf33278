"""Indexes for long lists: the updates of a page of data versions, and a page of a model's updates."""

from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("updates") as table:
        table.create_index("ix_updates_model_id_id", ["model_id", "id"])
        table.create_index(op.f("ix_updates_data_version_id"), ["data_version_id"])
        table.drop_index(op.f("ix_updates_model_id"))


def downgrade() -> None:
    with op.batch_alter_table("updates") as table:
        table.create_index(op.f("ix_updates_model_id"), ["model_id"])
        table.drop_index(op.f("ix_updates_data_version_id"))
        table.drop_index("ix_updates_model_id_id")
