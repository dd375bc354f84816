"""Paged attention: every position of a batch over its own sequence's cached keys and values.

One plan serves all layers of a step. On the CPU each position attends by itself, over a view of the cache where its
blocks neighbour each other and over a copy where they do not: the same call for the same position whether it is
decoded, prefilled in a chunk of any size, or recomputed, so its result has the same bits every time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True, slots=True, eq=False)
class _Read:
    """What one query position, or two with as much to read, reads: `length` positions from each first slot.

    queries: their indices. blocks: where a query's blocks are no run of neighbours, those blocks; its first slot is
    then 0 of their copy.
    """

    queries: tuple[int, ...]
    first_slots: tuple[int, ...]
    length: int
    blocks: torch.Tensor | None


@dataclass(frozen=True, slots=True, eq=False)
class AttentionPlan:
    """Where each query of a step finds its keys.

    block_tables: int32 [R, max_blocks], rows of sequences; query_start: int32 [R + 1], the queries of row r are
    query_start[r] .. query_start[r + 1]; context_lens: int32 [R], cached positions of row r, those of its own
    queries included; causal: query i of n sees context_len - n + i + 1 positions, else all of them.
    reads, order, restore: the same for the CPU; order (int64 [N]) puts the queries into the order of the reads, restore
    back into their own.
    """

    block_tables: torch.Tensor
    query_start: torch.Tensor
    context_lens: torch.Tensor
    causal: bool
    reads: tuple[_Read, ...]
    order: torch.Tensor
    restore: torch.Tensor


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
    starts = [0]
    for query_len in query_lens:
        starts.append(starts[-1] + query_len)
    reads: list[_Read] = []
    if device.type == "cpu":
        for row, table in enumerate(block_tables):
            queries = range(starts[row], starts[row + 1])
            reads += _reads_of(table, queries, context_len=context_lens[row], block_size=block_size, causal=causal)
        reads = _in_pairs(reads)
    order = torch.tensor([query for read in reads for query in read.queries], dtype=torch.int64)
    return AttentionPlan(
        block_tables=torch.tensor(padded, dtype=torch.int32, device=device).view(len(padded), width),
        query_start=torch.tensor(starts, dtype=torch.int32, device=device),
        context_lens=torch.tensor(list(context_lens), dtype=torch.int32, device=device),
        causal=causal,
        reads=tuple(reads),
        order=order,
        restore=order.argsort(),
    )


def _reads_of(table: Sequence[int], queries: range, *, context_len: int, block_size: int, causal: bool) -> list[_Read]:
    used = table[: -(-context_len // block_size)]
    first = used[0] if used else 0
    is_run = all(block == first + i for i, block in enumerate(used))
    blocks = None if is_run else torch.tensor(used, dtype=torch.int64)
    slots = (first * block_size if is_run else 0,)
    return [
        _Read((query,), slots, context_len - (queries.stop - query - 1 if causal else 0), blocks) for query in queries
    ]


def _in_pairs(reads: Sequence[_Read]) -> list[_Read]:
    """Two runs of one length are one strided view, so guidance branches share a call; its cost is mostly the call."""
    paired: list[_Read] = []
    unpaired: dict[int, _Read] = {}
    for read in reads:
        other = unpaired.pop(read.length, None) if read.blocks is None else None
        if read.blocks is not None or read.length == 0:
            paired.append(read)
        elif other is None:
            unpaired[read.length] = read
        else:
            low, high = sorted((other, read), key=lambda item: item.first_slots)
            paired.append(_Read(low.queries + high.queries, low.first_slots + high.first_slots, read.length, None))
    return paired + list(unpaired.values())


def paged_attention_reference(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, plan: AttentionPlan, *, scale: float
) -> torch.Tensor:
    """softmax(q k^T * scale) v in float64, one query at a time; a query with nothing to read gives zeros."""
    out = torch.zeros_like(q)
    group = q.shape[1] // k_cache.shape[1]
    for row in range(plan.context_lens.shape[0]):
        begin, end = int(plan.query_start[row]), int(plan.query_start[row + 1])
        blocks = plan.block_tables[row].long()
        keys = k_cache[blocks].transpose(0, 1).flatten(1, 2).double().repeat_interleave(group, 0)
        values = v_cache[blocks].transpose(0, 1).flatten(1, 2).double().repeat_interleave(group, 0)
        context_len = int(plan.context_lens[row])
        for i in range(begin, end):
            length = context_len - (end - i) + 1 if plan.causal else context_len
            if length == 0:
                continue
            scores = torch.einsum("hd,htd->ht", q[i].double(), keys[:, :length]) * scale
            out[i] = torch.einsum("ht,htd->hd", scores.softmax(-1), values[:, :length]).to(q.dtype)
    return out


def paged_attention(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, plan: AttentionPlan, *, scale: float
) -> torch.Tensor:
    """Attention of every query over its sequence's cache.

    q: [N, H, D]; k_cache, v_cache: [blocks, kv_heads, block_size, D], H a multiple of kv_heads -> [N, H, D].
    A query whose sequence has nothing cached gives exact zeros.
    Source: Vaswani et al. 2017, equation 1; Ainslie et al. 2023 for grouped heads; Kwon et al. 2023 for paging.
    """
    if q.is_cuda:
        return _attend_gathered(q, k_cache, v_cache, plan, scale=scale)
    num_queries, num_heads, head_dim = q.shape
    num_kv_heads = k_cache.shape[1]
    if not plan.reads:
        return torch.empty_like(q)
    ordered = q.index_select(0, plan.order).view(num_queries, num_kv_heads, num_heads // num_kv_heads, head_dim)
    parts = ordered.split([len(read.queries) for read in plan.reads])
    attended = [
        _attend(part, k_cache, v_cache, read, scale=scale) for part, read in zip(parts, plan.reads, strict=True)
    ]
    return torch.cat(attended).index_select(0, plan.restore).view(num_queries, num_heads, head_dim)


def _attend(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, read: _Read, *, scale: float
) -> torch.Tensor:
    """The queries of one read, [1 or 2, kv_heads, group, D]."""
    if read.length == 0:
        return torch.zeros_like(q)
    if read.blocks is not None:
        k_cache, v_cache = _gather(k_cache, read.blocks), _gather(v_cache, read.blocks)
    return F.scaled_dot_product_attention(q, _runs(k_cache, read), _runs(v_cache, read), scale=scale)


def _runs(cache: torch.Tensor, read: _Read) -> torch.Tensor:
    """View the positions of a read in a CPU cache, [1 or 2, kv_heads, length, D]: there they are `head_dim` wide rows
    of all heads, one after the other."""
    _, num_kv_heads, _, head_dim = cache.shape
    position = num_kv_heads * head_dim
    first = read.first_slots[0]
    apart = (read.first_slots[-1] - first) * position
    return cache.as_strided(
        (len(read.first_slots), num_kv_heads, read.length, head_dim),
        (apart, head_dim, position, 1),
        cache.storage_offset() + first * position,
    )


def _gather(cache: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    return cache.transpose(1, 2).index_select(0, blocks).transpose(1, 2)


def _attend_gathered(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, plan: AttentionPlan, *, scale: float
) -> torch.Tensor:
    """All queries at once over gathered, masked pages: the plain path of a device without a kernel of its own."""
    num_queries, num_heads, head_dim = q.shape
    query_lens = (plan.query_start[1:] - plan.query_start[:-1]).long()
    rows = torch.repeat_interleave(torch.arange(len(query_lens), device=q.device), query_lens)
    lengths = plan.context_lens[rows].long()
    if plan.causal:
        lengths = lengths - plan.query_start[rows + 1].long() + torch.arange(num_queries, device=q.device) + 1
    tables = plan.block_tables[rows].long()
    group = num_heads // k_cache.shape[1]
    keys = k_cache[tables].transpose(1, 2).flatten(2, 3)
    values = v_cache[tables].transpose(1, 2).flatten(2, 3)
    seen = torch.arange(keys.shape[2], device=q.device)[None] < lengths[:, None]
    values = values.masked_fill(~seen[:, None, :, None], 0.0)
    scores = torch.einsum("nkgd,nktd->nkgt", q.view(num_queries, -1, group, head_dim).float() * scale, keys.float())
    scores = scores.masked_fill(~seen[:, None, None], -math.inf)
    weights = torch.where(lengths[:, None, None, None] > 0, scores.softmax(-1), 0.0)
    return (
        torch.einsum("nkgt,nktd->nkgd", weights, values.float()).to(q.dtype).reshape(num_queries, num_heads, head_dim)
    )
