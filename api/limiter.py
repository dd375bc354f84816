"""Limits that several API processes share through the database.

Owns one thread, which settles everything that waits in one transaction: ends of streams first, then what asks to be let
in or for more, in its order. So a flood of requests costs the database no more than one, admission is all or nothing,
and processes take turns by the row lock of a tenant's meter. Owns this process's leases too, and renews them; those of
a process that died run out. The rules are in `limits.py`.
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace

import sqlalchemy as sa
from sqlalchemy import exc, orm

from declaim.api.limits import Meter, headers_of, refill, take, take_more
from declaim.api.store.database import Database, StoreUnavailable
from declaim.api.store.tenants import Limits, StreamLease, Tenant, TenantMeter, limits_of
from declaim.api.tenant_errors import InvalidApiKey, QuotaExceeded, RateLimited
from declaim.engine.errors import EngineClosed, InvalidRequest
from declaim.engine.request import Tier

logger = logging.getLogger(__name__)

_MAX_BATCH = 512
_MAX_WAITING = 10_000


@dataclass(frozen=True, slots=True)
class Lease:
    """A stream that was let in. headers: where its tenant stood right after."""

    id: str
    tenant: str
    chars: int
    headers: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class _Admit:
    tenant: str
    chars: int
    tier: Tier
    future: Future[Lease]


@dataclass(frozen=True, slots=True)
class _Charge:
    lease: Lease
    chars: int
    future: Future[None]


@dataclass(frozen=True, slots=True)
class _Release:
    lease: Lease
    refund_chars: int


@dataclass(frozen=True, slots=True)
class _LetIn:
    future: Future[Lease]
    lease: Lease

    def tell(self) -> None:
        self.future.set_result(self.lease)


@dataclass(frozen=True, slots=True)
class _Charged:
    future: Future[None]

    def tell(self) -> None:
        self.future.set_result(None)


@dataclass(frozen=True, slots=True)
class _Refused:
    future: Future[Lease] | Future[None]
    error: Exception

    def tell(self) -> None:
        self.future.set_exception(self.error)


_Answer = _LetIn | _Charged | _Refused


@dataclass(slots=True)
class _Account:
    """One tenant within one transaction."""

    limits: Limits
    meter: Meter
    began: list[str] = field(default_factory=list)


class SharedLimits:
    """Admits requests and takes back their places, for one process of many.

    lease_s: how long the streams of a process that died still count.
    """

    def __init__(self, database: Database, *, lease_s: float = 30.0) -> None:
        self._database = database
        self._lease_s = lease_s
        self._process_id = uuid.uuid4().hex
        self._waiting: list[_Admit | _Charge | _Release] = []  # guarded by _changed
        self._live: set[str] = set()  # leases of streams that run; guarded by _changed
        self._is_closing = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="declaim-limits", daemon=True)
        self._thread.start()

    def admit(self, tenant: str, *, chars: int, tier: Tier) -> Future[Lease]:
        """Ask for a place; every lease that comes of it must be released. Never blocks.

        The future raises: RateLimited, QuotaExceeded, InvalidApiKey where the tenant is gone, InvalidRequest for a tier
        that is not the tenant's, StoreUnavailable, EngineClosed.
        """
        future: Future[Lease] = Future()
        self._ask(_Admit(tenant, chars, tier, future))
        return future

    def charge(self, lease: Lease, *, chars: int) -> Future[None]:
        """Charge more text to a stream that was let in; the lease's own `chars` stay those of its beginning.

        Never blocks. The future raises: as `admit`; then nothing was charged.
        """
        future: Future[None] = Future()
        self._ask(_Charge(lease, chars, future))
        return future

    def release(self, lease: Lease, *, refund_chars: int = 0) -> None:
        """Give a place back; the second time does nothing. refund_chars: of all that was charged to it, how many do not
        count against the month.

        Never blocks.
        """
        with self._changed:
            if lease.id not in self._live:
                return
            self._live.discard(lease.id)
            self._waiting.append(_Release(lease, refund_chars))
            self._changed.notify()

    @property
    def num_streams(self) -> int:
        """Streams of this process that hold a place."""
        return len(self._live)

    def close(self) -> None:
        """Settle what waits, give every place of this process back, and stop."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        self._thread.join()

    def _ask(self, item: _Admit | _Charge) -> None:
        with self._changed:
            if self._is_closing:
                item.future.set_exception(EngineClosed("the server is being closed: try again"))
            elif len(self._waiting) >= _MAX_WAITING:
                item.future.set_exception(StoreUnavailable(f"{_MAX_WAITING} requests wait for the database"))
            else:
                self._waiting.append(item)
                self._changed.notify()

    def _run(self) -> None:
        renew_at = time.monotonic() + self._lease_s / 3
        while True:
            with self._changed:
                self._changed.wait_for(
                    lambda: self._waiting or self._is_closing, timeout=max(0.0, renew_at - time.monotonic())
                )
                batch, self._waiting = self._waiting[:_MAX_BATCH], self._waiting[_MAX_BATCH:]
                is_last = self._is_closing and not batch
            if batch:
                self._settle(batch)
            if is_last or time.monotonic() >= renew_at:
                self._renew(is_last=is_last)
                renew_at = time.monotonic() + self._lease_s / 3
            if is_last:
                return

    def _settle(self, batch: list[_Admit | _Charge | _Release]) -> None:
        releases = [item for item in batch if isinstance(item, _Release)]
        # A request whose client has gone meanwhile is not let in.
        asked = [
            item for item in batch if not isinstance(item, _Release) and item.future.set_running_or_notify_cancel()
        ]
        answers: list[_Answer] = []
        try:
            with self._database.session() as session:
                accounts = self._open(session, {_tenant_of(item) for item in (*asked, *releases)}, releases)
                for release in releases:
                    _refund(accounts.get(release.lease.tenant), release)
                answers = [_decide(accounts.get(_tenant_of(item)), item) for item in asked]
                self._save(session, accounts)
        except (StoreUnavailable, exc.SQLAlchemyError) as error:
            # What these releases should have deleted is deleted by the next _renew.
            if not isinstance(error, StoreUnavailable):
                error = StoreUnavailable(" ".join(str(error).split()))
            logger.error("limits_unavailable requests=%d error=%r", len(asked), error.detail)
            answers = [_Refused(item.future, error) for item in asked]
        with self._changed:
            self._live |= {answer.lease.id for answer in answers if isinstance(answer, _LetIn)}
        for answer in answers:
            answer.tell()

    def _open(self, session: orm.Session, tenants: set[str], releases: Sequence[_Release]) -> dict[str, _Account]:
        """Lock the tenants' meters, always in the same order; end what ended, and read where they stand."""
        rows = session.execute(
            sa.select(Tenant, TenantMeter, self._database.now())
            .join(TenantMeter, TenantMeter.tenant_id == Tenant.id)
            .where(Tenant.id.in_(tenants))
            .order_by(Tenant.id)
            .with_for_update(of=TenantMeter)
        ).all()
        if not rows:
            return {}
        now = max(row[2] for row in rows)
        # Not before the locks are held: another process may have let streams in while we waited.
        session.execute(
            sa.delete(StreamLease).where(
                StreamLease.tenant_id.in_(tenants),
                (StreamLease.expires_at <= now) | StreamLease.id.in_([item.lease.id for item in releases]),
            ),
            execution_options={"synchronize_session": False},
        )
        counts = session.execute(
            sa.select(StreamLease.tenant_id, sa.func.count())
            .where(StreamLease.tenant_id.in_(tenants))
            .group_by(StreamLease.tenant_id)
        )
        num_streams: dict[str, int] = {tenant_id: count for tenant_id, count in counts}
        accounts: dict[str, _Account] = {}
        for tenant, row, _ in rows:
            meter = Meter(
                at=row.metered_at,
                requests_left=row.requests_left,
                chars_left=row.chars_left,
                month=row.month,
                month_chars=row.month_chars,
                num_streams=num_streams.get(tenant.id, 0),
            )
            limits = limits_of(tenant)
            accounts[tenant.id] = _Account(limits, refill(meter, limits, now=now))
        return accounts

    def _save(self, session: orm.Session, accounts: Mapping[str, _Account]) -> None:
        leases = [
            {
                "id": lease_id,
                "tenant_id": tenant,
                "process_id": self._process_id,
                "expires_at": account.meter.at + self._lease_s,
            }
            for tenant, account in accounts.items()
            for lease_id in account.began
        ]
        if leases:
            session.execute(sa.insert(StreamLease), leases)
        if accounts:
            session.execute(
                sa.update(TenantMeter),
                [
                    {
                        "tenant_id": tenant,
                        "metered_at": account.meter.at,
                        "requests_left": account.meter.requests_left,
                        "chars_left": account.meter.chars_left,
                        "month": account.meter.month,
                        "month_chars": account.meter.month_chars,
                    }
                    for tenant, account in accounts.items()
                ],
            )

    def _renew(self, *, is_last: bool) -> None:
        """Keep this process's leases alive, and drop those whose release never reached the database."""
        with self._changed:
            live = set() if is_last else set(self._live)
        mine = StreamLease.process_id == self._process_id
        try:
            # Rows of ours are written by this thread alone, so they may be read first: who has none takes no lock.
            with self._database.reader() as session:
                known = session.scalars(sa.select(StreamLease.id).where(mine)).all()
            if not known:
                return
            with self._database.session() as session:
                dead = [lease_id for lease_id in known if lease_id not in live]
                for first in range(0, len(dead), _MAX_BATCH):
                    session.execute(
                        sa.delete(StreamLease).where(StreamLease.id.in_(dead[first : first + _MAX_BATCH])),
                        execution_options={"synchronize_session": False},
                    )
                session.execute(
                    sa.update(StreamLease).where(mine).values(expires_at=self._database.now() + self._lease_s),
                    execution_options={"synchronize_session": False},
                )
        except (StoreUnavailable, exc.SQLAlchemyError) as error:
            detail = error.detail if isinstance(error, StoreUnavailable) else " ".join(str(error).split())
            logger.warning("leases_not_renewed num_streams=%d error=%r", len(live), detail)


def _tenant_of(item: _Admit | _Charge | _Release) -> str:
    return item.tenant if isinstance(item, _Admit) else item.lease.tenant


def _decide(account: _Account | None, item: _Admit | _Charge) -> _Answer:
    """Charge what is asked to its tenant, or refuse it."""
    try:
        if account is None:
            raise InvalidApiKey(f"tenant {_tenant_of(item)} was removed: ask for a new key")
        if isinstance(item, _Charge):
            account.meter = take_more(account.meter, account.limits, chars=item.chars, tenant=item.lease.tenant)
            return _Charged(item.future)
        return _LetIn(item.future, _begin(account, item))
    except (RateLimited, QuotaExceeded, InvalidApiKey, InvalidRequest) as error:
        return _Refused(item.future, error)


def _begin(account: _Account, item: _Admit) -> Lease:
    """Raises: InvalidRequest, RateLimited, QuotaExceeded."""
    if item.tier not in account.limits.tiers:
        allowed = ", ".join(account.limits.tiers)
        message = f"service_tier {item.tier!r} is not open to tenant {item.tenant}: it may use {allowed}"
        raise InvalidRequest(message, param="service_tier")
    account.meter = take(account.meter, account.limits, chars=item.chars, tenant=item.tenant)
    lease = Lease(uuid.uuid4().hex, item.tenant, item.chars, headers_of(account.meter, account.limits))
    account.began.append(lease.id)
    return lease


def _refund(account: _Account | None, release: _Release) -> None:
    if account is not None:
        left = max(0, account.meter.month_chars - release.refund_chars)
        account.meter = replace(account.meter, month_chars=left)
