"""How much faster Zonos speaks 16 requests together than one after the other, and whether memory stays where it was.

    python -m benchmarks.zonos_throughput [--family transformer hybrid] [--size tiny half] [--vocoder silent ray]
        [--requests 16] [--seconds 1]

Two sizes: "tiny", the model of the tests, whose weights a core's caches hold, so that a step is mostly calls; and
"half", half the real width, whose step reads and computes in the proportions of the real model. There one request is
bound by the memory that weights come from, and 16 by what a core can multiply: that alone allows some 5 times.
Random weights in the published layout, the nine codebooks and the real guidance, on the CPU with one thread.
Three vocoders: "silent" makes silence, so that codes alone are timed, "ray", which is what is served by default,
decodes in a worker that has another thread, and "inline" in the engine's own. The codecs are DACs so thin that their
convolutions take most of their time for calls and for memory, and cannot be decoded together without other bits.
Both ways run the same requests, with the same texts and seeds, through the same engine from text to audio, and give
the same codes and samples, which is checked. In three rounds, each a third of the requests one by one and then all
together. Also in seconds of this process, which neighbours on the machine disturb less; with Ray they leave out its
worker's. Memory: the process' resident set after each round, the first one apart. The last line is JSON.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from benchmarks import machine
from benchmarks.silent_vocoder import SilentVocoder
from declaim.engine import Engine, EngineConfig, SamplingParams, SpeechRequest, SpeechResult
from declaim.engine.models.zonos import ZonosModel
from declaim.engine.vocoder.base import Vocoder, Wake
from declaim.engine.vocoder.inline import InlineVocoder
from declaim.engine.vocoder.ray_pool import RayPoolOptions, RayVocoderPool
from tests.zonos_checkpoints import CONFIGS, codec_recipe, load_dac, load_zonos, make_zonos

NUM_ROUNDS = 3
# As many as the reference speaks in one.
PHONEMES_OF_A_SECOND = "həlˈoʊ nˈʌmbɚ {} "

# Of "half". Few layers, and the real proportions of what a step reads and computes: weights that do not fit a core's
# caches, as the real ones do not fit a GPU's; an MLP four times as wide, four heads to a KV head, three Mamba-2 layers
# to one of attention; and states that are 2 % of their layer's weights, as 64 x 64 x 128 numbers are of 25.8 M (with
# the real d_state it would be 4 %).
SIZES = {
    "transformer": {"n_layer": 3, "attn_layer_idx": [0, 1, 2]},
    "hybrid": {
        "n_layer": 4,
        "attn_layer_idx": [0],
        "ssm_cfg": {"layer": "Mamba2", "d_state": 64, "headdim": 64},
    },
}
WIDTH = {"d_model": 1024, "attn_mlp_d_intermediate": 4096}
HEADS = {"num_heads": 16, "num_heads_kv": 4, "rotary_emb_dim": 64}
# The real DAC does a quarter as many multiplications as the model, and so does "tiny"'s; that of "half" 1.5 %, for
# layers as thin as these do theirs several times as slowly.
CODEC_CHANNELS = {"tiny": 32, "half": 64}


def make_model(folder: Path, family: str, *, size: str) -> Path:
    """The folder of a family's model, with its codec."""
    config = copy.deepcopy(CONFIGS[family])
    if size == "half":
        config["backbone"].update(WIDTH | SIZES[family])
        config["backbone"]["attn_cfg"].update(HEADS)
    return make_zonos(folder, config, codec_channels=CODEC_CHANNELS[size])


def make_vocoder(name: str, folder: Path, model: ZonosModel, wake: Wake) -> Vocoder:
    """Silence, the model's codec in this process, or in one worker."""
    if name == "silent":
        return SilentVocoder(model.spec.codec.hop, wake=wake)
    if name == "inline":
        return InlineVocoder(load_dac(folder), wake=wake)
    return RayVocoderPool(codec_recipe(folder), RayPoolOptions(max_workers=1), wake=wake)


def make_requests(count: int, *, seconds: float) -> list[SpeechRequest]:
    return [
        SpeechRequest(
            "".join(PHONEMES_OF_A_SECOND.format(i + second) for second in range(max(1, round(seconds)))),
            sampling=SamplingParams(seed=i, max_seconds=seconds),
            normalize=False,
        )
        for i in range(count)
    ]


def resident_mb() -> float:
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * 4096 / 1e6


def timed(work: Callable[[], list[SpeechResult]]) -> tuple[list[SpeechResult], float, float]:
    """What it gave, and seconds on the wall and of the process."""
    began, cpu_began = time.perf_counter(), time.process_time()
    results = work()
    return results, time.perf_counter() - began, time.process_time() - cpu_began


def measure(engine: Engine, requests: list[SpeechRequest]) -> dict[str, object]:
    """The rounds of one engine. Raises: AssertionError where one way gives other codes or samples than the other."""
    alone: list[SpeechResult] = []
    alone_s, alone_cpu_s = 0.0, 0.0
    together_s: list[float] = []
    together_cpu_s: list[float] = []
    resident: list[float] = []
    engine.generate(requests[:2], progress=False)
    for i in range(NUM_ROUNDS):
        part = requests[i::NUM_ROUNDS]
        results, wall_s, cpu_s = timed(lambda: [engine.generate([r], progress=False)[0] for r in part])  # noqa: B023
        alone += results
        alone_s, alone_cpu_s = alone_s + wall_s, alone_cpu_s + cpu_s
        together, wall_s, cpu_s = timed(lambda: engine.generate(requests, progress=False))
        together_s.append(wall_s)
        together_cpu_s.append(cpu_s)
        resident.append(resident_mb())
        for one, other in zip(results, together[i::NUM_ROUNDS], strict=True):
            np.testing.assert_array_equal(one.codes, other.codes)
            np.testing.assert_array_equal(one.audio, other.audio)
    return {
        "audio_s": sum(result.duration_s for result in alone),
        "one_by_one_s": alone_s,
        "one_by_one_cpu_s": alone_cpu_s,
        "together_s": together_s,
        "together_cpu_s": together_cpu_s,
        "ratio": alone_s / statistics.median(together_s),
        "cpu_ratio": alone_cpu_s / statistics.median(together_cpu_s),
        "resident_mb": resident,
        "swing_mb": max(resident[1:]) - min(resident[1:]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", nargs="+", choices=tuple(SIZES), default=list(SIZES))
    parser.add_argument("--size", nargs="+", choices=tuple(CODEC_CHANNELS), default=list(CODEC_CHANNELS))
    parser.add_argument("--vocoder", nargs="+", choices=("silent", "inline", "ray"), default=["silent", "ray"])
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=1.0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    document = machine.begin(
        f"Zonos: {arguments.requests} requests together or one by one; is memory flat?", vars(arguments)
    )
    requests = make_requests(arguments.requests, seconds=arguments.seconds)
    engine_config = EngineConfig(device="cpu", max_batch=arguments.requests, num_threads=1, memory_gb=4).resolve()
    trials: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as name:
        for size, family in itertools.product(arguments.size, arguments.family):
            folder = make_model(Path(name) / f"{family}-{size}", family, size=size)
            model = load_zonos(folder)
            for vocoder in arguments.vocoder:
                with Engine(
                    model,
                    engine_config,
                    make_vocoder=lambda wake: make_vocoder(vocoder, folder, model, wake),  # noqa: B023
                    model_name="zonos",
                ) as engine:
                    trials.append({"family": family, "size": size, "vocoder": vocoder} | measure(engine, requests))
    machine.print_table(
        f"{arguments.requests} requests of {arguments.seconds:g} s",
        ("family, size, vocoder", "one by one s", "together s", "times as fast", "of the process", "memory's swing MB"),
        [
            (
                f"{trial['family']}, {trial['size']}, {trial['vocoder']}",
                trial["one_by_one_s"],
                statistics.median(trial["together_s"]),  # type: ignore[arg-type]
                trial["ratio"],
                trial["cpu_ratio"],
                trial["swing_mb"],
            )
            for trial in trials
        ],
    )
    machine.end(document, {"trials": trials})


if __name__ == "__main__":
    main()
