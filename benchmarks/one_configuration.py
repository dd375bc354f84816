"""Does one configuration serve a single listener and a crowd, or does each load want another?

Method. The embedded voice, the inline vocoder, three configurations of the same engine in one run, each in a process of
its own and twice, in the order A B C C B A, so that a machine that becomes slower or faster is seen as a difference
between rounds and not between configurations:
- default: the engine's own settings;
- small: a fixed 0.16 s for every chunk, four sequences at once: what one would choose for a single listener;
- large: a fixed 1.28 s for every chunk, 128 sequences at once: what one would choose for throughput.
At each load so many streams are kept open that a new one begins as one ends; the texts and seeds are the same for all.
The first chunk is from the call to the first samples, first audio to the first audible sound; a stream is dry if a
player that buffers 100 ms ran dry; throughput is audio over the time from the first call to the last end. Of the two
rounds the median (their mean) counts.

    python benchmarks/one_configuration.py [--loads 1 4 32] [--streams 10] [--rounds 2] [--threads N] [--quick]
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import statistics
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import machine
import numpy as np
import torch
from texts import SENTENCES

from declaim.engine import DeclaimError, Engine, EngineConfig, SamplingParams, SpeechRequest
from declaim.load.client import Outcome
from declaim.load.playback import Listener
from declaim.load.summary import Objective, summarize
from declaim.load.workload import Job, Tenant

QUESTION = "One configuration from one request at a time to saturation, against two that are fixed for one end"
SETUPS: Mapping[str, EngineConfig] = {
    "default": EngineConfig(vocoder="inline"),
    "small": EngineConfig(vocoder="inline", first_chunk_s=0.16, max_chunk_s=0.16, max_batch=4),
    "large": EngineConfig(vocoder="inline", first_chunk_s=1.28, max_chunk_s=1.28, max_batch=128),
}
BUFFER_S = 0.1
CALLER = Tenant("all")
MEASURES = ("first_chunk_p50_ms", "first_audio_p50_ms", "first_audio_p95_ms", "rtf_p50", "dry_percent", "audio_s_per_s")


def serve_all(setup: str, loads: Sequence[int], *, num_streams: int, threads: int) -> list[dict[str, Any]]:
    """One configuration at every load, in this process. Returns a row a load."""
    torch.set_num_threads(threads)
    rows = []
    with Engine.from_pretrained(config=SETUPS[setup]) as engine:
        engine.warm_up()
        for load in loads:
            # The ramp up and down are a smaller part of a longer run.
            outcomes = asyncio.run(_closed_loop(engine, num_at_once=load, num_streams=num_streams + load - 1))
            rows.append({"setup": setup, "concurrency": load} | _measures(outcomes))
    return rows


async def _closed_loop(engine: Engine, *, num_at_once: int, num_streams: int) -> list[Outcome]:
    origin_s = time.perf_counter()
    jobs = iter([Job(i, None, CALLER, SENTENCES[i % len(SENTENCES)]) for i in range(num_streams)])
    outcomes: list[Outcome] = []

    async def caller() -> None:
        for job in jobs:
            outcomes.append(await _listen(engine, job, origin_s=origin_s))

    await asyncio.gather(*(caller() for _ in range(num_at_once)))
    return outcomes


async def _listen(engine: Engine, job: Job, *, origin_s: float) -> Outcome:
    rate_hz = engine.spec.codec.sample_rate_hz
    outcome = Outcome(job, time.perf_counter() - origin_s, listener=Listener(rate_hz))
    request = SpeechRequest(job.text, sampling=SamplingParams(seed=job.index))
    try:
        async for chunk in engine.astream(request):
            samples = np.rint(np.clip(chunk.audio, -1, 1) * 32767).astype("<i2")
            outcome.listener.feed(samples.tobytes(), time.perf_counter() - origin_s)
    except DeclaimError as error:
        outcome.error = type(error).__name__
    outcome.ended_s = time.perf_counter() - origin_s
    return outcome


def _measures(outcomes: Sequence[Outcome]) -> dict[str, float]:
    summary = summarize(outcomes, Objective(buffer_s=BUFFER_S))
    if summary.errors:
        raise RuntimeError(f"not all streams ended well: {summary.errors}")
    return {
        "first_chunk_p50_ms": 1000 * summary.first_byte_s.p50,
        "first_audio_p50_ms": 1000 * summary.first_audio_s.p50,
        "first_audio_p95_ms": 1000 * summary.first_audio_s.p95,
        "rtf_p50": summary.rtf.p50,
        "dry_percent": 100 * summary.underruns[f"{BUFFER_S:g}"],
        "audio_s_per_s": summary.audio_s_per_s,
    }


def _medians(rounds: Sequence[Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Rows of the same load and setup, of all rounds, made one; in the order of the loads."""
    rows = [row for part in rounds for row in part]
    keys = sorted({(row["concurrency"], list(SETUPS).index(row["setup"])) for row in rows})
    return [
        {"setup": setup, "concurrency": load}
        | {
            name: statistics.median(r[name] for r in rows if (r["concurrency"], r["setup"]) == (load, setup))
            for name in MEASURES
        }
        for load, setup in ((load, list(SETUPS)[place]) for load, place in keys)
    ]


def _ends(rows: Sequence[dict[str, Any]], loads: Sequence[int]) -> dict[str, dict[str, float]]:
    """What each configuration has at both ends, as a multiple of the default's."""

    def first_ms(setup: str) -> float:
        return next(r["first_audio_p50_ms"] for r in rows if (r["setup"], r["concurrency"]) == (setup, min(loads)))

    def most(setup: str) -> float:
        return max(float(r["audio_s_per_s"]) for r in rows if r["setup"] == setup)

    return {
        setup: {
            "first_audio_ratio": first_ms(setup) / first_ms("default"),
            "throughput_ratio": most(setup) / most("default"),
        }
        for setup in SETUPS
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loads", type=int, nargs="+", default=[1, 4, 32], help="streams open at a time")
    parser.add_argument("--streams", type=int, default=10, help="at the lowest load; more at higher ones")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true", help="two streams, one round")
    args = parser.parse_args()
    loads, num_streams, num_rounds = (
        ([1, 2], 2, 1) if args.quick else (sorted(set(args.loads)), args.streams, args.rounds)
    )
    torch.set_num_threads(args.threads)
    document = machine.begin(QUESTION, vars(args) | {"loads": loads, "streams": num_streams, "rounds": num_rounds})
    rounds = []
    for i in range(num_rounds):
        order = list(SETUPS) if i % 2 == 0 else list(reversed(SETUPS))
        for setup in order:
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
                done = process.submit(serve_all, setup, loads, num_streams=num_streams, threads=args.threads)
                rounds.append(done.result())
    rows = _medians(rounds)
    machine.print_table(
        f"median of {num_rounds} round(s)",
        ("at a time, configuration", "first chunk ms", "first audio ms", "p95", "RTF", "dry %", "audio s/s"),
        [(f"{row['concurrency']} {row['setup']}", *(row[name] for name in MEASURES)) for row in rows],
    )
    ends = _ends(rows, loads)
    machine.print_table(
        "against the default",
        ("configuration", "first audio alone", "most audio s/s"),
        [(n, *e.values()) for n, e in ends.items()],
    )
    machine.end(document, {"rows": rows, "rounds": rounds, "ends": ends})


if __name__ == "__main__":
    main()
