"""Is the GPU path right, and how near does it come to what the card can do?

Method. One command on a machine with a CUDA card, torch, triton, transformers, numpy and safetensors, no network, in
under ten minutes; every section prints as it goes, the last line is all of it as JSON. A section that fails is said to
have failed, the others go on, and the exit status is 1.
- ceilings: a 2 GiB copy (bytes read plus written), and a bfloat16 matrix product through cuBLAS.
- kernels: every kernel against its float32 or float64 reference on fresh random inputs, outputs poisoned, in float16
  and bfloat16; run twice for equal bits; rows computed in another batch for equal bits.
- engine: a tiny Dia in float32: greedy codes of the graph engine, of the eager engine and of transformers on the card;
  ragged lengths, preemption, so that graphs replay with changing lengths.
- attention, products: graphs of 20 calls on rotating buffers larger than the L2 cache, median of 30 replays.
- step: a Dia of the size of Dia-1.6B, random weights, guidance: one replay of the decode step at some batch sizes in
  bfloat16 and int4, against its byte floor (weights and KV read once, at the measured bandwidth); the engine as a whole
  (audio seconds per second, how much of the time the card waits for the CPU); transformers' generate on the same card.

    python benchmarks/gpu.py [--only SECTION ...] [--quick] [--batches 1 4 16 64 128]
    TRITON_INTERPRET=1 python benchmarks/gpu.py --quick     # no card: does every line run?
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import random_dia
import torch
import torch.nn.functional as F
from random_dia import DiaSize, quiet_transformers
from texts import text_of_length

from declaim.engine import Engine, EngineConfig, SamplingParams, SpeechRequest
from declaim.engine.graphs import GraphRunner
from declaim.engine.loader import find_model, load_model
from declaim.engine.vocoder.base import DecodedWindow, Wake, Window
from declaim.kernels import activation, attention, backend, codebooks, int4, matmul, norm, rope
from declaim.kernels.kv_cache import allocate_cache, write_cache

# Dia-1.6B's own sizes.
LARGE = DiaSize(
    layers=18,
    hidden=2048,
    heads=16,
    kv_heads=4,
    cross_heads=16,
    head_dim=128,
    ffn=8192,
    encoder_layers=12,
    encoder_hidden=1024,
    encoder_heads=16,
    encoder_ffn=4096,
    max_positions=3072,
)
ATTENTION_SHAPES = ((16, 4, 128), (16, 16, 128), (8, 2, 64))  # heads, KV heads, head dim
PRODUCT_SHAPES = ((2048, 3072), (2048, 2048), (2048, 16384), (8192, 2048), (1024, 1024))  # in, out
GUIDANCE, TOP_K = 3.0, 45
STEP_CONTEXT, TEXT_LEN, SPOKEN_FRAMES = 500, 128, 430
REPLAYS, CALLS = 30, 20
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2, torch.float32: 2e-5}

# Without a card the script runs, meaninglessly, under Triton's interpreter: a rehearsal (--quick).
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

Section = Callable[[argparse.Namespace, dict[str, Any]], dict[str, Any]]


@dataclass
class Failures:
    """What was wrong, in words."""

    messages: list[str] = field(default_factory=list)

    def check(self, name: str, ok: bool, said: str) -> None:
        print(f"  {'ok  ' if ok else 'FAIL'} {name}: {said}", flush=True)
        if not ok:
            self.messages.append(f"{name}: {said}")


def ceilings(args: argparse.Namespace, found: dict[str, Any]) -> dict[str, Any]:
    """Bytes a second and operations a second, measured."""
    source = torch.randn(1 << (20 if args.quick else 28), device=DEVICE)
    target = torch.empty_like(source)
    copy_s = _median_s(lambda: target.copy_(source))
    size = 256 if args.quick else 8192
    a = torch.randn(size, size, device=DEVICE, dtype=torch.bfloat16)
    product_s = _median_s(lambda: a @ a)
    result = {
        "copy_gb_per_s": 2 * source.numel() * 4 / copy_s / 1e9,
        "bfloat16_tflops": 2 * size**3 / product_s / 1e12,
    }
    print(
        f"  copy {result['copy_gb_per_s']:.0f} GB/s, bfloat16 product {result['bfloat16_tflops']:.0f} TFLOP/s",
        flush=True,
    )
    return result


def kernels(args: argparse.Namespace, found: dict[str, Any]) -> dict[str, Any]:
    """Every kernel against its reference."""
    failures = Failures()
    for dtype in (torch.float16, torch.bfloat16):
        torch.manual_seed(int(time.time()))
        name = str(dtype).removeprefix("torch.")
        _check_attention(dtype, name, failures, shapes=((4, 2, 32),) if args.quick else ATTENTION_SHAPES)
        _check_products(dtype, name, failures, shapes=((256, 128),) if args.quick else PRODUCT_SHAPES)
        _check_small(dtype, name, failures)
    if failures.messages:
        raise RuntimeError("; ".join(failures.messages))
    return {"all": "ok"}


def _check_attention(
    dtype: torch.dtype, name: str, failures: Failures, *, shapes: Sequence[tuple[int, int, int]]
) -> None:
    for heads, kv_heads, head_dim in shapes:
        lens = [0, 1, 31, 32, 33, 255, 256, 257, 700, 1025]
        q, k_cache, v_cache, tables = _paged(lens, heads, kv_heads, head_dim=head_dim, dtype=dtype)
        plan = _plan(tables, lens)
        out = attention.paged_attention(q, k_cache, v_cache, plan, scale=head_dim**-0.5)
        wanted = attention.paged_attention_reference(q, k_cache, v_cache, plan, scale=head_dim**-0.5)
        again = attention.paged_attention(q, k_cache, v_cache, plan, scale=head_dim**-0.5)
        one = [lens.index(700)]
        alone = attention.paged_attention(
            q[one], k_cache, v_cache, _plan([tables[i] for i in one], [700]), scale=head_dim**-0.5
        )
        label = f"attention {heads}/{kv_heads}x{head_dim} {name}"
        _compare(label, out, wanted, dtype, failures)
        failures.check(f"{label}, twice", torch.equal(out, again), "same bits")
        failures.check(f"{label}, alone", torch.equal(out[one], alone), "same bits as in a batch")
        counts = [1, 7, 33, 90]
        total = [40, 7, 300, 600]
        q, k_cache, v_cache, tables = _paged(total, heads, kv_heads, head_dim=head_dim, dtype=dtype, counts=counts)
        plan = attention.plan_attention(
            tables, counts, context_lens=total, block_size=32, causal=True, device=torch.device(DEVICE)
        )
        out = attention.paged_attention(q, k_cache, v_cache, plan, scale=head_dim**-0.5)
        wanted = attention.paged_attention_reference(q, k_cache, v_cache, plan, scale=head_dim**-0.5)
        _compare(f"{label}, prefill", out, wanted, dtype, failures)
        last = attention.paged_attention(q[-1:], k_cache, v_cache, _plan(tables[-1:], [600]), scale=head_dim**-0.5)
        failures.check(f"{label}, prefill", torch.equal(last[0], out[-1]), "same bits as decoded")


def _check_products(dtype: torch.dtype, name: str, failures: Failures, *, shapes: Sequence[tuple[int, int]]) -> None:
    for num_in, num_out in shapes:
        weight = torch.randn(num_out, num_in, device=DEVICE) / math.sqrt(num_in)
        dense, packed = weight.t().contiguous().to(dtype), int4.quantize_weight(weight, 128)
        packed = packed.to(dtype=dtype, device=weight.device)
        x = torch.randn(200, num_in, device=DEVICE).to(dtype)
        for kind, product, reference in (
            ("dense", lambda x, w=dense: matmul.matmul(x, w, num_out=w.shape[1]), x.float() @ dense.float()),
            (
                "int4",
                lambda x, w=packed: int4.w4a16_matmul(x, w),
                x.float() @ int4.w4a16_dequantize_reference(packed).float(),
            ),
        ):
            whole = product(x)
            _compare(f"{kind} {num_in}x{num_out} {name}", whole, reference, dtype, failures)
            counts = [1, 2, 15, 16, 17, 32, 33, 64, 128, 129, 200]
            if DEVICE == "cpu":
                # Beyond these int4 is dequantized, and the interpreter sums a dense tile in an order of its own.
                counts = [rows for rows in counts if rows <= int4.DEQUANTIZE_ROWS]
            firsts = [product(x[:rows])[:1] for rows in counts]
            same = all(torch.equal(first, firsts[0]) for first in firsts)
            failures.check(f"{kind} {num_in}x{num_out} {name}, rows", same, f"same bits from 1 to {counts[-1]} rows")


def _check_small(dtype: torch.dtype, name: str, failures: Failures) -> None:
    x, residual = (torch.randn(33, 2048, device=DEVICE).to(dtype) for _ in range(2))
    weight = torch.randn(2048, device=DEVICE).to(dtype)
    _compare(
        f"rms_norm {name}",
        norm.rms_norm(x, weight, eps=1e-5),
        norm.rms_norm_reference(x.float(), weight.float(), eps=1e-5),
        dtype,
        failures,
    )
    normed, summed = norm.add_rms_norm(x, residual, weight, eps=1e-5)
    _compare(
        f"add_rms_norm {name}",
        normed,
        norm.rms_norm_reference(summed.float(), weight.float(), eps=1e-5),
        dtype,
        failures,
    )
    gate_up = torch.randn(33, 2 * 8192, device=DEVICE).to(dtype)
    _compare(
        f"silu_and_mul {name}",
        activation.silu_and_mul(gate_up),
        activation.silu_and_mul_reference(gate_up.float()),
        dtype,
        failures,
    )
    table = torch.randn(9 * 1028, 2048, device=DEVICE).to(dtype)
    codes = torch.randint(0, 1028, (33, 9), device=DEVICE)
    _compare(
        f"codebook_embedding {name}",
        codebooks.codebook_embedding(codes, table, vocab_size=1028),
        codebooks.codebook_embedding_reference(codes, table.float(), vocab_size=1028),
        dtype,
        failures,
    )
    angles = rope.rotary_table(4096, 128, theta=10000.0, device=torch.device(DEVICE))[
        torch.randint(0, 4096, (33,), device=DEVICE)
    ]
    heads = torch.randn(33, 20, 128, device=DEVICE).to(dtype)
    _compare(
        f"rotary {name}",
        rope.apply_rotary(heads, angles),
        rope.apply_rotary_reference(heads.float(), angles),
        dtype,
        failures,
    )


def engine(args: argparse.Namespace, found: dict[str, Any]) -> dict[str, Any]:
    """Greedy codes of three implementations, ragged and with preemption."""
    seconds = (0.02, 0.03) if args.quick else (0.4, 1.1, 0.7, 0.9, 0.5)
    asks = [
        ("[S1] " + text_of_length(30 + 9 * i, skip=i), int(s * random_dia.FRAME_RATE_HZ)) for i, s in enumerate(seconds)
    ]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        random_dia.save_dia(folder, random_dia.TINY, scale=0.15)
        theirs = [_transformers_codes(folder, text, frames) for text, frames in asks]
        shares = {}
        for label, config in (
            ("graphs", EngineConfig(device=DEVICE, dtype="float32", max_batch=4, num_blocks=16)),
            ("eager", EngineConfig(device=DEVICE, dtype="float32", max_batch=4, eager=True)),
        ):
            with Engine.from_pretrained(folder, config) as speaking:
                results = speaking.generate([_request(text, frames) for text, frames in asks], progress=False)
                stats = speaking.stats()
            equal = [
                r.codes.shape == t.shape and bool((r.codes == t).all()) for r, t in zip(results, theirs, strict=True)
            ]
            shares[label] = {"identical_requests": sum(equal), "requests": len(equal), "preemptions": stats.preemptions}
            print(
                f"  {label}: {sum(equal)} of {len(equal)} requests as transformers, {stats.preemptions} preemptions",
                flush=True,
            )
    if any(share["identical_requests"] < share["requests"] for share in shares.values()):
        raise RuntimeError(f"codes differ: {shares}")
    return shares


def attention_speed(args: argparse.Namespace, found: dict[str, Any]) -> dict[str, Any]:
    """Decode attention, part of the measured bandwidth."""
    rows = []
    for heads, kv_heads, head_dim in ((4, 2, 32),) if args.quick else ATTENTION_SHAPES[:2]:
        for batch in (1, 2) if args.quick else (1, 8, 16, 64, 256):
            for context in (128,) if args.quick else (128, 1000, 3000):
                num_bytes = 2 * batch * context * kv_heads * head_dim * 2
                if num_bytes > 8e9:
                    continue
                copies = 2 if args.quick else max(2, min(CALLS, int(2e8 / num_bytes) + 1))
                sets = [
                    _paged([context] * batch, heads, kv_heads, head_dim=head_dim, dtype=torch.bfloat16)
                    for _ in range(copies)
                ]
                plans = [_plan(tables, [context] * batch) for *_, tables in sets]

                def run(i: int, sets: Any = sets, plans: Any = plans, scale: float = head_dim**-0.5) -> object:
                    q, k_cache, v_cache, _ = sets[i % len(sets)]
                    return attention.paged_attention(q, k_cache, v_cache, plans[i % len(sets)], scale=scale)

                us = _graph_us(run)
                share = num_bytes / (us * 1e-6) / 1e9 / found["ceilings"]["copy_gb_per_s"]
                rows.append(
                    {
                        "heads": f"{heads}/{kv_heads}x{head_dim}",
                        "batch": batch,
                        "context": context,
                        "us": us,
                        "of_copy": share,
                    }
                )
                print(
                    f"  {heads}/{kv_heads}x{head_dim} batch {batch:4d} context {context:5d}: {us:8.1f} us,"
                    f" {100 * share:5.1f} % of copy",
                    flush=True,
                )
    return {"rows": rows}


def products_speed(args: argparse.Namespace, found: dict[str, Any]) -> dict[str, Any]:
    """int4 and our dense product against cuBLAS, bfloat16."""
    rows = []
    for num_in, num_out in ((256, 128),) if args.quick else PRODUCT_SHAPES:
        copies = 2 if args.quick else max(2, int(2e8 / (num_in * num_out * 2)) + 1)
        weights = [torch.randn(num_out, num_in, device=DEVICE, dtype=torch.bfloat16) for _ in range(min(copies, CALLS))]
        dense = [weight.t().contiguous() for weight in weights]
        packed = [int4.quantize_weight(w.float(), 128).to(dtype=torch.bfloat16, device=w.device) for w in weights]
        for batch in (1, 16) if args.quick else (1, 2, 4, 8, 16, 32, 64, 128, 256):
            x = torch.randn(batch, num_in, device=DEVICE, dtype=torch.bfloat16)
            us = {
                "cublas": _graph_us(lambda i, x=x, w=weights: F.linear(x, w[i % len(w)])),
                "dense": _graph_us(lambda i, x=x, w=dense, n=num_out: matmul.matmul(x, w[i % len(w)], num_out=n)),
                "int4": _graph_us(lambda i, x=x, w=packed: int4.w4a16_matmul(x, w[i % len(w)])),
            }
            rows.append({"in": num_in, "out": num_out, "rows": batch, **us})
            print(
                f"  {num_in:5d} -> {num_out:5d}, {batch:3d} rows: cuBLAS {us['cublas']:7.1f} us,"
                f" dense {us['cublas'] / us['dense']:.2f} x, int4 {us['cublas'] / us['int4']:.2f} x",
                flush=True,
            )
    return {"rows": rows}


def step(args: argparse.Namespace, found: dict[str, Any]) -> dict[str, Any]:
    """Dia-1.6B's size: the replayed step, the engine around it, and transformers."""
    size, frames = (random_dia.TINY, 1) if args.quick else (LARGE, SPOKEN_FRAMES)
    result: dict[str, Any] = {"precisions": {}}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        begin = time.perf_counter()
        random_dia.save_dia(folder, size, scale=0.02)
        print(f"  saved a random model in {time.perf_counter() - begin:.1f} s", flush=True)
        for dtype in ("bfloat16", "int4"):
            result["precisions"][dtype] = _steps(
                folder, size, args.batches, dtype=dtype, copy_gb_per_s=found["ceilings"]["copy_gb_per_s"], frames=frames
            )
        result["transformers"] = _transformers_speed(folder, [b for b in (1, 64) if b <= max(args.batches)])
    for batch, theirs in result["transformers"].items():
        ours = result["precisions"]["bfloat16"]["engine"][batch]["audio_s_per_s"]
        print(f"  {batch} requests: {ours / theirs:.1f} x transformers", flush=True)
    return result


def _steps(
    folder: Path, size: DiaSize, batches: Sequence[int], *, dtype: Any, copy_gb_per_s: float, frames: int
) -> dict[str, Any]:
    config = EngineConfig(device=DEVICE, dtype=dtype, max_batch=max(batches)).resolve()
    files = find_model(str(folder))
    begin = time.perf_counter()
    model, codec, _ = load_model(files, config)
    speaking = Engine(model, config, make_vocoder=lambda wake: _Silence(codec.spec.hop, wake=wake), model_name="dia")
    print(
        f"  {dtype}: loaded and captured in {time.perf_counter() - begin:.1f} s, {model.weight_bytes / 1e9:.2f} GB",
        flush=True,
    )
    replays, engines = {}, {}
    with speaking:
        runner = speaking._runner
        assert isinstance(runner, GraphRunner)
        for batch in batches:
            us = _replay_us(runner, batch)
            floor_us = _floor_bytes(size, batch, dtype=dtype) / copy_gb_per_s / 1e3
            real_time_factor = us * 1e-6 * random_dia.FRAME_RATE_HZ
            replays[batch] = {
                "us": us,
                "floor_us": floor_us,
                "of_floor": us / floor_us,
                "real_time_factor": real_time_factor,
            }
            print(
                f"  {dtype} {batch:4d} requests: {us:8.0f} us a step, {us / floor_us:.2f} x its byte floor,"
                f" real-time factor {real_time_factor:.3f}",
                flush=True,
            )
        for batch in batches:
            requests = [_request("[S1] " + text_of_length(TEXT_LEN, skip=i), frames) for i in range(batch)]
            before, begin = speaking.stats().steps, time.perf_counter()
            results = speaking.generate(requests, progress=False)
            wall_s, steps = time.perf_counter() - begin, speaking.stats().steps - before
            audio_s = sum(len(r.codes) for r in results) / random_dia.FRAME_RATE_HZ
            idle = 1 - replays[batch]["us"] * 1e-6 * steps / wall_s
            engines[batch] = {"audio_s_per_s": audio_s / wall_s, "step_ms": 1e3 * wall_s / steps, "not_in_replay": idle}
            print(
                f"  {dtype} {batch:4d} requests through the engine: {audio_s / wall_s:7.1f} audio s/s,"
                f" {100 * idle:.1f} % of the time outside replays",
                flush=True,
            )
    return {"replay": replays, "engine": engines}


def _replay_us(runner: GraphRunner, batch: int) -> float:
    """One replay with every sequence at STEP_CONTEXT positions, blocks scattered over the cache."""
    bucket = min(size for size, branches in runner.lanes if size >= batch and branches == 2)
    lanes, seats = runner.lanes[bucket, 2], runner.seats
    num_blocks = runner.num_blocks
    count = min(math.ceil((STEP_CONTEXT + 40 * REPLAYS) / runner.block_size), lanes.tables.shape[1])
    blocks = torch.randint(0, num_blocks, (2 * bucket, count), device=DEVICE, dtype=torch.int32)
    with torch.inference_mode():
        lanes.tables.zero_()[:, :count] = blocks
        lanes.seats.fill_(seats.nobody)
        lanes.seats[:batch] = torch.arange(batch, device=DEVICE)
        seats.pretend(batch, row=STEP_CONTEXT, cross_len=TEXT_LEN)
    return 1e6 * _median_s(lanes.replay)


def _floor_bytes(size: DiaSize, batch: int, *, dtype: str) -> float:
    """Bytes a step must read: the decoder's weights once, K and V of both branches, cross-attention's of one."""
    q, kv, cross = size.heads * size.head_dim, size.kv_heads * size.head_dim, size.cross_heads * size.head_dim
    layer = size.hidden * (q + 2 * kv) + q * size.hidden + 2 * size.hidden * cross + 3 * size.hidden * size.ffn
    bytes_per_weight = 2.0 if dtype == "bfloat16" else 0.5 + 4 / 128
    head = 9 * 1028 * size.hidden * 2
    per_sequence = size.layers * 2 * 2 * (2 * STEP_CONTEXT * kv + TEXT_LEN * cross)
    return size.layers * layer * bytes_per_weight + head + batch * per_sequence


def _transformers_speed(folder: Path, batches: Sequence[int]) -> dict[int, float]:
    """Audio seconds per second of generate(), 86 frames, bfloat16."""
    from transformers import DiaForConditionalGeneration, DiaProcessor

    frames = 86
    with quiet_transformers(), torch.inference_mode():
        model: Any = DiaForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16).to(DEVICE).eval()
        processor: Any = DiaProcessor.from_pretrained(folder)
        speeds = {}
        for batch in batches:
            texts = ["[S1] " + text_of_length(TEXT_LEN, skip=i) for i in range(batch)]
            inputs = processor(text=texts, return_tensors="pt").to(DEVICE)
            model.generate(**inputs, generation_config=_generation(24))
            _synchronize()
            begin = time.perf_counter()
            model.generate(**inputs, generation_config=_generation(frames + random_dia.NUM_DRAIN_ROWS))
            _synchronize()
            speeds[batch] = batch * frames / random_dia.FRAME_RATE_HZ / (time.perf_counter() - begin)
            print(f"  transformers, {batch} requests: {speeds[batch]:.2f} audio s/s", flush=True)
    return speeds


def _transformers_codes(folder: Path, text: str, frames: int) -> np.ndarray[Any, Any]:
    from transformers import DiaForConditionalGeneration, DiaProcessor

    with quiet_transformers(), torch.inference_mode():
        model: Any = DiaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).to(DEVICE).eval()
        processor: Any = DiaProcessor.from_pretrained(folder)
        inputs = processor(text=[text], return_tensors="pt").to(DEVICE)
        grid = (
            model.generate(**inputs, generation_config=_generation(frames + random_dia.NUM_DRAIN_ROWS))[0].cpu().numpy()
        )
    rows = np.arange(frames)
    return np.stack([grid[rows + 1 + delay, q] for q, delay in enumerate(random_dia.DELAY)], axis=1)


def _generation(max_new_tokens: int) -> Any:
    from transformers import GenerationConfig

    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        guidance_scale=GUIDANCE,
        top_k=TOP_K,
        bos_token_id=random_dia.BOS,
        decoder_start_token_id=random_dia.BOS,
        eos_token_id=random_dia.EOS,
        pad_token_id=random_dia.PAD,
    )


def _request(text: str, frames: int) -> SpeechRequest:
    seconds = frames / random_dia.FRAME_RATE_HZ
    sampling = SamplingParams(temperature=0.0, guidance_scale=GUIDANCE, top_k=TOP_K, max_seconds=seconds)
    return SpeechRequest(text, sampling=sampling)


class _Silence:
    """Keeps the vocoder's contract without a codec: the step is what is timed."""

    def __init__(self, hop: int, *, wake: Wake) -> None:
        self._hop, self._wake = hop, wake
        self._windows: list[Window] = []

    def submit(self, windows: Sequence[Window]) -> None:
        self._windows += windows
        self._wake()

    def poll(self) -> list[DecodedWindow]:
        windows, self._windows = self._windows, []
        return [DecodedWindow(w.sequence_id, w.index, np.zeros(w.num_frames * self._hop, np.float32)) for w in windows]

    def cancel(self, sequence_id: int) -> None:
        self._windows = [window for window in self._windows if window.sequence_id != sequence_id]

    @property
    def num_pending(self) -> int:
        return len(self._windows)

    def close(self) -> None:
        self._windows.clear()


def _paged(
    lens: Sequence[int],
    heads: int,
    kv_heads: int,
    *,
    head_dim: int,
    dtype: torch.dtype,
    counts: Sequence[int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[list[int]]]:
    """Queries, caches with NaN wherever nothing was written, and scattered tables."""
    device, block_size = torch.device(DEVICE), 32
    needed = [math.ceil(length / block_size) for length in lens]
    order = torch.randperm(sum(needed) + 3).tolist()
    tables = [[order.pop() for _ in range(count)] for count in needed]
    caches = [
        allocate_cache(
            sum(needed) + 3, kv_heads, block_size=block_size, head_dim=head_dim, dtype=dtype, device=device
        ).fill_(math.nan)
        for _ in range(2)
    ]
    slots = [
        t[p // block_size] * block_size + p % block_size for t, n in zip(tables, lens, strict=True) for p in range(n)
    ]
    k, v = (torch.randn(len(slots), kv_heads, head_dim, device=device).to(dtype) for _ in range(2))
    write_cache(k, v, torch.tensor(slots, device=device), caches[0], caches[1])
    q = torch.randn(sum(counts) if counts else len(lens), heads, head_dim, device=device).to(dtype)
    return q, caches[0], caches[1], tables


def _plan(tables: Sequence[Sequence[int]], lens: Sequence[int]) -> attention.AttentionPlan:
    return attention.plan_attention(
        tables, [1] * len(lens), context_lens=lens, block_size=32, causal=True, device=torch.device(DEVICE)
    )


def _compare(name: str, out: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype, failures: Failures) -> None:
    error = float((out.double() - wanted.double()).abs().max() / wanted.double().abs().max().clamp(min=1e-9))
    failures.check(name, error <= TOLERANCE[dtype], f"largest error {error:.1e} of the largest value")


def _median_s(run: Callable[[], object]) -> float:
    """Median seconds of a call, by events."""
    if DEVICE == "cpu":
        begin_s = time.perf_counter()
        run()
        return time.perf_counter() - begin_s
    for _ in range(5):
        run()
    times = []
    for _ in range(REPLAYS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times)


def _synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def _graph_us(run: Callable[[int], object]) -> float:
    """Median microseconds of one of CALLS calls inside a graph."""
    if DEVICE == "cpu":
        return 1e6 * _median_s(lambda: run(0))
    for i in range(CALLS):
        run(i)
    _synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(CALLS):
            run(i)
    return 1e6 * _median_s(graph.replay) / CALLS


SECTIONS: dict[str, Section] = {
    "ceilings": ceilings,
    "kernels": kernels,
    "engine": engine,
    "attention": attention_speed,
    "products": products_speed,
    "step": step,
}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, help="these sections, and the ceilings")
    parser.add_argument("--quick", action="store_true", help="a tiny model in place of Dia-1.6B's size")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16, 64, 128])
    return parser.parse_args()


def main() -> int:
    args = _arguments()
    if not torch.cuda.is_available() and not (backend.IS_INTERPRETED and args.quick):
        print(f"gpu.py: torch {torch.__version__} sees no CUDA card here, so nothing was measured", file=sys.stderr)
        return 1
    shown = [
        "nvidia-smi",
        "--query-gpu=name,clocks.sm,power.limit,memory.total,driver_version",
        "--format=csv,noheader",
    ]
    card = "no card: a rehearsal in the interpreter, whose numbers mean nothing"
    if DEVICE == "cuda":
        card = subprocess.run(shown, capture_output=True, text=True, check=False).stdout.strip()
    print(f"{card}; torch {torch.__version__}", flush=True)
    found: dict[str, Any] = {"card": card, "torch": torch.__version__}
    failed = False
    for name, section in SECTIONS.items():
        if args.only and name not in args.only and name != "ceilings":
            continue
        print(f"== {name}", flush=True)
        begin = time.perf_counter()
        try:
            found[name] = section(args, found)
        except Exception as error:  # one broken section must not cost the others their minutes on a lent card
            traceback.print_exc()
            found[name] = {"failed": repr(error)}
            failed = True
        print(f"   {time.perf_counter() - begin:.1f} s", flush=True)
    print(json.dumps(found))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
