"""Tenants' pronunciations."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "lexicon_entries",
        sa.Column("tenant", sa.String(64), primary_key=True),
        sa.Column("term", sa.Text, primary_key=True),
        sa.Column("written", sa.Text, nullable=False),
        sa.Column("said", sa.Text, nullable=False),
    )


def downgrade() -> None:
    op.drop_table("lexicon_entries")
