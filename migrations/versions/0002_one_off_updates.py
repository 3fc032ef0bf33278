"""One-off updates, which are not part of their line, and requested branches."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("updates") as table:
        table.add_column(sa.Column("one_off", sa.Boolean(), server_default=sa.false(), nullable=False))
        table.add_column(sa.Column("branch_from", sa.String(), nullable=True))
        table.create_foreign_key(op.f("fk_updates_branch_from"), "checkpoints", ["branch_from"], ["id"])


def downgrade() -> None:
    with op.batch_alter_table("updates") as table:
        table.drop_constraint(op.f("fk_updates_branch_from"), type_="foreignkey")
        table.drop_column("branch_from")
        table.drop_column("one_off")
