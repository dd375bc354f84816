"""Rotary position embedding; in the decoder together with the KV-cache write that follows it.

Which elements of a head form a pair differs between families: halves, (i, i + R/2), or neighbours, (2i, 2i + 1). R, the
rotary dim, is the head dim or less; what lies beyond it is not rotated. Either way a rotation by one row [a | b] of
`rotary_table` is x * a + partner(x) * b, where partner exchanges the two elements of every pair.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from declaim.kernels import backend
from declaim.kernels.kv_cache import check_cache, heads_are_adjacent, layout_of, slot_offset, write_cache

_TILE_HEADS = 4


def rotary_table(
    num_positions: int, rotary_dim: int, *, theta: float, device: torch.device, interleaved: bool = False
) -> torch.Tensor:
    """Cosines and signed sines of every position, float32 [num_positions, 2 * rotary_dim].

    With c_i and s_i the cosine and sine of position * theta^(-2i / R) for i < R/2, a row is
    halves:      c_0 c_1 .. | c_0 c_1 .. || -s_0 -s_1 .. | s_0 s_1 ..
    interleaved: c_0 c_0 c_1 c_1 ..      || -s_0 s_0 -s_1 s_1 ..
    Source: Su et al. 2021, equation 15.
    """
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float32, device=device) / rotary_dim
    inverse_frequencies = 1.0 / (theta**exponents)
    angles = torch.arange(num_positions, dtype=torch.float32, device=device)[:, None] * inverse_frequencies
    cos, sin = angles.cos(), angles.sin()
    if interleaved:
        return torch.cat([cos.repeat_interleave(2, dim=-1), torch.stack([-sin, sin], dim=-1).flatten(1)], dim=-1)
    return torch.cat([cos, cos, -sin, sin], dim=-1)


def apply_rotary_reference(x: torch.Tensor, angles: torch.Tensor, *, interleaved: bool = False) -> torch.Tensor:
    """Each pair turned as a complex number, in float32."""
    rotary_dim = angles.shape[-1] // 2
    first, second = slice(0, rotary_dim // 2), slice(rotary_dim // 2, rotary_dim)
    if interleaved:
        first, second = slice(0, rotary_dim, 2), slice(1, rotary_dim, 2)
    cos, sin = angles[:, None, :rotary_dim], angles[:, None, rotary_dim:]
    turned = torch.complex(x[..., first].float(), x[..., second].float())
    turned = turned * torch.complex(cos[..., first], sin[..., second])
    out = x.clone()
    out[..., first] = turned.real.to(x.dtype)
    out[..., second] = turned.imag.to(x.dtype)
    return out


@triton.jit
def _rotary_kernel(
    x,
    angles,
    rotated,
    slots,
    k_cache,
    v_cache,
    x_stride,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    IS_INTERLEAVED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_STRIDE: tl.constexpr,
    HEAD_STRIDE: tl.constexpr,
    POSITION_STRIDE: tl.constexpr,
    TILE_HEADS: tl.constexpr,
    TILE_DIM: tl.constexpr,
):
    """Some heads of one row [heads | kv heads | kv heads]: turn the first two parts, keep the third; heads go to
    `rotated`, kv heads to the caches at the row's slot."""
    row = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * TILE_HEADS + tl.arange(0, TILE_HEADS))[:, None]
    dim = tl.arange(0, TILE_DIM)[None]
    is_turned = (head < NUM_HEADS + NUM_KV_HEADS) & (dim < ROTARY_DIM)
    source = x + row * x_stride + head * HEAD_DIM
    values = tl.load(source + dim, mask=(head < NUM_HEADS + 2 * NUM_KV_HEADS) & (dim < HEAD_DIM), other=0.0)
    values = values.to(tl.float32)
    if IS_INTERLEAVED:
        even, odd = tl.split(tl.reshape(values, (TILE_HEADS, TILE_DIM // 2, 2)))
        partners = tl.reshape(tl.join(odd, even), (TILE_HEADS, TILE_DIM))
    else:
        partner = tl.where(dim < ROTARY_DIM // 2, dim + ROTARY_DIM // 2, dim - ROTARY_DIM // 2)
        partners = tl.load(source + partner, mask=is_turned, other=0.0).to(tl.float32)
    turn = angles + row * (2 * ROTARY_DIM) + dim
    cos = tl.load(turn, mask=dim < ROTARY_DIM, other=1.0)
    sin = tl.load(turn + ROTARY_DIM, mask=dim < ROTARY_DIM, other=0.0)
    result = tl.where(is_turned, values * cos + partners * sin, values).to(rotated.dtype.element_ty)
    is_query = (head < NUM_HEADS) & (dim < HEAD_DIM)
    tl.store(rotated + (row * NUM_HEADS + head) * HEAD_DIM + dim, result, mask=is_query)
    if slots is not None:
        slot = tl.load(slots + row)
        if slot >= 0:
            start = slot_offset(slot, BLOCK_SIZE, BLOCK_STRIDE, POSITION_STRIDE) + dim
            k_head, v_head = head - NUM_HEADS, head - NUM_HEADS - NUM_KV_HEADS
            is_key = (k_head >= 0) & (k_head < NUM_KV_HEADS) & (dim < HEAD_DIM)
            is_value = (v_head >= 0) & (v_head < NUM_KV_HEADS) & (dim < HEAD_DIM)
            tl.store(k_cache + start + k_head * HEAD_STRIDE, result, mask=is_key)
            tl.store(v_cache + start + v_head * HEAD_STRIDE, result, mask=is_value)


def apply_rotary(x: torch.Tensor, angles: torch.Tensor, *, interleaved: bool = False) -> torch.Tensor:
    """Rotate the pairs of x, halves or interleaved as its table was made.

    x: [N, H, D]; angles: [N, 2R], rows of `rotary_table` at the positions of x, R <= D -> [N, H, D], contiguous.
    Raises: ValueError (on the GPU) for shapes, strides or dtypes that the kernel cannot read.
    """
    if backend.use_triton(x):
        return _rotate(x, angles, None, num_heads=x.shape[1], interleaved=interleaved)
    rotary_dim = angles.shape[-1] // 2
    rows = angles.to(x.dtype)[:, None]
    turned = x if rotary_dim == x.shape[-1] else x[..., :rotary_dim]
    if interleaved:
        partners = turned.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    else:
        half = rotary_dim // 2
        partners = torch.cat([turned[..., half:], turned[..., :half]], dim=-1)
    rotated = torch.addcmul(turned * rows[..., :rotary_dim], partners, rows[..., rotary_dim:])
    return rotated if turned is x else torch.cat([rotated, x[..., rotary_dim:]], dim=-1)


def rotary_and_cache(
    qkv: torch.Tensor,
    angles: torch.Tensor,
    slots: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    interleaved: bool = False,
) -> torch.Tensor:
    """Rotate queries and keys of a merged projection; store keys and values at their slots, in place.

    qkv: [N, (num_heads + 2 * num_kv_heads) * head_dim], [heads | kv heads | kv heads]; angles: [N, 2R], rows of
    `rotary_table`, R <= head_dim; slots: int64 [N], all different; k_cache, v_cache: [blocks, kv_heads, block_size, D].
    Returns the queries [N, H, D]: contiguous on the GPU, on the CPU a view of queries and keys.
    On the GPU, slot -1 is padding of a captured graph and stores nothing; the CPU has no padding and raises IndexError.
    Raises: ValueError for heads that do not add up to qkv, and on the GPU for what the kernel cannot read.
    """
    num_parts = num_heads + 2 * num_kv_heads
    if qkv.shape[1] != num_parts * head_dim:
        raise ValueError(
            f"a projection of {qkv.shape[1]} is not {num_heads} heads and 2 x {num_kv_heads} kv heads of {head_dim}"
        )
    heads = qkv.view(len(qkv), num_parts, head_dim)
    if backend.use_triton(qkv):
        return _rotate(heads, angles, (slots, k_cache, v_cache), num_heads=num_heads, interleaved=interleaved)
    first_v = num_heads + num_kv_heads
    # Queries and keys are turned as one tensor.
    rotated = apply_rotary(heads[:, :first_v], angles, interleaved=interleaved)
    write_cache(rotated[:, num_heads:], heads[:, first_v:], slots, k_cache, v_cache)
    return rotated[:, :num_heads]


def _rotate(
    x: torch.Tensor,
    angles: torch.Tensor,
    cache: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None,
    *,
    num_heads: int,
    interleaved: bool,
) -> torch.Tensor:
    """Launch the kernel over x [N, heads + 2 * kv heads, D]. cache: slots, k_cache, v_cache; None for no kv heads."""
    num_rows, num_parts, head_dim = x.shape
    if not heads_are_adjacent(x):
        raise ValueError(
            f"x has shape {tuple(x.shape)} and strides {x.stride()}: the heads of a row must lie side by side"
        )
    rotary_dim = angles.shape[-1] // 2
    is_table = angles.shape == (num_rows, 2 * rotary_dim) and angles.dtype == torch.float32 and angles.is_contiguous()
    if not is_table or rotary_dim > head_dim or rotary_dim % 2:
        raise ValueError(
            f"angles have shape {tuple(angles.shape)}, strides {angles.stride()} and {angles.dtype}: {num_rows} rows of"
            f" rotary_table are contiguous float32 [{num_rows}, 2R], R even and at most {head_dim}"
        )
    layout = {"NUM_KV_HEADS": 0, "BLOCK_SIZE": 1, "BLOCK_STRIDE": 0, "HEAD_STRIDE": 0, "POSITION_STRIDE": 0}
    slots, k_cache, v_cache = cache or (None, None, None)
    if slots is not None and k_cache is not None and v_cache is not None:
        shape = (num_rows, (num_parts - num_heads) // 2, head_dim)
        check_cache(slots, k_cache, v_cache, shape=shape, dtype=x.dtype)
        layout = layout_of(k_cache)
    rotated = torch.empty(num_rows, num_heads, head_dim, dtype=x.dtype, device=x.device)
    backend.launch(
        _rotary_kernel,
        (num_rows, triton.cdiv(num_parts, _TILE_HEADS)),
        {
            "x": x,
            "angles": angles,
            "rotated": rotated,
            "slots": slots,
            "k_cache": k_cache,
            "v_cache": v_cache,
            "x_stride": x.stride(0),
        },
        layout
        | {
            "NUM_HEADS": num_heads,
            "HEAD_DIM": head_dim,
            "ROTARY_DIM": rotary_dim,
            "IS_INTERLEAVED": interleaved,
            "TILE_HEADS": _TILE_HEADS,
            "TILE_DIM": triton.next_power_of_2(head_dim),
        },
        warps=2,
        stages=1,
    )
    return rotated
