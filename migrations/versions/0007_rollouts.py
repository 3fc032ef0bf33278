"""Rollouts: how a release is rolled out, its progress, and the latest reports of replicas."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

JSON = sa.JSON().with_variant(postgresql.JSONB(), "postgresql")
TIMES = ("begun_at", "tried_at", "promoted_at")


def upgrade() -> None:
    op.create_table(
        "observations",
        sa.Column("model_id", sa.String(), nullable=False),
        sa.Column("replicas", JSON, nullable=False),
        sa.Column("observed_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["model_id"], ["models.id"], name="fk_observations_model_id"),
        sa.PrimaryKeyConstraint("model_id", name="pk_observations"),
    )
    op.add_column("releases", sa.Column("rollout", JSON, nullable=True))
    op.add_column("releases", sa.Column("trial", JSON, nullable=True))
    for name in TIMES:
        op.add_column("releases", sa.Column(name, sa.DateTime(timezone=True), nullable=True))


def downgrade() -> None:
    for name in (*reversed(TIMES), "trial", "rollout"):
        op.drop_column("releases", name)
    op.drop_table("observations")
