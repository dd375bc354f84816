"""The paged KV cache: its memory, and writing to it.

A cache tensor is [blocks, kv_heads, block_size, head_dim] by index. On the GPU that is also its order in memory. On the
CPU the positions lie outermost, so that a run of neighbouring blocks reads as one strided view and attention over it
copies nothing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from declaim.kernels import backend

_TILE_HEADS = 4


def allocate_cache(
    num_blocks: int, num_kv_heads: int, *, block_size: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """One layer's K or V cache, [num_blocks, num_kv_heads, block_size, head_dim], not initialised."""
    if device.type == "cpu":
        pages = torch.empty(num_blocks, block_size, num_kv_heads, head_dim, dtype=dtype)
        return pages.transpose(1, 2)
    return torch.empty(num_blocks, num_kv_heads, block_size, head_dim, dtype=dtype, device=device)


@triton.jit
def slot_offset(slot, BLOCK_SIZE: tl.constexpr, BLOCK_STRIDE: tl.constexpr, POSITION_STRIDE: tl.constexpr):
    """Elements from the start of a cache to head 0 of a slot (int64, not negative)."""
    return (slot // BLOCK_SIZE) * BLOCK_STRIDE + (slot % BLOCK_SIZE) * POSITION_STRIDE


@triton.jit
def _write_cache_kernel(
    k,
    v,
    slots,
    k_cache,
    v_cache,
    k_stride,
    v_stride,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_STRIDE: tl.constexpr,
    HEAD_STRIDE: tl.constexpr,
    POSITION_STRIDE: tl.constexpr,
    TILE_HEADS: tl.constexpr,
    TILE_DIM: tl.constexpr,
):
    """Some heads of one position."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row)
    head = (tl.program_id(1) * TILE_HEADS + tl.arange(0, TILE_HEADS))[:, None]
    dim = tl.arange(0, TILE_DIM)[None]
    exists = (head < NUM_KV_HEADS) & (dim < HEAD_DIM)
    if slot >= 0:
        to = slot_offset(slot, BLOCK_SIZE, BLOCK_STRIDE, POSITION_STRIDE) + head * HEAD_STRIDE + dim
        tl.store(k_cache + to, tl.load(k + row * k_stride + head * HEAD_DIM + dim, mask=exists), mask=exists)
        tl.store(v_cache + to, tl.load(v + row * v_stride + head * HEAD_DIM + dim, mask=exists), mask=exists)


def write_cache_reference(
    k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor
) -> None:
    """One slot at a time; slot -1 stores nothing."""
    block_size = k_cache.shape[2]
    for row, slot in enumerate(slots.tolist()):
        if slot >= 0:
            k_cache[slot // block_size, :, slot % block_size] = k[row]
            v_cache[slot // block_size, :, slot % block_size] = v[row]


def write_cache(
    k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor
) -> None:
    """Store keys and values at their slots, in place.

    k, v: [N, kv_heads, head_dim]; slots: int64 [N], `block_id * block_size + offset`, all different.
    k_cache, v_cache: [blocks, kv_heads, block_size, head_dim].
    On the GPU, slot -1 is padding of a captured graph and stores nothing; the CPU has no padding and raises IndexError.
    Raises: ValueError (on the GPU) for shapes, strides or dtypes that the kernel cannot read.
    """
    if backend.use_triton(k_cache):
        _write_cache_triton(k, v, slots, k_cache, v_cache)
        return
    _by_position(k_cache).index_copy_(0, slots, k)
    _by_position(v_cache).index_copy_(0, slots, v)


def check_cache(
    slots: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    *,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
) -> None:
    """What kernels that write keys and values of a shape [N, kv_heads, D] rely on. Raises: ValueError."""
    num_rows, num_kv_heads, head_dim = shape
    if slots.shape != (num_rows,) or slots.dtype != torch.int64 or not slots.is_contiguous():
        raise ValueError(f"slots are {tuple(slots.shape)} {slots.dtype}: {num_rows} rows need int64 [{num_rows}]")
    if k_cache.shape != v_cache.shape or k_cache.stride() != v_cache.stride() or k_cache.stride(3) != 1:
        raise ValueError(
            f"k_cache has shape {tuple(k_cache.shape)} and strides {k_cache.stride()}, v_cache {tuple(v_cache.shape)}"
            f" and {v_cache.stride()}: make both with allocate_cache"
        )
    fits = k_cache.shape[1] == num_kv_heads and k_cache.shape[3] == head_dim
    if not fits or k_cache.dtype != dtype or v_cache.dtype != dtype:
        raise ValueError(
            f"caches of {k_cache.shape[1]} heads of {k_cache.shape[3]} in {k_cache.dtype} and {v_cache.dtype} cannot"
            f" hold {num_kv_heads} heads of {head_dim} in {dtype}"
        )


def heads_are_adjacent(x: torch.Tensor) -> bool:
    """Whether the heads of a row of x [N, H, D] lie side by side; rows may lie apart."""
    _, num_heads, head_dim = x.shape
    return x.stride(2) == 1 and (num_heads == 1 or x.stride(1) == head_dim)


def layout_of(cache: torch.Tensor) -> dict[str, int]:
    """The constexprs by which a kernel finds a slot's heads."""
    return {
        "NUM_KV_HEADS": cache.shape[1],
        "BLOCK_SIZE": cache.shape[2],
        "BLOCK_STRIDE": cache.stride(0),
        "HEAD_STRIDE": cache.stride(1),
        "POSITION_STRIDE": cache.stride(2),
    }


def _write_cache_triton(
    k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor
) -> None:
    num_rows, num_kv_heads, head_dim = k.shape
    check_cache(slots, k_cache, v_cache, shape=(num_rows, num_kv_heads, head_dim), dtype=k.dtype)
    for x in (k, v):
        if x.shape != k.shape or not heads_are_adjacent(x) or x.dtype != k.dtype:
            raise ValueError(
                f"k is {tuple(k.shape)} {k.dtype}; keys or values of {tuple(x.shape)} {x.dtype} with strides"
                f" {x.stride()} do not fit: both are [N, kv_heads, D], the heads of a row side by side"
            )
    backend.launch(
        _write_cache_kernel,
        (num_rows, triton.cdiv(num_kv_heads, _TILE_HEADS)),
        {
            "k": k,
            "v": v,
            "slots": slots,
            "k_cache": k_cache,
            "v_cache": v_cache,
            "k_stride": k.stride(0),
            "v_stride": v.stride(0),
        },
        layout_of(k_cache)
        | {"HEAD_DIM": head_dim, "TILE_HEADS": _TILE_HEADS, "TILE_DIM": triton.next_power_of_2(head_dim)},
        warps=2,
        stages=1,
    )


def _by_position(cache: torch.Tensor) -> torch.Tensor:
    pages = cache.transpose(1, 2)
    return pages.view(-1, pages.shape[2], pages.shape[3])
