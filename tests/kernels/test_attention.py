"""Paged attention against its float64 reference, and against itself under every layout of the same positions.

Memory that no query may read is NaN throughout.
"""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch

from declaim.kernels.attention import MAX_COPIED, paged_attention, paged_attention_reference, plan_attention
from declaim.kernels.kv_cache import allocate_cache, write_cache

CPU = torch.device("cpu")
SHAPES = [
    (1, 1, 16, 4),
    (2, 2, 24, 16),
    (4, 3, 64, 8),
    (2, 4, 32, 16),
    (1, 8, 64, 32),
    (3, 1, 128, 5),
    (5, 1, 33, 7),
    (1, 5, 33, 7),
]
TOLERANCE = 2e-6  # of the largest value: sums of float32 products in another order


def caches(num_blocks: int, num_kv_heads: int, *, block_size: int, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    k_cache, v_cache = (
        allocate_cache(
            num_blocks, num_kv_heads, block_size=block_size, head_dim=head_dim, dtype=torch.float32, device=CPU
        )
        for _ in range(2)
    )
    return k_cache.fill_(math.nan), v_cache.fill_(math.nan)


def fill(
    tables: list[list[int]], lens: list[int], k_cache: torch.Tensor, v_cache: torch.Tensor, *, seed: int = 0
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Write random keys and values at the first positions of each table. Returns them, [T, K, D] each."""
    generator = torch.Generator().manual_seed(seed)
    _, num_kv_heads, block_size, head_dim = k_cache.shape
    written = []
    for table, length in zip(tables, lens, strict=True):
        k, v = torch.randn(2, length, num_kv_heads, head_dim, generator=generator)
        positions = torch.arange(length)
        slots = torch.tensor(table + [0])[positions // block_size] * block_size + positions % block_size
        write_cache(k, v, slots, k_cache, v_cache)
        written.append((k, v))
    return written


def tables_for(lens: list[int], block_size: int, num_blocks: int, *, seed: int) -> list[list[int]]:
    free = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(seed)).tolist()
    return [[free.pop() for _ in range(-(-length // block_size))] for length in lens]


def queries(count: int, num_heads: int, head_dim: int, *, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, num_heads, head_dim, generator=torch.Generator().manual_seed(seed))


def close(got: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(got, expected, atol=TOLERANCE * max(1.0, float(expected.abs().max())), rtol=0)


@pytest.mark.parametrize("path", [paged_attention, paged_attention_reference])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("num_kv_heads", "group", "head_dim", "block_size"), SHAPES)
def test_every_path_is_softmax_attention_over_a_permuted_cache(
    path: object, causal: bool, num_kv_heads: int, group: int, head_dim: int, block_size: int
) -> None:
    """Against torch's own attention in float64 over the keys as they were before they were paged."""
    lens = [1, block_size - 1, block_size, block_size + 1, 3 * block_size + 2, 0, 50]
    query_lens = [1, min(2, block_size - 1), block_size, 1, 4, 0 if causal else 2, 9]
    num_blocks = sum(-(-length // block_size) for length in lens) + 5
    k_cache, v_cache = caches(num_blocks, num_kv_heads, block_size=block_size, head_dim=head_dim)
    tables = tables_for(lens, block_size, num_blocks, seed=3)
    written = fill(tables, lens, k_cache, v_cache)
    plan = plan_attention(tables, query_lens, context_lens=lens, block_size=block_size, causal=causal, device=CPU)
    q = queries(sum(query_lens), num_kv_heads * group, head_dim)
    got = path(q, k_cache, v_cache, plan, scale=head_dim**-0.5)  # type: ignore[operator]
    begin = 0
    for (k, v), length, count in zip(written, lens, query_lens, strict=True):
        for i in range(count):
            seen = length - count + i + 1 if causal else length
            if seen == 0:
                assert (got[begin + i] == 0).all()
                continue
            expected = attention(q[begin + i], k[:seen], v[:seen], scale=head_dim**-0.5)
            close(got[begin + i], expected)
        begin += count


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float) -> torch.Tensor:
    """One query, [H, D], over [T, K, D]."""
    group = q.shape[0] // k.shape[1]
    out = []
    for h in range(q.shape[0]):
        scores = k[:, h // group].double() @ q[h].double() * scale
        weights = (scores - scores.max()).exp()
        out.append((weights / weights.sum()) @ v[:, h // group].double())
    return torch.stack(out).to(q.dtype)


@pytest.mark.parametrize(("num_kv_heads", "group", "head_dim", "block_size"), SHAPES)
def test_a_position_has_the_same_bits_decoded_prefilled_and_in_a_crowd(
    num_kv_heads: int, group: int, head_dim: int, block_size: int
) -> None:
    length, num_blocks = 45, 120
    k_cache, v_cache = caches(num_blocks, num_kv_heads, block_size=block_size, head_dim=head_dim)
    lens = [length, 17, 30]
    tables = tables_for(lens, block_size, num_blocks, seed=4)
    fill(tables, lens, k_cache, v_cache)
    q = queries(length, num_kv_heads * group, head_dim)

    def run(first: int, last: int, crowd: bool) -> torch.Tensor:
        some = [(tables[0], last - first, last)]
        extra = queries(3, num_kv_heads * group, head_dim, seed=5)
        if crowd:
            some = [(tables[1], 1, 17), *some, (tables[2], 2, 30)]
        plan = plan_attention(
            [table for table, _, _ in some],
            [count for _, count, _ in some],
            context_lens=[context for _, _, context in some],
            block_size=block_size,
            causal=True,
            device=CPU,
        )
        rows = torch.cat([extra[:1], q[first:last], extra[1:]]) if crowd else q[first:last]
        out = paged_attention(rows, k_cache, v_cache, plan, scale=1.0)
        return out[1 : 1 + last - first] if crowd else out

    whole = run(0, length, False)
    for edges in ([0, 45], [0, 1, 2, 3, 45], [0, 16, 32, 45], list(range(46))):
        for first, last in itertools.pairwise(edges):
            assert torch.equal(run(first, last, False), whole[first:last])
            assert torch.equal(run(first, last, True), whole[first:last])


@pytest.mark.parametrize(("num_kv_heads", "group", "head_dim", "block_size"), SHAPES)
@pytest.mark.parametrize("num_threads", [1, 2])
def test_the_bits_do_not_depend_on_where_the_blocks_lie(
    num_kv_heads: int, group: int, head_dim: int, block_size: int, num_threads: int
) -> None:
    """Neighbouring blocks are read in place, others through a copy."""
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        for length in (1, 3, block_size, 2 * block_size + 1, 61):
            count = -(-length // block_size)
            layouts = [
                list(range(count)),
                list(range(11, 11 + count)),
                list(range(count + 6, 6, -1)),
                torch.randperm(60, generator=torch.Generator().manual_seed(length)).tolist()[:count],
            ]
            q = queries(1, num_kv_heads * group, head_dim)
            outs = []
            for table in layouts:
                k_cache, v_cache = caches(60, num_kv_heads, block_size=block_size, head_dim=head_dim)
                fill([table], [length], k_cache, v_cache)
                plan = plan_attention(
                    [table], [1], context_lens=[length], block_size=block_size, causal=True, device=CPU
                )
                outs.append(paged_attention(q, k_cache, v_cache, plan, scale=1.0))
            assert all(torch.equal(out, outs[0]) for out in outs)
    finally:
        torch.set_num_threads(before)


def test_sequences_that_share_blocks_each_read_them() -> None:
    k_cache, v_cache = caches(8, 2, block_size=4, head_dim=16)
    tables = [[3, 1], [3, 5], [3, 1]]
    fill([[3, 1], [0, 5]], [8, 7], k_cache, v_cache)
    plan = plan_attention(tables, [1, 1, 1], context_lens=[8, 7, 6], block_size=4, causal=True, device=CPU)
    q = queries(3, 4, 16)
    got = paged_attention(q, k_cache, v_cache, plan, scale=0.25)
    close(got, paged_attention_reference(q, k_cache, v_cache, plan, scale=0.25))


@pytest.mark.parametrize("path", [paged_attention, paged_attention_reference])
def test_a_step_of_sequences_with_nothing_cached_gives_exact_zeros(path: object) -> None:
    k_cache, v_cache = caches(2, 2, block_size=4, head_dim=16)
    plan = plan_attention([[], []], [1, 2], context_lens=[0, 0], block_size=4, causal=False, device=CPU)
    got = path(queries(3, 4, 16), k_cache, v_cache, plan, scale=1.0)  # type: ignore[operator]
    assert torch.equal(got, torch.zeros(3, 4, 16))


def test_the_plans_tables_are_padded_and_its_queries_counted() -> None:
    plan = plan_attention([[4, 2], [7]], [3, 1], context_lens=[6, 2], block_size=4, causal=True, device=CPU)
    assert plan.block_tables.tolist() == [[4, 2], [7, 0]]
    assert plan.query_start.tolist() == [0, 3, 4]
    assert plan.context_lens.tolist() == [6, 2]
    assert (plan.max_query_len, plan.max_context_len) == (3, 6)


def test_a_plan_without_cpu_reads_says_how_to_make_one() -> None:
    k_cache, v_cache = caches(2, 2, block_size=4, head_dim=16)
    plan = plan_attention([[1]], [1], context_lens=[1], block_size=4, causal=True, device=CPU)
    with pytest.raises(ValueError, match="plan_attention"):
        paged_attention(queries(1, 4, 16), k_cache, v_cache, dataclasses.replace(plan, cpu=None), scale=1.0)


@pytest.mark.parametrize(("num_kv_heads", "group", "head_dim", "block_size"), SHAPES)
@pytest.mark.parametrize("num_threads", [1, 2])
def test_queries_with_as_much_to_read_have_the_same_bits_together_and_alone(
    num_kv_heads: int, group: int, head_dim: int, block_size: int, num_threads: int
) -> None:
    """Runs and scattered blocks, in both orders in memory, two of them the same blocks, and an odd number of each."""
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        for length in (1, block_size, 2 * block_size + 1, 61):
            count = -(-length // block_size)
            runs = [list(range(first, first + count)) for first in (70, 0, 35)]
            tables = [*runs, runs[0], list(range(140, 140 + 2 * count, 2)), list(range(199, 199 - count, -1))]
            k_cache, v_cache = caches(200, num_kv_heads, block_size=block_size, head_dim=head_dim)
            fill(tables, [length] * len(tables), k_cache, v_cache)
            q = queries(len(tables), num_kv_heads * group, head_dim)

            def run(rows: list[int]) -> torch.Tensor:
                plan = plan_attention(
                    [tables[i] for i in rows],  # noqa: B023
                    [1] * len(rows),
                    context_lens=[length] * len(rows),  # noqa: B023
                    block_size=block_size,
                    causal=True,
                    device=CPU,
                )
                return paged_attention(q[rows], k_cache, v_cache, plan, scale=1.0)  # noqa: B023

            alone = torch.cat([run([i]) for i in range(len(tables))])
            assert alone.isfinite().all()
            for rows in ([0, 1], [1, 0], [0, 3], [2, 1, 0], [5, 4, 3, 2, 1, 0], [0, 1, 2, 3, 4, 5]):
                assert torch.equal(run(rows), alone[rows]), rows
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("num_kv_heads", "group", "head_dim"), [(1, 5, 64), (1, 8, 64), (16, 1, 128)])
def test_numbers_of_16_bits_keep_theirs_too_with_two_threads(
    dtype: torch.dtype, num_kv_heads: int, group: int, head_dim: int
) -> None:
    """Of hundreds of lengths, for one of a thousand is what goes wrong where it does."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        tables = [list(range(first, first + 20)) for first in (0, 20, 40)]
        k_cache, v_cache = (
            allocate_cache(60, num_kv_heads, block_size=16, head_dim=head_dim, dtype=dtype, device=CPU)
            for _ in range(2)
        )
        for seed, cache in enumerate((k_cache, v_cache)):
            cache.copy_(torch.randn(cache.shape, generator=torch.Generator().manual_seed(seed)))
        for length in range(1, 301):
            q = queries(3, num_kv_heads * group, head_dim, seed=length).to(dtype)

            def run(rows: list[int]) -> torch.Tensor:
                plan = plan_attention(
                    [tables[i] for i in rows],
                    [1] * len(rows),
                    context_lens=[length] * len(rows),  # noqa: B023
                    block_size=16,
                    causal=True,
                    device=CPU,
                )
                return paged_attention(q[rows], k_cache, v_cache, plan, scale=0.125)  # noqa: B023

            assert torch.equal(run([0, 1, 2]), torch.cat([run([i]) for i in range(3)])), length
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("num_kv_heads", [1, 16])
def test_queries_with_as_much_to_read_share_few_calls(num_kv_heads: int) -> None:
    """Short ones are copied, long ones are one view where they begin equally far apart, and nothing else is."""
    head_dim, block_size, length = 32, 8, 61
    is_short = num_kv_heads * head_dim * length <= MAX_COPIED
    tables = [list(range(first, first + 8)) for first in (0, 20, 40, 60)] + [list(range(99, 91, -1))]
    k_cache, v_cache = caches(100, num_kv_heads, block_size=block_size, head_dim=head_dim)
    fill(tables, [length] * 5, k_cache, v_cache)
    q = queries(5, num_kv_heads, head_dim)
    plan = plan_attention(tables, [1] * 5, context_lens=[length] * 5, block_size=block_size, causal=True, device=CPU)
    close(
        paged_attention(q, k_cache, v_cache, plan, scale=0.2),
        paged_attention_reference(q, k_cache, v_cache, plan, scale=0.2),
    )
    assert plan.cpu is not None
    calls = plan.cpu.calls_for(num_kv_heads, head_dim).calls
    assert sorted(call.num_queries for call in calls) == ([5] if is_short else [1, 4])


def test_all_queries_of_a_text_share_a_call_and_a_view() -> None:
    """As in a prefill's cross-attention: one table, however long."""
    k_cache, v_cache = caches(40, 8, block_size=8, head_dim=64)
    fill([list(range(40))], [300], k_cache, v_cache)
    q = queries(37, 16, 64)
    plan = plan_attention([list(range(40))], [37], context_lens=[300], block_size=8, causal=False, device=CPU)
    got = paged_attention(q, k_cache, v_cache, plan, scale=0.125)
    close(got, paged_attention_reference(q, k_cache, v_cache, plan, scale=0.125))
    assert plan.cpu is not None
    (call,) = plan.cpu.calls_for(8, 64).calls
    assert call.num_queries == 37 and call.strides[0] == 0
    one = plan_attention([list(range(40))], [1], context_lens=[300], block_size=8, causal=False, device=CPU)
    for i in (0, 20, 36):
        assert torch.equal(paged_attention(q[i : i + 1], k_cache, v_cache, one, scale=0.125)[0], got[i])
