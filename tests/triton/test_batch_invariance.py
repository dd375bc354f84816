"""A row has the same bits with 0, 1, 3, 16 or 64 others beside it, wherever it stands: the law, kernel by kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch

from declaim.kernels import sample
from declaim.kernels.activation import silu_and_mul
from declaim.kernels.attention import paged_attention, plan_attention
from declaim.kernels.codebooks import codebook_embedding
from declaim.kernels.int4 import Int4Weight, quantize_weight, w4a16_matmul
from declaim.kernels.kv_cache import write_cache
from declaim.kernels.mamba import causal_conv, gated_rms_norm, state_scan
from declaim.kernels.matmul import matmul
from declaim.kernels.norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from declaim.kernels.rope import apply_rotary, rotary_and_cache, rotary_table
from declaim.kernels.sample import SampleParams, guided_sample
from tests.state_plans import plan_of
from tests.triton.guards import CPU, guard_allocations, random

NUM_ROWS = 65
ROW = 40

Compute = Callable[[list[int]], torch.Tensor]
"""Runs a kernel on some of the rows, in this order: [len(rows), ...]."""


@pytest.fixture(autouse=True)
def guarded_empty(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    yield from guard_allocations(monkeypatch)


def _norms() -> Compute:
    x, residual = random(NUM_ROWS, 320), random(NUM_ROWS, 320, seed=1)
    weight, bias = random(320, seed=2), random(320, seed=3)

    def compute(rows: list[int]) -> torch.Tensor:
        parts = [
            rms_norm(x[rows], weight, eps=1e-5),
            layer_norm(x[rows], weight, bias, eps=1e-5),
            *add_rms_norm(x[rows], residual[rows], weight, eps=1e-5),
            *add_layer_norm(x[rows], residual[rows], weight, bias, eps=1e-5),
            gated_rms_norm(x[rows], residual[rows], weight, eps=1e-5),
        ]
        return torch.cat(parts, 1)

    return compute


def _embedding_and_gate() -> Compute:
    gate_up, table = random(NUM_ROWS, 2 * 96), random(4 * 7, 96, seed=1)
    codes = torch.randint(-1, 7, (NUM_ROWS, 4), generator=torch.Generator().manual_seed(2))
    return lambda rows: torch.cat(
        [silu_and_mul(gate_up[rows]), codebook_embedding(codes[rows], table, vocab_size=7)], 1
    )


def _rotary() -> Compute:
    qkv, angles = random(NUM_ROWS, 4 * 16), rotary_table(NUM_ROWS, 8, theta=1e4, device=CPU)

    def compute(rows: list[int]) -> torch.Tensor:
        caches = [torch.zeros(NUM_ROWS, 1, 1, 16) for _ in range(4)]
        slots = torch.tensor(rows)
        q = rotary_and_cache(
            qkv[rows], angles[rows], slots, caches[0], caches[1], num_heads=2, num_kv_heads=1, head_dim=16
        )
        heads = qkv[rows].unflatten(1, (4, 16))
        write_cache(heads[:, 2:3], heads[:, 3:], slots, caches[2], caches[3])
        written = [cache[rows].flatten(1) for cache in caches]
        return torch.cat([q.flatten(1), apply_rotary(heads, angles[rows]).flatten(1), *written], 1)

    return compute


@dataclass(frozen=True)
class Product:
    """A product of num_in inputs: one part up to 511, as `split_of` cuts, and more from there."""

    num_in: int
    dtype: torch.dtype
    is_int4: bool

    def __call__(self) -> Compute:
        x, residual = random(NUM_ROWS, self.num_in, dtype=self.dtype), random(NUM_ROWS, 32, seed=1, dtype=self.dtype)
        weight, bias = random(32, self.num_in, seed=2), random(32, seed=3, dtype=self.dtype)
        quantized = quantize_weight(weight, 64).to(dtype=self.dtype, device=CPU) if self.is_int4 else None
        dense = weight.t().to(self.dtype).contiguous()

        def product(rows: list[int], *, residual: torch.Tensor | None, is_gated: bool) -> torch.Tensor:
            if isinstance(quantized, Int4Weight):
                return w4a16_matmul(x[rows], quantized, bias=bias, residual=residual, is_gated=is_gated)
            return matmul(x[rows], dense, num_out=32, bias=bias, residual=residual, is_gated=is_gated)

        def compute(rows: list[int]) -> torch.Tensor:
            gated = product(rows, residual=None, is_gated=True)
            return torch.cat([product(rows, residual=residual[rows], is_gated=False), gated], 1)

        return compute


@dataclass(frozen=True)
class Attention:
    """Sequences of 0 to 300 positions over blocks that all share, with one query each, or up to 3."""

    is_decode: bool

    def __call__(self) -> Compute:
        generator = torch.Generator().manual_seed(0)
        k_cache, v_cache = random(24, 1, 16, 16), random(24, 1, 16, 16, seed=1)
        tables = [torch.randperm(24, generator=generator).tolist()[:19] for _ in range(NUM_ROWS)]
        counts = [1 if self.is_decode else 1 + i % 3 for i in range(NUM_ROWS)]
        lens = [max(count, 300 - 7 * abs(i - ROW)) for i, count in enumerate(counts)]
        q = random(NUM_ROWS, 3, 2, 16, seed=2)

        def compute(rows: list[int]) -> torch.Tensor:
            plan = plan_attention(
                [tables[i] for i in rows],
                [counts[i] for i in rows],
                context_lens=[lens[i] for i in rows],
                block_size=16,
                causal=True,
                device=CPU,
            )
            queries = torch.cat([q[i, : counts[i]] for i in rows])
            out = paged_attention(queries, k_cache, v_cache, plan, scale=0.25)
            ends = plan.query_start[1:].long() - 1
            return out[ends].flatten(1)

        return compute


def _recurrence() -> Compute:
    """A block and a rest of 3 positions for one sequence, one position for the others."""
    heads, head_dim, size, width = 2, 4, 8, 4
    channels = heads * head_dim + 2 * size
    xbc, dt = random(NUM_ROWS, 19, channels), random(NUM_ROWS, 19, heads, seed=1)
    taps, bias = random(width, channels, seed=2), random(channels, seed=3)
    numbers = (-random(heads, seed=4).exp(), random(heads, seed=5), random(heads, seed=6))
    counts = [19 if i == ROW else 1 for i in range(NUM_ROWS)]
    blocked = [16 if i == ROW else 0 for i in range(NUM_ROWS)]

    def compute(rows: list[int]) -> torch.Tensor:
        conv = random(NUM_ROWS, width - 1, channels, seed=7)
        ssm = random(NUM_ROWS, heads, head_dim, size, seed=8)
        plan = plan_of([counts[i] for i in rows], rows, [i % 5 == 1 for i in rows], [blocked[i] for i in rows])
        x, steps = (torch.cat([values[i, : counts[i]] for i in rows]) for values in (xbc, dt))
        y = state_scan(causal_conv(x, taps, bias, conv, plan), steps, *numbers, ssm, plan)
        return torch.cat([y[plan.query_start[1:].long() - 1], conv[rows].flatten(1), ssm[rows].flatten(1)], 1)

    return compute


def _draws() -> Compute:
    """Two codebooks of 40 ids: guided or not, greedy or not, with any filter."""
    generator = torch.Generator().manual_seed(0)
    cond, uncond = random(NUM_ROWS, 2, 40, seed=1) * 3, random(NUM_ROWS, 2, 40, seed=2) * 3
    history = torch.randint(-1, 40, (NUM_ROWS, 2, 2), generator=generator)
    number = torch.arange(NUM_ROWS)
    ops = (
        sample.guidance(center="uncond", keep="guided", top_k_filter=False),
        sample.allowed_ids((40, 39)),
        sample.repetition_penalty(window=2, compounding=True),
        sample.TEMPERATURE,
        *(sample.TOP_P, sample.TOP_K, sample.MIN_P),
    )

    def compute(rows: list[int]) -> torch.Tensor:
        here = number[rows]
        params = SampleParams(
            temperature=(here % 4 * 0.5).float(),
            top_k=(here % 3 * 5).int(),
            top_p=1.0 - here % 2 * 0.2,
            min_p=here % 5 * 0.02,
            repetition_penalty=1.0 + here % 2,
            guidance_scale=2.0 + here % 3,
            seed=here,
        )
        is_guided = here % 4 != 1
        uncond_rows = torch.where(is_guided, len(rows) + is_guided.cumsum(0) - 1, -1)
        return guided_sample(
            torch.cat([cond[rows], uncond[rows][is_guided]]),
            params,
            rows=here + 7,
            uncond_rows=uncond_rows,
            history=history[rows],
            ops=ops,
        )

    return compute


KERNELS: dict[str, Callable[[], Compute]] = {
    "norms": _norms,
    "embedding and gate": _embedding_and_gate,
    "rotary and cache": _rotary,
    "product": Product(320, torch.float16, is_int4=False),
    "product in parts": Product(576, torch.float32, is_int4=False),
    "int4 product": Product(320, torch.float16, is_int4=True),
    "int4 product in parts": Product(576, torch.float16, is_int4=True),
    "decode attention": Attention(is_decode=True),
    "prefill attention": Attention(is_decode=False),
    "recurrence": _recurrence,
    "draws": _draws,
}


def company(num_beside: int, place: int) -> list[int]:
    others = [row for row in range(NUM_ROWS) if row != ROW][:num_beside]
    return [*others[:place], ROW, *others[place:]]


@pytest.mark.parametrize("name", KERNELS)
def test_a_row_has_the_same_bits_whatever_runs_beside_it(name: str) -> None:
    compute = KERNELS[name]()
    alone = compute([ROW])[0]
    assert not alone.isnan().any()
    for num_beside, place in ((1, 0), (3, 3), (16, 5), (64, 40)):
        got = compute(company(num_beside, place))
        assert torch.equal(got[place], alone), num_beside
