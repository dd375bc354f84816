"""The rules of limits, alone: no clock, no database."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from declaim.api.limits import Meter, go_duration, headers_of, refill, take
from declaim.api.store.tenants import Limits
from declaim.api.tenant_errors import QuotaExceeded, RateLimited, TooManyStreams
from declaim.engine.errors import InvalidRequest

NOON = 1_790_000_000.0


def ask(meter: Meter, limits: Limits, *, at: float, chars: int = 0) -> tuple[Meter, RateLimited | None]:
    meter = refill(meter, limits, now=at)
    try:
        return take(meter, limits, chars=chars, tenant="acme"), None
    except RateLimited as error:
        return meter, error


@given(
    rpm=st.integers(1, 5000),
    chars_per_minute=st.integers(1, 100_000),
    steps=st.lists(st.tuples(st.floats(-0.5, 90.0), st.integers(0, 5000)), max_size=80),
)
def test_never_more_is_admitted_than_rate_times_time_and_one_burst(
    rpm: int, chars_per_minute: int, steps: list[tuple[float, int]]
) -> None:
    """Clocks of several processes may disagree by less than a second: steps back are among the steps."""
    limits = Limits(requests_per_minute=rpm, chars_per_minute=chars_per_minute)
    meter = Meter(at=NOON)
    now = latest = NOON
    admitted: list[tuple[float, int]] = []
    for step_s, chars in steps:
        now = max(now + step_s, latest - 0.9)
        latest = max(latest, now)
        meter, error = ask(meter, limits, at=now, chars=chars)
        if error is None:
            admitted.append((latest, chars))
    for first, (begin, _) in enumerate(admitted):
        num_requests = num_chars = 0
        for end, chars in admitted[first:]:
            num_requests += 1
            num_chars += chars
            minutes = (end - begin) / 60
            assert num_requests <= rpm * minutes + rpm + 1e-3
            assert num_chars <= chars_per_minute * minutes + chars_per_minute + 1e-3


@given(
    rpm=st.integers(1, 5000),
    chars_per_minute=st.integers(1, 100_000),
    before=st.lists(st.integers(0, 2000), max_size=60),
    data=st.data(),
)
def test_retry_after_is_when_this_very_request_is_let_in_and_no_later(
    rpm: int, chars_per_minute: int, before: list[int], data: st.DataObject
) -> None:
    limits = Limits(requests_per_minute=rpm, chars_per_minute=chars_per_minute)
    meter = Meter(at=NOON)
    for cost in before:
        meter, _ = ask(meter, limits, at=NOON, chars=cost)
    chars = data.draw(st.integers(0, chars_per_minute))
    meter, error = ask(meter, limits, at=NOON, chars=chars)
    if error is None:
        return
    assert error.retry_after_s is not None
    early, late = error.retry_after_s * 0.99 - 1e-3, error.retry_after_s + 1e-3
    if early > 0.0:
        assert ask(meter, limits, at=NOON + early, chars=chars)[1] is not None
    assert ask(meter, limits, at=NOON + late, chars=chars)[1] is None


def test_a_refusal_charges_nothing() -> None:
    limits = Limits(requests_per_minute=10, chars_per_minute=100)
    meter, _ = ask(Meter(at=NOON), limits, at=NOON, chars=60)
    after, error = ask(meter, limits, at=NOON, chars=60)
    assert error is not None and after == meter


def test_the_429_of_a_rate_says_when_to_come_back() -> None:
    limits = Limits(requests_per_minute=100, chars_per_minute=6000)
    meter, _ = ask(Meter(at=NOON), limits, at=NOON, chars=6000)
    _, error = ask(meter, limits, at=NOON, chars=50)
    assert error is not None
    assert str(error) == "tenant acme may send 6000 characters a minute: try again in 500ms"
    assert (error.status, error.type, error.code) == (429, "rate_limit_error", "rate_limit_exceeded")
    assert error.headers["retry-after"] == "1" and error.headers["retry-after-ms"] == "500"
    assert error.headers["x-ratelimit-remaining-characters"] == "0"


def test_what_can_never_be_admitted_is_not_to_be_retried() -> None:
    _, error = ask(Meter(at=NOON), Limits(chars_per_minute=100), at=NOON, chars=101)
    assert error is not None
    assert "101 characters" in str(error) and "100 a minute: split it" in str(error)
    assert error.headers["x-should-retry"] == "false" and "retry-after" not in error.headers


def test_streams_at_once_are_counted() -> None:
    limits = Limits(max_streams=2)
    meter = Meter(at=NOON, num_streams=1)
    meter, error = ask(meter, limits, at=NOON)
    assert error is None and meter.num_streams == 2
    _, error = ask(meter, limits, at=NOON)
    assert isinstance(error, TooManyStreams)
    assert str(error).startswith("2 requests of tenant acme run, 2 may run at once")


def test_the_months_quota_ends_with_a_429_of_its_own_and_begins_again_next_month() -> None:
    limits = Limits(chars_per_month=100)
    november = 1_795_910_400.0  # 2026-11-29 00:00 UTC
    meter = take(refill(Meter(at=november), limits, now=november), limits, chars=90, tenant="acme")
    with pytest.raises(QuotaExceeded, match=r"10 of its 100 characters left this month .* has 11") as caught:
        take(refill(meter, limits, now=november + 86_400), limits, chars=11, tenant="acme")
    assert (caught.value.status, caught.value.type, caught.value.code) == (429, *["insufficient_quota"] * 2)
    assert caught.value.headers["x-should-retry"] == "false" and "retry-after" not in caught.value.headers
    december = refill(meter, limits, now=november + 2 * 86_400)
    assert (december.month, december.month_chars) == ("2026-12", 0)


def test_a_clock_set_back_by_an_hour_does_not_lock_anybody_out() -> None:
    limits = Limits(requests_per_minute=60)
    meter, _ = ask(Meter(at=NOON), limits, at=NOON)
    meter, _ = ask(meter, limits, at=NOON - 3600)
    assert refill(meter, limits, now=NOON - 3600 + 60).requests_left == 60


def test_a_limit_lowered_takes_hold_at_once_and_one_set_anew_begins_full() -> None:
    meter = refill(Meter(at=NOON, requests_left=500.0), Limits(requests_per_minute=10, chars_per_minute=70), now=NOON)
    assert (meter.requests_left, meter.chars_left) == (10.0, 70.0)


def test_headers_tell_limit_rest_and_when_it_is_full() -> None:
    limits = Limits(requests_per_minute=600, chars_per_minute=6000, max_streams=4)
    meter, _ = ask(Meter(at=NOON), limits, at=NOON, chars=1000)
    assert headers_of(meter, limits) == {
        "x-ratelimit-limit-requests": "600",
        "x-ratelimit-remaining-requests": "599",
        "x-ratelimit-reset-requests": "100ms",
        "x-ratelimit-limit-tokens": "6000",
        "x-ratelimit-remaining-tokens": "5000",
        "x-ratelimit-reset-tokens": "10s",
        "x-ratelimit-limit-characters": "6000",
        "x-ratelimit-remaining-characters": "5000",
        "x-ratelimit-reset-characters": "10s",
        "x-ratelimit-limit-concurrent-streams": "4",
        "x-ratelimit-remaining-concurrent-streams": "3",
    }
    assert headers_of(Meter(at=NOON), Limits()) == {}


@pytest.mark.parametrize(
    "seconds, text",
    [(0.0, "0s"), (0.0001, "1ms"), (0.012, "12ms"), (1.0, "1s"), (1.5, "1.5s"), (360.0, "6m0s"), (3725.25, "62m5.25s")],
)
def test_durations_are_written_as_go_does(seconds: float, text: str) -> None:
    assert go_duration(seconds) == text


@pytest.mark.parametrize(
    "name, value", [("requests_per_minute", 0), ("max_streams", -1), ("chars_per_month", 10**12 + 1), ("weight", 0.0)]
)
def test_limits_outside_their_range_are_refused_by_name(name: str, value: float) -> None:
    with pytest.raises(InvalidRequest, match=f"{name} is {value:g}|{name} is {value}"):
        Limits(**{name: value})  # type: ignore[arg-type]
