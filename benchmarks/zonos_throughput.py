"""How much faster Zonos speaks 16 requests together than one after the other, and whether memory stays where it was.

    python -m benchmarks.zonos_throughput [--family hybrid] [--size tiny] [--vocoder ray] [--requests 16] [--seconds 1]

Two sizes: "half", whose step reads and computes in the proportions of the real model, and "tiny", the model of the
tests, whose weights a core's caches hold. Random weights in the published layout, the nine codebooks and the real
guidance, on the CPU with one thread; --vocoder ray, which is what is served by default, decodes in a worker that has
another. Both ways run the same requests, with the same texts and seeds, through the same engine from text to audio, and
give the same codes and samples, which is checked. Also in seconds of this process, which neighbours on the machine
disturb less; with Ray they leave out its worker's.
Memory: the process' resident set after each of three rounds, the first one apart. The last line is JSON.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from benchmarks import machine
from declaim.engine import Engine, EngineConfig, SamplingParams, SpeechRequest, SpeechResult
from declaim.engine.vocoder.base import Vocoder, Wake
from declaim.engine.vocoder.inline import InlineVocoder
from declaim.engine.vocoder.ray_pool import RayPoolOptions, RayVocoderPool
from tests.zonos_checkpoints import CONFIGS, codec_recipe, load_dac, load_zonos, make_zonos

# "half": half the real width, few layers, and the real proportions of what a step reads and computes: weights that do
# not fit a core's caches, as the real ones do not fit a GPU's; an MLP four times as wide, four heads to a KV head,
# three Mamba-2 layers to one of attention; and states that are 2 % of their layer's weights, as 64 x 64 x 128 numbers
# are of 25.8 M (with the real d_state it would be 4 %). The codec is DAC with 64 channels: 1.5 % of the model's
# multiplications. The real one does a quarter as many as the model; layers as thin as these do theirs several times
# as slowly. Each text has as many phonemes as the reference speaks in the second of audio that it gets.
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


def make_model(folder: Path, family: str, *, size: str) -> Path:
    """The folder of a family's model, with its codec."""
    config = copy.deepcopy(CONFIGS[family])
    if size == "half":
        config["backbone"].update(WIDTH | SIZES[family])
        config["backbone"]["attn_cfg"].update(HEADS)
    return make_zonos(folder, config)


def make_vocoder(name: str, folder: Path, wake: Wake) -> Vocoder:
    """The model's codec in this process, or in one worker."""
    if name == "inline":
        return InlineVocoder(load_dac(folder), wake=wake)
    return RayVocoderPool(codec_recipe(folder), RayPoolOptions(max_workers=1), wake=wake)


def resident_mb() -> float:
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * 4096 / 1e6


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds on the wall, and of the process."""
    began, cpu_began = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - began, time.process_time() - cpu_began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=tuple(SIZES), default="transformer")
    parser.add_argument("--size", choices=("half", "tiny"), default="half")
    parser.add_argument("--vocoder", choices=("inline", "ray"), default="inline")
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=1.0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    document = machine.begin(
        f"Zonos: {arguments.requests} requests together or one by one; is memory flat?", vars(arguments)
    )
    requests = [
        SpeechRequest(
            f"həlˈoʊ nˈʌmbɚ {i}",
            sampling=SamplingParams(seed=i, max_seconds=arguments.seconds),
            normalize=False,
        )
        for i in range(arguments.requests)
    ]
    with tempfile.TemporaryDirectory() as name:
        folder = make_model(Path(name) / "zonos", arguments.family, size=arguments.size)
        engine_config = EngineConfig(device="cpu", max_batch=arguments.requests, num_threads=1, memory_gb=4)
        with Engine(
            load_zonos(folder),
            engine_config.resolve(),
            make_vocoder=lambda wake: make_vocoder(arguments.vocoder, folder, wake),
            model_name="zonos",
        ) as engine:
            engine.generate(requests[:2], progress=False)
            alone: list[SpeechResult] = []
            one_by_one = timed(lambda: alone.extend(engine.generate([r], progress=False)[0] for r in requests))
            rounds: list[tuple[float, float]] = []
            resident: list[float] = []
            together: list[SpeechResult] = []
            for _ in range(3):
                together.clear()
                rounds.append(timed(lambda: together.extend(engine.generate(requests, progress=False))))
                resident.append(resident_mb())
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_array_equal(one.codes, other.codes)
        np.testing.assert_array_equal(one.audio, other.audio)
    audio_s = sum(result.duration_s for result in alone)
    median = [float(np.median(kind)) for kind in zip(*rounds, strict=True)]
    ratios = [alone_s / together_s for alone_s, together_s in zip(one_by_one, median, strict=True)]
    swing_mb = max(resident[1:]) - min(resident[1:])
    machine.print_table(
        f"{audio_s:.1f} s of audio",
        ("seconds", "one by one", "together (median of 3)", "times as fast"),
        [
            (name, f"{alone_s:.1f}", f"{together_s:.1f}", f"{ratio:.1f}")
            for name, alone_s, together_s, ratio in zip(
                ("on the wall", "of the process"), one_by_one, median, ratios, strict=True
            )
        ],
    )
    print(f"resident memory: {swing_mb:.1f} MB between the second round and the third")
    machine.end(
        document,
        {
            "audio_s": audio_s,
            "one_by_one_s": one_by_one[0],
            "one_by_one_cpu_s": one_by_one[1],
            "together_s": [wall_s for wall_s, _ in rounds],
            "together_cpu_s": [cpu_s for _, cpu_s in rounds],
            "ratio": ratios[0],
            "cpu_ratio": ratios[1],
            "resident_mb": resident,
            "swing_mb": swing_mb,
        },
    )


if __name__ == "__main__":
    main()
