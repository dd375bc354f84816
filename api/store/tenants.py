"""Tenants, their keys and what meters them: the tables, and what is asked of them outside a request's path.

A key's secret is never stored: only its SHA-256, by which it is found, and a prefix by which people tell keys apart.
`api/limiter.py` owns the rows of TenantMeter and StreamLease while a server runs.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy import orm

from declaim.api.store.database import Base
from declaim.engine.errors import InvalidRequest
from declaim.engine.request import Tier

KEY_PATTERN = re.compile(r"sk-[A-Za-z0-9_-]{43}")
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
_SHOWN_CHARS = 10
_TIERS: Mapping[str, Tier] = {"priority": "priority", "default": "default", "flex": "flex"}
_LIMITS = ("requests_per_minute", "chars_per_minute", "max_streams", "chars_per_month")
_MAX_LIMIT = 10**12
_MIN_WEIGHT, _MAX_WEIGHT = 0.01, 1000.0


class Tenant(Base):
    """The owner of keys, and its limits; None is no limit."""

    __tablename__ = "tenants"

    id: orm.Mapped[str] = orm.mapped_column(primary_key=True)
    created_at: orm.Mapped[float]
    requests_per_minute: orm.Mapped[int | None]
    chars_per_minute: orm.Mapped[int | None]
    max_streams: orm.Mapped[int | None]
    chars_per_month: orm.Mapped[int | None]
    weight: orm.Mapped[float]
    tiers: orm.Mapped[str]  # names joined by commas

    # A row written by hand must not be able to stop a server.
    __table_args__ = (
        *(sa.CheckConstraint(f"{name} BETWEEN 1 AND {_MAX_LIMIT}", name=f"tenants_{name}") for name in _LIMITS),
        sa.CheckConstraint(f"weight BETWEEN {_MIN_WEIGHT} AND {_MAX_WEIGHT}", name="tenants_weight"),
    )


class TenantMeter(Base):
    """Where a tenant stood within its limits at metered_at.

    requests_left, chars_left: what was in each bucket; None is full. month: "2026-08" in UTC, when month_chars were
    spent.
    """

    __tablename__ = "tenant_meters"

    tenant_id: orm.Mapped[str] = orm.mapped_column(sa.ForeignKey("tenants.id", ondelete="CASCADE"), primary_key=True)
    metered_at: orm.Mapped[float] = orm.mapped_column(default=0.0)
    requests_left: orm.Mapped[float | None]
    chars_left: orm.Mapped[float | None]
    month: orm.Mapped[str] = orm.mapped_column(default="")
    month_chars: orm.Mapped[int] = orm.mapped_column(default=0)


class StreamLease(Base):
    """One stream that is running. Its process renews expires_at; if that process dies, the lease runs out."""

    __tablename__ = "stream_leases"

    id: orm.Mapped[str] = orm.mapped_column(primary_key=True)
    tenant_id: orm.Mapped[str] = orm.mapped_column(sa.ForeignKey("tenants.id", ondelete="CASCADE"), index=True)
    process_id: orm.Mapped[str] = orm.mapped_column(index=True)
    expires_at: orm.Mapped[float]


class ApiKey(Base):
    """A key, less its secret. sha256: of the whole key. prefix: what people are shown of it."""

    __tablename__ = "api_keys"

    id: orm.Mapped[str] = orm.mapped_column(primary_key=True)
    tenant_id: orm.Mapped[str] = orm.mapped_column(sa.ForeignKey("tenants.id", ondelete="CASCADE"), index=True)
    name: orm.Mapped[str]
    prefix: orm.Mapped[str]
    sha256: orm.Mapped[bytes] = orm.mapped_column(unique=True)
    created_at: orm.Mapped[float]
    revoked_at: orm.Mapped[float | None]


@dataclass(frozen=True, slots=True)
class Limits:
    """What a tenant may do. None is no limit, except for tiers.

    max_streams: requests that run at once. chars_per_month: of input, counted in UTC months. weight: the tenant's share
    of the engine under load.

    Raises: InvalidRequest.
    """

    requests_per_minute: int | None = None
    chars_per_minute: int | None = None
    max_streams: int | None = None
    chars_per_month: int | None = None
    weight: float = 1.0
    tiers: tuple[Tier, ...] = ("default", "flex")

    def __post_init__(self) -> None:
        for name in _LIMITS:
            value = getattr(self, name)
            if value is not None and not 1 <= value <= _MAX_LIMIT:
                raise InvalidRequest(f"{name} is {value}: give 1 to 10^12, or none for no limit", param=name)
        if not _MIN_WEIGHT <= self.weight <= _MAX_WEIGHT:
            raise InvalidRequest(
                f"weight is {self.weight:g}: give 0.01 to 1000; 1 is one tenant's share", param="weight"
            )


def hash_key(key: str) -> bytes:
    """What is stored of a key, and how it is found. A fast hash will do: 32 random bytes cannot be guessed."""
    return hashlib.sha256(key.encode()).digest()


def limits_of(tenant: Tenant) -> Limits:
    """A row's limits."""
    return Limits(
        requests_per_minute=tenant.requests_per_minute,
        chars_per_minute=tenant.chars_per_minute,
        max_streams=tenant.max_streams,
        chars_per_month=tenant.chars_per_month,
        weight=tenant.weight,
        tiers=tuple(_TIERS[name] for name in tenant.tiers.split(",") if name in _TIERS),
    )


def parse_tiers(names: str) -> tuple[Tier, ...]:
    """Names joined by commas. Raises: InvalidRequest for one that is unknown, and for none."""
    found = [name.strip() for name in names.split(",") if name.strip()]
    unknown = [name for name in found if name not in _TIERS]
    if unknown or not found:
        raise InvalidRequest(f"tiers is {names!r}: give some of {','.join(_TIERS)}", param="tiers")
    return tuple(_TIERS[name] for name in dict.fromkeys(found))


def set_tenant(session: orm.Session, tenant_id: str, limits: Limits, *, now: float) -> Tenant:
    """Give a tenant these limits; it is made if there is none of that name. Raises: InvalidRequest for its name."""
    if not _NAME.fullmatch(tenant_id):
        raise InvalidRequest(
            f"the tenant's name is {tenant_id!r}: give 1 to 63 of a-z 0-9 . _ -, the first a letter or digit",
            param="tenant",
        )
    tenant = session.get(Tenant, tenant_id)
    if tenant is None:
        tenant = Tenant(id=tenant_id, created_at=now)
        session.add_all([tenant, TenantMeter(tenant_id=tenant_id)])
    resized = {
        bucket: None
        for bucket, before, after in (
            ("requests_left", tenant.requests_per_minute, limits.requests_per_minute),
            ("chars_left", tenant.chars_per_minute, limits.chars_per_minute),
        )
        if before != after
    }
    tenant.requests_per_minute = limits.requests_per_minute
    tenant.chars_per_minute = limits.chars_per_minute
    tenant.max_streams = limits.max_streams
    tenant.chars_per_month = limits.chars_per_month
    tenant.weight = limits.weight
    tenant.tiers = ",".join(limits.tiers)
    session.flush()
    if resized:
        # A bucket of another size begins full: what the operator has just granted is there at once.
        session.execute(sa.update(TenantMeter).where(TenantMeter.tenant_id == tenant_id).values(resized))
    return tenant


def create_key(session: orm.Session, tenant_id: str, *, name: str = "", now: float) -> tuple[ApiKey, str]:
    """Make a key for a tenant that exists; gives its row, and the key itself, which nobody can show again."""
    key = f"sk-{secrets.token_urlsafe(32)}"
    row = ApiKey(
        id=f"key_{secrets.token_hex(12)}",
        tenant_id=tenant_id,
        name=name,
        prefix=key[:_SHOWN_CHARS],
        sha256=hash_key(key),
        created_at=now,
    )
    session.add(row)
    session.flush()
    return row, key


def revoke_key(session: orm.Session, key_id: str, *, now: float) -> ApiKey:
    """Revoke the key of this id, or the only one with this prefix. Raises: InvalidRequest if there is none, or more."""
    found = session.scalars(sa.select(ApiKey).where(sa.or_(ApiKey.id == key_id, ApiKey.prefix == key_id))).all()
    if len(found) != 1:
        problem = "no key has" if not found else f"{len(found)} keys have"
        raise InvalidRequest(f"{problem} the id or prefix {key_id!r}: `declaim keys list` shows their ids", param="key")
    if found[0].revoked_at is None:
        found[0].revoked_at = now
    return found[0]


def has_keys(session: orm.Session) -> bool:
    """Whether a key was ever made. Revoked ones count: revoking the last key must not open a server to everybody."""
    return session.scalar(sa.select(sa.literal(1)).select_from(ApiKey).limit(1)) is not None
