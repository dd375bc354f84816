"""Does a server keep its word while things break? Faults at random under steady load; every stream is accounted for.

A `declaim serve` of its own (Ray vocoder, result cache and ledger on a small disk) first speaks a set of texts with
fixed seeds, undisturbed. Then listeners ask for the same, again and again, while faults come: workers are killed,
or stopped for 5 seconds; clients hang up; clients read 1 kB/s; one tenant floods; the disk of cache and ledger fills;
Ray itself dies. What must hold:

- a stream that ends well has the bytes of the undisturbed run: none lost, none doubled;
- one that does not, ends with an HTTP error or a broken connection, never as if it were whole, within --deadline;
- afterwards nothing is left: no stream, block, window or connection, and the server still speaks.

    python benchmarks/chaos.py [--minutes 20] [--faults kill_worker,stop_worker,...] [--seed 0] [--listeners 6]
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import re
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import machine
import psutil
from own_server import DRAIN_S, left_over, own_server
from texts import text_of_length

QUESTION = "Chaos: streams under faults, against an undisturbed run"
STOPPED_S = 5.0
SLOW_BYTES_PER_S = 1000
SLOW_S = 8.0
FLOOD_REQUESTS = 60


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
    """What became of all streams. violations: what must never be; each says what and when."""

    ends: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)
    slowest_error_s: float = 0.0


@dataclass(slots=True)
class World:
    """The server and its listeners. hang_up, slow: how many of the next streams do so."""

    url: str
    process: psutil.Process
    session: aiohttp.ClientSession
    rng: random.Random
    whole: dict[Case, bytes]
    ledger: Ledger
    deadline_s: float
    disk: Path
    hang_up: int = 0
    slow: int = 0

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


# Faults. Each leaves the world as it was, in time.


async def kill_worker(world: World) -> None:
    """SIGKILL one vocoder worker."""
    workers = world.children(r"^ray::.*Worker")
    if workers:
        world.rng.choice(workers).kill()


async def stop_worker(world: World) -> None:
    """SIGSTOP one vocoder worker for 5 seconds."""
    workers = world.children(r"^ray::.*Worker")
    if not workers:
        return
    worker = world.rng.choice(workers)
    try:
        worker.suspend()
        await asyncio.sleep(STOPPED_S)
        worker.resume()
    except psutil.NoSuchProcess:  # the pool gave it up and ended it
        return


async def hang_up(world: World) -> None:
    """Half of the listeners hang up somewhere in their next stream."""
    world.hang_up += 3


async def slow_clients(world: World) -> None:
    """Two listeners read 1 kB/s for a while, and then hang up."""
    world.slow += 2


async def flood(world: World) -> None:
    """One caller sends 60 requests at once and hangs up on all of them after two seconds."""

    async def one(case: Case) -> None:
        async with asyncio.timeout(2.0), world.session.post(world.url + "/v1/audio/speech", json=case.body()) as answer:
            await answer.read()

    cases = [world.rng.choice(CASES) for _ in range(FLOOD_REQUESTS)]
    await asyncio.gather(*(one(case) for case in cases), return_exceptions=True)


async def fill_disk(world: World) -> None:
    """The disk of cache and ledger has no byte left for 5 seconds."""
    ballast = world.disk / "ballast"
    try:
        with ballast.open("wb") as file:
            while True:
                file.write(bytes(1 << 16))
                file.flush()
    except OSError:
        pass
    await asyncio.sleep(STOPPED_S)
    ballast.unlink(missing_ok=True)


async def kill_ray(world: World) -> None:
    """SIGKILL Ray's raylet: every worker dies with it."""
    for child in world.children(r"raylet/raylet"):
        child.kill()
    await asyncio.sleep(STOPPED_S)


FAULTS: dict[str, Callable[[World], Awaitable[None]]] = {
    "kill_worker": kill_worker,
    "stop_worker": stop_worker,
    "hang_up": hang_up,
    "slow_clients": slow_clients,
    "flood": flood,
    "fill_disk": fill_disk,
    "kill_ray": kill_ray,
}


# Listeners.


async def listen(world: World, case: Case) -> None:
    """One stream from its request to its end, into the ledger."""
    until: str | None = None
    if world.hang_up:
        world.hang_up, until = world.hang_up - 1, "hang_up"
    elif world.slow:
        world.slow, until = world.slow - 1, "slow"
    data = bytearray()
    began_s = time.monotonic()
    limit_s = 30.0 if world.rng.random() < SHARE_CACHED else world.rng.uniform(30.0, 60.0)
    try:
        async with (
            asyncio.timeout(world.deadline_s),
            world.session.post(world.url + "/v1/audio/speech", json=case.body(max_seconds=limit_s)) as answer,
        ):
            if answer.status != 200:
                await answer.read()
                world.ledger.ends[f"http {answer.status}"] += 1
                return
            stop_at = world.rng.randrange(1, max(2, len(world.whole[case]))) if until == "hang_up" else None
            async for piece in answer.content.iter_any():
                data += piece
                if stop_at is not None and len(data) >= stop_at:
                    world.ledger.ends["hung up"] += 1
                    return
                if until == "slow":
                    await asyncio.sleep(min(len(piece) / SLOW_BYTES_PER_S, SLOW_S))
                    if time.monotonic() - began_s > SLOW_S:
                        world.ledger.ends["hung up, slow"] += 1
                        return
    except TimeoutError:
        _violate(world, f"a stream did not end within {world.deadline_s:g} s: {case.text!r}, {len(data)} bytes so far")
        return
    except aiohttp.ClientError as error:
        world.ledger.ends[f"broken off: {type(error).__name__}"] += 1
        world.ledger.slowest_error_s = max(world.ledger.slowest_error_s, time.monotonic() - began_s)
        if not world.whole[case].startswith(bytes(data)):
            _violate(world, f"a broken stream had other samples before it broke: {case.text!r}")
        return
    if bytes(data) == world.whole[case]:
        world.ledger.ends["whole"] += 1
    else:
        _violate(
            world,
            f"a stream ended as if whole with {len(data)} bytes for {len(world.whole[case])}"
            f" ({'a prefix' if world.whole[case].startswith(bytes(data)) else 'other samples'}): {case.text!r}",
        )


def _violate(world: World, message: str) -> None:
    world.ledger.violations.append(f"{time.strftime('%H:%M:%S')} {message}")
    machine.CONSOLE.print(f"[red]{message}[/red]", soft_wrap=True)


async def keep_listening(world: World, until_s: float) -> None:
    while time.monotonic() < until_s:
        await listen(world, world.rng.choice(CASES))
        await asyncio.sleep(world.rng.random())


async def keep_breaking(world: World, until_s: float, faults: list[str], *, every_s: float) -> None:
    """Each fault once, in random order, and again; the next may come while one still lasts."""
    running: set[asyncio.Task[None]] = set()
    while time.monotonic() < until_s:
        for name in world.rng.sample(faults, len(faults)):
            await asyncio.sleep(world.rng.uniform(0.5, 1.5) * every_s)
            if time.monotonic() >= until_s:
                break
            machine.CONSOLE.print(
                f"{time.strftime('%H:%M:%S')} {name}; so far {dict(world.ledger.ends)}", soft_wrap=True
            )
            world.ledger.faults[name] += 1
            task = asyncio.ensure_future(FAULTS[name](world))
            running.add(task)
            task.add_done_callback(running.discard)
    await asyncio.gather(*running)


# The run.


async def run(arguments: argparse.Namespace, url: str, process: psutil.Process, disk: Path) -> dict[str, object]:
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(connector=connector, read_bufsize=1 << 12) as session:
        whole = {case: await _speak(session, url, case) for case in CASES}
        again = {case: await _speak(session, url, case) for case in CASES}
        if whole != again:
            raise SystemExit("the undisturbed server does not repeat itself: nothing can be compared with it")
        world = World(
            url=url,
            process=process,
            session=session,
            rng=random.Random(arguments.seed),
            whole=whole,
            ledger=Ledger(),
            deadline_s=arguments.deadline,
            disk=disk,
        )
        before = _resources(process)
        until_s = time.monotonic() + 60 * arguments.minutes
        await asyncio.gather(
            keep_breaking(world, until_s, arguments.faults, every_s=arguments.every),
            *(keep_listening(world, until_s) for _ in range(arguments.listeners)),
        )
        left = await left_over(session, url)
        if left:
            _violate(world, f"after {DRAIN_S:g} s of silence there is left: {left}")
        for case in CASES:
            if await _speak(session, url, case) != whole[case]:
                _violate(world, f"after the storm the server speaks otherwise: {case.text!r}")
        ledger = world.ledger
        return {
            "minutes": arguments.minutes,
            "faults": dict(ledger.faults),
            "ends": dict(ledger.ends.most_common()),
            "slowest_error_s": round(ledger.slowest_error_s, 2),
            "before": before,
            "after": _resources(process),
            "violations": ledger.violations,
        }


async def _speak(session: aiohttp.ClientSession, url: str, case: Case) -> bytes:
    async with session.post(url + "/v1/audio/speech", json=case.body()) as answer:
        answer.raise_for_status()
        return await answer.read()


def _resources(process: psutil.Process) -> dict[str, float]:
    """Of the server process alone: workers come and go."""
    return {
        "rss_mb": round(process.memory_info().rss / 1e6, 1),
        "threads": process.num_threads(),
        "handles": process.num_fds(),
    }


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
    parser.add_argument("--faults", type=lambda value: value.split(","), default=[n for n in FAULTS if n != "kill_ray"])
    parser.add_argument("--every", type=float, default=5.0, help="seconds between faults, on average")
    parser.add_argument("--listeners", type=int, default=6)
    parser.add_argument("--deadline", type=float, default=60.0, help="seconds until every stream must have ended")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    unknown = set(arguments.faults) - set(FAULTS)
    if unknown:
        parser.error(f"--faults names {', '.join(sorted(unknown))}: use {', '.join(FAULTS)}")
    document = machine.begin(QUESTION, vars(arguments))
    with small_disk(24) as disk:
        if not os.path.ismount(disk) and "fill_disk" in arguments.faults:
            machine.CONSOLE.print("no small disk can be mounted here: fill_disk is left out")
            arguments.faults.remove("fill_disk")
        arguments_of_server = ["--vocoder", "ray", "--workers", "1:2", "--max-waiting", "64"]
        arguments_of_server += ["--cache-dir", str(disk / "cache"), "--database-url", f"sqlite:///{disk}/declaim.db"]
        with own_server("chaos", arguments_of_server) as (url, process):
            result = asyncio.run(run(arguments, url, process, disk))
    ends = result["ends"]
    assert isinstance(ends, dict)
    machine.print_table("how streams ended", ["end", "streams"], list(ends.items()))
    machine.end(document, result)
    if result["violations"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
