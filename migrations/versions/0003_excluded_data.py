"""Excluded data versions."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("data_versions") as table:
        table.add_column(sa.Column("excluded_at", sa.DateTime(timezone=True), nullable=True))
        table.add_column(sa.Column("excluded_reason", sa.String(), nullable=True))
        table.create_check_constraint("excluded", "(excluded_at IS NULL) = (excluded_reason IS NULL)")


def downgrade() -> None:
    with op.batch_alter_table("data_versions") as table:
        table.drop_constraint(op.f("ck_data_versions_excluded"), type_="check")
        table.drop_column("excluded_reason")
        table.drop_column("excluded_at")
