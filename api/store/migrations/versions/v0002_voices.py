"""Voices, their codes, and consents."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "voice_consents",
        sa.Column("id", sa.String(40), primary_key=True),
        sa.Column("tenant", sa.String(64), nullable=False),
        sa.Column("name", sa.String(64), nullable=False),
        sa.Column("language", sa.String(35), nullable=False),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.Column("recording", sa.LargeBinary, nullable=False),
    )
    op.create_index("ix_voice_consents_tenant", "voice_consents", ["tenant", "created_at", "id"])
    op.create_table(
        "voices",
        sa.Column("id", sa.String(40), primary_key=True),
        sa.Column("tenant", sa.String(64), nullable=False),
        sa.Column("name", sa.String(64), nullable=False),
        sa.Column("transcript", sa.Text, nullable=False),
        sa.Column("consent_id", sa.String(40)),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.Column("audio", sa.LargeBinary, nullable=False),
    )
    op.create_index("ix_voices_tenant", "voices", ["tenant", "created_at", "id"])
    op.create_table(
        "voice_codes",
        sa.Column("voice_id", sa.String(40), sa.ForeignKey("voices.id", ondelete="CASCADE"), primary_key=True),
        sa.Column("model_key", sa.String(64), primary_key=True),
        sa.Column("codes", sa.LargeBinary, nullable=False),
        sa.Column("num_codebooks", sa.BigInteger, nullable=False),
        sa.Column("embedding", sa.LargeBinary),
    )


def downgrade() -> None:
    for table in ("voice_codes", "voices", "voice_consents"):
        op.drop_table(table)
