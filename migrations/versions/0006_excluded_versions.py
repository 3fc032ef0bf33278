"""Index of a dataset's excluded versions, which every registration reads."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_index(
        "ix_data_versions_excluded",
        "data_versions",
        ["dataset_id"],
        sqlite_where=sa.text("excluded_at IS NOT NULL"),
        postgresql_where=sa.text("excluded_at IS NOT NULL"),
    )


def downgrade() -> None:
    op.drop_index("ix_data_versions_excluded", "data_versions")
