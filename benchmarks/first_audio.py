"""How long until a listener of `declaim serve` as it comes has first audio?

A server of its own with the default settings (embedded voice, Ray vocoder) is asked for one sentence after the other by
one client, after --warm-up requests that are not counted. First audio is from sending the request to the first byte of
the response's body, which for mp3 is the first whole frame. The parts of it are told beside it: the server's own time
(`openai-processing-ms`: up to the response's headers), and the same engine asked for pcm, which no encoder holds back.
The verdict: the median with mp3 is at most --most-ms.

    python benchmarks/first_audio.py [--vocoder ray|inline] [--requests 24] [--most-ms 250] [--serve "--max-batch 8"]
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time

import aiohttp
import machine
import numpy as np
from own_server import own_server
from texts import SENTENCES

QUESTION = "First audio of `declaim serve`, one stream at a time"
FORMATS = ("mp3", "pcm")


async def ask(session: aiohttp.ClientSession, url: str, text: str, response_format: str) -> tuple[float, float]:
    """Speak a text to its end. Returns first audio and the server's own time until its headers, in ms."""
    body = {"model": "tts-1", "voice": "alloy", "input": text, "response_format": response_format}
    began_s = time.perf_counter()
    first_s: float | None = None
    async with session.post(url + "/v1/audio/speech", json=body) as answer:
        answer.raise_for_status()
        async for _ in answer.content.iter_any():
            first_s = first_s or time.perf_counter()
        processing_ms = float(answer.headers["openai-processing-ms"])
    if first_s is None:
        raise SystemExit(f"no audio came for {text!r}")
    return (first_s - began_s) * 1e3, processing_ms


async def measure(arguments: argparse.Namespace, url: str) -> dict[str, list[tuple[float, float]]]:
    """By format; the formats take turns, so that a slow moment of the machine hits all of them."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in FORMATS}
    async with aiohttp.ClientSession() as session:
        for i in range(arguments.warm_up):
            await ask(session, url, SENTENCES[-1 - i % len(SENTENCES)], FORMATS[i % len(FORMATS)])
        for i in range(arguments.requests):
            for name in FORMATS:
                times[name].append(await ask(session, url, SENTENCES[i % len(SENTENCES)], name))
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocoder", choices=("ray", "inline"), default="ray")
    parser.add_argument("--requests", type=int, default=24, help="of each format")
    parser.add_argument("--warm-up", type=int, default=3)
    parser.add_argument("--most-ms", type=float, default=250.0, help="the median with mp3 that is still good")
    parser.add_argument("--serve", default="", help="more options for `declaim serve`")
    arguments = parser.parse_args()
    document = machine.begin(QUESTION, vars(arguments))
    with tempfile.TemporaryDirectory(prefix="declaim-first-audio-") as folder:
        options = ["--vocoder", arguments.vocoder, "--no-auth", "--database-url", f"sqlite:///{folder}/declaim.db"]
        with own_server("first-audio", [*options, *arguments.serve.split()]) as (url, _):
            times = asyncio.run(measure(arguments, url))
    rows: list[list[object]] = []
    result = {}
    for name, pairs in times.items():
        first, processing = zip(*pairs, strict=True)
        p50, p95 = (float(np.percentile(first, q)) for q in (50, 95))
        rows.append([name, p50, p95, max(first), float(np.median(processing))])
        result[name] = {"p50_ms": p50, "p95_ms": p95, "first_ms": first, "processing_ms": processing}
    machine.print_table("first audio, ms", ["format", "p50", "p95", "worst", "server's own, p50"], rows)
    p50_ms = result["mp3"]["p50_ms"]
    is_kept = p50_ms <= arguments.most_ms
    verdict = "kept" if is_kept else "broken"
    machine.CONSOLE.print(f"{verdict}: the median with mp3 is {p50_ms:.0f} ms, {arguments.most_ms:g} are allowed")
    machine.end(document, {"formats": result, "kept": is_kept})
    if not is_kept:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
