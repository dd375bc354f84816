"""The paged KV cache: its memory, and writing to it.

A cache tensor is [blocks, kv_heads, block_size, head_dim] by index. On the GPU that is also its order in memory. On the
CPU the positions lie outermost, so that a run of neighbouring blocks reads as one strided view and attention over it
copies nothing.
"""

from __future__ import annotations

import torch


def allocate_cache(
    num_blocks: int, num_kv_heads: int, *, block_size: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """One layer's K or V cache, [num_blocks, num_kv_heads, block_size, head_dim], not initialised."""
    if device.type == "cpu":
        pages = torch.empty(num_blocks, block_size, num_kv_heads, head_dim, dtype=dtype)
        return pages.transpose(1, 2)
    return torch.empty(num_blocks, num_kv_heads, block_size, head_dim, dtype=dtype, device=device)


def write_cache(
    k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor
) -> None:
    """Store keys and values at their slots, in place.

    k, v: [N, kv_heads, head_dim]; slots: int64 [N], `block_id * block_size + offset`, all different.
    k_cache, v_cache: [blocks, kv_heads, block_size, head_dim].
    """
    if k_cache.is_cuda:
        block_size = k_cache.shape[2]
        blocks, offsets = slots // block_size, slots % block_size
        k_cache[blocks, :, offsets] = k
        v_cache[blocks, :, offsets] = v
        return
    _by_position(k_cache).index_copy_(0, slots, k)
    _by_position(v_cache).index_copy_(0, slots, v)


def _by_position(cache: torch.Tensor) -> torch.Tensor:
    pages = cache.transpose(1, 2)
    return pages.view(-1, pages.shape[2], pages.shape[3])
