"""How often does the same seed give other codes, because of what ran beside it or because it was preempted?

Method.
(a) The embedded voice and a small random Dia (guidance on, paged cross-attention), float32 on the CPU: every request
is made alone; then in groups of 2, 3, 5, 16 and 32; then all at once in an engine whose KV cache holds two of the
longest, so that sequences are preempted and computed again. Every code drawn is compared with the one drawn alone.
(b) The same in bfloat16.
(c) Where differences would come from: the dense layers of the embedded voice and of vs_transformers.py's Dia, 1 to 32
random rows, by F.linear over a weight [out, in], by a plain product with a weight [in, out], and by kernels/linear.py.
Every row is compared bit for bit with itself computed alone, and with itself among 16. The weights' values do not
matter to the order in which a row is summed, so random ones stand for the model's.
"Draws" are codes: one a frame and codebook. A request whose first different code changes what follows counts all of it.

    python benchmarks/determinism.py [--requests N] [--threads N] [--quick]
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import machine
import numpy as np
import random_dia
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from texts import SENTENCES

from declaim.engine import Engine, EngineConfig, SamplingParams, SpeechRequest, SpeechResult
from declaim.kernels.linear import linear, pack_linear

QUESTION = "How often the same seed gives different codes: alone, in batches, after preemption"
GROUP_SIZES = (2, 3, 5, 16, 32)
BLOCK_SIZE = 8
LONGEST_HELD = 2
MAX_ROWS = 32
ALONE, AMONG = 1, 16

DTypeName = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Trial:
    """One model and dtype under one condition, against every request alone."""

    model: str
    dtype: str
    condition: str
    requests: int
    draws: int
    different_requests: int
    different_draws: int
    preemptions: int
    draws_per_step: float  # sequences that drew in a step, on average: how full the batches were


@dataclass(frozen=True)
class RowTrial:
    """One dense layer by one method: does a row keep its bits whatever the number of rows?"""

    layer: str
    dtype: str
    method: str
    unlike_alone: str  # numbers of rows at which some element differs from its row computed alone
    unlike_16: str  # the same against the row among 16
    different_percent: float  # of all elements, at the worst number of rows
    max_abs: float


def _trials(model: str, name: str, requests: Sequence[SpeechRequest], *, dtype: DTypeName) -> list[Trial]:
    config = EngineConfig(dtype=dtype, device="cpu", max_batch=max(GROUP_SIZES), block_size=BLOCK_SIZE)
    trials: list[Trial] = []
    with Engine.from_pretrained(model, config) as engine:
        codec, rule = engine.spec.codec, engine.spec.rule
        num_branches = 2 if engine.spec.sampling.has_guidance else 1
        alone = [_speak(engine, [request])[0] for request in requests]
        for size in (size for size in GROUP_SIZES if size <= len(requests)):
            groups = [requests[i : i + size] for i in range(0, len(requests), size)]
            trials.append(_trial(engine, groups, alone, named=(name, dtype, f"groups of {size}")))
    longest_s = max(request.sampling.max_seconds or 0.0 for request in requests)
    num_positions = int(longest_s * codec.frame_rate_hz) + rule.num_drain_rows + 1
    num_blocks = LONGEST_HELD * num_branches * -(-num_positions // BLOCK_SIZE)
    with Engine.from_pretrained(model, dataclasses.replace(config, num_blocks=num_blocks)) as engine:
        trial = _trial(engine, [requests], alone, named=(name, dtype, f"all, {num_blocks} blocks"))
    if not trial.preemptions:
        raise RuntimeError(f"{num_blocks} blocks were enough for {len(requests)} requests: nothing was preempted")
    return [*trials, trial]


def _trial(
    engine: Engine, groups: Sequence[Sequence[SpeechRequest]], alone: list[SpeechResult], *, named: tuple[str, str, str]
) -> Trial:
    before = engine.stats()
    results = [result for group in groups for result in _speak(engine, group)]
    after = engine.stats()
    different = [_num_different(result.codes, other.codes) for result, other in zip(results, alone, strict=True)]
    model, dtype, condition = named
    return Trial(
        model=model,
        dtype=dtype,
        condition=condition,
        requests=len(results),
        draws=sum(result.codes.size for result in results),
        different_requests=sum(count > 0 for count in different),
        different_draws=sum(different),
        preemptions=after.preemptions - before.preemptions,
        draws_per_step=(after.frames - before.frames) / (after.steps - before.steps),
    )


def _speak(engine: Engine, requests: Sequence[SpeechRequest]) -> list[SpeechResult]:
    results = engine.generate(requests, progress=False)
    for result in results:
        if result.error is not None:
            raise result.error
    return results


def _num_different(codes: NDArray[np.int32], others: NDArray[np.int32]) -> int:
    """Codes that differ; those that only one of the two has differ too."""
    shared = min(len(codes), len(others))
    beyond = abs(len(codes) - len(others)) * int(codes.shape[1])
    return int((codes[:shared] != others[:shared]).sum()) + beyond


def _requests(count: int, *, max_seconds: float, tag: str) -> list[SpeechRequest]:
    """Sampled, each with a seed of its own, at lengths between half of max_seconds and the whole."""
    return [
        SpeechRequest(
            tag + SENTENCES[i % len(SENTENCES)],
            sampling=SamplingParams(seed=i, max_seconds=max_seconds * (0.5 + 0.5 * (i * 5 % 7) / 6)),
        )
        for i in range(count)
    ]


def _row_trials(layers: dict[str, tuple[int, int]], dtype: torch.dtype) -> list[RowTrial]:
    """layers: (out, in) by name."""
    trials = []
    for name, (num_out, num_in) in layers.items():
        generator = torch.Generator().manual_seed(0)
        weight = (torch.randn(num_out, num_in, generator=generator) / num_in**0.5).to(dtype)
        x = torch.randn(MAX_ROWS, num_in, generator=generator).to(dtype)
        packed = pack_linear(weight)
        methods: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
            "F.linear, [out, in]": functools.partial(F.linear, weight=weight),
            "product, [in, out]": functools.partial(torch.mm, mat2=weight.t().contiguous()),
            "kernels/linear.py": functools.partial(linear, layer=packed),
        }
        label = f"{name} ({num_out}, {num_in})"
        trials += [
            _row_trial(x, method, named=(label, str(dtype).removeprefix("torch."), method_name))
            for method_name, method in methods.items()
        ]
    return trials


def _row_trial(
    x: torch.Tensor, method: Callable[[torch.Tensor], torch.Tensor], *, named: tuple[str, str, str]
) -> RowTrial:
    references = [torch.cat([method(part) for part in torch.split(x, count)]) for count in (ALONE, AMONG)]
    changed: list[list[int]] = [[], []]
    worst, max_abs = 0.0, 0.0
    for num_rows in range(1, MAX_ROWS + 1):
        rows = method(x[:num_rows])
        for counts, whole in zip(changed, references, strict=True):
            reference = whole[:num_rows]
            share = float((rows != reference).double().mean())
            if share:
                counts.append(num_rows)
                worst = max(worst, 100 * share)
                max_abs = max(max_abs, float((rows.double() - reference.double()).abs().max()))
    layer, dtype, method_name = named
    return RowTrial(layer, dtype, method_name, _ranges(changed[0]), _ranges(changed[1]), worst, max_abs)


def _ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers as "1, 4-7"; "none" if there are none."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], number]
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs) or "none"


def _layers() -> dict[str, tuple[int, int]]:
    """The decoders' dense layers, (out, in)."""
    dia = random_dia.MEDIUM
    q_size, kv_size = dia.heads * dia.head_dim, dia.kv_heads * dia.head_dim
    return {
        "lark qkv": (448, 320),
        "lark out": (320, 320),
        "lark gate_up": (1920, 320),
        "lark down": (320, 960),
        "lark head": (8192, 320),
        "dia qkv": (q_size + 2 * kv_size, dia.hidden),
        "dia gate_up": (2 * dia.ffn, dia.hidden),
        "dia down": (dia.hidden, dia.ffn),
        "dia head": (len(random_dia.DELAY) * 1028, dia.hidden),
    }


def _print_trials(trials: Sequence[Trial]) -> None:
    machine.print_table(
        "codes against the same request alone",
        ("model", "dtype", "condition", "requests", "differ", "draws", "differ", "preemptions", "draws a step"),
        [
            (
                t.model,
                t.dtype,
                t.condition,
                t.requests,
                t.different_requests,
                t.draws,
                t.different_draws,
                t.preemptions,
                t.draws_per_step,
            )
            for t in trials
        ],
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=QUESTION)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--max-seconds", type=float, default=3.0, help="the longest request")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true", help="five requests of up to 0.3 seconds, and two layers")
    return parser.parse_args()


def main() -> None:
    args = _arguments()
    torch.set_num_threads(args.threads)
    num_requests, max_seconds = (5, 0.3) if args.quick else (args.requests, args.max_seconds)
    document = machine.begin(QUESTION, vars(args) | {"requests": num_requests, "max_seconds": max_seconds})
    trials: list[Trial] = []
    dtypes: tuple[DTypeName, ...] = ("float32", "bfloat16")
    with tempfile.TemporaryDirectory(prefix="declaim-dia-") as folder:
        random_dia.save_dia(Path(folder), random_dia.TINY, scale=0.15)
        lark = _requests(num_requests, max_seconds=max_seconds, tag="")
        dia = _requests(num_requests, max_seconds=max_seconds, tag="[S1] ")
        for dtype in dtypes:
            trials += _trials("lark", "lark", lark, dtype=dtype)
            trials += _trials(folder, "dia, random", dia, dtype=dtype)
    _print_trials(trials)
    layers = _layers()
    if args.quick:
        layers = {name: layers[name] for name in ("lark out", "dia down")}
    rows = [trial for dtype in (torch.float32, torch.bfloat16) for trial in _row_trials(layers, dtype)]
    machine.print_table(
        f"rows of a dense layer, 1 to {MAX_ROWS} at a time",
        ("layer (out, in)", "dtype", "by", "rows unlike alone", "unlike among 16", "worst %", "max abs"),
        [dataclasses.astuple(row) for row in rows],
    )
    codes = [dataclasses.asdict(trial) for trial in trials]
    machine.end(document, {"codes": codes, "rows": [dataclasses.asdict(row) for row in rows]})


if __name__ == "__main__":
    main()
