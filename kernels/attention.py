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


@dataclass(frozen=True, slots=True)
class _Read:
    """What one query position reads: a run of `length` positions from `first_slot`, or the blocks listed."""

    first_slot: int
    length: int
    blocks: torch.Tensor | None


@dataclass(frozen=True, slots=True, eq=False)
class AttentionPlan:
    """Where each query of a step finds its keys.

    block_tables: int32 [R, max_blocks], rows of sequences; query_start: int32 [R + 1], the queries of row r are
    query_start[r] .. query_start[r + 1]; context_lens: int32 [R], cached positions of row r, those of its own
    queries included; causal: query i of n sees context_len - n + i + 1 positions, else all of them.
    """

    block_tables: torch.Tensor
    query_start: torch.Tensor
    context_lens: torch.Tensor
    causal: bool
    reads: tuple[_Read, ...]


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
        for table, query_len, context_len in zip(block_tables, query_lens, context_lens, strict=True):
            reads += _reads_of(table, query_len, context_len=context_len, block_size=block_size, causal=causal)
    return AttentionPlan(
        block_tables=torch.tensor(padded, dtype=torch.int32, device=device).view(len(padded), width),
        query_start=torch.tensor(starts, dtype=torch.int32, device=device),
        context_lens=torch.tensor(list(context_lens), dtype=torch.int32, device=device),
        causal=causal,
        reads=tuple(reads),
    )


def _reads_of(table: Sequence[int], query_len: int, *, context_len: int, block_size: int, causal: bool) -> list[_Read]:
    num_used = -(-context_len // block_size)
    used = table[:num_used]
    first = used[0] if num_used else 0
    is_run = all(block == first + i for i, block in enumerate(used))
    blocks = None if is_run else torch.tensor(used, dtype=torch.int64)
    if not causal:
        return [_Read(first * block_size, context_len, blocks)] * query_len
    return [_Read(first * block_size, context_len - query_len + i + 1, blocks) for i in range(query_len)]


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
    grouped = q.view(num_queries, 1, num_kv_heads, num_heads // num_kv_heads, head_dim)
    out = torch.empty_like(grouped)
    keys, values = _as_run(k_cache), _as_run(v_cache)
    for i, read in enumerate(plan.reads):
        if read.length == 0:
            out[i].zero_()
            continue
        if read.blocks is None:
            begin, k, v = read.first_slot, keys, values
        else:
            begin, k, v = 0, _gather(k_cache, read.blocks), _gather(v_cache, read.blocks)
        end = begin + read.length
        out[i] = F.scaled_dot_product_attention(grouped[i], k[:, :, begin:end], v[:, :, begin:end], scale=scale)
    return out.view(num_queries, num_heads, head_dim)


def _as_run(cache: torch.Tensor) -> torch.Tensor:
    """View a CPU cache as [1, kv_heads, blocks * block_size, D]."""
    return cache.transpose(0, 1).flatten(1, 2)[None]


def _gather(cache: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    return _as_run(cache.transpose(1, 2).index_select(0, blocks).transpose(1, 2))


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
