"""The usage ledger's table: one row a request that was let in. `api/ledger.py` writes it, `api/usage.py` adds it up."""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy import orm

from declaim.api.store.database import Base


class UsageRow(Base):
    """What one request took. tenant_id: "" for a request to an open server. at: when it ended.

    There is no foreign key: what a tenant used outlives it.
    """

    __tablename__ = "usage"

    id: orm.Mapped[str] = orm.mapped_column(primary_key=True)
    at: orm.Mapped[float]
    tenant_id: orm.Mapped[str]
    key_id: orm.Mapped[str | None]
    request_id: orm.Mapped[str]
    model: orm.Mapped[str]
    voice: orm.Mapped[str]
    response_format: orm.Mapped[str]
    tier: orm.Mapped[str]
    chars: orm.Mapped[int]
    frames: orm.Mapped[int]
    generated_s: orm.Mapped[float]
    delivered_s: orm.Mapped[float]
    ttfa_s: orm.Mapped[float | None]
    status: orm.Mapped[int]
    outcome: orm.Mapped[str]
    is_cached: orm.Mapped[bool]

    __table_args__ = (sa.Index("usage_by_tenant", "tenant_id", "at"),)
