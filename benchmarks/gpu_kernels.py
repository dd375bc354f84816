"""Sections of gpu.py: every kernel against its reference on the card, and how fast the heavy ones are.

Inputs are drawn anew in each run; what a kernel must not read is NaN. Its tolerances are shares of the largest value.
"""

from __future__ import annotations

import math
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from gpu_run import CALLS, DEVICE, L2_BYTES, Run, graph_us, median_s

from declaim.engine.request import ResolvedSampling
from declaim.engine.sampler import DrawInputs, draw, sample_ops
from declaim.engine.spec import (
    AllowedIds,
    EosGate,
    Guidance,
    MinP,
    RepetitionPenalty,
    SamplingDefaults,
    SamplingSpec,
    Temperature,
    TopK,
    TopP,
)
from declaim.kernels import activation, attention, codebooks, int4, kv_cache, mamba, matmul, norm, rope
from declaim.kernels.sample import SampleParams, guided_sample

TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2, torch.float32: 2e-5}
ATTENTION_SHAPES = ((16, 4, 128), (16, 16, 128), (8, 2, 64))  # heads, KV heads, head dim
PRODUCT_SHAPES = ((2048, 3072), (2048, 2048), (2048, 8192), (2048, 16384), (8192, 2048), (1024, 1024))  # in, out
BLOCK_SIZE = 32


@dataclass
class Checks:
    """What was compared, and what was wrong, in words."""

    run: Run
    num_ok: int = 0
    failures: list[str] = field(default_factory=list)

    def check(self, name: str, ok: bool, said: str) -> None:
        self.run.say(f"{'ok  ' if ok else 'FAIL'} {name}: {said}")
        self.num_ok += ok
        if not ok:
            self.failures.append(f"{name}: {said}")
        self.run.put("ok", self.num_ok)
        self.run.put("failures", self.failures)

    def attempt(self, function: Callable[..., None], *arguments: Any) -> None:
        """Make some checks; a kernel that does not even run is a failure among others."""
        try:
            function(*arguments)
        except Exception as error:  # what follows is still worth its seconds on a lent card
            traceback.print_exc()
            self.check(function.__name__.removeprefix("_check_"), False, f"{type(error).__name__}: {error}")

    def near(self, name: str, out: torch.Tensor, wanted: torch.Tensor) -> None:
        """Within the tolerance of `out`'s dtype."""
        error = float((out.double() - wanted.double()).abs().max() / wanted.double().abs().max().clamp(min=1e-9))
        self.check(name, error <= TOLERANCE[out.dtype], f"largest error {error:.1e} of the largest value")

    def same(self, name: str, a: torch.Tensor, b: torch.Tensor, said: str) -> None:
        self.check(name, torch.equal(a, b), said)


def check_float16(run: Run) -> None:
    """Every kernel against its reference, twice, and in another batch; and the draw."""
    checks = Checks(run)
    checks.attempt(_check_sampling, checks)
    _check_kernels(torch.float16, checks)


def check_bfloat16(run: Run) -> None:
    """The same kernels, whose sums are the same and whose roundings are not."""
    _check_kernels(torch.bfloat16, Checks(run))


def _check_kernels(dtype: torch.dtype, checks: Checks) -> None:
    torch.manual_seed(int(time.time()))
    checks.attempt(_check_norms, dtype, checks)
    checks.attempt(_check_rows, dtype, checks)
    checks.attempt(_check_mamba, dtype, checks)
    for shape in ((4, 2, 32),) if checks.run.quick else ATTENTION_SHAPES:
        checks.attempt(_check_attention, dtype, shape, checks)
    for num_in, num_out in ((256, 64),) if checks.run.quick else PRODUCT_SHAPES:
        checks.attempt(_check_products, dtype, num_in, num_out, checks)
    if checks.failures:
        raise RuntimeError("; ".join(checks.failures))


def _check_attention(dtype: torch.dtype, shape: tuple[int, int, int], checks: Checks) -> None:
    heads, kv_heads, head_dim = shape
    scale = head_dim**-0.5
    label = f"attention {heads}/{kv_heads}x{head_dim} {_name(dtype)}"
    longest, lens = (300, [0, 33, 300]) if checks.run.quick else (700, [0, 1, 31, 32, 33, 255, 256, 257, 700, 1025])
    q, k_cache, v_cache, tables = paged(lens, shape, dtype=dtype)
    plan = decode_plan(tables, lens)
    out = attention.paged_attention(q, k_cache, v_cache, plan, scale=scale)
    checks.near(label, out, attention.paged_attention_reference(q, k_cache, v_cache, plan, scale=scale))
    again = attention.paged_attention(q, k_cache, v_cache, plan, scale=scale)
    checks.same(f"{label}, twice", out, again, "same bits")
    one = [lens.index(longest)]
    plan = decode_plan([tables[i] for i in one], [longest])
    alone = attention.paged_attention(q[one], k_cache, v_cache, plan, scale=scale)
    checks.same(f"{label}, alone", out[one], alone, "same bits as in a batch")
    counts, total = ([2, 9], [40, 70]) if checks.run.quick else ([1, 7, 33, 90], [40, 7, 300, 600])
    q, k_cache, v_cache, tables = paged(total, shape, dtype=dtype, counts=counts)
    plan = attention.plan_attention(
        tables, counts, context_lens=total, block_size=BLOCK_SIZE, causal=True, device=torch.device(DEVICE)
    )
    out = attention.paged_attention(q, k_cache, v_cache, plan, scale=scale)
    checks.near(f"{label}, prefill", out, attention.paged_attention_reference(q, k_cache, v_cache, plan, scale=scale))
    last = attention.paged_attention(q[-1:], k_cache, v_cache, decode_plan(tables[-1:], total[-1:]), scale=scale)
    checks.same(f"{label}, prefill", last[0], out[-1], "same bits as decoded")


def _check_products(dtype: torch.dtype, num_in: int, num_out: int, checks: Checks) -> None:
    """Both products, their epilogues, and the bits of a row whatever the batch."""
    counts = [1, 17, 64] if checks.run.quick else [1, 2, 15, 16, 17, 32, 33, 64, 128, 129, 200]
    weight = torch.randn(num_out, num_in, device=DEVICE) / math.sqrt(num_in)
    dense = weight.t().contiguous().to(dtype)
    packed = int4.quantize_weight(weight, 128).to(dtype=dtype, device=weight.device)
    rounded = int4.w4a16_dequantize_reference(packed)
    label = f"{num_in}x{num_out} {_name(dtype)}"
    checks.near(f"dequantize {label}", int4.w4a16_dequantize(packed, dtype=dtype), rounded)
    x = torch.randn(counts[-1], num_in, device=DEVICE).to(dtype)
    residual = torch.randn(counts[-1], num_out, device=DEVICE).to(dtype)
    bias = torch.randn(num_out, device=DEVICE).to(dtype)

    def of_dense(x: torch.Tensor, **epilogue: Any) -> torch.Tensor:
        return matmul.matmul(x, dense, num_out=num_out, **epilogue)

    def of_int4(x: torch.Tensor, **epilogue: Any) -> torch.Tensor:
        return int4.w4a16_matmul(x, packed, **epilogue)

    for kind, product, used in (("dense", of_dense, dense), ("int4", of_int4, rounded)):
        reference = x.float() @ used.float()
        few = slice(0, 5)
        checks.near(f"{kind} {label}", product(x), reference)
        biased = reference[few] + bias.float()
        checks.near(
            f"{kind} {label}, bias and residual",
            product(x[few], bias=bias, residual=residual[few]),
            biased + residual[few].float(),
        )
        gate, up = reference[few].chunk(2, dim=1)
        checks.near(f"{kind} {label}, gated", product(x[few], is_gated=True), F.silu(gate) * up)
        # Beyond these int4 is dequantized, and the interpreter sums a dense tile in an order of its own.
        same = [rows for rows in counts if DEVICE == "cuda" or rows <= int4.DEQUANTIZE_ROWS]
        firsts = [product(x[:rows])[:1] for rows in same]
        is_same = all(torch.equal(first, firsts[0]) for first in firsts)
        checks.check(f"{kind} {label}, rows", is_same, f"same bits from 1 to {same[-1]} rows")


def _check_norms(dtype: torch.dtype, checks: Checks) -> None:
    rows, size, ffn = (5, 256, 512) if checks.run.quick else (33, 2048, 8192)
    name = _name(dtype)
    x, residual = (torch.randn(rows, size, device=DEVICE).to(dtype) for _ in range(2))
    weight, bias = (torch.randn(size, device=DEVICE).to(dtype) for _ in range(2))
    wanted = norm.rms_norm_reference(x.float(), weight.float(), eps=1e-5)
    checks.near(f"rms_norm {name}", norm.rms_norm(x, weight, eps=1e-5), wanted)
    normed, total = norm.add_rms_norm(x, residual, weight, eps=1e-5)
    checks.near(f"add_rms_norm {name}, sum", total, x.float() + residual.float())
    wanted = norm.rms_norm_reference(total.float(), weight.float(), eps=1e-5)
    checks.near(f"add_rms_norm {name}", normed, wanted)
    wanted = norm.layer_norm_reference(x.float(), weight.float(), bias.float(), eps=1e-5)
    checks.near(f"layer_norm {name}", norm.layer_norm(x, weight, bias, eps=1e-5), wanted)
    normed, total = norm.add_layer_norm(x, residual, weight, bias, eps=1e-5)
    wanted = norm.layer_norm_reference(total.float(), weight.float(), bias.float(), eps=1e-5)
    checks.near(f"add_layer_norm {name}", normed, wanted)
    gate_up = torch.randn(rows, 2 * ffn, device=DEVICE).to(dtype)
    wanted = activation.silu_and_mul_reference(gate_up.float())
    checks.near(f"silu_and_mul {name}", activation.silu_and_mul(gate_up), wanted)


def _check_rows(dtype: torch.dtype, checks: Checks) -> None:
    """Embedding, rotation and the cache."""
    rows, size, num_heads, num_kv, dim = (5, 64, 4, 2, 32) if checks.run.quick else (33, 2048, 16, 4, 128)
    name, device = _name(dtype), torch.device(DEVICE)
    table = torch.randn(9 * 1028, size, device=DEVICE).to(dtype)
    codes = torch.randint(0, 1028, (rows, 9), device=DEVICE)
    wanted = codebooks.codebook_embedding_reference(codes, table.float(), vocab_size=1028)
    checks.near(f"codebook_embedding {name}", codebooks.codebook_embedding(codes, table, vocab_size=1028), wanted)
    for interleaved in (False, True):
        angles = rope.rotary_table(4096, dim, theta=10000.0, device=device, interleaved=interleaved)
        angles = angles[torch.randint(0, 4096, (rows,), device=DEVICE)]
        label = f"rotary {'interleaved ' if interleaved else ''}{name}"
        heads = torch.randn(rows, num_heads, dim, device=DEVICE).to(dtype)
        wanted = rope.apply_rotary_reference(heads.float(), angles, interleaved=interleaved)
        checks.near(label, rope.apply_rotary(heads, angles, interleaved=interleaved), wanted)
        qkv = torch.randn(rows, (num_heads + 2 * num_kv) * dim, device=DEVICE).to(dtype)
        slots = torch.randperm(3 * BLOCK_SIZE, device=DEVICE)[:rows]
        slots[0] = -1
        shape = {"block_size": BLOCK_SIZE, "head_dim": dim, "dtype": dtype, "device": device}
        caches = [kv_cache.allocate_cache(3, num_kv, **shape).fill_(7.0) for _ in range(2)]
        queries = rope.rotary_and_cache(
            qkv, angles, slots, *caches, num_heads=num_heads, num_kv_heads=num_kv, head_dim=dim, interleaved=interleaved
        )
        split = qkv.view(rows, -1, dim)
        rotated = rope.apply_rotary_reference(split[:, : num_heads + num_kv].float(), angles, interleaved=interleaved)
        checks.near(f"{label} and cache, queries", queries, rotated[:, :num_heads])
        wanted_caches = [torch.full_like(cache, 7.0, dtype=torch.float32) for cache in caches]
        kv_cache.write_cache_reference(
            rotated[:, num_heads:], split[:, num_heads + num_kv :].float(), slots, *wanted_caches
        )
        checks.near(f"{label} and cache, keys", caches[0], wanted_caches[0])
        checks.same(
            f"{label} and cache, values", caches[1].float(), wanted_caches[1], "copied, and nothing else written"
        )


def _check_mamba(dtype: torch.dtype, checks: Checks) -> None:
    heads, head_dim, size = (2, 16, 16) if checks.run.quick else (64, 64, 128)
    name, inner = _name(dtype), heads * head_dim
    channels, counts, num_slots = inner + 2 * size, [1, 38, 2, 1, 1], 6
    plan = mamba.StatePlan(
        torch.tensor([0, *counts], device=DEVICE).cumsum(0).to(torch.int32),
        torch.tensor([3, 0, 4, -1, 1], device=DEVICE),
        torch.tensor([False, True, False, False, True], device=DEVICE),
        torch.tensor([0, 32, 0, 0, 0], dtype=torch.int32, device=DEVICE),
        has_new=True,
        has_blocks=True,
    )
    x = torch.randn(sum(counts), inner + channels + heads, device=DEVICE).to(dtype)
    z, xbc, dt = x.split([inner, channels, heads], dim=1)
    taps, bias = torch.randn(4, channels, device=DEVICE).to(dtype), torch.randn(channels, device=DEVICE).to(dtype)
    newest = torch.randn(num_slots, 3, channels, device=DEVICE).to(dtype)
    states = [newest.clone() for _ in range(2)]
    mixed = mamba.causal_conv(xbc, taps, bias, states[0], plan)
    wanted = mamba.causal_conv_reference(xbc, taps, bias, states[1], plan)
    checks.near(f"causal_conv {name}", mixed, wanted)
    checks.same(f"causal_conv {name}, state", *states, "the newest inputs, in their own slots alone")
    numbers = (-torch.randn(heads, device=DEVICE).exp(), *(torch.randn(heads, device=DEVICE) for _ in range(2)))
    matrices = torch.randn(num_slots, heads, head_dim, size, device=DEVICE).to(dtype)
    states = [matrices.clone() for _ in range(2)]
    y = mamba.state_scan(wanted, dt, *numbers, states[0], plan)
    wanted_y = mamba.state_scan_reference(wanted, dt, *numbers, states[1], plan)
    checks.near(f"state_scan {name}", y, wanted_y)
    checks.near(f"state_scan {name}, state", *states)
    weight = torch.randn(inner, device=DEVICE).to(dtype)
    checks.near(
        f"gated_rms_norm {name}",
        mamba.gated_rms_norm(wanted_y, z, weight, eps=1e-5),
        mamba.gated_rms_norm_reference(wanted_y, z, weight, eps=1e-5),
    )


def _check_sampling(checks: Checks) -> None:
    """Against engine/sampler.py on the host: the most likely id always, a drawn one but for rounding at a limit."""
    count, eos = (2, 60) if checks.run.quick else (32, 1024)
    num_codebooks, vocab = 9, eos + 1
    for family, spec in _sampling_specs(eos).items():
        for temperature in (0.0, 1.0):
            params = [
                ResolvedSampling(temperature, 45, 0.95, 0.1, 2.0, 3.0, seed, 30.0)
                for seed in torch.randint(0, 1 << 40, (count,)).tolist()
            ]
            inputs = DrawInputs(
                cond=3 * torch.randn(count, num_codebooks, vocab),
                uncond=3 * torch.randn(count, num_codebooks, vocab),
                guided=torch.arange(count),
                params=tuple(params),
                rows=tuple(range(count)),
                history=torch.randint(0, eos, (count, 2, num_codebooks)),
            )
            got, wanted = _draw_on_device(inputs, spec), draw(inputs, spec)
            share = float((got.long() == wanted).float().mean())
            least = 1.0 if temperature == 0 else 0.98
            kind = "greedy" if temperature == 0 else "drawn"
            checks.check(f"guided_sample {family}, {kind}", share >= least, f"{100 * share:.1f} % as on the host")


def _sampling_specs(eos: int) -> dict[str, SamplingSpec]:
    """As the two guided families have them."""
    limits = AllowedIds((eos + 1,) + (eos,) * 8)
    of_dia = (
        Guidance(center="cond", keep="cond", top_k_filter=True),
        Temperature(),
        limits,
        EosGate(eos),
        TopK(),
        TopP(),
    )
    of_zonos = (
        Guidance(center="uncond", keep="guided", top_k_filter=False),
        limits,
        RepetitionPenalty(window=2, compounding=True),
        Temperature(),
        TopP(),
        TopK(),
        MinP(),
    )
    defaults = SamplingDefaults()
    return {"dia": SamplingSpec(ops=of_dia, defaults=defaults), "zonos": SamplingSpec(ops=of_zonos, defaults=defaults)}


def _draw_on_device(inputs: DrawInputs, spec: SamplingSpec) -> torch.Tensor:
    count = len(inputs.params)
    fields = {
        "temperature": torch.float32,
        "top_k": torch.int32,
        "top_p": torch.float32,
        "min_p": torch.float32,
        "repetition_penalty": torch.float32,
        "guidance_scale": torch.float32,
        "seed": torch.int64,
    }
    params = SampleParams(
        **{
            name: torch.tensor([getattr(p, name) for p in inputs.params], dtype=dtype, device=DEVICE)
            for name, dtype in fields.items()
        }
    )
    return guided_sample(
        torch.cat([inputs.cond, inputs.uncond]).to(DEVICE),
        params,
        rows=torch.tensor(inputs.rows, device=DEVICE),
        uncond_rows=count + torch.arange(count, device=DEVICE),
        history=inputs.history.to(DEVICE),
        ops=sample_ops(spec),
    ).cpu()


def measure_ceilings(run: Run) -> None:
    """Bytes a second and operations a second, measured."""
    source = torch.randn(1 << (20 if run.quick else 28), device=DEVICE)
    target = torch.empty_like(source)
    copy_s = median_s(lambda: target.copy_(source))
    size = 256 if run.quick else 8192
    a = torch.randn(size, size, device=DEVICE, dtype=torch.bfloat16)
    product_s = median_s(lambda: a @ a)
    run.put("copy_gb_per_s", 2 * source.numel() * 4 / copy_s / 1e9)
    run.put("bfloat16_tflops", 2 * size**3 / product_s / 1e12)
    run.say(f"copy {run.found['copy_gb_per_s']:.0f} GB/s, bfloat16 product {run.found['bfloat16_tflops']:.0f} TFLOP/s")


def time_attention(run: Run) -> None:
    """Decode attention, as a share of the measured bandwidth."""
    rows: list[dict[str, Any]] = []
    for shape in ((4, 2, 32),) if run.quick else ATTENTION_SHAPES[:2]:
        heads, kv_heads, head_dim = shape
        for batch in (1, 2) if run.quick else (1, 8, 16, 64, 256):
            for context in (64,) if run.quick else (128, 1000, 3000):
                num_bytes = 2 * batch * context * kv_heads * head_dim * 2
                if num_bytes > 8e9:
                    continue
                copies = 1 if run.quick else max(2, min(CALLS, int(L2_BYTES / num_bytes) + 1))
                sets = [paged([context] * batch, shape, dtype=torch.bfloat16) for _ in range(copies)]
                plans = [decode_plan(tables, [context] * batch) for *_, tables in sets]

                def attend(i: int, sets: Any = sets, plans: Any = plans, scale: float = head_dim**-0.5) -> object:
                    q, k_cache, v_cache, _ = sets[i % len(sets)]
                    return attention.paged_attention(q, k_cache, v_cache, plans[i % len(sets)], scale=scale)

                us = graph_us(attend)
                share = num_bytes / (us * 1e-6) / 1e9 / run.copy_gb_per_s
                label = f"{heads}/{kv_heads}x{head_dim}"
                rows.append({"heads": label, "batch": batch, "context": context, "us": us, "of_copy": share})
                run.put("rows", rows)
                run.say(f"{label} batch {batch:4d} context {context:5d}: {us:8.1f} us, {100 * share:5.1f} % of copy")


def time_products(run: Run) -> None:
    """int4 and our dense product against cuBLAS, bfloat16."""
    rows: list[dict[str, Any]] = []
    for num_in, num_out in ((256, 64),) if run.quick else PRODUCT_SHAPES:
        copies = 1 if run.quick else max(2, int(L2_BYTES / (num_in * num_out * 2)) + 1)
        weights = [torch.randn(num_out, num_in, device=DEVICE, dtype=torch.bfloat16) for _ in range(min(copies, CALLS))]
        dense = [weight.t().contiguous() for weight in weights]
        packed = [int4.quantize_weight(w.float(), 128).to(dtype=torch.bfloat16, device=w.device) for w in weights]
        for batch in (1, 16) if run.quick else (1, 2, 4, 8, 16, 32, 64, 128, 256):
            x = torch.randn(batch, num_in, device=DEVICE, dtype=torch.bfloat16)
            us = {
                "cublas": graph_us(lambda i, x=x, w=weights: F.linear(x, w[i % len(w)])),
                "dense": graph_us(lambda i, x=x, w=dense, n=num_out: matmul.matmul(x, w[i % len(w)], num_out=n)),
                "int4": graph_us(lambda i, x=x, w=packed: int4.w4a16_matmul(x, w[i % len(w)])),
            }
            rows.append({"in": num_in, "out": num_out, "rows": batch, **us})
            run.put("rows", rows)
            run.say(
                f"{num_in:5d} -> {num_out:5d}, {batch:3d} rows: cuBLAS {us['cublas']:7.1f} us,"
                f" dense {us['cublas'] / us['dense']:.2f} x, int4 {us['cublas'] / us['int4']:.2f} x"
            )


def time_small(run: Run) -> None:
    """The launches that are not products: bytes they must move, as a share of the measured bandwidth."""
    rows: list[dict[str, Any]] = []
    for batch in (2,) if run.quick else (1, 16, 64, 256):
        for name, num_bytes, call in _small_calls(batch, *((256, 512) if run.quick else (2048, 8192))):
            us = graph_us(call)
            share = num_bytes / (us * 1e-6) / 1e9 / run.copy_gb_per_s
            rows.append({"kernel": name, "rows": batch, "us": us, "of_copy": share})
            run.put("rows", rows)
            run.say(f"{name} {batch:4d} rows: {us:6.1f} us, {100 * share:5.1f} % of copy")


def _small_calls(batch: int, size: int, ffn: int) -> tuple[tuple[str, int, Callable[[int], object]], ...]:
    """Name, bytes read and written, and the call on the i-th of CALLS inputs."""
    x, residual = (torch.randn(CALLS, batch, size, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    gate_up = torch.randn(CALLS, batch, 2 * ffn, device=DEVICE, dtype=torch.bfloat16)
    weight = torch.randn(size, device=DEVICE, dtype=torch.bfloat16)
    table = torch.randn(9 * 1028, size, device=DEVICE, dtype=torch.bfloat16)
    codes = torch.randint(0, 1028, (CALLS, batch, 9), device=DEVICE)
    return (
        ("add_rms_norm", 8 * batch * size, lambda i: norm.add_rms_norm(x[i], residual[i], weight, eps=1e-5)),
        ("silu_and_mul", 6 * batch * ffn, lambda i: activation.silu_and_mul(gate_up[i])),
        (
            "codebook_embedding",
            20 * batch * size,
            lambda i: codebooks.codebook_embedding(codes[i], table, vocab_size=1028),
        ),
    )


def paged(
    lens: Sequence[int], shape: tuple[int, int, int], *, dtype: torch.dtype, counts: Sequence[int] | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[list[int]]]:
    """Queries, caches with NaN wherever nothing was written, and scattered tables. shape: heads, KV heads, head dim."""
    heads, kv_heads, head_dim = shape
    device = torch.device(DEVICE)
    needed = [math.ceil(length / BLOCK_SIZE) for length in lens]
    order = torch.randperm(sum(needed) + 3).tolist()
    tables = [[order.pop() for _ in range(count)] for count in needed]
    caches = [
        kv_cache.allocate_cache(
            sum(needed) + 3, kv_heads, block_size=BLOCK_SIZE, head_dim=head_dim, dtype=dtype, device=device
        ).fill_(math.nan)
        for _ in range(2)
    ]
    slots = [
        t[p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for t, n in zip(tables, lens, strict=True) for p in range(n)
    ]
    k, v = (torch.randn(len(slots), kv_heads, head_dim, device=device).to(dtype) for _ in range(2))
    kv_cache.write_cache(k, v, torch.tensor(slots, device=device), caches[0], caches[1])
    q = torch.randn(sum(counts) if counts else len(lens), heads, head_dim, device=device).to(dtype)
    return q, caches[0], caches[1], tables


def decode_plan(tables: Sequence[Sequence[int]], lens: Sequence[int]) -> attention.AttentionPlan:
    return attention.plan_attention(
        tables, [1] * len(lens), context_lens=lens, block_size=BLOCK_SIZE, causal=True, device=torch.device(DEVICE)
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
