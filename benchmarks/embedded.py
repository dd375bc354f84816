"""How fast is the embedded voice on this CPU, and what does a Ray vocoder add to it?

Method. One engine a vocoder, default settings, the voice's own sampling with fixed seeds. After one warm-up request:
- one stream at a time: each of --sentences sentences through Engine.stream(); first audio is from the call to the
  first chunk that has samples, the real-time factor (RTF) is the time to the last chunk over the seconds of audio;
- many at once: --concurrent sentences through one Engine.generate(), against the same one after the other.
Ray's workers are processes of their own and share the cores with the engine, as they would in service; the time to
start them is not counted. The median of --repeats is reported for throughput, percentiles over sentences for streams.

    python benchmarks/embedded.py [--vocoder inline|ray|both] [--threads N] [--repeats N] [--profile] [--quick]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from typing import Any

import machine
import numpy as np
import profiling
import torch
from texts import SENTENCES

from declaim.engine import Engine, EngineConfig, SamplingParams, SpeechRequest
from declaim.engine.config import VocoderName

QUESTION = "The embedded voice: first audio, real-time factor, and throughput of many at once"
PERCENTILES = (50, 95, 99)


def _requests(count: int) -> list[SpeechRequest]:
    return [SpeechRequest(SENTENCES[i % len(SENTENCES)], sampling=SamplingParams(seed=i)) for i in range(count)]


def _stream(engine: Engine, request: SpeechRequest) -> tuple[float, float]:
    """Speak one sentence. Returns first audio in ms and the real-time factor."""
    begin = time.perf_counter()
    first_at: float | None = None
    audio_s = 0.0
    for chunk in engine.stream(request):
        if first_at is None and len(chunk.audio):
            first_at = time.perf_counter()
        audio_s += len(chunk.audio) / chunk.sample_rate_hz
    wall_s = time.perf_counter() - begin
    if first_at is None:
        raise RuntimeError(f"no audio came for {request.text!r}")
    return (first_at - begin) * 1e3, wall_s / audio_s


def _generate(engine: Engine, groups: Sequence[Sequence[SpeechRequest]]) -> float:
    """Speak groups of requests, one group after the other. Returns seconds of audio per second."""
    audio_s = 0.0
    begin = time.perf_counter()
    for group in groups:
        for result in engine.generate(group, progress=False):
            if result.error is not None:
                raise result.error
            audio_s += result.duration_s
    return audio_s / (time.perf_counter() - begin)


def _measure(engine: Engine, *, num_sentences: int, num_concurrent: int, repeats: int) -> dict[str, Any]:
    engine.warm_up()
    streams = [_stream(engine, request) for request in _requests(num_sentences)]
    first_ms, rtf = (np.percentile(values, PERCENTILES) for values in zip(*streams, strict=True))
    requests = _requests(num_concurrent)
    together = statistics.median(_generate(engine, [requests]) for _ in range(repeats))
    apart = statistics.median(_generate(engine, [[request] for request in requests]) for _ in range(repeats))
    return {
        "first_audio_ms": {f"p{p}": float(value) for p, value in zip(PERCENTILES, first_ms, strict=True)},
        "rtf": {f"p{p}": float(value) for p, value in zip(PERCENTILES, rtf, strict=True)},
        "concurrent_audio_s_per_s": together,
        "one_by_one_audio_s_per_s": apart,
        "concurrent_vs_one_by_one": together / apart,
    }


def _print(result: dict[str, dict[str, Any]], *, num_sentences: int, num_concurrent: int) -> None:
    labels = [f"p{p}" for p in PERCENTILES]
    machine.print_table(
        f"one stream at a time, {num_sentences} sentences",
        ("vocoder", *(f"first audio ms {label}" for label in labels), *(f"RTF {label}" for label in labels)),
        [
            (name, *(part["first_audio_ms"][label] for label in labels), *(part["rtf"][label] for label in labels))
            for name, part in result.items()
        ],
    )
    machine.print_table(
        f"audio s/s of {num_concurrent} requests",
        ("vocoder", "at once", "one by one", "ratio"),
        [
            (
                name,
                part["concurrent_audio_s_per_s"],
                part["one_by_one_audio_s_per_s"],
                part["concurrent_vs_one_by_one"],
            )
            for name, part in result.items()
        ],
    )


def _ray_adds(result: dict[str, dict[str, Any]]) -> dict[str, float]:
    """What changes from the inline vocoder to Ray's, printed and returned."""
    inline, ray = result["inline"], result["ray"]
    first_ms = ray["first_audio_ms"]["p50"] - inline["first_audio_ms"]["p50"]
    throughput = 100 * (ray["concurrent_audio_s_per_s"] / inline["concurrent_audio_s_per_s"] - 1)
    machine.CONSOLE.print(f"Ray: {first_ms:+.1f} ms to first audio (p50), {throughput:+.1f} % throughput at once")
    return {"first_audio_ms": first_ms, "concurrent_percent": throughput}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=QUESTION)
    parser.add_argument("--vocoder", choices=("inline", "ray", "both"), default="inline")
    parser.add_argument("--sentences", type=int, default=20)
    parser.add_argument("--concurrent", type=int, default=16)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--profile", action="store_true", help="where the step time goes, and no measurement")
    parser.add_argument("--quick", action="store_true", help="two sentences")
    return parser.parse_args()


def main() -> None:
    args = _arguments()
    torch.set_num_threads(args.threads)
    num_sentences, num_concurrent = (2, 2) if args.quick else (args.sentences, args.concurrent)
    document = machine.begin(QUESTION, vars(args) | {"sentences": num_sentences, "concurrent": num_concurrent})
    names: tuple[VocoderName, ...] = ("inline", "ray") if args.vocoder == "both" else (args.vocoder,)
    result: dict[str, dict[str, Any]] = {}
    for name in names:
        with Engine.from_pretrained(config=EngineConfig(vocoder=name)) as engine:
            if args.profile:
                result[name] = profiling.profile_engine(engine, _requests(num_concurrent))
            else:
                result[name] = _measure(
                    engine, num_sentences=num_sentences, num_concurrent=num_concurrent, repeats=args.repeats
                )
    if not args.profile:
        _print(result, num_sentences=num_sentences, num_concurrent=num_concurrent)
    ray_adds = _ray_adds(result) if args.vocoder == "both" and not args.profile else None
    machine.end(document, {"vocoders": result, "ray_adds": ray_adds})


if __name__ == "__main__":
    main()
