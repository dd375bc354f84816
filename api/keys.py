"""The gate of a server with tenants: who holds which key, and whether they may go on.

Owns the cache of keys that were looked up, and how a request's place comes back. What keys and limits are is in
`store/tenants.py`, how processes share them in `limiter.py`. A key itself is never stored, logged or shown.

Open servers: with `open_always` nobody is asked for a key. With `open_without_keys` everybody is let in until the first
key is made, by any process; within `cache_s` of that the server asks for keys, for ever: revoking the last key does not
open it again. Who comes in without a key has no limits, and what it uses is written down under the tenant "".
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import MappingProxyType

import sqlalchemy as sa
from starlette.datastructures import Headers
from starlette.requests import Request

from declaim.api.gate import NO_HEADERS, Admission, Caller, Gate, Usage, credential_of, tier_of
from declaim.api.ledger import Ledger, UsageRecord
from declaim.api.limiter import Lease, SharedLimits
from declaim.api.store.database import Database
from declaim.api.store.tenants import KEY_PATTERN, ApiKey, Tenant, has_keys, hash_key
from declaim.api.tenant_errors import InvalidApiKey, TooManyStreams, WrongAffiliation
from declaim.engine.request import Tier

logger = logging.getLogger(__name__)

# A client may hear the end of one stream from one process and ask another for the next before its place is free.
_STREAM_GRACE_S = 0.05
_LOOKUP_THREADS = 2


@dataclass(frozen=True, slots=True)
class _Cached:
    """What a lookup gave; caller None: no such key, or revoked."""

    caller: Caller | None
    until: float


class KeyGate:
    """Knows keys, limits and quotas, for one API process of any number on one database.

    cache_s: how long a key is trusted before it is looked up again, and so the longest that a revoked one still works.
    max_cached: keys held in memory. clock: of the cache, in seconds.
    """

    def __init__(
        self,
        database: Database,
        *,
        ledger: Ledger,
        open_always: bool = False,
        open_without_keys: bool = False,
        cache_s: float = 3.0,
        max_cached: int = 10_000,
        lease_s: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._database = database
        self._ledger = ledger
        self._cache_s = cache_s
        self._max_cached = max_cached
        self._clock = clock
        # used by the event loop alone
        self._cached: OrderedDict[bytes, _Cached] = OrderedDict()
        self._looking_up: dict[bytes, asyncio.Task[Caller | None]] = {}
        self._is_always_open = open_always
        self._may_be_open = open_without_keys
        self._open_until = 0.0
        self._lookups = ThreadPoolExecutor(_LOOKUP_THREADS, thread_name_prefix="declaim-keys")
        self._limits = SharedLimits(database, lease_s=lease_s)

    async def authenticate(self, credential: str | None) -> Caller:
        """Who holds this key.

        Raises: InvalidApiKey, StoreUnavailable.
        """
        if self._is_always_open or (self._may_be_open and await self._is_open()):
            return Caller()
        if credential is None:
            raise InvalidApiKey(
                "no API key was sent: send `Authorization: Bearer sk-...`; `declaim keys create` makes one"
            )
        caller = await self._look_up(credential) if KEY_PATTERN.fullmatch(credential) else None
        if caller is None:
            raise InvalidApiKey("the API key is unknown or was revoked: check it, or ask for another")
        return caller

    async def admit(self, caller: Caller, *, request_id: str, chars: int, service_tier: str | None) -> Admission:
        """Charge a request to its caller, or refuse it and charge nothing.

        chars: Unicode code points of its input.

        Raises: RateLimited, QuotaExceeded, InvalidApiKey where the tenant was removed, InvalidRequest for a tier that
        is unknown or not the caller's, StoreUnavailable.
        """
        tier = tier_of(service_tier)
        lease = None
        if caller.tenant:
            try:
                lease = await self._place(caller.tenant, chars, tier)
            except TooManyStreams:
                await asyncio.sleep(_STREAM_GRACE_S)
                lease = await self._place(caller.tenant, chars, tier)
        return _KeyAdmission(caller, request_id, tier, lease, limits=self._limits, ledger=self._ledger)

    async def has_keys(self) -> bool:
        """Whether any key was ever made, revoked ones included. Raises: StoreUnavailable."""
        return await asyncio.get_running_loop().run_in_executor(self._lookups, self._read_has_keys)

    @property
    def num_streams(self) -> int:
        """Admissions that are not closed."""
        return self._limits.num_streams

    def close(self) -> None:
        """Give all places back, and write all usage down. Blocks for as long as the database takes, at most seconds."""
        self._lookups.shutdown()
        self._limits.close()
        self._ledger.close()

    async def _is_open(self) -> bool:
        if self._clock() >= self._open_until:
            if await self.has_keys():
                self._may_be_open = False
                logger.info("keys_required a key was made: from now on every request needs one")
                return False
            self._open_until = self._clock() + self._cache_s
        return True

    async def _look_up(self, key: str) -> Caller | None:
        sha256 = hash_key(key)
        cached = self._cached.get(sha256)
        if cached is not None and self._clock() < cached.until:
            self._cached.move_to_end(sha256)
            return cached.caller
        # Requests with the same key wait for one lookup.
        task = self._looking_up.get(sha256)
        if task is None:
            task = asyncio.create_task(self._read_and_cache(sha256))
            self._looking_up[sha256] = task
            task.add_done_callback(lambda _: self._looking_up.pop(sha256, None))
        # One client that hangs up must not cancel it for the others.
        return await asyncio.shield(task)

    async def _read_and_cache(self, sha256: bytes) -> Caller | None:
        # Counted from before the read: a key revoked right after it still works no longer than cache_s.
        until = self._clock() + self._cache_s
        caller = await asyncio.get_running_loop().run_in_executor(self._lookups, self._read_caller, sha256)
        self._cached[sha256] = _Cached(caller, until)
        self._cached.move_to_end(sha256)
        while len(self._cached) > self._max_cached:
            self._cached.popitem(last=False)
        return caller

    def _read_caller(self, sha256: bytes) -> Caller | None:
        with self._database.reader() as session:
            row = session.execute(
                sa.select(ApiKey.id, ApiKey.sha256, Tenant.id, Tenant.weight)
                .join(Tenant, Tenant.id == ApiKey.tenant_id)
                .where(ApiKey.sha256 == sha256, ApiKey.revoked_at.is_(None))
            ).one_or_none()
        if row is None or not hmac.compare_digest(row[1], sha256):
            return None
        key_id, _, tenant, weight = row
        return Caller(tenant=tenant, key_id=key_id, weight=weight)

    def _read_has_keys(self) -> bool:
        with self._database.reader() as session:
            return has_keys(session)

    async def _place(self, tenant: str, chars: int, tier: Tier) -> Lease:
        future = self._limits.admit(tenant, chars=chars, tier=tier)
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            # The caller has gone, and the place may be given all the same.
            future.add_done_callback(self._give_back)
            raise

    def _give_back(self, future: Future[Lease]) -> None:
        if not future.cancelled() and future.exception() is None:
            self._limits.release(future.result(), refund_chars=future.result().chars)


class _KeyAdmission:
    """One request of a tenant, or of anybody on an open server (no lease)."""

    def __init__(
        self,
        caller: Caller,
        request_id: str,
        tier: Tier,
        lease: Lease | None,
        *,
        limits: SharedLimits,
        ledger: Ledger,
    ) -> None:
        told = NO_HEADERS if lease is None else {**lease.headers, "openai-organization": caller.tenant}
        self.tier: Tier = tier
        self.headers: Mapping[str, str] = MappingProxyType({**told, "x-service-tier": tier})
        self._caller = caller
        self._request_id = request_id
        self._lease = lease
        self._limits = limits
        self._ledger = ledger
        self._num_chars = 0 if lease is None else lease.chars
        self._is_closed = False

    async def charge(self, chars: int) -> None:
        """Charge more text to it. Raises: as `KeyGate.admit`."""
        if self._lease is not None:
            await asyncio.wrap_future(self._limits.charge(self._lease, chars=chars))
            self._num_chars += chars

    def close(self, usage: Usage) -> None:
        """Give the place back and write the usage down, once however often it is called; never blocks."""
        if self._is_closed:
            return
        self._is_closed = True
        if self._lease is not None:
            # Our failure does not count against the month.
            self._limits.release(self._lease, refund_chars=self._num_chars if usage.status >= 500 else 0)
        self._ledger.write(
            UsageRecord.of(
                usage,
                tenant=self._caller.tenant,
                key_id=self._caller.key_id,
                request_id=self._request_id,
                tier=self.tier,
                at=time.time(),
            )
        )


async def caller_of(gate: Gate, request: Request) -> Caller:
    """Who sends an HTTP request. Raises: InvalidApiKey, WrongAffiliation, StoreUnavailable."""
    caller = await gate.authenticate(credential_of(request.headers, request.query_params))
    check_affiliation(caller, request.headers)
    return caller


def check_affiliation(caller: Caller, headers: Headers) -> None:
    """Refuse a request that names another organization or project than its key's. Open servers do not look.

    A tenant is both: `acme`, `org-acme` and `proj_acme` name it.

    Raises: WrongAffiliation.
    """
    if not caller.tenant:
        return
    organization = headers.get("openai-organization", "")
    if organization.removeprefix("org-") not in ("", caller.tenant):
        raise WrongAffiliation(
            "OpenAI-Organization is not that of the API key: leave it out, or use the key of that organization",
            status=401,
            code="mismatched_organization",
        )
    project = headers.get("openai-project", "")
    if project.removeprefix("proj_") not in ("", caller.tenant):
        raise WrongAffiliation(
            "OpenAI-Project is not that of the API key: leave it out, or use the key of that project",
            status=403,
            code="mismatched_project",
        )
