"""What a tenant may do right now: two token buckets, a count of streams, a monthly quota. Pure; owns no state.

A bucket holds a minute's worth and refills evenly, so over any time t it gives out at most capacity + rate * t.
Characters are charged when a request is let in: Unicode code points of its input.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from declaim.api.store.tenants import Limits
from declaim.api.tenant_errors import QuotaExceeded, RateLimited, TooManyStreams

WINDOW_S = 60.0
# How long a caller waits for one of its own streams to end is unknown: long enough not to hammer.
_STREAM_RETRY_S = 1.0
# Larger steps back are the clock being set, smaller ones are processes that read it in another order.
_CLOCK_SET_S = 1.0
# Refilling adds rounding errors; this is far below one character, and far above all errors of a day.
_ROUNDING = 1e-6


@dataclass(frozen=True, slots=True)
class Meter:
    """Where a tenant stood at `at`, seconds since 1970. As in `TenantMeter`, and num_streams that run."""

    at: float
    requests_left: float | None = None
    chars_left: float | None = None
    month: str = ""
    month_chars: int = 0
    num_streams: int = 0


def month_of(at: float) -> str:
    """The UTC month of a time, such as "2026-08"."""
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m")


def refill(meter: Meter, limits: Limits, *, now: float) -> Meter:
    """The meter at `now`: buckets fuller, and a new month's count at 0."""
    if meter.at - _CLOCK_SET_S < now < meter.at:
        now = meter.at
    elapsed_s = max(0.0, now - meter.at)
    month = month_of(now)
    return Meter(
        at=now,
        requests_left=_refilled(meter.requests_left, limits.requests_per_minute, elapsed_s),
        chars_left=_refilled(meter.chars_left, limits.chars_per_minute, elapsed_s),
        month=month,
        month_chars=meter.month_chars if meter.month == month else 0,
        num_streams=meter.num_streams,
    )


def take(meter: Meter, limits: Limits, *, chars: int, tenant: str) -> Meter:
    """Charge one request of so many characters to a meter that was refilled; the new meter, or all stays as it was.

    Raises: QuotaExceeded, RateLimited, TooManyStreams.
    """
    headers = headers_of(meter, limits)
    meter = _take_chars(meter, limits, num_requests=1, chars=chars, tenant=tenant)
    if limits.max_streams is not None and meter.num_streams >= limits.max_streams:
        raise TooManyStreams(
            f"{meter.num_streams} requests of tenant {tenant} run, {limits.max_streams} may run at once: "
            f"let one end, or have the limit raised",
            retry_after_s=_STREAM_RETRY_S,
            headers=headers,
        )
    return replace(meter, num_streams=meter.num_streams + 1)


def take_more(meter: Meter, limits: Limits, *, chars: int, tenant: str) -> Meter:
    """Charge more text to a request that was let in; as `take`. Raises: QuotaExceeded, RateLimited."""
    return _take_chars(meter, limits, num_requests=0, chars=chars, tenant=tenant)


def _take_chars(meter: Meter, limits: Limits, *, num_requests: int, chars: int, tenant: str) -> Meter:
    headers = headers_of(meter, limits)
    quota = limits.chars_per_month
    if quota is not None and meter.month_chars + chars > quota:
        raise QuotaExceeded(
            f"tenant {tenant} has {max(0, quota - meter.month_chars)} of its {quota} characters left this month (UTC), "
            f"this request has {chars}: wait for the next month, or have the quota raised",
            headers=headers,
        )
    if limits.chars_per_minute is not None and chars > limits.chars_per_minute:
        raise RateLimited(
            f"the input has {chars} characters, tenant {tenant} may send {limits.chars_per_minute} a minute: split it",
            retry_after_s=None,
            headers=headers,
        )
    waits_s = {
        f"{limits.requests_per_minute} requests": _wait_s(
            meter.requests_left, limits.requests_per_minute, num_requests
        ),
        f"{limits.chars_per_minute} characters": _wait_s(meter.chars_left, limits.chars_per_minute, chars),
    }
    limit, wait_s = max(waits_s.items(), key=lambda item: item[1])
    if wait_s > 0.0:
        raise RateLimited(
            f"tenant {tenant} may send {limit} a minute: try again in {go_duration(wait_s)}",
            retry_after_s=wait_s,
            headers=headers,
        )
    return replace(
        meter,
        requests_left=None if meter.requests_left is None else meter.requests_left - num_requests,
        chars_left=None if meter.chars_left is None else meter.chars_left - chars,
        month_chars=meter.month_chars + chars,
    )


def headers_of(meter: Meter, limits: Limits) -> Mapping[str, str]:
    """The x-ratelimit-* headers; what has no limit is not told. Characters are told as tokens too, for old clients."""
    headers: dict[str, str] = {}
    for names, left, capacity in (
        (("requests",), meter.requests_left, limits.requests_per_minute),
        (("tokens", "characters"), meter.chars_left, limits.chars_per_minute),
    ):
        if capacity is None:
            continue
        left = capacity if left is None else left
        for name in names:
            headers[f"x-ratelimit-limit-{name}"] = str(capacity)
            headers[f"x-ratelimit-remaining-{name}"] = str(max(0, math.floor(left + _ROUNDING)))
            headers[f"x-ratelimit-reset-{name}"] = go_duration((capacity - left) * WINDOW_S / capacity)
    if limits.max_streams is not None:
        headers["x-ratelimit-limit-concurrent-streams"] = str(limits.max_streams)
        headers["x-ratelimit-remaining-concurrent-streams"] = str(max(0, limits.max_streams - meter.num_streams))
    return headers


def go_duration(seconds: float) -> str:
    """As Go writes it, which clients parse: "12ms", "1.5s", "6m0s". Rounded up to a millisecond."""
    ms = max(0, math.ceil(seconds * 1000 - _ROUNDING))
    if ms < 1000:
        return f"{ms}ms" if ms else "0s"
    minutes, rest_ms = divmod(ms, 60_000)
    text = f"{rest_ms / 1000:.3f}".rstrip("0").rstrip(".") + "s"
    return f"{minutes}m{text}" if minutes else text


def _refilled(left: float | None, capacity: int | None, elapsed_s: float) -> float | None:
    """None where there is no limit: a limit set later begins with a full bucket."""
    if capacity is None:
        return None
    return float(capacity) if left is None else min(float(capacity), left + elapsed_s * capacity / WINDOW_S)


def _wait_s(left: float | None, capacity: int | None, cost: int) -> float:
    if left is None or capacity is None or left + _ROUNDING >= cost:
        return 0.0
    return (cost - left) * WINDOW_S / capacity
