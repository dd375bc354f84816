"""Does anything grow? Hours of mixed traffic, memory and handles sampled all along, and a verdict.

A `declaim serve` of its own, with a database and a cache, is asked by a few listeners for texts of all lengths, as pcm,
wav, mp3, opus and flac, by HTTP, SSE and WebSocket; some again and again, for the cache; every fifth hangs up on the
way. Every --sample seconds each process is noted, the server, Ray's and the vocoder workers: resident memory, threads,
file handles, and where nvidia-smi is, memory on the GPU.

The verdict is on what follows a warm-up of a quarter of the run, in the processes that live to its end:

- memory may rise by --growth MB an hour beyond what the samples scatter, by the medians of the first and last third,
  and once by --settling MB: in minutes, caches that still fill cannot be told from a leak;
- what is alive of the server's memory may rise by --live MB an hour (malloc's blocks) and by 1 % (Python's), by the
  same medians, the whole of the KV cache counted from the start; its resident memory may also rise by what that takes,
  once: a page of it is resident from when it is first written;
- threads and handles may not rise by more than 4 and 16 from the first third to the last, nor in the silence after it;
- no process may be left that the first third did not have, beyond one vocoder worker;
- in that silence no stream, block, window or connection is left, and no vocoder worker was lost on the way;
- every stream ends whole or by its listener's own hanging up.

    python benchmarks/soak.py [--minutes 30] [--listeners 4] [--rest 1.0] [--vocoder ray] [--growth 20] [--live 5]
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import shutil
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import aiohttp
import machine
import numpy as np
import psutil
from own_server import ServerDied, check_alive, gauges, left_over, log_of, own_server
from texts import text_of_length

from declaim.load.client import Target, ask
from declaim.load.workload import Job, Tenant

QUESTION = "Soak: what grows over time"
NAME = "soak"
FORMATS = ("pcm", "wav", "mp3", "opus", "flac")
SHARE_HUNG_UP, SHARE_WEBSOCKET, SHARE_REPEATED = 0.2, 0.2, 0.2
ENDS = ("whole", "hung up")
PROGRESS_S = 30.0
CACHE_GB = 0.02
MEMORY_GB = 0.43  # for a small KV cache
PYTHON_GROWTH = 0.01
# What may come and go by more than the load explains: a pool's idle threads, connections kept alive.
SLACK = {"threads": 4, "handles": 16}


@dataclass(frozen=True, slots=True)
class Process:
    """One process at one moment. vram_mb: 0 where no GPU is. Of the server only: heap_mb and python_blocks, what is
    alive; cache_mb, the KV cache, written or not."""

    name: str
    rss_mb: float
    threads: int
    handles: int
    vram_mb: float = 0.0
    heap_mb: float = 0.0
    python_blocks: float = 0.0
    cache_mb: float = 0.0


@dataclass(frozen=True, slots=True)
class Sample:
    """One moment: the processes by id, the server's first."""

    at_s: float
    processes: Mapping[int, Process]


def sample(server: psutil.Process, told: Mapping[str, float], began_s: float) -> Sample:
    """told: the server's gauges. Raises: ServerDied."""
    check_alive(server)
    vram_mb = _vram_mb()
    processes = {}
    for process in (server, *server.children(recursive=True)):
        try:
            with process.oneshot():
                processes[process.pid] = Process(
                    name="server" if process is server else _name_of(process.cmdline()),
                    rss_mb=process.memory_info().rss / 1e6,
                    threads=process.num_threads(),
                    handles=process.num_fds(),
                    vram_mb=vram_mb.get(process.pid, 0.0),
                )
        except psutil.NoSuchProcess:
            continue
    check_alive(server)
    processes[server.pid] = replace(
        processes[server.pid],
        heap_mb=told["declaim_heap_used_bytes"] / 1e6,
        python_blocks=told["declaim_python_blocks"],
        cache_mb=told["declaim_kv_cache_bytes"] / 1e6,
    )
    return Sample(time.monotonic() - began_s, processes)


def _name_of(command: Sequence[str]) -> str:
    """Of one of Ray's processes: ray::DecodeWorker, raylet, gcs_server, log_monitor.py."""
    if not command:
        return "?"
    if command[0].startswith("ray::"):
        # A busy worker's title tells the method, too.
        return command[0].split()[0].split(".")[0]
    script = next((word for word in command if word.endswith(".py")), command[0])
    return Path(script).name


def _vram_mb() -> dict[int, float]:
    """By process id."""
    if shutil.which("nvidia-smi") is None:
        return {}
    query = ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
    told = subprocess.run(query, capture_output=True, text=True, check=True).stdout
    rows = [line.split(",") for line in told.splitlines() if line.strip()]
    return {int(pid): float(used) * 1.048576 for pid, used in rows if used.strip().isdecimal()}


# Traffic.


async def listen(session: aiohttp.ClientSession, url: str, rng: random.Random, *, deadline_s: float) -> str:
    """One request. Returns how it ended."""
    text = text_of_length(rng.choice((12, 40, 90, 250)), skip=rng.randrange(20))
    extra: dict[str, object] = {"seed": 1} if rng.random() < SHARE_REPEATED else {}
    if rng.random() < SHARE_WEBSOCKET:
        target = Target(f"{url}/v1", model="tts-1", voice="alloy", protocol="ws", timeout_s=deadline_s, extra=extra)
        outcome = await ask(session, target, Job(0, None, Tenant("soak"), text), origin_s=time.perf_counter())
        return "whole" if outcome.error is None else f"websocket: {outcome.error}"
    body = {
        "model": "tts-1",
        "voice": "alloy",
        "input": text,
        "response_format": rng.choice(FORMATS),
        "stream_format": rng.choice(("audio", "audio", "sse")),
    }
    stop_at = rng.randrange(1, 60_000) if rng.random() < SHARE_HUNG_UP else None
    num_bytes = 0
    try:
        async with (
            asyncio.timeout(deadline_s),
            session.post(url + "/v1/audio/speech", json=body | extra) as answer,
        ):
            if answer.status != 200:
                await answer.read()
                return f"http {answer.status}"
            async for piece in answer.content.iter_any():
                num_bytes += len(piece)
                if stop_at is not None and num_bytes >= stop_at:
                    return "hung up"
    except TimeoutError:
        return f"did not end within {deadline_s:g} s"
    except aiohttp.ClientError as error:
        return f"broken off: {type(error).__name__}"
    return "whole" if num_bytes else "empty"


async def run(
    arguments: argparse.Namespace, url: str, server: psutil.Process
) -> tuple[list[Sample], Counter[str], dict[str, float]]:
    """Raises: ServerDied, in a group."""
    samples: list[Sample] = []
    ends: Counter[str] = Counter()
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def listener(number: int) -> None:
            rng = random.Random(f"{arguments.seed} listener {number}")
            while time.monotonic() < until_s:
                end = await listen(session, url, rng, deadline_s=arguments.deadline)
                check_alive(server)
                ends[end] += 1
                await asyncio.sleep(rng.uniform(0.0, 2.0) * arguments.rest)

        async def sampler() -> None:
            told_s = began_s
            while (now := time.monotonic()) < until_s:
                told = await gauges(session, url)
                samples.append(await asyncio.to_thread(sample, server, told, began_s))
                if now - told_s >= PROGRESS_S:
                    told_s = now
                    _tell(samples[-1], ends, server, left_s=until_s - now)
                await asyncio.sleep(arguments.sample)

        began_s = time.monotonic()
        until_s = began_s + 60 * arguments.minutes
        async with asyncio.TaskGroup() as group:
            group.create_task(sampler())
            for i in range(arguments.listeners):
                group.create_task(listener(i))
        left = await left_over(session, url)
        told = await gauges(session, url)
        if lost := told.get("declaim_vocoder_restarts_total", 0.0):
            left["vocoder workers lost"] = lost
        samples.append(sample(server, told, began_s))
    return samples, ends, left


def _tell(now: Sample, ends: Counter[str], server: psutil.Process, *, left_s: float) -> None:
    own = now.processes[server.pid]
    others_mb = sum(process.rss_mb for process in now.processes.values()) - own.rss_mb
    machine.CONSOLE.print(
        f"{time.strftime('%H:%M:%S')} {left_s:.0f} s to go, load {os.getloadavg()[0]:.1f}; {dict(ends)}; server "
        f"{own.rss_mb:.0f} MB, {own.threads} threads, {own.handles} handles; {len(now.processes) - 1} others "
        f"{others_mb:.0f} MB",
        soft_wrap=True,
    )


# The verdict.


@dataclass(frozen=True, slots=True)
class Growth:
    """What a process did from the first third after the warm-up to the last. hours: between the middles of the two.
    rss, vram, heap: by how much they rise, and twice the scatter of the last third about its median, in MB an hour.
    """

    name: str
    pid: int
    hours: float
    rss: tuple[float, float]
    vram: tuple[float, float]
    heap: tuple[float, float]
    first: Process
    last: Process


def thirds(samples: Sequence[Sample]) -> tuple[Sequence[Sample], Sequence[Sample]]:
    """The first and the last third of what follows the warm-up."""
    kept = samples[len(samples) // 4 :]
    count = max(1, len(kept) // 3)
    return kept[:count], kept[-count:]


def growths(samples: Sequence[Sample]) -> list[Growth]:
    """Of the processes that are in all of the first and the last third."""
    first, last = thirds(samples)
    hours = max(1e-9, float(np.median([s.at_s for s in last]) - np.median([s.at_s for s in first])) / 3600)
    ids = set.intersection(*(set(s.processes) for s in (*first, *last)))
    found = []
    for pid in sorted(ids):
        before, after = [s.processes[pid] for s in first], [s.processes[pid] for s in last]

        def slope(
            name: str, before: Sequence[Process] = before, after: Sequence[Process] = after
        ) -> tuple[float, float]:
            old, new = (np.array([getattr(process, name) for process in part]) for part in (before, after))
            scatter = np.median(np.abs(new - np.median(new)))
            return float(np.median(new) - np.median(old)) / hours, float(2 * scatter) / hours

        rises = [slope(name) for name in ("rss_mb", "vram_mb", "heap_mb")]
        found.append(Growth(after[-1].name, pid, hours, *rises, _middle(before), _middle(after)))
    return found


def _middle(moments: Sequence[Process]) -> Process:
    return Process(
        name=moments[0].name,
        rss_mb=float(np.median([process.rss_mb for process in moments])),
        threads=int(np.median([process.threads for process in moments])),
        handles=int(np.median([process.handles for process in moments])),
        vram_mb=float(np.median([process.vram_mb for process in moments])),
        heap_mb=float(np.median([process.heap_mb for process in moments])),
        python_blocks=float(np.median([process.python_blocks for process in moments])),
        cache_mb=moments[0].cache_mb,
    )


def judge(
    samples: Sequence[Sample],
    silence: Sample,
    ends: Mapping[str, int],
    left: Mapping[str, float],
    *,
    growth_mb: float,
    settling_mb: float,
    live_mb: float,
) -> list[str]:
    """What is wrong. samples: under load; silence: after it; left: what is not back at nothing. growth_mb, live_mb: an
    hour."""
    faults = [f"{name}: {value:g} in the silence after the run" for name, value in left.items()]
    for growth in growths(samples):
        who = f"{growth.name} ({growth.pid})"
        for what, (rise, trust), limit_mb, once_mb in (
            ("memory", growth.rss, growth_mb, settling_mb + growth.last.cache_mb),
            ("GPU memory", growth.vram, growth_mb, settling_mb),
            ("live memory", growth.heap, live_mb, settling_mb),
        ):
            allowed = limit_mb + once_mb / growth.hours
            if rise - trust > allowed:
                faults.append(
                    f"{who}: its {what} grows by {rise:.0f} MB an hour (+- {trust:.0f}), {allowed:.0f} may be"
                )
        if growth.last.python_blocks > (1 + PYTHON_GROWTH) * growth.first.python_blocks:
            faults.append(
                f"{who}: Python holds {growth.first.python_blocks:.0f} blocks after the warm-up,"
                f" {growth.last.python_blocks:.0f} at the end"
            )
        for name, slack in SLACK.items():
            before, after = getattr(growth.first, name), getattr(growth.last, name)
            ended = getattr(silence.processes[growth.pid], name) if growth.pid in silence.processes else 0
            if max(after, ended) > before + slack:
                faults.append(f"{who}: {before} {name} after the warm-up, {after} at the end, {ended} in silence")
    first, _ = thirds(samples)
    most = max(len(s.processes) for s in first)
    if len(silence.processes) > most + 1:
        faults.append(f"{most} processes after the warm-up, {len(silence.processes)} in silence")
    for end, count in ends.items():
        if end not in ENDS:
            faults.append(f"{count} streams ended so: {end}")
    if not ends.get("whole"):
        faults.append("no stream ended whole")
    return faults


def _result(verdict: str, faults: Sequence[str], ends: Mapping[str, int], told: Sequence[Growth]) -> dict[str, object]:
    """What the record keeps. server_live: None where the server died."""
    live = None
    for growth in told:
        if growth.name == "server":
            blocks = [growth.first.python_blocks, growth.last.python_blocks]
            live = {"growth_mb_per_hour": growth.heap, "python_blocks": blocks}
    return {
        "verdict": verdict,
        "faults": faults,
        "ends": dict(ends),
        "growth_mb_per_hour": {f"{growth.name} {growth.pid}": growth.rss for growth in told},
        "server_live": live,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--listeners", type=int, default=4)
    parser.add_argument("--rest", type=float, default=1.0, help="a listener's pause between streams, on average")
    parser.add_argument("--deadline", type=float, default=120.0, help="seconds until every stream must have ended")
    parser.add_argument("--vocoder", choices=("ray", "inline"), default="ray")
    parser.add_argument("--sample", type=float, default=2.0, help="seconds between samples")
    parser.add_argument("--growth", type=float, default=20.0, help="MB an hour of memory that are no leak")
    parser.add_argument("--live", type=float, default=5.0, help="MB an hour of live memory that are no leak")
    parser.add_argument("--settling", type=float, default=0.0, help="MB that each process may take once")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    document = machine.begin(QUESTION, vars(arguments))
    with tempfile.TemporaryDirectory(prefix="declaim-soak-") as folder:
        options = ["--vocoder", arguments.vocoder, "--database-url", f"sqlite:///{folder}/declaim.db"]
        options += ["--cache-dir", f"{folder}/cache", "--cache-gb", str(CACHE_GB), "--memory-gb", str(MEMORY_GB)]
        with own_server(NAME, options) as (url, server):
            samples: list[Sample] = []
            died = ""
            try:
                samples, ends, left = asyncio.run(run(arguments, url, server))
            except* (ServerDied, aiohttp.ClientError) as errors:
                died = f"FAILED: {errors.exceptions[0]!r}: see {log_of(NAME)}"
    if died:
        machine.CONSOLE.print(died, soft_wrap=True)
        machine.end(document, _result(died, [died], Counter(), []))
        raise SystemExit(1)
    *loaded, silence = samples
    faults = judge(
        loaded, silence, ends, left, growth_mb=arguments.growth, settling_mb=arguments.settling, live_mb=arguments.live
    )
    told = growths(loaded)
    machine.print_table(
        "processes that lived through it, after the warm-up and at the end",
        ["process", "RSS MB", "", "MB an hour", "+-", "live MB", "", "threads", "", "handles", ""],
        [
            [g.name, g.first.rss_mb, g.last.rss_mb, *g.rss, g.first.heap_mb, g.last.heap_mb]
            + [g.first.threads, g.last.threads, g.first.handles, g.last.handles]
            for g in told
        ],
    )
    machine.print_table("how streams ended", ["end", "streams"], list(ends.most_common()))
    own = next(g for g in told if g.name == "server")
    verdict = (
        "FAILED: " + "; ".join(faults)
        if faults
        else f"nothing grows beyond what may: the server {own.rss[0]:+.0f} MB an hour (+- {own.rss[1]:.0f}), "
        f"{arguments.growth:g} may be, and once the {own.last.cache_mb:.0f} MB of its cache; alive of it "
        f"{own.heap[0]:+.1f} MB an hour (+- {own.heap[1]:.1f}), {arguments.live:g} may be; and once "
        f"{arguments.settling:g} MB of either"
    )
    machine.CONSOLE.print(verdict, soft_wrap=True)
    course = [[round(s.at_s), round(s.processes[own.pid].rss_mb, 1)] for s in loaded[:: max(1, len(loaded) // 60)]]
    machine.end(document, {**_result(verdict, faults, ends, told), "server_rss_mb": course})
    if faults:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
