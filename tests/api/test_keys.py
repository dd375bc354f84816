"""Keys and limits on a real database: what callers are told, and what several processes share."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pytest
import sqlalchemy as sa
from starlette.datastructures import Headers

from declaim.api.errors import answer_for, error_response
from declaim.api.gate import Admission, Caller
from declaim.api.keys import KeyGate, check_affiliation
from declaim.api.ledger import Ledger
from declaim.api.limiter import SharedLimits
from declaim.api.store.database import Base, Database, StoreUnavailable
from declaim.api.store.tenants import (
    Limits,
    StreamLease,
    Tenant,
    TenantMeter,
    create_key,
    revoke_key,
    set_tenant,
)
from declaim.api.store.usage import UsageRow
from declaim.api.tenant_errors import (
    InvalidApiKey,
    QuotaExceeded,
    RateLimited,
    TooManyStreams,
    WrongAffiliation,
)
from declaim.engine.errors import InvalidRequest
from tests.api.children import PROCESSES, USAGE, flood, hold_streams
from tests.api.fake_engine import eventually

T = TypeVar("T")


class Clock:
    """Time that passes when it is told to."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@contextmanager
def gate_of(database: Database, folder: Path, **options: Any) -> Iterator[KeyGate]:
    gate = KeyGate(database, ledger=Ledger(database, spill_folder=folder), **options)
    try:
        yield gate
    finally:
        gate.close()


@pytest.fixture
def gate(database: Database, tmp_path: Path) -> Iterator[KeyGate]:
    with gate_of(database, tmp_path) as opened:
        yield opened


def make_tenant(database: Database, tenant: str = "acme", limits: Limits | None = None) -> str:
    """Gives a key."""
    with database.session() as session:
        set_tenant(session, tenant, limits or Limits(), now=time.time())
        return create_key(session, tenant, now=time.time())[1]


def run(work: Callable[[], Coroutine[Any, Any, T]]) -> T:
    return asyncio.run(work())


def admit(gate: KeyGate, tenant: str = "acme", *, chars: int = 1, tier: str | None = None) -> Admission:
    caller = Caller(tenant=tenant, key_id="key_1")
    return run(lambda: gate.admit(caller, request_id="req_1", chars=chars, service_tier=tier))


def charge(admission: Admission, chars: int) -> None:
    run(lambda: admission.charge(chars))


def month_chars(database: Database) -> int:
    with database.reader() as session:
        return session.scalars(sa.select(TenantMeter.month_chars)).one()


def count(database: Database, table: type[Base]) -> int:
    with database.reader() as session:
        return session.scalar(sa.select(sa.func.count()).select_from(table)) or 0


def statements(database: Database) -> list[str]:
    """Every SQL statement from here on."""
    seen: list[str] = []
    sa.event.listen(database.engine, "before_cursor_execute", lambda *event: seen.append(event[2]))
    return seen


def test_a_key_names_its_tenant_and_its_share(database: Database, gate: KeyGate) -> None:
    key = make_tenant(database, limits=Limits(weight=2.5))
    caller = run(lambda: gate.authenticate(key))
    assert (caller.tenant, caller.weight) == ("acme", 2.5)
    assert caller.key_id is not None and caller.key_id.startswith("key_")


@pytest.mark.parametrize(
    "credential, told",
    [(None, "no API key was sent"), ("", "unknown"), ("sk-", "unknown"), (f"sk-{'x' * 43}", "unknown")],
)
def test_without_a_good_key_the_answer_is_openais_401(gate: KeyGate, credential: str | None, told: str) -> None:
    with pytest.raises(InvalidApiKey, match=told) as caught:
        run(lambda: gate.authenticate(credential))
    response = error_response(caught.value)
    assert response.status_code == 401 and response.headers["www-authenticate"] == "Bearer"
    assert b'"code":"invalid_api_key"' in response.body
    assert not credential or credential.encode() not in response.body.replace(b"`Authorization: Bearer sk-...`", b"")


def test_what_cannot_be_a_key_costs_the_database_nothing(database: Database, gate: KeyGate) -> None:
    seen = statements(database)
    for credential in ("x" * 100_000, "sk-short", "sk-" + "é" * 43, f"sk-{'x' * 43}\n"):
        with pytest.raises(InvalidApiKey):
            run(lambda credential=credential: gate.authenticate(credential))  # type: ignore[misc]
    assert seen == []


def test_a_revoked_key_works_no_longer_than_the_cache_keeps_it(database: Database, tmp_path: Path) -> None:
    clock = Clock()
    key = make_tenant(database)
    with gate_of(database, tmp_path, cache_s=3.0, clock=clock) as gate:
        caller = run(lambda: gate.authenticate(key))
        with database.session() as session:
            revoke_key(session, caller.key_id or "", now=time.time())
        clock.now = 2.9
        assert run(lambda: gate.authenticate(key)) == caller
        clock.now = 3.0
        with pytest.raises(InvalidApiKey, match="revoked"):
            run(lambda: gate.authenticate(key))


def test_requests_that_come_together_look_their_key_up_once(database: Database, gate: KeyGate) -> None:
    key = make_tenant(database)
    seen = statements(database)

    async def together() -> Sequence[Caller]:
        return await asyncio.gather(*(gate.authenticate(key) for _ in range(50)))

    assert {caller.tenant for caller in run(together)} == {"acme"}
    run(together)
    assert sum("FROM api_keys" in statement for statement in seen) == 1


def test_one_client_that_hangs_up_does_not_spoil_the_lookup_of_another(database: Database, gate: KeyGate) -> None:
    key = make_tenant(database)

    async def two() -> Caller:
        first, second = (asyncio.create_task(gate.authenticate(key)) for _ in range(2))
        await asyncio.sleep(0)
        first.cancel()
        return await second

    assert run(two).tenant == "acme"


def test_the_cache_is_bounded(database: Database, tmp_path: Path) -> None:
    keys = [make_tenant(database) for _ in range(4)]
    with gate_of(database, tmp_path, max_cached=2) as gate:
        for key in (*keys, keys[-1]):
            run(lambda key=key: gate.authenticate(key))  # type: ignore[misc]
        seen = statements(database)
        run(lambda: gate.authenticate(keys[-1]))
        assert seen == []
        run(lambda: gate.authenticate(keys[0]))
        assert len(gate._cached) == 2 and seen != []


def test_a_key_is_neither_stored_nor_logged(
    database: Database, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    key = make_tenant(database)
    with gate_of(database, tmp_path) as gate:
        caller = run(lambda: gate.authenticate(key))
        run(lambda: gate.admit(caller, request_id="req_1", chars=1, service_tier=None)).close(USAGE)
        with pytest.raises(InvalidApiKey):
            run(lambda: gate.authenticate(key[:-1] + ("x" if key[-1] != "x" else "y")))
        held = repr(vars(gate))
    secret = key[len("sk-") + 7 :]
    stored = ""
    with database.reader() as session:
        for table in Base.metadata.sorted_tables:
            stored += repr(session.execute(sa.select(table)).all())
    assert key[:10] in stored and "req_1" in stored
    for text in (stored, caplog.text, held, str(database)):
        assert secret not in text
    for path in tmp_path.glob("declaim.db*"):
        assert secret.encode() not in path.read_bytes()


def test_an_open_server_lets_everybody_in_until_the_first_key_is_made(database: Database, tmp_path: Path) -> None:
    clock = Clock()
    with gate_of(database, tmp_path, open_without_keys=True, cache_s=3.0, clock=clock) as gate:
        assert not run(gate.has_keys)
        for credential in (None, "", "sk-of-another-program"):
            assert run(lambda credential=credential: gate.authenticate(credential)) == Caller()  # type: ignore[misc]
        key = make_tenant(database)
        assert run(gate.has_keys)
        clock.now = 3.0
        with pytest.raises(InvalidApiKey):
            run(lambda: gate.authenticate(None))
        caller = run(lambda: gate.authenticate(key))
        with database.session() as session:
            revoke_key(session, caller.key_id or "", now=time.time())
        clock.now = 100.0
        with pytest.raises(InvalidApiKey):
            run(lambda: gate.authenticate(None))


def test_a_server_that_is_not_open_needs_a_key_from_the_start(gate: KeyGate) -> None:
    with pytest.raises(InvalidApiKey, match="declaim keys create"):
        run(lambda: gate.authenticate(None))


def test_requests_to_an_open_server_are_written_down_and_not_limited(database: Database, tmp_path: Path) -> None:
    with gate_of(database, tmp_path, open_without_keys=True) as gate:
        admission = admit(gate, "", tier="flex")
        assert (admission.tier, dict(admission.headers)) == ("flex", {"x-service-tier": "flex"})
        admission.close(USAGE)
    with database.reader() as session:
        assert session.scalars(sa.select(UsageRow.tenant_id)).all() == [""]


def test_a_server_told_to_ask_for_no_key_writes_usage_down_all_the_same(database: Database, tmp_path: Path) -> None:
    key = make_tenant(database, limits=Limits(requests_per_minute=1))
    with gate_of(database, tmp_path, open_always=True) as gate:
        for credential in (key, key, None, "sk-wrong"):
            caller = run(lambda credential=credential: gate.authenticate(credential))
            assert caller == Caller()
            admit(gate, caller.tenant).close(USAGE)
    with database.reader() as session:
        assert session.scalars(sa.select(UsageRow.tenant_id)).all() == [""] * 4


def test_text_that_comes_in_pieces_is_charged_piece_by_piece(database: Database, gate: KeyGate) -> None:
    make_tenant(database, limits=Limits(chars_per_minute=100, chars_per_month=130))
    admission = admit(gate, chars=30)
    charge(admission, 60)
    with pytest.raises(RateLimited, match="100 characters a minute: try again in") as caught:
        charge(admission, 35)
    assert caught.value.retry_after_s is not None and caught.value.retry_after_s > 5.0
    with pytest.raises(QuotaExceeded, match="40 of its 130 characters left"):
        charge(admission, 41)
    assert month_chars(database) == 90  # what was refused was not charged
    admission.close(USAGE)


def test_all_pieces_of_a_request_that_we_failed_come_back(database: Database, gate: KeyGate) -> None:
    make_tenant(database, limits=Limits(chars_per_month=100))
    admission = admit(gate, chars=30)
    charge(admission, 60)
    admission.close(replace(USAGE, status=500))
    assert eventually(lambda: month_chars(database) == 0)


def test_pieces_need_neither_another_request_nor_another_place(database: Database, gate: KeyGate) -> None:
    make_tenant(database, limits=Limits(requests_per_minute=1, max_streams=1))
    admission = admit(gate)
    for _ in range(5):
        charge(admission, 10)
    assert gate.num_streams == 1
    admission.close(USAGE)


def test_an_admission_tells_its_limits_and_its_tier(database: Database, gate: KeyGate) -> None:
    make_tenant(database, limits=Limits(requests_per_minute=10, chars_per_minute=1000, max_streams=3))
    admission = admit(gate, chars=400)
    assert admission.headers["x-ratelimit-remaining-requests"] == "9"
    assert admission.headers["x-ratelimit-remaining-characters"] == "600"
    assert admission.headers["x-ratelimit-remaining-concurrent-streams"] == "2"
    assert admission.headers["x-service-tier"] == "default"
    assert admission.headers["openai-organization"] == "acme"
    admission.close(USAGE)


def test_retry_after_is_kept(database: Database, gate: KeyGate) -> None:
    """Who waits as long as told is let in; the bucket is the database's, on its clock."""
    make_tenant(database, limits=Limits(chars_per_minute=6000))
    admit(gate, chars=6000).close(USAGE)
    with pytest.raises(RateLimited) as caught:
        admit(gate, chars=20)
    assert caught.value.retry_after_s is not None and 0.0 < caught.value.retry_after_s <= 0.2
    time.sleep(caught.value.retry_after_s + 0.002)
    admit(gate, chars=20).close(USAGE)


def test_a_place_is_given_back_once_however_often_it_is_closed(database: Database, gate: KeyGate) -> None:
    make_tenant(database, limits=Limits(max_streams=2))
    first, second = admit(gate), admit(gate)
    with pytest.raises(TooManyStreams, match="2 requests of tenant acme run, 2 may run at once"):
        admit(gate)
    for _ in range(3):
        first.close(USAGE)
    third = admit(gate)
    with pytest.raises(TooManyStreams):
        admit(gate)
    second.close(USAGE)
    third.close(USAGE)
    assert gate.num_streams == 0
    assert eventually(lambda: count(database, StreamLease) == 0)
    assert eventually(lambda: count(database, UsageRow) == 3)


def test_of_many_at_once_exactly_as_many_as_may_run_are_let_in(database: Database, gate: KeyGate) -> None:
    make_tenant(database, limits=Limits(max_streams=5))

    async def together() -> list[Admission | BaseException]:
        caller = Caller(tenant="acme")
        asked = (gate.admit(caller, request_id=f"r{i}", chars=1, service_tier=None) for i in range(40))
        return await asyncio.gather(*asked, return_exceptions=True)

    answers = run(together)
    assert sum(isinstance(answer, TooManyStreams) for answer in answers) == 35
    assert count(database, StreamLease) == 5
    for answer in answers:
        if not isinstance(answer, BaseException):
            answer.close(USAGE)


def test_a_flood_costs_the_database_few_transactions(database: Database, gate: KeyGate) -> None:
    make_tenant(database)
    begun: list[object] = []
    sa.event.listen(database.engine, "commit", begun.append)

    async def together() -> list[Admission]:
        caller = Caller(tenant="acme")
        asked = (gate.admit(caller, request_id=f"r{i}", chars=1, service_tier=None) for i in range(200))
        return await asyncio.gather(*asked)

    admissions = run(together)
    assert len(admissions) == 200 and len(begun) < 20
    for admission in admissions:
        admission.close(USAGE)


def test_a_client_that_leaves_while_it_is_let_in_holds_no_place(database: Database, gate: KeyGate) -> None:
    make_tenant(database, limits=Limits(chars_per_month=100))

    async def leave_at(num_turns: int) -> None:
        asked = asyncio.create_task(gate.admit(Caller(tenant="acme"), request_id="r", chars=7, service_tier=None))
        for _ in range(num_turns):
            await asyncio.sleep(0.0005)
        asked.cancel()
        with suppress(asyncio.CancelledError):
            (await asked).close(replace(USAGE, status=500))

    for num_turns in range(12):
        run(lambda num_turns=num_turns: leave_at(num_turns))  # type: ignore[misc]
    assert eventually(lambda: gate.num_streams == 0 and count(database, StreamLease) == 0)
    with database.reader() as session:
        assert session.scalars(sa.select(TenantMeter.month_chars)).all() == [0]


def test_the_month_is_charged_unless_the_failure_was_ours(database: Database, gate: KeyGate) -> None:
    make_tenant(database, limits=Limits(chars_per_month=100))
    admit(gate, chars=60).close(replace(USAGE, status=503))
    admit(gate, chars=60).close(replace(USAGE, outcome="client_gone"))
    with pytest.raises(QuotaExceeded, match="40 of its 100 characters left") as caught:
        admit(gate, chars=60)
    response = error_response(caught.value)
    assert (response.status_code, response.headers["x-should-retry"]) == (429, "false")
    assert "retry-after" not in response.headers and b'"type":"insufficient_quota"' in response.body


def test_a_tier_must_be_the_tenants(database: Database, gate: KeyGate) -> None:
    make_tenant(database, limits=Limits(tiers=("default", "flex")))
    with pytest.raises(
        InvalidRequest, match=r"'priority' is not open to tenant acme: it may use default, flex"
    ) as caught:
        admit(gate, tier="priority")
    assert caught.value.param == "service_tier"
    with pytest.raises(InvalidRequest, match="service_tier is 'scale'"):
        admit(gate, tier="scale")
    assert gate.num_streams == 0


def test_limits_changed_by_the_operator_hold_from_the_next_request_on(database: Database, gate: KeyGate) -> None:
    make_tenant(database, limits=Limits(chars_per_minute=10))
    with pytest.raises(RateLimited, match="split it"):
        admit(gate, chars=11)
    with database.session() as session:
        set_tenant(session, "acme", Limits(chars_per_minute=1000), now=time.time())
    admit(gate, chars=11).close(USAGE)


def test_the_requests_of_a_tenant_that_was_removed_are_refused(database: Database, gate: KeyGate) -> None:
    make_tenant(database)
    running = admit(gate)
    with database.session() as session:
        session.execute(sa.delete(Tenant))
    with pytest.raises(InvalidApiKey, match="was removed"):
        admit(gate)
    running.close(USAGE)
    assert eventually(lambda: count(database, UsageRow) == 1)


def test_one_tenants_flood_leaves_the_others_limits_alone(database: Database, gate: KeyGate) -> None:
    for tenant in ("acme", "quiet"):
        make_tenant(database, tenant, Limits(requests_per_minute=5, max_streams=5))
    for _ in range(5):
        admit(gate, "acme")
    with pytest.raises(RateLimited):
        admit(gate, "acme")
    quiet = admit(gate, "quiet")
    assert quiet.headers["x-ratelimit-remaining-requests"] == "4"
    assert quiet.headers["x-ratelimit-remaining-concurrent-streams"] == "4"


def test_two_processes_share_one_bucket(database: Database, database_url: str) -> None:
    limits = Limits(requests_per_minute=1200, chars_per_minute=1_000_000)
    make_tenant(database, limits=limits)
    with database.session() as session:
        # Begin with 10, or the burst alone would hide what is refilled.
        session.execute(sa.update(TenantMeter).values(requests_left=10.0, metered_at=time.time()))
    pipes = [PROCESSES.Pipe() for _ in range(2)]
    children = [PROCESSES.Process(target=flood, args=(database_url, "acme", 1, 3.0, theirs)) for _, theirs in pipes]
    for child in children:
        child.start()
    for ours, _ in pipes:
        assert ours.recv() == "ready"
    began = time.time()
    with database.session() as session:
        session.execute(sa.update(TenantMeter).values(requests_left=10.0, metered_at=began))
    for ours, _ in pipes:
        ours.send("go")
    counts, lasts = zip(*(ours.recv() for ours, _ in pipes), strict=True)
    for child in children:
        child.join(30)
    allowed = 10 + 20 * (max(lasts) - began)
    assert 10 < sum(counts) <= allowed + 0.1
    assert min(counts) > 0


def test_a_meter_never_goes_back_to_a_time_from_before_its_lock_was_free(database: Database) -> None:
    """Or the seconds of the wait would be refilled twice."""
    make_tenant(database, limits=Limits(requests_per_minute=10))
    limits = SharedLimits(database)
    seen: list[str] = []

    def is_waiting() -> bool:
        if database.is_sqlite:
            return "BEGIN IMMEDIATE" in seen
        with database.reader() as session:
            query = sa.text("SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query ~ 'meters'")
            return session.scalar(query) == 1

    with database.session() as holder:
        holder.execute(sa.update(TenantMeter).values(month="held"))
        seen = statements(database)
        asked = limits.admit("acme", chars=1, tier="default")
        assert eventually(is_waiting)
        at = holder.scalar(sa.select(database.now())) or 0.0
        holder.execute(sa.update(TenantMeter).values(metered_at=at))
    limits.release(asked.result(10))
    with database.reader() as session:
        assert session.scalars(sa.select(TenantMeter.metered_at)).one() > at
    limits.close()


def test_the_places_of_a_process_that_was_killed_come_back_and_those_of_a_live_one_do_not(
    database: Database, database_url: str, tmp_path: Path
) -> None:
    make_tenant(database, limits=Limits(max_streams=3))
    ours, theirs = PROCESSES.Pipe()
    child = PROCESSES.Process(target=hold_streams, args=(database_url, "acme", 2, 2.0, theirs))
    child.start()
    assert ours.recv() == "holding"
    with gate_of(database, tmp_path, lease_s=2.0) as gate:
        mine = admit(gate)
        began = time.monotonic()
        with pytest.raises(TooManyStreams):
            admit(gate)
        child.kill()
        child.join()
        again: list[Admission] = []

        def take_again() -> bool:
            with suppress(TooManyStreams):
                again.append(admit(gate))
            return len(again) == 2

        assert eventually(take_again)
        # Ours was renewed meanwhile: it still counts.
        assert time.monotonic() - began > 0.9
        with pytest.raises(TooManyStreams):
            admit(gate)
        for admission in (mine, *again):
            admission.close(USAGE)
    assert count(database, StreamLease) == 0


def test_a_lease_that_ran_out_and_was_taken_is_not_given_back_a_second_time(database: Database, gate: KeyGate) -> None:
    make_tenant(database, limits=Limits(max_streams=1))
    stalled = admit(gate)
    with database.session() as session:
        session.execute(sa.update(StreamLease).values(expires_at=0.0))
    running = admit(gate)
    stalled.close(USAGE)
    with pytest.raises(TooManyStreams):
        admit(gate)
    running.close(USAGE)


def test_while_the_database_is_away_requests_get_a_503_to_retry(tmp_path: Path) -> None:
    away = Database("postgresql://nobody@127.0.0.1:1/x")
    with gate_of(away, tmp_path) as gate:
        for ask in (
            lambda: gate.authenticate(f"sk-{'x' * 43}"),
            lambda: gate.admit(Caller(tenant="acme"), request_id="r", chars=1, service_tier=None),
        ):
            with pytest.raises(StoreUnavailable) as caught:
                run(ask)  # type: ignore[arg-type]
            assert answer_for(caught.value).status == 503
            assert "127.0.0.1" not in str(caught.value)


@pytest.mark.parametrize(
    "headers, status, code",
    [
        ({}, None, None),
        ({"OpenAI-Organization": "acme", "OpenAI-Project": "proj_acme"}, None, None),
        ({"OpenAI-Organization": "org-rival"}, 401, "mismatched_organization"),
        ({"OpenAI-Project": "proj_rival"}, 403, "mismatched_project"),
    ],
)
def test_another_organization_or_project_than_the_keys_is_refused(
    headers: dict[str, str], status: int | None, code: str | None
) -> None:
    check_affiliation(Caller(), Headers(headers))
    if status is None:
        check_affiliation(Caller(tenant="acme"), Headers(headers))
        return
    with pytest.raises(WrongAffiliation) as caught:
        check_affiliation(Caller(tenant="acme"), Headers(headers))
    assert (caught.value.status, caught.value.code) == (status, code)
