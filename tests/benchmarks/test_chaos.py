"""The chaos run sees what must never be, at a server that does it; and a short run of the whole."""

from __future__ import annotations

import asyncio
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest
from aiohttp import web

from declaim.api.store.database import Database
from declaim.api.store.usage import UsageRow
from tests.api.children import record

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
WHOLE = bytes(range(256)) * 40
Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]


@pytest.fixture(scope="module")
def chaos() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        import chaos

        yield chaos


def listened(chaos: Any, answer: Answer, *, hang_up: int = 0, slow: int = 0) -> Any:
    """What one listener has in its ledger after one stream of a server that answers so."""
    case = chaos.CASES[0]

    async def listen() -> Any:
        app = web.Application()
        app.router.add_post("/v1/audio/speech", answer)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        try:
            async with aiohttp.ClientSession(read_bufsize=1 << 10) as session:
                world = chaos.World(
                    url=f"http://127.0.0.1:{runner.addresses[0][1]}",
                    process=psutil.Process(),
                    session=session,
                    rng=random.Random(0),
                    whole={case: WHOLE},
                    ledger=chaos.Ledger(),
                    deadline_s=1.0,
                    disk=Path(),
                    database=None,
                    flooder={},
                    hang_up=hang_up,
                    slow=slow,
                )
                await chaos.listen(world, case, random.Random(0))
                return world.ledger
        finally:
            await runner.cleanup()

    return asyncio.run(listen())


def speaks(data: bytes, *, status: int = 200) -> Answer:
    """All at once, whole by its Content-Length."""

    async def answer(request: web.Request) -> web.Response:
        return web.Response(body=data, status=status, headers={"x-request-id": "req_1"})

    return answer


def streams(data: bytes, *, then: Callable[[web.Request], Awaitable[None]]) -> Answer:
    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"x-request-id": "req_1"})
        await response.prepare(request)
        await response.write(data)
        await then(request)
        return response

    return answer


async def break_off(request: web.Request) -> None:
    assert request.transport is not None
    request.transport.abort()


async def stall(request: web.Request) -> None:
    await asyncio.sleep(3.0)


def test_a_whole_stream_a_refusal_and_a_clean_break_are_counted_and_are_no_violation(chaos: Any) -> None:
    whole = listened(chaos, speaks(WHOLE))
    assert (dict(whole.ends), whole.whole_ids, whole.violations) == ({"whole": 1}, ["req_1"], [])
    refused = listened(chaos, speaks(b"busy", status=503))
    assert (dict(refused.ends), refused.violations) == ({"http 503": 1}, [])
    broken = listened(chaos, streams(WHOLE[:5000], then=break_off))
    assert [end.split(":")[0] for end in broken.ends] == ["broken off"]
    assert broken.violations == []
    left = listened(chaos, speaks(WHOLE), hang_up=1)
    assert (dict(left.ends), left.violations) == ({"hung up": 1}, [])


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (speaks(WHOLE[:-2]), "req_1 ended as if whole, 10238 bytes of 10240"),
        (speaks(WHOLE + WHOLE[-2:]), "req_1 ended as if whole, 10242 bytes of 10240"),
        (speaks(WHOLE[:512] + WHOLE[256:]), "req_1 ended as if whole, 10496 bytes of 10240"),
        (speaks(b"x" + WHOLE[1:]), "req_1 (cut) had other samples"),
        (streams(b"x" + WHOLE[1:5000], then=break_off), "req_1 (broken off: ClientPayloadError) had other samples"),
        (streams(WHOLE[:5000], then=stall), "req_1 did not end within 1 s: 5000 bytes"),
        (speaks(b"oops", status=500), "req_1 was answered 500: b'oops'"),
    ],
    ids=["truncated", "longer", "doubled", "other", "other and broken", "late", "500"],
)
def test_what_must_never_be_is_a_violation(chaos: Any, answer: Answer, told: str) -> None:
    violations = listened(chaos, answer).violations
    assert any(told in violation for violation in violations), violations


def test_a_listener_that_hangs_up_has_heard_the_right_samples_too(chaos: Any) -> None:
    (violation,) = listened(chaos, speaks(b"x" + WHOLE[1:]), hang_up=1).violations
    assert "req_1 (hung up) had other samples" in violation


def test_a_servers_death_ends_the_run(chaos: Any) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as child:
        server = psutil.Process(child.pid)
        end_s = time.monotonic() + 20
        while server.status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < end_s
        with pytest.raises(chaos.ServerDied):
            chaos.check_alive(server)


def test_usage_that_is_missing_is_a_violation_unless_the_log_tells_that_it_was_lost(chaos: Any, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/usage.db"
    database = Database(url)
    database.migrate()
    with database.session() as session:
        for number in (1, 2, 3):
            # The third is the second once more.
            row = replace(record(), request_id=f"req_{min(number, 2)}")
            session.add(UsageRow(**asdict(row)))
    database.close()

    def violations(whole_ids: list[str], log: str) -> list[str]:
        ledger = chaos.Ledger(whole_ids=whole_ids)
        chaos.check_usage(ledger, url, log)
        return [violation.partition(" ")[2] for violation in ledger.violations]

    doubled = "requests that are in the usage table more than once: ['req_2']"
    assert violations(["req_1", "req_2"], "") == [doubled]
    missing = "1 whole answers are not in the usage table, 0 rows were lost: ['req_9']"
    assert violations(["req_1", "req_9"], "") == [missing, doubled]
    assert violations(["req_1", "req_9"], "logger=ledger event=usage_lost rows=1 why=full") == [doubled]


@pytest.mark.ray
def test_a_short_chaos_holds(tmp_path: Path) -> None:
    faults = ["kill_worker", "break_ray", "hang_up", "restart_database", "flood"]
    command = [sys.executable, str(BENCHMARKS / "chaos.py"), "--faults", ",".join(faults), "--minutes", "0.2"]
    command += ["--every", "1.5", "--listeners", "2", "--rest", "0.1", "--texts", "2", "--database", "sqlite"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=280, env={**os.environ, "TMPDIR": str(tmp_path)}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout.splitlines()[-1])["result"]
    assert result["verdict"].startswith("held: ")
    assert result["violations"] == []
    assert all(result["faults"][name] >= 1 for name in ("break_ray", "restart_database", "flood"))
    assert result["ends"]["whole"] >= 1
