"""The usage ledger's table: one row a request that was let in. `api/ledger.py` writes it, `api/usage.py` adds it up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

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


Group = Literal["tenant_id", "key_id", "model", "voice"]


@dataclass(frozen=True, slots=True)
class UsageSum:
    """What a group of requests took. start: of their bucket. by: the group's values, in the order they were asked for.

    delivered_s: seconds of audio handed to clients, generated_s: made for them.
    """

    start: int
    by: tuple[str | None, ...]
    num_requests: int
    chars: int
    generated_s: float
    delivered_s: float


def sum_usage(
    session: orm.Session,
    *,
    tenant: str | None,
    start: int,
    end: int,
    width_s: int,
    since: int = 0,
    group_by: Sequence[Group] = (),
    only: Mapping[Group, Sequence[str]] = MappingProxyType({}),
) -> list[UsageSum]:
    """Add usage up in buckets of width_s that begin at `start`, up to but without `end`, both seconds since 1970.

    since: rows before it are left out of the first bucket. tenant: whose rows; None is everybody's. only: keep rows
    whose column has one of these values. Requests that failed by our fault (status 500 and above) are left out: nobody
    pays for them.
    """
    columns = [getattr(UsageRow, name) for name in group_by]
    quotient = (UsageRow.at - start) / width_s
    # A cast rounds down in SQLite, which may have no floor(), and to the nearest in PostgreSQL.
    is_sqlite = session.get_bind().dialect.name == "sqlite"
    bucket = sa.cast(quotient if is_sqlite else sa.func.floor(quotient), sa.BigInteger).label("bucket")
    query = (
        sa.select(
            bucket,
            *columns,
            sa.func.count(),
            sa.func.sum(UsageRow.chars),
            sa.func.sum(UsageRow.generated_s),
            sa.func.sum(UsageRow.delivered_s),
        )
        .where(UsageRow.at >= max(start, since), UsageRow.at < end, UsageRow.status < 500)
        .group_by(bucket, *columns)
        .order_by(bucket, *columns)
    )
    if tenant is not None:
        query = query.where(UsageRow.tenant_id == tenant)
    for name, values in only.items():
        query = query.where(getattr(UsageRow, name).in_(values))
    return [
        UsageSum(
            start=start + int(index) * width_s,
            by=tuple(by),
            num_requests=num_requests,
            chars=int(chars),
            generated_s=generated_s,
            delivered_s=delivered_s,
        )
        for index, *by, num_requests, chars, generated_s, delivered_s in session.execute(query)
    ]
