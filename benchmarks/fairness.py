"""Does one tenant's flood reach another, and do shares follow the weights?

A `declaim serve` of its own, with keys made by `declaim keys create`. First a quiet tenant asks for one sentence after
the other, alone, and then the same again while another tenant of the same weight has --flood requests in the server at
all times. First audio is from sending a request to the first byte of the response's body. Then two tenants of weights
2 and 1 each have --crowd requests in the server at all times; the audio that each is sent is counted over --seconds,
after the first --settle. What one tenant can see of another is tested in tests/api/test_scale_isolation.py.

What must hold:
- under the flood the quiet tenant's median first audio is less than --most times what it was alone;
- the shares are 2 : 1 within 10 %;
- no request of a crowd is broken off.

    python benchmarks/fairness.py [--parts quiet,shares] [--vocoder ray|inline] [--flood 200] [--asks 20]
"""

from __future__ import annotations

import argparse
import asyncio
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import machine
import numpy as np
from own_server import gauges, left_over, own_server
from texts import SENTENCES

QUESTION = "Tenants: one quiet beside a flood, and shares by weight"
WEIGHTS = {"quiet": 1.0, "loud": 1.0, "heavy": 2.0, "light": 1.0}
SPEECH_PATH = "/v1/audio/speech"
SHARE_TOLERANCE = 0.10
SHORT = [text for text in SENTENCES if len(text) < 50]  # what the quiet tenant says
BACK_OFF_S = 0.2
CROWD_ENDS = ("whole", "http 429", "http 503")
FLOOD_S = 30.0  # until a flood is in the server


@dataclass(slots=True)
class World:
    """The server under test, and its tenants' keys."""

    session: aiohttp.ClientSession
    url: str
    keys: dict[str, str]
    response_format: str

    def headers(self, tenant: str) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.keys[tenant]}"}

    def body(self, text: str) -> dict[str, object]:
        return {"model": "tts-1", "voice": "alloy", "input": text, "response_format": self.response_format}


@dataclass(slots=True)
class Crowd:
    """What a tenant's requests came to. received: when, and how many bytes, of constant bit rate audio."""

    received: list[tuple[float, int]] = field(default_factory=list)
    ends: Counter[str] = field(default_factory=Counter)

    def num_bytes(self, first_s: float, last_s: float) -> int:
        return sum(count for at_s, count in self.received if first_s <= at_s < last_s)


def make_keys(database: str) -> dict[str, str]:
    """A key for each tenant, as an operator makes them."""
    keys = {}
    for tenant, weight in WEIGHTS.items():
        command = [sys.executable, "-c", "from declaim.api.cli import main; main()", "keys", "create"]
        command += ["--tenant", tenant, "--weight", str(weight), "--database", database]
        keys[tenant] = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    return keys


async def first_audio(world: World, tenant: str, text: str) -> float:
    """Speak a text to its end. Returns first audio in ms."""
    began_s = time.perf_counter()
    first_s: float | None = None
    async with world.session.post(
        world.url + SPEECH_PATH, json=world.body(text), headers=world.headers(tenant)
    ) as answer:
        answer.raise_for_status()
        async for _ in answer.content.iter_any():
            first_s = first_s or time.perf_counter()
    if first_s is None:
        raise SystemExit(f"no audio came for {text!r}")
    return (first_s - began_s) * 1e3


async def ask_quietly(world: World, count: int) -> list[float]:
    """One sentence after the other. Returns each first audio in ms."""
    times = []
    for i in range(count):
        times.append(await first_audio(world, "quiet", SHORT[i % len(SHORT)]))
        machine.CONSOLE.print(f"{time.strftime('%H:%M:%S')} the quiet tenant: {times[-1]:.0f} ms")
    return times


async def _keep_asking(world: World, tenant: str, crowd: Crowd, *, skip: int) -> None:
    """One request at all times, until cancelled."""
    for i in range(skip, sys.maxsize):
        text = SENTENCES[i % len(SENTENCES)]
        async with world.session.post(
            world.url + SPEECH_PATH, json=world.body(text), headers=world.headers(tenant)
        ) as answer:
            if answer.status != 200:
                await answer.read()
                crowd.ends[f"http {answer.status}"] += 1
                await asyncio.sleep(BACK_OFF_S)
                continue
            async for piece in answer.content.iter_any():
                crowd.received.append((time.perf_counter(), len(piece)))
            crowd.ends["whole"] += 1


@asynccontextmanager
async def crowding(world: World, tenant: str, count: int) -> AsyncIterator[Crowd]:
    """`count` requests of a tenant in the server at all times: all sent at once, and each ended one sent again."""
    crowd = Crowd()
    tasks = [asyncio.ensure_future(_keep_asking(world, tenant, crowd, skip=i)) for i in range(count)]
    try:
        yield crowd
    finally:
        for task in tasks:
            task.cancel()
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(result, Exception):
                crowd.ends[type(result).__name__] += 1


def faults_of(tenant: str, crowd: Crowd) -> list[str]:
    """How a crowd's requests may not end: one that is broken off leaves the crowd smaller than was said."""
    return [
        f"{count} requests of the {tenant} tenant ended so: {end}"
        for end, count in crowd.ends.items()
        if end not in CROWD_ENDS
    ]


async def is_flooded(world: World, num_requests: int) -> bool:
    """Whether half of a flood waits for a place, or all of it is in the server: a small one fits into its steps."""
    told = await gauges(world.session, world.url)
    waiting, running = told["declaim_waiting_sequences"], told["declaim_running_sequences"]
    return waiting >= num_requests / 2 or waiting + running >= num_requests


async def measure_quiet(arguments: argparse.Namespace, world: World) -> tuple[list[float], list[float], Crowd]:
    """First audio of the quiet tenant, alone and beside the flood."""
    await ask_quietly(world, 3)  # the first ones set up what later ones find
    alone = await ask_quietly(world, arguments.asks)
    async with crowding(world, "loud", arguments.flood) as crowd:
        until_s = time.monotonic() + FLOOD_S
        while not await is_flooded(world, arguments.flood) and time.monotonic() < until_s:
            await asyncio.sleep(0.1)
        beside = await ask_quietly(world, arguments.asks)
    return alone, beside, crowd


async def measure_shares(arguments: argparse.Namespace, world: World) -> tuple[dict[str, int], list[Crowd]]:
    """Bytes of audio that each tenant was sent while both had work queued."""
    async with crowding(world, "heavy", arguments.crowd) as heavy, crowding(world, "light", arguments.crowd) as light:
        await asyncio.sleep(arguments.settle)
        begin_s = time.perf_counter()
        await asyncio.sleep(arguments.seconds)
        end_s = time.perf_counter()
    counts = {"heavy": heavy.num_bytes(begin_s, end_s), "light": light.num_bytes(begin_s, end_s)}
    return counts, [heavy, light]


async def judge_quiet(arguments: argparse.Namespace, world: World) -> tuple[dict[str, object], list[str]]:
    """What was measured of the quiet tenant, and what is wrong with it."""
    alone, beside, crowd = await measure_quiet(arguments, world)
    rows = [
        [name, *(float(np.percentile(times, q)) for q in (50, 95)), max(times)]
        for name, times in (("alone", alone), ("beside the flood", beside))
    ]
    machine.print_table("the quiet tenant's first audio, ms", ["", "p50", "p95", "worst"], rows)
    faults = faults_of("loud", crowd)
    ratio = float(np.median(beside) / np.median(alone))
    machine.CONSOLE.print(f"{ratio:.2f} times as long beside the flood, whose requests: {dict(crowd.ends)}")
    result: dict[str, object] = {"alone_ms": alone, "beside_ms": beside, "ratio": ratio, "flood": dict(crowd.ends)}
    if ratio >= arguments.most:
        faults.append(f"beside the flood the quiet tenant's first audio takes {ratio:.2f} times as long")
    return result, faults


async def judge_shares(arguments: argparse.Namespace, world: World) -> tuple[dict[str, object], list[str]]:
    """What was measured of the shares, and what is wrong with them."""
    counts, crowds = await measure_shares(arguments, world)
    machine.print_table("audio sent, MB", ["tenant", "MB"], [[name, count / 1e6] for name, count in counts.items()])
    share = counts["heavy"] / max(1, counts["light"])
    ends = [dict(crowd.ends) for crowd in crowds]
    machine.CONSOLE.print(f"shares {share:.2f} : 1 for weights 2 : 1; requests: {ends}")
    result: dict[str, object] = {"shares": share, "bytes": counts, "ends": ends}
    faults = [fault for name, crowd in zip(counts, crowds, strict=True) for fault in faults_of(name, crowd)]
    if abs(share / (WEIGHTS["heavy"] / WEIGHTS["light"]) - 1) > SHARE_TOLERANCE:
        faults.append(f"tenants of weights 2 : 1 got {share:.2f} : 1")
    return result, faults


PARTS = {"quiet": judge_quiet, "shares": judge_shares}


async def run(arguments: argparse.Namespace, url: str, keys: dict[str, str]) -> tuple[dict[str, object], list[str]]:
    """The parts asked for, one after the other: their results, and all that is wrong."""
    results: dict[str, object] = {}
    faults: list[str] = []
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=None)) as session:
        world = World(session, url, keys, arguments.format)
        for part in arguments.parts:
            results[part], wrong = await PARTS[part](arguments, world)
            faults += wrong
            await left_over(session, url)
    return results, faults


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=lambda value: value.split(","), default=list(PARTS))
    parser.add_argument("--vocoder", choices=("ray", "inline"), default="ray")
    parser.add_argument("--flood", type=int, default=200, help="requests of the loud tenant at all times")
    parser.add_argument("--asks", type=int, default=20, help="sentences of the quiet tenant")
    parser.add_argument("--crowd", type=int, default=60, help="requests of each of the two weighted tenants")
    parser.add_argument("--seconds", type=float, default=30.0, help="over which shares are counted")
    parser.add_argument("--settle", type=float, default=10.0, help="seconds before that")
    parser.add_argument("--most", type=float, default=1.5, help="how often the quiet tenant's first audio may grow")
    parser.add_argument("--format", choices=("mp3", "pcm"), default="mp3", help="both have a constant bit rate")
    parser.add_argument("--serve", default="", help="more options for `declaim serve`")
    arguments = parser.parse_args()
    if unknown := set(arguments.parts) - set(PARTS):
        parser.error(f"--parts names {', '.join(sorted(unknown))}: use {', '.join(PARTS)}")
    document = machine.begin(QUESTION, vars(arguments))
    with tempfile.TemporaryDirectory(prefix="declaim-fairness-") as folder:
        database = f"sqlite:///{Path(folder) / 'declaim.db'}"
        keys = make_keys(database)
        options = ["--vocoder", arguments.vocoder, "--database-url", database, *arguments.serve.split()]
        with own_server("fairness", options) as (url, _):
            result, faults = asyncio.run(run(arguments, url, keys))
    verdict = "; ".join(faults) or "kept"
    machine.CONSOLE.print(verdict, soft_wrap=True)
    machine.end(document, {**result, "faults": faults})
    if faults:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
