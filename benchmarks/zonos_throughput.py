"""How much faster Zonos speaks 16 requests together than one after the other, and whether memory stays where it was.

    python -m benchmarks.zonos_throughput [--family hybrid] [--requests 16] [--seconds 0.5]

Random weights of a medium size in the published layout, the nine codebooks and the real guidance, a small DAC, one
process, the CPU, one thread. Both ways run the same requests through the same engine, and give the same codes, which is
checked. Memory: the process' resident set after each of three rounds, the first one apart. The last line is JSON.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks import machine
from declaim.engine import Engine, EngineConfig, SamplingParams, SpeechRequest
from declaim.engine.vocoder.inline import InlineVocoder
from tests.zonos_checkpoints import CONFIGS, load_dac, load_zonos, make_zonos

# A quarter of the real width.
SIZES = {
    "transformer": {"d_model": 512, "attn_mlp_d_intermediate": 2048, "n_layer": 6, "attn_layer_idx": list(range(6))},
    "hybrid": {
        "d_model": 512,
        "attn_mlp_d_intermediate": 2048,
        "n_layer": 8,
        "attn_layer_idx": [0, 4],
        "ssm_cfg": {"layer": "Mamba2", "d_state": 64, "headdim": 64},
    },
}


def resident_mb() -> float:
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * 4096 / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=tuple(SIZES), default="transformer")
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=0.5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    document = machine.begin(
        f"Zonos: {arguments.requests} requests together or one by one; is memory flat?", vars(arguments)
    )
    config = copy.deepcopy(CONFIGS[arguments.family])
    config["backbone"].update(SIZES[arguments.family])
    config["backbone"]["attn_cfg"].update(num_heads=8, num_heads_kv=2, rotary_emb_dim=64)
    requests = [
        SpeechRequest(
            f"həlˈoʊ nˈʌmbɚ {i}",
            sampling=SamplingParams(seed=i, max_seconds=arguments.seconds),
            normalize=False,
        )
        for i in range(arguments.requests)
    ]
    with tempfile.TemporaryDirectory() as name:
        folder = make_zonos(Path(name) / "zonos", config)
        engine_config = EngineConfig(device="cpu", max_batch=arguments.requests, num_threads=1, memory_gb=4)
        with Engine(
            load_zonos(folder),
            engine_config.resolve(),
            make_vocoder=lambda wake: InlineVocoder(load_dac(folder), wake=wake),
            model_name="zonos",
        ) as engine:
            engine.generate(requests[:2], progress=False)
            began = time.perf_counter()
            alone = [engine.generate([request], progress=False)[0] for request in requests]
            alone_s = time.perf_counter() - began
            rounds: list[float] = []
            resident: list[float] = []
            for _ in range(3):
                began = time.perf_counter()
                together = engine.generate(requests, progress=False)
                rounds.append(time.perf_counter() - began)
                resident.append(resident_mb())
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_array_equal(one.codes, other.codes)
    audio_s = sum(result.duration_s for result in alone)
    together_s = float(np.median(rounds))
    ratio, swing_mb = alone_s / together_s, max(resident[1:]) - min(resident[1:])
    machine.print_table(
        f"{audio_s:.1f} s of audio",
        ("one by one", "together (median of 3)", "times as fast", "resident memory, swing"),
        [(f"{alone_s:.1f} s", f"{together_s:.1f} s", f"{ratio:.1f}", f"{swing_mb:.1f} MB")],
    )
    machine.end(
        document,
        {
            "audio_s": audio_s,
            "one_by_one_s": alone_s,
            "together_s": rounds,
            "ratio": ratio,
            "resident_mb": resident,
            "swing_mb": swing_mb,
        },
    )


if __name__ == "__main__":
    main()
