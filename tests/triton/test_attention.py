"""Paged attention under the interpreter: against float64, and against itself in every company and every cut.

Memory that no query may read is NaN: free blocks, block 0, the rest of a last block, what lies between queries. Tables
name blocks that do not exist behind their last one.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from declaim.kernels import attention, backend
from declaim.kernels.attention import AttentionPlan, paged_attention, paged_attention_reference, plan_attention
from declaim.kernels.kv_cache import allocate_cache
from tests.triton.guards import CPU, guard_allocations

# Of the largest value, and of the norm. The interpreter truncates to bfloat16, so that its bounds are twice a GPU's.
TOLERANCE = {torch.float32: (2e-6, 1e-6), torch.float16: (2e-3, 1e-3), torch.bfloat16: (2e-2, 8e-3)}
NO_SUCH_BLOCK = 1 << 24


@pytest.fixture(autouse=True)
def guarded_empty(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    yield from guard_allocations(monkeypatch)


@dataclasses.dataclass(frozen=True)
class Cached:
    """Caches in which sequence i has lens[i] random positions, scattered over the blocks of tables[i]."""

    k: torch.Tensor
    v: torch.Tensor
    tables: list[list[int]]
    lens: list[int]

    def plan(self, rows: Sequence[tuple[int, int, int]], *, causal: bool = True) -> AttentionPlan:
        """A plan of (sequence, queries, context length), made by hand as a CUDA graph's is."""
        width = max(len(self.tables[sequence]) for sequence, _, _ in rows) + 2
        tables = torch.full((len(rows), width), NO_SUCH_BLOCK, dtype=torch.int32)
        for row, (sequence, _, context_len) in enumerate(rows):
            used = self.tables[sequence][: -(-context_len // self.k.shape[2])]
            tables[row, : len(used)] = torch.tensor(used, dtype=torch.int32)
        return AttentionPlan(
            block_tables=tables,
            query_start=torch.tensor([0, *itertools.accumulate(count for _, count, _ in rows)], dtype=torch.int32),
            context_lens=torch.tensor([context_len for _, _, context_len in rows], dtype=torch.int32),
            causal=causal,
            max_query_len=max(count for _, count, _ in rows),
            max_context_len=max(context_len for _, _, context_len in rows),
        )

    def attend(self, q: torch.Tensor, rows: Sequence[tuple[int, int, int]], *, causal: bool = True) -> torch.Tensor:
        return paged_attention(q, self.k, self.v, self.plan(rows, causal=causal), scale=q.shape[2] ** -0.5)


def cached(
    lens: Sequence[int],
    *,
    num_kv_heads: int = 2,
    head_dim: int = 16,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    is_gpu_layout: bool = True,
    seed: int = 0,
) -> Cached:
    generator = torch.Generator().manual_seed(seed)
    counts = [-(-length // block_size) for length in lens]
    num_blocks = sum(counts) + 3
    if is_gpu_layout:
        k, v = torch.full((2, num_blocks, num_kv_heads, block_size, head_dim), math.nan, dtype=dtype).unbind()
    else:
        k, v = (
            allocate_cache(
                num_blocks, num_kv_heads, block_size=block_size, head_dim=head_dim, dtype=dtype, device=CPU
            ).fill_(math.nan)
            for _ in range(2)
        )
    free = (torch.randperm(num_blocks - 1, generator=generator) + 1).tolist()
    tables = [[free.pop() for _ in range(count)] for count in counts]
    for table, length in zip(tables, lens, strict=True):
        for i, block in enumerate(table):
            filled = min(block_size, length - i * block_size)
            for cache in (k, v):
                values = torch.randn(num_kv_heads, filled, head_dim, generator=generator)
                cache[block, :, :filled] = values.to(dtype)
    return Cached(k, v, tables, list(lens))


def queries(count: int, num_heads: int, head_dim: int, *, dtype: torch.dtype, seed: int = 1) -> torch.Tensor:
    """Rows of a wider matrix, as a merged projection gives them; NaN around."""
    values = torch.randn(count, num_heads * head_dim, generator=torch.Generator().manual_seed(seed))
    wide = torch.full((count, num_heads * head_dim + 48), math.nan, dtype=dtype)
    wide[:, 16 : 16 + values.shape[1]] = values.to(dtype)
    return wide[:, 16 : 16 + values.shape[1]].view(count, num_heads, head_dim)


def check(got: torch.Tensor, q: torch.Tensor, cache: Cached, plan: AttentionPlan) -> None:
    """Against softmax attention in float64 over the same rounded values."""
    expected = paged_attention_reference(
        q.float(), cache.k.float(), cache.v.float(), plan, scale=q.shape[2] ** -0.5
    ).double()
    largest, norm = TOLERANCE[q.dtype]
    error = got.double() - expected
    assert float(error.abs().max()) <= largest * max(1.0, float(expected.abs().max()))
    assert float(error.norm()) <= norm * float(expected.norm())


@pytest.fixture(params=["dot", "no_dot"])
def uses_dot(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """With tl.dot, in chunks of four tiles, and without, as a GPU of compute capability 7.5 runs: there the tiles are
    smaller, and for the tests' sake the chunks."""
    if request.param == "no_dot":
        monkeypatch.setattr(backend, "capability_of", lambda x: 75)
        monkeypatch.setattr(attention, "CHUNK", 64)
    return request.param == "dot"


def programs(monkeypatch: pytest.MonkeyPatch, num_splits: int) -> None:
    monkeypatch.setattr(attention, "_num_splits", lambda q, num_pairs, max_chunks: min(num_splits, max_chunks))


SHAPES = [
    # kv_heads, group, head_dim, block_size, dtype, is_gpu_layout
    (2, 1, 16, 16, torch.float32, True),
    (1, 2, 32, 32, torch.float32, False),
    (1, 3, 24, 16, torch.float16, True),
    (2, 4, 64, 64, torch.bfloat16, True),
    (1, 5, 64, 32, torch.float16, False),
    (1, 8, 128, 32, torch.float16, True),
]
SHAPE_NAMES = ("num_kv_heads", "group", "head_dim", "block_size", "dtype", "is_gpu_layout")


@pytest.mark.parametrize(SHAPE_NAMES, SHAPES)
def test_decode_is_attention_and_any_number_of_splits_gives_the_same_bits(
    monkeypatch: pytest.MonkeyPatch,
    uses_dot: bool,
    num_kv_heads: int,
    group: int,
    head_dim: int,
    block_size: int,
    dtype: torch.dtype,
    is_gpu_layout: bool,
) -> None:
    if not uses_dot and dtype == torch.bfloat16:
        pytest.skip("that GPU has no bfloat16")
    chunk = attention.CHUNK
    lens = [0, 1, block_size - 1, block_size, block_size + 1, chunk - 1, chunk, chunk + 1, 2 * chunk + 18]
    cache = cached(
        lens,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        block_size=block_size,
        dtype=dtype,
        is_gpu_layout=is_gpu_layout,
    )
    q = queries(len(lens), num_kv_heads * group, head_dim, dtype=dtype)
    rows = [(i, 1, length) for i, length in enumerate(lens)]
    outs = []
    for num_splits in (1, 2):
        programs(monkeypatch, num_splits)
        outs.append(cache.attend(q, rows))
    check(outs[0], q, cache, cache.plan(rows))
    assert torch.equal(outs[0][0], torch.zeros_like(outs[0][0]))
    assert torch.equal(outs[0], outs[1])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(SHAPE_NAMES, SHAPES[::2])
def test_prefill_of_ragged_rows_is_attention(
    uses_dot: bool,
    causal: bool,
    num_kv_heads: int,
    group: int,
    head_dim: int,
    block_size: int,
    dtype: torch.dtype,
    is_gpu_layout: bool,
) -> None:
    """Not causal is cross-attention: any number of queries over any context, the empty one too."""
    lens = [40, 0, 17, 1, attention.CHUNK + 2, block_size, 3]
    counts = [5, 0, 17, 1, 6, 2, 0] if causal else [1, 4, 2, 1, 3, 0, 2]
    cache = cached(
        lens,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        block_size=block_size,
        dtype=dtype,
        is_gpu_layout=is_gpu_layout,
    )
    q = queries(sum(counts), num_kv_heads * group, head_dim, dtype=dtype)
    rows = [(i, count, length) for i, (count, length) in enumerate(zip(counts, lens, strict=True))]
    got = cache.attend(q, rows, causal=causal)
    check(got, q, cache, cache.plan(rows, causal=causal))
    if not causal:
        assert torch.equal(got[1:5], torch.zeros_like(got[1:5]))


@pytest.mark.parametrize(("group", "dtype"), [(2, torch.float16), (3, torch.float32)])
def test_a_position_has_the_same_bits_decoded_prefilled_at_once_and_in_parts(
    monkeypatch: pytest.MonkeyPatch, uses_dot: bool, group: int, dtype: torch.dtype
) -> None:
    first, last = attention.CHUNK - 7, attention.CHUNK + 5
    cache = cached([last], num_kv_heads=1, dtype=dtype)
    q = queries(last - first, group, 16, dtype=dtype)
    whole = cache.attend(q, [(0, last - first, last)])
    check(whole, q, cache, cache.plan([(0, last - first, last)]))
    for begin, end in itertools.pairwise([0, 1, 7, 12]):
        part = cache.attend(q[begin:end], [(0, end - begin, first + end)])
        assert torch.equal(part, whole[begin:end])
    for num_splits in (1, 2):
        programs(monkeypatch, num_splits)
        decoded = cache.attend(q, [(0, 1, position + 1) for position in range(first, last)])
        assert torch.equal(decoded, whole)


def test_a_row_has_the_same_bits_whatever_runs_beside_it(uses_dot: bool) -> None:
    chunk = attention.CHUNK
    lens = [chunk + 44, 17, chunk, chunk - 1, 1, 0]
    cache = cached(lens, num_kv_heads=1)
    for counts in ([1] * 6, [5, 3, 1, 8, 1, 0]):
        rows = [(i, count, length) for i, (count, length) in enumerate(zip(counts, lens, strict=True))]
        parts = queries(sum(counts), 3, 16, dtype=torch.float32).split(counts)
        alone = [cache.attend(part, [row]) for part, row in zip(parts, rows, strict=True)]
        for order in ([5, 3, 0], [4, 5, 0, 2, 1, 3]):
            crowd = cache.attend(torch.cat([parts[i] for i in order]), [rows[i] for i in order])
            for i, out in zip(order, crowd.split([counts[i] for i in order]), strict=True):
                assert torch.equal(out, alone[i]), (counts, order, i)


def test_a_graph_planned_for_the_longest_context_and_more_rows_gives_the_same_bits() -> None:
    lens = [300, 31, 5]
    cache = cached(lens, num_kv_heads=1)
    rows = [(i, 1, length) for i, length in enumerate(lens)]
    q = queries(4, 2, 16, dtype=torch.float32)
    expected = cache.attend(q[:3], rows)
    static = dataclasses.replace(cache.plan([*rows, (0, 1, 0)]), max_context_len=3072)
    got = paged_attention(q, cache.k, cache.v, static, scale=0.25)
    assert torch.equal(got[:3], expected)
    assert torch.equal(got[3], torch.zeros_like(got[3]))


def test_sequences_that_share_blocks_each_read_them(uses_dot: bool) -> None:
    cache = cached([80])
    rows = [(0, 1, 80), (0, 3, 70), (0, 2, 33)]
    q = queries(6, 4, 16, dtype=torch.float32)
    check(cache.attend(q, rows), q, cache, cache.plan(rows))


def test_large_scores_neither_overflow_nor_vanish(uses_dot: bool) -> None:
    """Scores of some hundreds: sums are rescaled by factors that underflow."""
    cache = cached([300], num_kv_heads=1)
    q = queries(1, 2, 16, dtype=torch.float32) * 100
    got = cache.attend(q, [(0, 1, 300)])
    assert got.isfinite().all()
    expected = paged_attention_reference(q, cache.k, cache.v, cache.plan([(0, 1, 300)]), scale=0.25)
    torch.testing.assert_close(got, expected, atol=2e-4, rtol=0)


def test_the_plan_of_the_engine_runs_on_both_paths() -> None:
    cache = cached([20, 33], is_gpu_layout=False)
    plan = plan_attention(cache.tables, [1, 4], context_lens=[20, 33], block_size=16, causal=True, device=CPU)
    q = queries(5, 4, 16, dtype=torch.float32)
    check(paged_attention(q, cache.k, cache.v, plan, scale=0.25), q, cache, plan)


@pytest.mark.parametrize("num_rows", [0, 2])
def test_nothing_to_attend_to_or_with(num_rows: int) -> None:
    cache = cached([16])
    plan = plan_attention(
        [[]] * num_rows, [1] * num_rows, context_lens=[0] * num_rows, block_size=16, causal=False, device=CPU
    )
    got = paged_attention(queries(num_rows, 4, 16, dtype=torch.float32), cache.k, cache.v, plan, scale=0.25)
    assert torch.equal(got, torch.zeros(num_rows, 4, 16))


@settings(
    max_examples=12,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_any_tables_and_lengths(data: st.DataObject) -> None:
    block_size = data.draw(st.sampled_from([16, 32, 64]))
    lens = data.draw(st.lists(st.integers(0, 300), min_size=1, max_size=4))
    group = data.draw(st.integers(1, 4))
    causal = data.draw(st.booleans())
    is_decode = data.draw(st.booleans())
    counts = [1 if is_decode else data.draw(st.integers(0, min(9, length) if causal else 9)) for length in lens]
    cache = cached(lens, num_kv_heads=1, block_size=block_size, seed=data.draw(st.integers(0, 99)))
    rows = [(i, count, length) for i, (count, length) in enumerate(zip(counts, lens, strict=True))]
    q = queries(sum(counts), group, 16, dtype=torch.float32)
    plan = cache.plan(rows, causal=causal)
    got = paged_attention(q, cache.k, cache.v, plan, scale=0.25)
    assert got.shape == q.shape
    if len(q):
        check(got, q, cache, plan)


def test_what_does_not_fit_is_refused() -> None:
    cache = cached([20])
    plan = cache.plan([(0, 1, 20)])
    q = queries(1, 4, 16, dtype=torch.float32)

    def refused(match: str, **changes: object) -> None:
        arguments = {"q": q, "k_cache": cache.k, "v_cache": cache.v, "plan": plan, "scale": 0.25} | changes
        with pytest.raises(ValueError, match=match):
            paged_attention(**arguments)  # type: ignore[arg-type]

    refused("one layout", v_cache=cache.v.transpose(1, 2).contiguous().transpose(1, 2))
    refused("3 heads x 16 do not fit a cache of 2 heads x 16", q=q[:, :3])
    refused("4 heads x 8 do not fit", q=q[:, :, :8])
    refused("one dtype", q=q.half())
    refused("neighbours", q=q.transpose(1, 2).contiguous().transpose(1, 2))
    refused("block tables", plan=dataclasses.replace(plan, block_tables=plan.block_tables.repeat(2, 1)))
    refused("int32", plan=dataclasses.replace(plan, context_lens=plan.context_lens.long()))
    refused("scale", scale=0.0)


@pytest.mark.parametrize(("capability", "match"), [(70, "below 7.5"), (75, "no bfloat16")])
def test_a_gpu_too_old_says_what_runs(monkeypatch: pytest.MonkeyPatch, capability: int, match: str) -> None:
    monkeypatch.setattr(backend, "capability_of", lambda x: capability)
    cache = cached([20], dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=match):
        cache.attend(queries(1, 4, 16, dtype=torch.bfloat16), [(0, 1, 20)])
