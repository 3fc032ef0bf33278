"""Requests with an Idempotency-Key, and their answers."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "idempotent_requests",
        sa.Column("key", sa.String(), nullable=False),
        sa.Column("target", sa.String(), nullable=False),
        sa.Column("owner", sa.String(), nullable=False),
        sa.Column("lease_until", sa.DateTime(timezone=True), nullable=False),
        sa.Column("carried_out", sa.Boolean(), nullable=False),
        sa.Column("request_sha256", sa.String(), nullable=True),
        sa.Column("status", sa.Integer(), nullable=True),
        sa.Column("media_type", sa.String(), nullable=True),
        sa.Column("body", sa.LargeBinary(), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.CheckConstraint(
            "(status IS NULL) = (body IS NULL) AND (status IS NULL) = (request_sha256 IS NULL)",
            name=op.f("ck_idempotent_requests_answer"),
        ),
        sa.PrimaryKeyConstraint("key", name=op.f("pk_idempotent_requests")),
    )
    with op.batch_alter_table("idempotent_requests") as table:
        table.create_index(op.f("ix_idempotent_requests_created_at"), ["created_at"])


def downgrade() -> None:
    op.drop_table("idempotent_requests")
