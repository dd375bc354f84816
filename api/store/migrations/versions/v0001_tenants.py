"""Tenants, keys, meters, leases and usage."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "tenants",
        sa.Column("id", sa.String, primary_key=True),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.Column("requests_per_minute", sa.BigInteger),
        sa.Column("chars_per_minute", sa.BigInteger),
        sa.Column("max_streams", sa.BigInteger),
        sa.Column("chars_per_month", sa.BigInteger),
        sa.Column("weight", sa.Double, nullable=False),
        sa.Column("tiers", sa.String, nullable=False),
        *(
            sa.CheckConstraint(f"{name} BETWEEN 1 AND 1000000000000", name=f"tenants_{name}")
            for name in ("requests_per_minute", "chars_per_minute", "max_streams", "chars_per_month")
        ),
        sa.CheckConstraint("weight BETWEEN 0.01 AND 1000.0", name="tenants_weight"),
    )
    op.create_table(
        "tenant_meters",
        sa.Column("tenant_id", sa.String, sa.ForeignKey("tenants.id", ondelete="CASCADE"), primary_key=True),
        sa.Column("metered_at", sa.Double, nullable=False),
        sa.Column("requests_left", sa.Double),
        sa.Column("chars_left", sa.Double),
        sa.Column("month", sa.String, nullable=False),
        sa.Column("month_chars", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "stream_leases",
        sa.Column("id", sa.String, primary_key=True),
        sa.Column("tenant_id", sa.String, sa.ForeignKey("tenants.id", ondelete="CASCADE"), nullable=False, index=True),
        sa.Column("process_id", sa.String, nullable=False, index=True),
        sa.Column("expires_at", sa.Double, nullable=False),
    )
    op.create_table(
        "api_keys",
        sa.Column("id", sa.String, primary_key=True),
        sa.Column("tenant_id", sa.String, sa.ForeignKey("tenants.id", ondelete="CASCADE"), nullable=False, index=True),
        sa.Column("name", sa.String, nullable=False),
        sa.Column("prefix", sa.String, nullable=False),
        sa.Column("sha256", sa.LargeBinary, nullable=False, unique=True),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.Column("revoked_at", sa.Double),
    )
    op.create_table(
        "usage",
        sa.Column("id", sa.String, primary_key=True),
        sa.Column("at", sa.Double, nullable=False),
        sa.Column("tenant_id", sa.String, nullable=False),
        sa.Column("key_id", sa.String),
        sa.Column("request_id", sa.String, nullable=False),
        sa.Column("model", sa.String, nullable=False),
        sa.Column("voice", sa.String, nullable=False),
        sa.Column("response_format", sa.String, nullable=False),
        sa.Column("tier", sa.String, nullable=False),
        sa.Column("chars", sa.BigInteger, nullable=False),
        sa.Column("frames", sa.BigInteger, nullable=False),
        sa.Column("generated_s", sa.Double, nullable=False),
        sa.Column("delivered_s", sa.Double, nullable=False),
        sa.Column("ttfa_s", sa.Double),
        sa.Column("status", sa.BigInteger, nullable=False),
        sa.Column("outcome", sa.String, nullable=False),
        sa.Column("is_cached", sa.Boolean, nullable=False),
    )
    op.create_index("usage_by_tenant", "usage", ["tenant_id", "at"])


def downgrade() -> None:
    for table in ("usage", "api_keys", "stream_leases", "tenant_meters", "tenants"):
        op.drop_table(table)
