"""Does a server keep its word while things break? Faults at random under steady load; every stream is accounted for.

A `declaim serve` of its own (Ray vocoder, keys and usage in a database, result cache and usage's spill file on a small
disk) first speaks a set of texts with fixed seeds, undisturbed. Then listeners ask for the same, again and again, while
faults come: vocoder workers are killed, or stopped for 5 seconds; Ray itself dies (its raylet, its GCS, or the server's
process that holds it); clients hang up; clients read 1 kB/s; one tenant floods; the disk fills; the database is
restarted. What must hold:

- a stream that ends well has the bytes of the undisturbed run: none lost, none doubled; of one that breaks off or that
  its client leaves, the bytes so far are the first ones of these;
- one that does not end well, ends with 429, 503 or a broken connection, never as if it were whole, within --deadline;
- afterwards nothing is left: no stream, block, window or connection; workers are back, and the server speaks as before;
- told to stop, it stops, and no process of it is left; every whole answer is in the usage table, but for rows that the
  log says were lost (the disk full and the database away at once).

    python benchmarks/chaos.py [--minutes 20] [--faults kill_worker,break_ray,...] [--seed 0] [--listeners 6]
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import machine
import psutil
import sqlalchemy as sa
from own_database import KINDS, OwnDatabase, own_database, usual_kind
from own_server import DRAIN_S, STOP_S, ServerDied, check_alive, gauges, left_over, log_of, own_server
from texts import text_of_length

from declaim.api.store.database import Database
from declaim.api.store.tenants import Limits, create_key, set_tenant
from declaim.api.store.usage import UsageRow

QUESTION = "Chaos: streams under faults, against an undisturbed run"
NAME = "chaos"
STOPPED_S = 5.0
SLOW_BYTES_PER_S = 1000
SLOW_S = 8.0
FLOOD_REQUESTS = 60
DISK_MB = 24
CACHE_GB = 0.008
RECOVER_S = 120.0
PROGRESS_S = 30.0
REFUSALS = (429, 503)


@dataclass(frozen=True, slots=True)
class Case:
    """One text with its seed."""

    text: str
    seed: int

    def body(self, *, max_seconds: float = 30.0) -> dict[str, object]:
        """max_seconds: a limit that no case reaches; each value is another request to the cache, of the same audio."""
        return {
            "model": "tts-1",
            "voice": "alloy",
            "input": self.text,
            "seed": self.seed,
            "response_format": "pcm",
            "max_seconds": max_seconds,
        }


CASES = tuple(Case(text_of_length(20 + 12 * i, skip=i), 100 + i) for i in range(12))
SHARE_CACHED = 0.2  # of requests; the others are spoken anew


@dataclass(slots=True)
class Ledger:
    """What became of all streams. whole_ids: request ids. violations: what must never be, with its time of day."""

    ends: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    whole_ids: list[str] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)
    slowest_s: float = 0.0
    slowest_error_s: float = 0.0

    def violate(self, message: str) -> None:
        self.violations.append(f"{time.strftime('%H:%M:%S')} {message}")
        machine.CONSOLE.print(f"[red]{message}[/red]", soft_wrap=True)


@dataclass(slots=True)
class World:
    """The server and its listeners. hang_up, slow: how many of the next streams do so. seen: the server's
    descendants of all times, by process id."""

    url: str
    process: psutil.Process
    session: aiohttp.ClientSession
    rng: random.Random
    whole: dict[Case, bytes]
    ledger: Ledger
    deadline_s: float
    disk: Path
    database: OwnDatabase
    flooder: dict[str, str]
    hang_up: int = 0
    slow: int = 0
    is_database_away: bool = False
    seen: dict[int, psutil.Process] = field(default_factory=dict)

    def children(self, pattern: str) -> list[psutil.Process]:
        """The server's descendants whose command line has `pattern`."""
        found = []
        for child in self.process.children(recursive=True):
            try:
                if re.search(pattern, " ".join(child.cmdline())):
                    found.append(child)
            except psutil.NoSuchProcess:
                continue
        return found


# Faults. Each leaves the world as it was, in time, and says whether it did anything.


async def kill_worker(world: World) -> bool:
    """SIGKILL one vocoder worker."""
    workers = world.children(r"^ray::.*Worker")
    if workers:
        with suppress(psutil.NoSuchProcess):
            world.rng.choice(workers).kill()
    return bool(workers)


async def stop_worker(world: World) -> bool:
    """SIGSTOP one vocoder worker for 5 seconds."""
    workers = world.children(r"^ray::.*Worker")
    if not workers:
        return False
    worker = world.rng.choice(workers)
    with suppress(psutil.NoSuchProcess):  # the pool gives it up and ends it
        worker.suspend()
        await asyncio.sleep(STOPPED_S)
        worker.resume()
    return True


async def break_ray(world: World) -> bool:
    """SIGKILL Ray's raylet, whose workers die with it, its control service, or the process that speaks to both."""
    children = world.children(world.rng.choice((r"raylet/raylet ", r"gcs/gcs_server ", r"ray_host import main")))
    for child in children:
        with suppress(psutil.NoSuchProcess):
            child.kill()
    return bool(children)


async def hang_up(world: World) -> bool:
    """Three listeners hang up somewhere in their next stream."""
    world.hang_up += 3
    return True


async def slow_clients(world: World) -> bool:
    """Two listeners read 1 kB/s for a while, and then hang up."""
    world.slow += 2
    return True


async def flood(world: World) -> bool:
    """Another tenant sends 60 requests at once and hangs up on all of them after two seconds."""

    async def one(case: Case) -> None:
        async with (
            asyncio.timeout(2.0),
            world.session.post(world.url + "/v1/audio/speech", json=case.body(), headers=world.flooder) as answer,
        ):
            await answer.read()

    cases = [world.rng.choice(list(world.whole)) for _ in range(FLOOD_REQUESTS)]
    await asyncio.gather(*(one(case) for case in cases), return_exceptions=True)
    return True


async def fill_disk(world: World) -> bool:
    """The disk of the cache and of the usage's spill file (and of SQLite) has no byte left for 5 seconds."""
    ballast = world.disk / "ballast"
    try:
        with suppress(OSError), ballast.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(1 << 16))
        await asyncio.sleep(STOPPED_S)
    finally:
        ballast.unlink(missing_ok=True)
    return True


async def restart_database(world: World) -> bool:
    """PostgreSQL is stopped, and started after 5 seconds; SQLite is locked for 5."""
    if world.is_database_away:
        return False
    world.is_database_away = True
    try:
        await world.database.away(STOPPED_S)
    finally:
        world.is_database_away = False
    return True


FAULTS: dict[str, Callable[[World], Awaitable[bool]]] = {
    "kill_worker": kill_worker,
    "stop_worker": stop_worker,
    "break_ray": break_ray,
    "hang_up": hang_up,
    "slow_clients": slow_clients,
    "flood": flood,
    "fill_disk": fill_disk,
    "restart_database": restart_database,
}


# Listeners.


async def listen(world: World, case: Case, rng: random.Random) -> None:
    """One stream from its request to its end, into the ledger."""
    ledger, whole = world.ledger, world.whole[case]
    until: str | None = None
    if world.hang_up:
        world.hang_up, until = world.hang_up - 1, "hang_up"
    elif world.slow:
        world.slow, until = world.slow - 1, "slow"
    data = bytearray()
    began_s = time.monotonic()
    limit_s = 30.0 if rng.random() < SHARE_CACHED else rng.uniform(30.0, 60.0)
    stop_at = rng.randrange(1, max(2, len(whole))) if until == "hang_up" else None
    end = ""
    request_id = ""
    try:
        async with (
            asyncio.timeout(world.deadline_s),
            world.session.post(world.url + "/v1/audio/speech", json=case.body(max_seconds=limit_s)) as answer,
        ):
            request_id = answer.headers.get("x-request-id", "")
            if answer.status != 200:
                told = (await answer.read())[:300]
                ledger.ends[f"http {answer.status}"] += 1
                ledger.slowest_error_s = max(ledger.slowest_error_s, time.monotonic() - began_s)
                if answer.status not in REFUSALS:
                    ledger.violate(f"{request_id} was answered {answer.status}: {told!r}")
                return
            async for piece in answer.content.iter_any():
                data += piece
                if stop_at is not None and len(data) >= stop_at:
                    end = "hung up"
                    break
                if until == "slow":
                    await asyncio.sleep(min(len(piece) / SLOW_BYTES_PER_S, SLOW_S))
                    if time.monotonic() - began_s > SLOW_S:
                        end = "hung up, slow"
                        break
    except TimeoutError:
        ledger.violate(f"{request_id} did not end within {world.deadline_s:g} s: {len(data)} bytes, {case.text!r}")
        end = "too late"
    except aiohttp.ClientError as error:
        check_alive(world.process)
        end = f"broken off: {type(error).__name__}"
        ledger.slowest_error_s = max(ledger.slowest_error_s, time.monotonic() - began_s)
    if not end and bytes(data) == whole:
        end = "whole"
        ledger.whole_ids.append(request_id)
        ledger.slowest_s = max(ledger.slowest_s, time.monotonic() - began_s)
    elif not end:
        end = "cut"
        ledger.violate(f"{request_id} ended as if whole, {len(data)} bytes of {len(whole)}: {case.text!r}")
    ledger.ends[end] += 1
    if not whole.startswith(bytes(data)):
        ledger.violate(f"{request_id} ({end}) had other samples than undisturbed: {case.text!r}")


async def keep_listening(world: World, until_s: float, rng: random.Random, *, rest_s: float) -> None:
    cases = list(world.whole)
    while time.monotonic() < until_s:
        await listen(world, rng.choice(cases), rng)
        await asyncio.sleep(rng.uniform(0.0, 2.0) * rest_s)


async def keep_breaking(world: World, until_s: float, faults: list[str], *, every_s: float) -> None:
    """Each fault once, in random order, and again; the next may come while one still lasts."""

    async def cause(name: str) -> None:
        world.ledger.faults[name] += await FAULTS[name](world)

    async with asyncio.TaskGroup() as running:
        while time.monotonic() < until_s:
            for name in world.rng.sample(faults, len(faults)):
                await asyncio.sleep(world.rng.uniform(0.5, 1.5) * every_s)
                if time.monotonic() >= until_s:
                    break
                machine.CONSOLE.print(f"{time.strftime('%H:%M:%S')} {name}", soft_wrap=True)
                running.create_task(cause(name))


async def watch(world: World, until_s: float) -> None:
    """Note the server's processes, and tell how far it is. Raises: ServerDied."""
    told_s = time.monotonic()
    while (now := time.monotonic()) < until_s:
        check_alive(world.process)
        world.seen |= {child.pid: child for child in world.process.children(recursive=True)}
        if now - told_s >= PROGRESS_S:
            told_s = now
            far = (
                f"{until_s - now:.0f} s to go, load {os.getloadavg()[0]:.1f}, {len(world.ledger.violations)} violations"
            )
            machine.CONSOLE.print(
                f"{time.strftime('%H:%M:%S')} {far}; {dict(world.ledger.ends)}; {_resources(world.process)}",
                soft_wrap=True,
            )
        await asyncio.sleep(2.0)


# The run.


async def storm(
    arguments: argparse.Namespace,
    url: str,
    process: psutil.Process,
    disk: Path,
    database: OwnDatabase,
    keys: tuple[str, str],
) -> tuple[World, dict[str, object]]:
    """The undisturbed run, the faults, and what is left after them. Returns the world and the resources."""
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    listener, flooder = ({"Authorization": f"Bearer {key}"} for key in keys)
    async with aiohttp.ClientSession(connector=connector, read_bufsize=1 << 12, headers=listener) as session:
        whole = {case: await _speak(session, url, case) for case in CASES[: arguments.texts]}
        again = {case: await _speak(session, url, case, max_seconds=29.0) for case in whole}
        if whole != again:
            raise SystemExit("the undisturbed server does not repeat itself: nothing can be compared with it")
        world = World(
            url=url,
            process=process,
            session=session,
            rng=random.Random(f"{arguments.seed} faults"),
            whole=whole,
            ledger=Ledger(),
            deadline_s=arguments.deadline,
            disk=disk,
            database=database,
            flooder=flooder,
        )
        resources: dict[str, object] = {"before": _resources(process)}
        until_s = time.monotonic() + 60 * arguments.minutes
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(watch(world, until_s))
                group.create_task(keep_breaking(world, until_s, arguments.faults, every_s=arguments.every))
                for i in range(arguments.listeners):
                    rng = random.Random(f"{arguments.seed} listener {i}")
                    group.create_task(keep_listening(world, until_s, rng, rest_s=arguments.rest))
            await _check_after(world, has_workers=arguments.vocoder == "ray")
            resources["after"] = _resources(process)
        except* ServerDied as died:
            world.ledger.violate(f"{died.exceptions[0]}: see {log_of(NAME)}")
        return world, resources


async def _check_after(world: World, *, has_workers: bool) -> None:
    """Nothing is left, workers are back if there were any, and the server speaks as before. Raises: ServerDied."""
    ledger = world.ledger
    try:
        if left := await left_over(world.session, world.url):
            ledger.violate(f"after {DRAIN_S:g} s of silence there is left: {left}")
        until_s = time.monotonic() + RECOVER_S
        while has_workers and not (await gauges(world.session, world.url)).get("declaim_vocoder_workers"):
            if time.monotonic() > until_s:
                ledger.violate(f"{RECOVER_S:g} s after the last fault there is no vocoder worker: see {log_of(NAME)}")
                break
            await asyncio.sleep(0.5)
        for case in world.whole:
            async with asyncio.timeout(world.deadline_s):
                if await _speak(world.session, world.url, case, max_seconds=28.0) != world.whole[case]:
                    ledger.violate(f"after the storm the server speaks otherwise: {case.text!r}")
        if left := await left_over(world.session, world.url):
            ledger.violate(f"after the last streams there is left: {left}")
    except (aiohttp.ClientError, TimeoutError) as error:
        check_alive(world.process)
        ledger.violate(f"after the storm the server does not answer: {error!r}")


async def _speak(session: aiohttp.ClientSession, url: str, case: Case, *, max_seconds: float = 30.0) -> bytes:
    """max_seconds: as in `Case.body`; another one than before is spoken anew."""
    async with session.post(url + "/v1/audio/speech", json=case.body(max_seconds=max_seconds)) as answer:
        answer.raise_for_status()
        return await answer.read()


def _resources(process: psutil.Process) -> dict[str, float]:
    """Of the server process alone: workers come and go."""
    return {
        "rss_mb": round(process.memory_info().rss / 1e6, 1),
        "threads": process.num_threads(),
        "handles": process.num_fds(),
    }


def stop(world: World) -> None:
    """Tell the server to stop, and see that it does, with all it started."""
    ledger = world.ledger
    with suppress(psutil.NoSuchProcess):
        world.seen |= {child.pid: child for child in world.process.children(recursive=True)}
        world.process.terminate()
    try:
        code = world.process.wait(STOP_S)
        if code not in (0, None):
            ledger.violate(f"told to stop, the server ended with code {code}: see {log_of(NAME)}")
    except psutil.TimeoutExpired:
        ledger.violate(f"told to stop, the server still ran after {STOP_S:g} s")
    _, left = psutil.wait_procs(list(world.seen.values()), timeout=STOP_S / 4)
    for process in left:
        with suppress(psutil.NoSuchProcess):
            ledger.violate(f"the server left a process: {process.pid} {' '.join(process.cmdline())[:80]}")
            process.kill()


def check_usage(ledger: Ledger, url: str, log: str) -> None:
    """Every whole answer is in the usage table, once, or counted as lost in the log."""
    database = Database(url)
    with database.reader() as session:
        written = Counter(session.scalars(sa.select(UsageRow.request_id)))
    database.close()
    num_lost = sum(int(rows) for rows in re.findall(r"event=usage_lost rows=(\d+)", log))
    missing = [request_id for request_id in ledger.whole_ids if request_id not in written]
    doubled = [request_id for request_id, count in written.items() if count > 1]
    if len(missing) > num_lost:
        ledger.violate(f"{len(missing)} whole answers are not in the usage table, {num_lost} rows were lost: {missing}")
    if doubled:
        ledger.violate(f"requests that are in the usage table more than once: {doubled}")


def make_keys(url: str) -> tuple[str, str]:
    """The listeners' and the flooder's, of a tenant each, without limits."""
    database = Database(url)
    database.migrate()
    now = time.time()
    keys = []
    with database.session() as session:
        for tenant in ("listeners", "flooder"):
            set_tenant(session, tenant, Limits(), now=now)
            keys.append(create_key(session, tenant, now=now)[1])
    database.close()
    return keys[0], keys[1]


@contextmanager
def small_disk(megabytes: int) -> Iterator[Path]:
    """A file system of that size where this user may mount one, else a folder (then no fault fills it)."""
    with tempfile.TemporaryDirectory(prefix="declaim-chaos-") as folder:
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "declaim-chaos", folder], capture_output=True
        )
        try:
            yield Path(folder)
        finally:
            if mounted.returncode == 0:
                subprocess.run(["umount", "-l", folder], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--faults", type=lambda value: value.split(","), default=list(FAULTS))
    parser.add_argument("--every", type=float, default=8.0, help="seconds between faults, on average")
    parser.add_argument("--listeners", type=int, default=6)
    parser.add_argument("--rest", type=float, default=0.5, help="a listener's pause between streams, on average")
    parser.add_argument("--deadline", type=float, default=60.0, help="seconds until every stream must have ended")
    parser.add_argument("--database", choices=KINDS, default=usual_kind())
    parser.add_argument("--vocoder", choices=("ray", "inline"), default="ray")
    parser.add_argument("--texts", type=int, default=len(CASES), help="how many texts are spoken, the shortest first")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    unknown = set(arguments.faults) - set(FAULTS)
    if unknown:
        parser.error(f"--faults names {', '.join(sorted(unknown))}: use {', '.join(FAULTS)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no disk stays mounted
    document = machine.begin(QUESTION, vars(arguments))
    with small_disk(DISK_MB) as disk, own_database(arguments.database, disk) as database:
        if not os.path.ismount(disk) and "fill_disk" in arguments.faults:
            machine.CONSOLE.print("no small disk can be mounted here: fill_disk is left out")
            arguments.faults.remove("fill_disk")
        keys = make_keys(database.url)
        options = ["--vocoder", arguments.vocoder, "--workers", "1:2", "--max-waiting", "64"]
        options += ["--cache-dir", str(disk / "cache"), "--cache-gb", str(CACHE_GB), "--database-url", database.url]
        # The usage's spill file is in the user's state folder.
        with own_server(NAME, options, environment={"XDG_STATE_HOME": str(disk)}) as (url, process):
            world, resources = asyncio.run(storm(arguments, url, process, disk, database, keys))
            stop(world)
        ledger = world.ledger
        check_usage(ledger, database.url, log_of(NAME).read_text(errors="replace"))
    machine.print_table("faults", ["fault", "times"], list(ledger.faults.items()))
    machine.print_table("how streams ended", ["end", "streams"], list(ledger.ends.most_common()))
    verdict = (
        f"FAILED: {len(ledger.violations)} violations, the first: {ledger.violations[0]}"
        if ledger.violations
        else f"held: {ledger.ends['whole']} streams whole, byte for byte as undisturbed; nothing cut, doubled or left"
    )
    machine.CONSOLE.print(verdict, soft_wrap=True)
    result = {
        "verdict": verdict,
        "faults": dict(ledger.faults),
        "ends": dict(ledger.ends.most_common()),
        "slowest_whole_s": round(ledger.slowest_s, 2),
        "slowest_error_s": round(ledger.slowest_error_s, 2),
        **resources,
        "violations": ledger.violations,
    }
    machine.end(document, result)
    if ledger.violations:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
