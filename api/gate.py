"""Who may ask for what: every request passes a gate before it costs anything.

Owns the words between the gate and its users: a Caller is who asks, an Admission is one request let in, a Usage is what
became of it. `OpenGate` is the gate of an application without a database.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Protocol

from starlette.datastructures import Headers, QueryParams

from declaim.engine.errors import InvalidRequest
from declaim.engine.request import Tier

NO_TENANT = "(open)"
"""How the tenant "" is shown to people: no tenant can be called so."""

NO_HEADERS: Mapping[str, str] = MappingProxyType({})

# What clients may send as service_tier, and where it puts them; "auto" and None are "default".
TIERS: Mapping[str | None, Tier] = MappingProxyType(
    {None: "default", "auto": "default", "default": "default", "flex": "flex", "priority": "priority"}
)


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks. tenant: "" on an open server, else the tenant's id. weight: the tenant's share under load."""

    tenant: str = ""
    key_id: str | None = None
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Usage:
    """What became of one request. generated_s and delivered_s: seconds of audio made, and handed to the client.

    status: the HTTP status; outcome: as in `RequestRecord`. ttfa_s: from arrival to the first audio, if it came.
    """

    model: str
    voice: str
    response_format: str
    chars: int
    frames: int
    generated_s: float
    delivered_s: float
    ttfa_s: float | None
    status: int
    outcome: str
    is_cached: bool = False


class Admission(Protocol):
    """One request that was let in."""

    @property
    def tier(self) -> Tier: ...

    @property
    def headers(self) -> Mapping[str, str]:
        """What its answer tells of the caller's limits (x-ratelimit-*), and its tier."""
        ...

    async def charge(self, chars: int) -> None:
        """Charge more text to it, of a request that comes in pieces.

        Raises: RateLimited, QuotaExceeded; then nothing was charged, and what was before goes on.
        """
        ...

    def close(self, usage: Usage) -> None:
        """Give its place back and write its usage down. Call it once, whatever happened; never blocks."""
        ...


class Gate(Protocol):
    """Knows keys, limits and quotas."""

    async def authenticate(self, credential: str | None) -> Caller:
        """Who holds this key. Raises: InvalidApiKey."""
        ...

    async def admit(self, caller: Caller, *, request_id: str, chars: int, service_tier: str | None) -> Admission:
        """Charge a request to its caller, or refuse it.

        Raises: RateLimited, QuotaExceeded, InvalidRequest for a tier that is unknown or not the caller's.
        """
        ...


def credential_of(headers: Headers, query: QueryParams) -> str | None:
    """The key a request carries: `Authorization: Bearer KEY`, Deepgram's `Token KEY`, or `?api_key=` from a browser's
    WebSocket, which can set no header. None where there is none."""
    scheme, _, key = headers.get("authorization", "").partition(" ")
    if scheme.lower() in ("bearer", "token") and key.strip():
        return key.strip()
    return query.get("api_key") or None


def tier_of(service_tier: str | None) -> Tier:
    """Raises: InvalidRequest for a tier that is not served."""
    if service_tier not in TIERS:
        raise InvalidRequest(
            f"service_tier is {service_tier!r}: use auto, default, flex or priority", param="service_tier"
        )
    return TIERS[service_tier]


@dataclass(frozen=True, slots=True)
class _OpenAdmission:
    tier: Tier
    headers: Mapping[str, str] = field(default_factory=dict)

    async def charge(self, chars: int) -> None:
        """Nobody's limits are met."""

    def close(self, usage: Usage) -> None:
        """Nothing is kept of it."""


class OpenGate:
    """Lets everybody in, whatever key they send, and keeps nothing of it."""

    async def authenticate(self, credential: str | None) -> Caller:
        return Caller()

    async def admit(self, caller: Caller, *, request_id: str, chars: int, service_tier: str | None) -> Admission:
        return _OpenAdmission(tier_of(service_tier))
