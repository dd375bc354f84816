"""Does anything grow? Hours of mixed traffic, memory and handles sampled all along, and a verdict.

A `declaim serve` of its own is asked by a few listeners for texts of all lengths, as pcm, wav, mp3, opus and flac, by
HTTP and SSE; every fifth hangs up on the way. Every --sample seconds the resident memory, threads and file handles of
the server are noted, and its workers' memory. The verdict: after a warm-up of a quarter of the run, memory must not
rise. It is judged by the line through the medians of the first and the last third: more than --growth MB an hour
beyond what the samples scatter is a leak. Handles and threads must end where they were, and all blocks be free.

    python benchmarks/soak.py [--minutes 30] [--listeners 4] [--vocoder ray] [--growth 20]
"""

from __future__ import annotations

import argparse
import asyncio
import random
import time
from collections import Counter
from dataclasses import asdict, dataclass

import aiohttp
import machine
import numpy as np
import psutil
from own_server import left_over, own_server
from texts import text_of_length

QUESTION = "Soak: what grows over time"
FORMATS = ("pcm", "wav", "mp3", "opus", "flac")


@dataclass(frozen=True, slots=True)
class Sample:
    """One moment. rss_mb: the server's resident memory; workers_rss_mb: its descendants'."""

    at_s: float
    rss_mb: float
    workers_rss_mb: float
    threads: int
    handles: int


def sample(process: psutil.Process, began_s: float) -> Sample:
    workers = 0
    for child in process.children(recursive=True):
        try:
            workers += child.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return Sample(
        at_s=time.monotonic() - began_s,
        rss_mb=process.memory_info().rss / 1e6,
        workers_rss_mb=workers / 1e6,
        threads=process.num_threads(),
        handles=process.num_fds(),
    )


async def listen(session: aiohttp.ClientSession, url: str, rng: random.Random) -> str:
    """One request. Returns how it ended."""
    body = {
        "model": "tts-1",
        "voice": "alloy",
        "input": text_of_length(rng.choice((12, 40, 90, 250)), skip=rng.randrange(20)),
        "response_format": rng.choice(FORMATS),
        "stream_format": rng.choice(("audio", "audio", "sse")),
    }
    stop_at = rng.randrange(1, 60_000) if rng.random() < 0.2 else None
    num_bytes = 0
    try:
        async with session.post(url + "/v1/audio/speech", json=body) as answer:
            if answer.status != 200:
                await answer.read()
                return f"http {answer.status}"
            async for piece in answer.content.iter_any():
                num_bytes += len(piece)
                if stop_at is not None and num_bytes >= stop_at:
                    return "hung up"
    except aiohttp.ClientError as error:
        return f"broken off: {type(error).__name__}"
    return "whole"


async def run(
    arguments: argparse.Namespace, url: str, process: psutil.Process
) -> tuple[list[Sample], Counter[str], dict[str, float]]:
    began_s = time.monotonic()
    until_s = began_s + 60 * arguments.minutes
    samples: list[Sample] = []
    ends: Counter[str] = Counter()
    rng = random.Random(arguments.seed)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def listener() -> None:
            while time.monotonic() < until_s:
                ends[await listen(session, url, rng)] += 1

        async def sampler() -> None:
            while time.monotonic() < until_s:
                samples.append(sample(process, began_s))
                await asyncio.sleep(arguments.sample)

        await asyncio.gather(sampler(), *(listener() for _ in range(arguments.listeners)))
        left = await left_over(session, url)
        samples.append(sample(process, began_s))
    return samples, ends, left


def growth_mb_per_hour(samples: list[Sample], values: list[float]) -> tuple[float, float]:
    """The slope between the medians of the first and last third after the warm-up, and how far one may trust it:
    twice the scatter of the samples about their third's median, over the same time. Both in MB an hour."""
    first = len(samples) // 4
    times, kept = np.array([s.at_s for s in samples][first:]), np.array(values[first:])
    third = max(1, len(kept) // 3)
    hours = (np.median(times[-third:]) - np.median(times[:third])) / 3600
    slope = (np.median(kept[-third:]) - np.median(kept[:third])) / max(hours, 1e-9)
    scatter = np.median(np.abs(kept[-third:] - np.median(kept[-third:])))
    return float(slope), float(2 * scatter / max(hours, 1e-9))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--listeners", type=int, default=4)
    parser.add_argument("--vocoder", choices=("ray", "inline"), default="ray")
    parser.add_argument("--sample", type=float, default=2.0, help="seconds between samples")
    parser.add_argument("--growth", type=float, default=20.0, help="MB an hour of memory that are no leak")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    document = machine.begin(QUESTION, vars(arguments))
    with own_server("soak", ["--vocoder", arguments.vocoder]) as (url, process):
        samples, ends, left = asyncio.run(run(arguments, url, process))
    settled = samples[len(samples) // 4]
    grown, trust = growth_mb_per_hour(samples, [s.rss_mb for s in samples])
    workers_grown, workers_trust = growth_mb_per_hour(samples, [s.workers_rss_mb for s in samples])
    faults = [f"{name} is left: {value:g}" for name, value in left.items()]
    if grown - trust > arguments.growth:
        faults.append(f"the server grows by {grown:.0f} MB an hour (+- {trust:.0f})")
    if workers_grown - workers_trust > arguments.growth:
        faults.append(f"the workers grow by {workers_grown:.0f} MB an hour (+- {workers_trust:.0f})")
    for name, slack in (("threads", 4), ("handles", 16)):
        if getattr(samples[-1], name) > getattr(settled, name) + slack:
            faults.append(
                f"{name}: {getattr(settled, name)} after the warm-up, {getattr(samples[-1], name)} at the end"
            )
    machine.print_table(
        "server",
        ["moment", "RSS MB", "workers' MB", "threads", "handles"],
        [[n, s.rss_mb, s.workers_rss_mb, s.threads, s.handles] for n, s in (("warm", settled), ("end", samples[-1]))],
    )
    machine.print_table("how streams ended", ["end", "streams"], list(ends.most_common()))
    verdict = "; ".join(faults) or f"nothing grows: {grown:+.0f} MB an hour (+- {trust:.0f})"
    machine.CONSOLE.print(verdict, soft_wrap=True)
    machine.end(
        document,
        {
            "verdict": verdict,
            "faults": faults,
            "growth_mb_per_hour": {"server": [grown, trust], "workers": [workers_grown, workers_trust]},
            "ends": dict(ends),
            "samples": [asdict(s) for s in samples[:: max(1, len(samples) // 60)]],
        },
    )
    if faults:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
