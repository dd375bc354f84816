"""Paged attention: every position of a batch over its own sequence's cached keys and values.

One plan serves all layers of a step. A position's result has the same bits whether it is decoded, prefilled in a chunk
of any size, or recomputed, and whatever runs beside it. On the CPU each position attends by itself, over a view of the
cache where its blocks neighbour each other and over a copy where they do not; on one core where products of few rows
depend on where a thread's memory begins (`row_counts.py`). On the GPU a context is cut into chunks
of CHUNK positions, whatever the batch; `_attend_chunk` takes one of them and `_merge` joins them first to last, for all
kernels alike, so that how many programs share a context changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from declaim.kernels import backend
from declaim.kernels.row_counts import equal_counts, takes_pairs
from declaim.kernels.threads import one_thread

CHUNK = 256
ALIGNED_DIMS = 16  # 64 bytes
MAX_COPIED = 8192  # numbers that a query reads: to copy as many takes less than a call
LOG2_E = math.log2(math.e)

# Programs that a decode step is cut into for each multiprocessor, so that their loads hide each other's latency.
PROGRAMS_PER_PROCESSOR = 4


class _Read(NamedTuple):
    """What one query position reads: `length` positions from slot `first` on; or where its blocks are no run of
    neighbours, the first ones of `blocks`."""

    query: int
    length: int
    first: int
    blocks: tuple[int, ...]


class _Call(NamedTuple):
    """One call of attention, for `num_queries` with as much to read.

    shape [num_queries, kv_heads, length, D], strides and first element: what they see of a cache; or of a copy of its
    `blocks`, or of its positions at `slots`, which are made first where there are any.
    """

    num_queries: int
    shape: tuple[int, int, int, int]
    strides: tuple[int, int, int, int]
    first: int
    blocks: torch.Tensor | None = None
    slots: torch.Tensor | None = None


class _Calls(NamedTuple):
    """order (int64 [N]) puts the queries into the order of the calls, restore back into their own."""

    calls: tuple[_Call, ...]
    order: torch.Tensor
    restore: torch.Tensor


@dataclass(frozen=True, slots=True, eq=False)
class CpuReads:
    """A plan as the CPU follows it. calls: for caches of so many heads and dims, made for the first layer that asks."""

    reads: tuple[_Read, ...]
    block_size: int
    calls: dict[tuple[int, int], _Calls] = field(default_factory=dict)

    def calls_for(self, num_kv_heads: int, head_dim: int) -> _Calls:
        shape = (num_kv_heads, head_dim)
        if shape not in self.calls:
            self.calls[shape] = _group(self.reads, *shape, block_size=self.block_size)
        return self.calls[shape]


@dataclass(frozen=True, slots=True, eq=False)
class AttentionPlan:
    """Where each query of a step finds its keys.

    block_tables: int32 [R, max_blocks], rows of sequences; query_start: int32 [R + 1], the queries of row r are
    query_start[r] .. query_start[r + 1]; context_lens: int32 [R], cached positions of row r, those of its own
    queries included; causal: query i of n sees context_len - n + i + 1 positions, else all of them.
    max_query_len, max_context_len: what no row exceeds. They decide launches, so a CUDA graph, whose tensors change
    between replays, takes the largest it will ever see.
    cpu: the same for the CPU, needed only there.
    """

    block_tables: torch.Tensor
    query_start: torch.Tensor
    context_lens: torch.Tensor
    causal: bool
    max_query_len: int
    max_context_len: int
    cpu: CpuReads | None = None


def plan_attention(
    block_tables: Sequence[Sequence[int]],
    query_lens: Sequence[int],
    *,
    context_lens: Sequence[int],
    block_size: int,
    causal: bool,
    device: torch.device,
) -> AttentionPlan:
    """Make a step's plan from R block tables (lists of block ids), query lengths and context lengths."""
    width = max((len(table) for table in block_tables), default=0)
    padded = [list(table) + [0] * (width - len(table)) for table in block_tables]
    starts = list(accumulate(query_lens, initial=0))
    cpu = None
    if device.type == "cpu":
        rows = [range(starts[row], starts[row + 1]) for row in range(len(padded))]
        cpu = _cpu_reads(block_tables, rows, context_lens=context_lens, block_size=block_size, causal=causal)
    return AttentionPlan(
        block_tables=torch.tensor(padded, dtype=torch.int32, device=device).view(len(padded), width),
        query_start=torch.tensor(starts, dtype=torch.int32, device=device),
        context_lens=torch.tensor(list(context_lens), dtype=torch.int32, device=device),
        causal=causal,
        max_query_len=max(query_lens, default=0),
        max_context_len=max(context_lens, default=0),
        cpu=cpu,
    )


def _cpu_reads(
    block_tables: Sequence[Sequence[int]],
    rows: Sequence[range],
    *,
    context_lens: Sequence[int],
    block_size: int,
    causal: bool,
) -> CpuReads:
    reads: list[_Read] = []
    for table, queries, context_len in zip(block_tables, rows, context_lens, strict=True):
        used = tuple(table[: -(-context_len // block_size)])
        first = used[0] if used else 0
        is_run = used == tuple(range(first, first + len(used)))
        last_query = queries.stop - 1
        reads += [
            _Read(
                query,
                context_len - (last_query - query if causal else 0),
                first * block_size if is_run else 0,
                () if is_run else used,
            )
            for query in queries
        ]
    return CpuReads(tuple(reads), block_size)


def _group(reads: Sequence[_Read], num_kv_heads: int, head_dim: int, *, block_size: int) -> _Calls:
    """Have queries with as much to read share a call where they can: a short one takes no longer than to call it.

    Runs that begin equally far apart, the two of guidance or all queries of a text, are one strided view. What is short
    enough is copied.
    """
    position = num_kv_heads * head_dim
    by_length: dict[int, list[_Read]] = {}
    for read in reads:
        by_length.setdefault(read.length, []).append(read)
    calls: list[_Call] = []
    order: list[int] = []
    for length, alike in by_length.items():
        shape = (num_kv_heads, length, head_dim)
        strides = (head_dim, position, 1)
        scattered = [read for read in alike if read.blocks]
        runs = sorted((read for read in alike if not read.blocks), key=lambda read: read.first)
        if len(alike) > 2 and 0 < length * position <= MAX_COPIED:
            slots = _slots_of(scattered, runs, length, block_size=block_size)
            calls.append(_Call(len(alike), (len(alike), *shape), (length * position, *strides), 0, slots=slots))
            order += [read.query for read in scattered + runs]
            continue
        for read in scattered:
            blocks = torch.tensor(read.blocks, dtype=torch.int64)
            calls.append(_Call(1, (1, *shape), (0, *strides), 0, blocks=blocks))
            order.append(read.query)
        begin = 0
        while begin < len(runs):
            end, first = begin + 1, runs[begin].first
            apart = runs[end].first - first if end < len(runs) else 0
            while end < len(runs) and runs[end].first == first + (end - begin) * apart:
                end += 1
            calls.append(_Call(end - begin, (end - begin, *shape), (apart * position, *strides), first * position))
            order += [read.query for read in runs[begin:end]]
            begin = end
    in_order = torch.tensor(order, dtype=torch.int64)
    return _Calls(tuple(calls), in_order, in_order.argsort())


def _slots_of(scattered: Sequence[_Read], runs: Sequence[_Read], length: int, *, block_size: int) -> torch.Tensor:
    """Where the positions of reads of one length lie, one read after the other."""
    positions = np.arange(length)
    slots = np.array([read.first for read in runs], dtype=np.int64)[:, None] + positions
    if scattered:
        blocks = np.array([read.blocks for read in scattered], dtype=np.int64)[:, positions // block_size]
        slots = np.concatenate([blocks * block_size + positions % block_size, slots])
    return torch.from_numpy(slots.ravel())


def paged_attention_reference(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, plan: AttentionPlan, *, scale: float
) -> torch.Tensor:
    """softmax(q k^T * scale) v in float64, one query at a time; a query with nothing to read gives zeros."""
    out = torch.zeros_like(q)
    group, block_size = q.shape[1] // k_cache.shape[1], k_cache.shape[2]
    for row, context_len in enumerate(plan.context_lens.tolist()):
        begin, end = int(plan.query_start[row]), int(plan.query_start[row + 1])
        blocks = plan.block_tables[row, : -(-context_len // block_size)].long()
        keys = k_cache[blocks].transpose(0, 1).flatten(1, 2).double().repeat_interleave(group, 0)
        values = v_cache[blocks].transpose(0, 1).flatten(1, 2).double().repeat_interleave(group, 0)
        for i in range(begin, end):
            length = context_len - (end - i) + 1 if plan.causal else context_len
            if length == 0:
                continue
            scores = torch.einsum("hd,htd->ht", q[i].double(), keys[:, :length]) * scale
            out[i] = torch.einsum("ht,htd->hd", scores.softmax(-1), values[:, :length]).to(q.dtype)
    return out


def attention_weights(
    q: torch.Tensor, k_cache: torch.Tensor, table: Sequence[int], *, context_len: int
) -> torch.Tensor:
    """softmax(q k^T) of one sequence's queries over all of its cache: what `paged_attention` mixes V by.

    q: [N, H, D], scaled already; k_cache: [blocks, kv_heads, block_size, D]; table: the sequence's blocks
    -> float32 [N, H, context_len].
    """
    blocks = torch.tensor(table[: -(-context_len // k_cache.shape[2])], dtype=torch.int64, device=k_cache.device)
    keys = k_cache.transpose(1, 2).index_select(0, blocks).flatten(0, 1)[:context_len]
    keys = keys.float().repeat_interleave(q.shape[1] // k_cache.shape[1], 1)
    return torch.einsum("nhd,thd->nht", q.float(), keys).softmax(-1)


@triton.jit
def _attend_chunk(
    q,
    k_head,
    v_head,
    table,
    begin,
    longest,
    lengths,
    scale,
    TILE_N: tl.constexpr,
    CHUNK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_STRIDE: tl.constexpr,
    POSITION_STRIDE: tl.constexpr,
    USE_DOT: tl.constexpr,
):
    """Online softmax over positions begin .. begin + CHUNK: max s, sum 2^(s - max), and sum 2^(s - max) v.

    q: [M, D]; lengths: [M], positions that each row of q sees, none more than `longest`; scale: for a softmax in base
    2. Every product that is added is an explicit fma: the compiler has no choice to make, here or in `_merge`, that it
    could make differently in another kernel.
    Source: Milakov & Gimelshein 2018, algorithm 3.
    """
    TILE_M: tl.constexpr = q.shape[0]
    TILE_D: tl.constexpr = q.shape[1]
    o_n = tl.arange(0, TILE_N)
    o_d = tl.arange(0, TILE_D)
    b_max = tl.full([TILE_M], float("-inf"), tl.float32)
    b_sum = tl.zeros([TILE_M], tl.float32)
    b_acc = tl.zeros([TILE_M, TILE_D], tl.float32)
    end = tl.minimum(begin + CHUNK, longest)
    b_block = tl.load(table + (begin + o_n) // BLOCK_SIZE, mask=begin + o_n < end, other=0)
    for start in range(begin, end, TILE_N):
        position = start + o_n
        o_kv = b_block.to(tl.int64) * BLOCK_STRIDE + position % BLOCK_SIZE * POSITION_STRIDE
        # Loaded for the next tile: an address that waits for a load of its own tile cannot be prefetched.
        ahead = position + TILE_N
        b_block = tl.load(table + ahead // BLOCK_SIZE, mask=ahead < end, other=0)
        # V is masked as K is: what lies behind the context may be NaN, which a weight of zero does not silence.
        mask = (position < end)[:, None] & (o_d < HEAD_DIM)[None, :]
        b_k = tl.load(k_head + o_kv[:, None] + o_d[None, :], mask=mask, other=0.0).to(q.dtype)
        b_v = tl.load(v_head + o_kv[:, None] + o_d[None, :], mask=mask, other=0.0).to(q.dtype)
        if USE_DOT:
            b_s = tl.dot(q, tl.trans(b_k), input_precision="ieee")
        else:
            b_s = tl.sum(q[:, None, :] * b_k[None, :, :], 2)
        b_s = tl.where(position[None, :] < lengths[:, None], b_s, float("-inf"))
        new_max = tl.maximum(b_max, tl.max(b_s, 1) * scale)
        shift = _finite(new_max)
        decay = tl.exp2(b_max - shift)
        b_p = tl.exp2(tl.fma(b_s, scale, -shift[:, None]))
        b_sum = tl.fma(b_sum, decay, tl.sum(b_p, 1))
        b_acc *= decay[:, None]
        if USE_DOT:
            b_acc = tl.dot(b_p.to(q.dtype), b_v, b_acc, input_precision="ieee")
        else:
            b_acc += tl.sum(b_p[:, :, None] * b_v[None, :, :], 1)
        b_max = new_max
    return b_max, b_sum, b_acc


@triton.jit
def _merge(b_max, b_sum, b_acc, chunk_max, chunk_sum, chunk_acc):
    """Join a chunk, as `_attend_chunk` returns it, to the chunks before it."""
    new_max = tl.maximum(b_max, chunk_max)
    shift = _finite(new_max)
    decay = tl.exp2(b_max - shift)
    weight = tl.exp2(chunk_max - shift)
    b_sum = tl.fma(b_sum, decay, chunk_sum * weight)
    b_acc = tl.fma(b_acc, decay[:, None], chunk_acc * weight[:, None])
    return new_max, b_sum, b_acc


@triton.jit
def _finite(b_max):
    """A maximum to subtract: a row that has seen nothing has none, and -inf - -inf is no number."""
    return tl.where(b_max == float("-inf"), 0.0, b_max)


@triton.jit
def _normalised(b_sum, b_acc):
    """Zeros for a row that has seen nothing."""
    return b_acc / tl.where(b_sum == 0.0, 1.0, b_sum)[:, None]


@triton.jit
def _row_of_tile(query_start, tile, num_rows, TILE_Q: tl.constexpr):
    """Whose queries a tile holds. Row r's tiles begin at query_start[r] // TILE_Q + r: far enough apart for any length,
    and known without a sum over the rows before it."""
    low = 0
    high = num_rows
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(query_start + middle) // TILE_Q + middle <= tile:
            low = middle
        else:
            high = middle
    return low


@triton.jit(do_not_specialize=["num_rows", "table_stride"])
def _attention_kernel(
    out,
    q,
    k_cache,
    v_cache,
    block_tables,
    query_start,
    context_lens,
    num_rows,
    table_stride,
    q_stride,
    q_head_stride,
    scale,
    CAUSAL: tl.constexpr,
    ONE_QUERY: tl.constexpr,
    GROUP: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_D: tl.constexpr,
    CHUNK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_STRIDE: tl.constexpr,
    HEAD_STRIDE: tl.constexpr,
    POSITION_STRIDE: tl.constexpr,
    USE_DOT: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """softmax(q k^T * scale) v for TILE_M // TILE_H queries of one row, all heads of one KV head, over all chunks.

    Grid: (tiles, kv_heads). ONE_QUERY: tile i is row i, and its query i.
    """
    TILE_Q: tl.constexpr = TILE_M // TILE_H
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    if ONE_QUERY:
        row = tile
        query_begin = tile
        query_len = 1
        first = 0
    else:
        row = _row_of_tile(query_start, tile, num_rows, TILE_Q)
        query_begin = tl.load(query_start + row)
        query_len = tl.load(query_start + row + 1) - query_begin
        first = (tile - query_begin // TILE_Q - row) * TILE_Q
    if first >= query_len:
        return
    context_len = tl.load(context_lens + row)

    o_m = tl.arange(0, TILE_M)
    o_d = tl.arange(0, TILE_D)
    query = first + o_m // TILE_H
    head = kv_head * GROUP + o_m % TILE_H
    is_row = (query < query_len) & (o_m % TILE_H < GROUP)
    mask = is_row[:, None] & (o_d < HEAD_DIM)[None, :]
    o_query = (query_begin + query).to(tl.int64)
    p_q = q + (o_query * q_stride + head * q_head_stride)[:, None] + o_d[None, :]
    b_q = tl.load(p_q, mask=mask, other=0.0).to(OPERAND)

    # Queries of the row behind this tile's last one: what they wrote, this tile does not see.
    longest = context_len
    lengths = tl.where(is_row, context_len, 0)
    if CAUSAL:
        longest = context_len - tl.maximum(query_len - first - TILE_Q, 0)
        lengths = tl.where(is_row, context_len - query_len + query + 1, 0)

    b_max = tl.full([TILE_M], float("-inf"), tl.float32)
    b_sum = tl.zeros([TILE_M], tl.float32)
    b_acc = tl.zeros([TILE_M, TILE_D], tl.float32)
    k_head = k_cache + kv_head * HEAD_STRIDE
    v_head = v_cache + kv_head * HEAD_STRIDE
    table = block_tables + tl.cast(row, tl.int64) * table_stride
    for begin in range(0, longest, CHUNK):
        chunk_max, chunk_sum, chunk_acc = _attend_chunk(
            b_q,
            k_head,
            v_head,
            table,
            begin,
            longest,
            lengths,
            scale,
            TILE_N,
            CHUNK,
            HEAD_DIM,
            BLOCK_SIZE,
            BLOCK_STRIDE,
            POSITION_STRIDE,
            USE_DOT,
        )
        b_max, b_sum, b_acc = _merge(b_max, b_sum, b_acc, chunk_max, chunk_sum, chunk_acc)

    num_heads = tl.num_programs(1) * GROUP
    p_out = out + ((o_query * num_heads + head) * HEAD_DIM)[:, None] + o_d[None, :]
    tl.store(p_out, _normalised(b_sum, b_acc).to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["table_stride", "max_chunks"])
def _split_attention_kernel(
    partial_acc,
    partial_max,
    partial_sum,
    q,
    k_cache,
    v_cache,
    block_tables,
    context_lens,
    table_stride,
    max_chunks,
    q_stride,
    q_head_stride,
    scale,
    GROUP: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_D: tl.constexpr,
    CHUNK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_STRIDE: tl.constexpr,
    HEAD_STRIDE: tl.constexpr,
    POSITION_STRIDE: tl.constexpr,
    USE_DOT: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """The sums of every num_splits-th chunk of one row's context, for its one query and all heads of one KV head.

    Grid: (rows, kv_heads, num_splits). partial_acc: [R, max_chunks, H, D]; partial_max, partial_sum:
    [R, max_chunks, H]; a context of c chunks writes the first c.
    Source: flash-decoding (Dao et al. 2023), with a chunk of fixed length.
    """
    row = tl.program_id(0)
    kv_head = tl.program_id(1)
    context_len = tl.load(context_lens + row)

    o_m = tl.arange(0, TILE_M)
    o_d = tl.arange(0, TILE_D)
    head = kv_head * GROUP + o_m
    is_row = o_m < GROUP
    mask = is_row[:, None] & (o_d < HEAD_DIM)[None, :]
    p_q = q + (row.to(tl.int64) * q_stride + head * q_head_stride)[:, None] + o_d[None, :]
    b_q = tl.load(p_q, mask=mask, other=0.0).to(OPERAND)
    lengths = tl.where(is_row, context_len, 0)

    num_heads = tl.num_programs(1) * GROUP
    k_head = k_cache + kv_head * HEAD_STRIDE
    v_head = v_cache + kv_head * HEAD_STRIDE
    table = block_tables + row.to(tl.int64) * table_stride
    for chunk in range(tl.program_id(2), tl.cdiv(context_len, CHUNK), tl.num_programs(2)):
        b_max, b_sum, b_acc = _attend_chunk(
            b_q,
            k_head,
            v_head,
            table,
            chunk * CHUNK,
            context_len,
            lengths,
            scale,
            TILE_N,
            CHUNK,
            HEAD_DIM,
            BLOCK_SIZE,
            BLOCK_STRIDE,
            POSITION_STRIDE,
            USE_DOT,
        )
        o_partial = (row.to(tl.int64) * max_chunks + chunk) * num_heads + head
        tl.store(partial_max + o_partial, b_max, mask=is_row)
        tl.store(partial_sum + o_partial, b_sum, mask=is_row)
        tl.store(partial_acc + (o_partial * HEAD_DIM)[:, None] + o_d[None, :], b_acc, mask=mask)


@triton.jit(do_not_specialize=["max_chunks"])
def _merge_splits_kernel(
    out,
    partial_acc,
    partial_max,
    partial_sum,
    context_lens,
    max_chunks,
    GROUP: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_D: tl.constexpr,
    CHUNK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """Join the chunks of one row and KV head, first to last, as `_attention_kernel` does. Grid: (rows, kv_heads)."""
    row = tl.program_id(0).to(tl.int64)
    num_heads = tl.num_programs(1) * GROUP
    o_h = tl.arange(0, TILE_H)
    o_d = tl.arange(0, TILE_D)
    head = tl.program_id(1) * GROUP + o_h
    is_row = o_h < GROUP
    mask = is_row[:, None] & (o_d < HEAD_DIM)[None, :]
    b_max = tl.full([TILE_H], float("-inf"), tl.float32)
    b_sum = tl.zeros([TILE_H], tl.float32)
    b_acc = tl.zeros([TILE_H, TILE_D], tl.float32)
    # A loop without tl.dot prefetches only where it is told to.
    num_chunks = tl.cdiv(tl.load(context_lens + row), CHUNK)
    for chunk in tl.range(0, num_chunks, num_stages=3):  # pyright: ignore[reportGeneralTypeIssues]
        o_partial = (row * max_chunks + chunk) * num_heads + head
        chunk_max = tl.load(partial_max + o_partial, mask=is_row, other=float("-inf"))
        chunk_sum = tl.load(partial_sum + o_partial, mask=is_row, other=0.0)
        chunk_acc = tl.load(partial_acc + (o_partial * HEAD_DIM)[:, None] + o_d[None, :], mask=mask, other=0.0)
        b_max, b_sum, b_acc = _merge(b_max, b_sum, b_acc, chunk_max, chunk_sum, chunk_acc)
    p_out = out + ((row * num_heads + head) * HEAD_DIM)[:, None] + o_d[None, :]
    tl.store(p_out, _normalised(b_sum, b_acc).to(out.dtype.element_ty), mask=mask)


def paged_attention(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, plan: AttentionPlan, *, scale: float
) -> torch.Tensor:
    """Attention of every query over its sequence's cache.

    q: [N, H, D], rows may be strided; k_cache, v_cache: [blocks, kv_heads, block_size, D], H a multiple of kv_heads
    -> [N, H, D]. A query whose sequence has nothing cached gives exact zeros.
    Raises: ValueError where tensors do not fit each other, or this GPU.
    Source: Vaswani et al. 2017, equation 1; Ainslie et al. 2023 for grouped heads; Kwon et al. 2023 for paging.
    """
    if backend.use_triton(q):
        return _attend_on_gpu(q, k_cache, v_cache, plan, scale=scale)
    if plan.cpu is None:
        raise ValueError("this attention plan has no CPU reads: make it by plan_attention(device=torch.device('cpu'))")
    num_queries, num_heads, head_dim = q.shape
    num_kv_heads = k_cache.shape[1]
    if not plan.cpu.reads:
        return torch.empty_like(q)
    calls, order, restore = plan.cpu.calls_for(num_kv_heads, head_dim)
    ordered = q.index_select(0, order).view(num_queries, num_kv_heads, num_heads // num_kv_heads, head_dim)
    parts = ordered.split([call.num_queries for call in calls])
    with nullcontext() if _keeps_bits_in_parallel(num_heads // num_kv_heads, q.dtype) else one_thread():
        attended = [_attend(part, k_cache, v_cache, call, scale=scale) for part, call in zip(parts, calls, strict=True)]
    return torch.cat(attended).index_select(0, restore).view(num_queries, num_heads, head_dim)


@dataclass(frozen=True, slots=True)
class _Tiling:
    """How a GPU generation goes through a chunk.

    kv_bytes: size of a tile of K; `stages` - 1 of them and as many of V leave room in shared memory for two programs
    or more to a multiprocessor. use_dot: whether tl.dot compiles to matrix instructions.
    """

    kv_bytes: int
    warps: int
    stages: int
    use_dot: bool


# By compute capability, each up to the next: 86 and 89 have 99 KB of shared memory, 80 has 163, 90 and 100 have 227.
_TILINGS = {
    75: _Tiling(kv_bytes=2048, warps=8, stages=1, use_dot=False),
    80: _Tiling(kv_bytes=16384, warps=4, stages=3, use_dot=True),
    86: _Tiling(kv_bytes=8192, warps=4, stages=3, use_dot=True),
    90: _Tiling(kv_bytes=16384, warps=4, stages=3, use_dot=True),
    120: _Tiling(kv_bytes=8192, warps=4, stages=3, use_dot=True),
}


def _tiling_of(q: torch.Tensor) -> _Tiling:
    capability = backend.capability_of(q)
    if capability < min(_TILINGS):
        raise ValueError(f"compute capability {capability / 10} is below 7.5, the oldest with attention kernels")
    if capability < 80 and q.dtype == torch.bfloat16:
        raise ValueError(f"compute capability {capability / 10} has no bfloat16: choose float16")
    return _TILINGS[max(bucket for bucket in _TILINGS if bucket <= capability)]


def _attend_on_gpu(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, plan: AttentionPlan, *, scale: float
) -> torch.Tensor:
    _check(q, k_cache, v_cache, plan, scale=scale)
    tiling = _tiling_of(q)
    num_queries, num_heads, head_dim = q.shape
    num_rows, num_kv_heads = len(plan.context_lens), k_cache.shape[1]
    out = torch.empty(num_queries, num_heads, head_dim, dtype=q.dtype, device=q.device)
    if num_queries == 0:
        return out
    group = num_heads // num_kv_heads
    tile_h, tile_d = triton.next_power_of_2(group), max(16, triton.next_power_of_2(head_dim))
    # 16 rows are what a matrix instruction takes. Decode pads to them what prefill fills: tiles of one shape in both
    # are what gives a position the same bits in both.
    tile_m = max(16, tile_h) if tiling.use_dot else tile_h
    arguments = {
        "q": q,
        "k_cache": k_cache,
        "v_cache": v_cache,
        "block_tables": plan.block_tables,
        "context_lens": plan.context_lens,
        "table_stride": plan.block_tables.stride(0),
        "q_stride": q.stride(0),
        "q_head_stride": q.stride(1),
        "scale": scale * LOG2_E,
    }
    shape = {"GROUP": group, "TILE_D": tile_d, "CHUNK": CHUNK, "HEAD_DIM": head_dim}
    tiles = {
        "TILE_M": tile_m,
        "TILE_N": min(64, max(16, tiling.kv_bytes // (tile_d * q.element_size()))),
        "BLOCK_SIZE": k_cache.shape[2],
        "BLOCK_STRIDE": k_cache.stride(0),
        "HEAD_STRIDE": k_cache.stride(1),
        "POSITION_STRIDE": k_cache.stride(2),
        "USE_DOT": tiling.use_dot,
        "OPERAND": backend.dot_dtype(q) if tiling.use_dot else tl.float32,
    }
    one_query = plan.max_query_len == 1 and num_queries == num_rows
    max_chunks = -(-plan.max_context_len // CHUNK)
    num_splits = _num_splits(q, num_rows * num_kv_heads, max_chunks) if one_query else 1
    if num_splits == 1:
        num_tiles = num_rows if one_query else num_queries // (tile_m // tile_h) + num_rows
        backend.launch(
            _attention_kernel,
            (num_tiles, num_kv_heads),
            {"out": out, "query_start": plan.query_start, "num_rows": num_rows, **arguments},
            {"CAUSAL": plan.causal and not one_query, "ONE_QUERY": one_query, "TILE_H": tile_h, **shape, **tiles},
            warps=tiling.warps,
            stages=tiling.stages,
        )
        return out
    heads = (num_rows, max_chunks, num_heads)
    partials = {
        "partial_acc": torch.empty(*heads, head_dim, dtype=torch.float32, device=q.device),
        "partial_max": torch.empty(*heads, dtype=torch.float32, device=q.device),
        "partial_sum": torch.empty(*heads, dtype=torch.float32, device=q.device),
        "max_chunks": max_chunks,
    }
    backend.launch(
        _split_attention_kernel,
        (num_rows, num_kv_heads, num_splits),
        {**partials, **arguments},
        {**shape, **tiles},
        warps=tiling.warps,
        stages=tiling.stages,
    )
    backend.launch(
        _merge_splits_kernel,
        (num_rows, num_kv_heads),
        {"out": out, "context_lens": plan.context_lens, **partials},
        {"TILE_H": tile_h, **shape},
        warps=2,
        stages=1,
    )
    return out


def _num_splits(q: torch.Tensor, num_pairs: int, max_chunks: int) -> int:
    """Programs to share each pair of a row and a KV head: enough to fill the GPU, one if the pairs fill it already."""
    wanted = -(-PROGRAMS_PER_PROCESSOR * backend.processors_of(q) // num_pairs)
    return max(1, min(wanted, max_chunks))


def _check(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, plan: AttentionPlan, *, scale: float) -> None:
    num_heads, head_dim = q.shape[1:]
    num_rows = len(plan.context_lens)
    if k_cache.shape != v_cache.shape or k_cache.stride() != v_cache.stride():
        raise ValueError(
            f"K and V caches must have one layout, not {tuple(k_cache.shape)} of strides {k_cache.stride()} and "
            f"{tuple(v_cache.shape)} of strides {v_cache.stride()}"
        )
    if num_heads % k_cache.shape[1] or head_dim != k_cache.shape[3]:
        raise ValueError(
            f"queries of {num_heads} heads x {head_dim} do not fit a cache of {k_cache.shape[1]} heads x "
            f"{k_cache.shape[3]}: the heads must be a multiple, the size of a head the same"
        )
    if not q.dtype == k_cache.dtype == v_cache.dtype:
        raise ValueError(f"q, K and V must have one dtype, not {q.dtype}, {k_cache.dtype} and {v_cache.dtype}")
    if q.stride(2) != 1 or k_cache.stride(3) != 1:
        raise ValueError(f"a head's values must be neighbours in memory: strides {q.stride()} and {k_cache.stride()}")
    if len(plan.query_start) != num_rows + 1 or len(plan.block_tables) != num_rows:
        raise ValueError(
            f"a plan of {num_rows} context lengths needs as many block tables and one query start more, not "
            f"{len(plan.block_tables)} and {len(plan.query_start)}"
        )
    for name in ("block_tables", "query_start", "context_lens"):
        tensor: torch.Tensor = getattr(plan, name)
        if tensor.dtype != torch.int32 or tensor.stride(-1) != 1:
            raise ValueError(f"{name} must be int32, neighbours in memory, not {tensor.dtype} of {tensor.stride()}")
    if scale <= 0:
        raise ValueError(f"scale must be above 0, not {scale}")


def _keeps_bits_in_parallel(group: int, dtype: torch.dtype) -> bool:
    """Whether products of `group` rows are the same on whichever of this process' threads, and on all of them.

    Those of 16 bits are not on AMD's: one in a thousand is another, which no trial would find. Where nobody looked they
    are not trusted either.
    """
    return dtype == torch.float32 and (takes_pairs(dtype) or group in equal_counts(dtype, torch.get_num_threads()))


def _attend(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, call: _Call, *, scale: float
) -> torch.Tensor:
    """The queries of one call, [num_queries, kv_heads, group, D]."""
    _, _, length, head_dim = call.shape
    if length == 0:
        return torch.zeros_like(q)
    k, v = _seen(k_cache, call), _seen(v_cache, call)
    missing = -head_dim % ALIGNED_DIMS
    if not missing:
        return F.scaled_dot_product_attention(q, k, v, scale=scale)
    # Where a position begins would depend on which it is.
    q, k, v = (F.pad(x, (0, missing)) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=scale)[..., :head_dim]


def _seen(cache: torch.Tensor, call: _Call) -> torch.Tensor:
    """What a call sees of a cache: in a CPU's the positions are rows of all heads, one after the other."""
    if call.slots is not None:
        cache = cache.transpose(1, 2).flatten(0, 1).index_select(0, call.slots)
    elif call.blocks is not None:
        cache = cache.transpose(1, 2).index_select(0, call.blocks)
    return cache.as_strided(call.shape, call.strides, cache.storage_offset() + call.first)
