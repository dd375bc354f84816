"""Layers of 4-bit weights and 16-bit activations ("W4A16").

A group of 32, 64 or 128 inputs of an output shares a scale and an offset: w = q * scale + offset, q in 0 .. 15. On the
GPU weights lie in planar blocks of 128 inputs: nibble j of word r in block b is input 128 b + 16 j + r, so that a
nibble of 16 words is 16 inputs side by side, and multiplies 16 columns of x as they lie. On the CPU they lie as torch's
own int4 product wants them, which is fast for bfloat16 alone: x is cast to it and the result back.

A row's bits depend on that row alone: splits are those of kernels/matmul.py, whatever the number of rows. Beyond
DEQUANTIZE_ROWS a weight is dequantized and multiplied densely: the same products, over the same parts, 16 at a time in
the same order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from declaim.kernels import backend
from declaim.kernels.activation import silu_and_mul
from declaim.kernels.matmul import MIN_CAPABILITY, Split, check_epilogue, finish, matmul, split_of, sum_parts

GROUP_SIZES = (128, 64, 32)
OUT_MULTIPLE = 16  # what torch's CPU product and 16-byte loads both ask of the outputs
DEQUANTIZE_ROWS = 128  # more rows than this are bound by arithmetic, not by reading weights
_BLOCK = 128
_WORDS = 16  # of a block: a word holds 8 nibbles
_QUANTIZE_ROWS = 1 << 22  # weights searched at a time, which bounds memory
_SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)
_REFITS = 2
_TILE_N = 64
_STAGES = 4  # 12 KB of weights on their way in each program
_DEQUANTIZE_TILE = 128


@dataclass(frozen=True, slots=True, eq=False)
class Int4Weight:
    """A quantized weight in planar blocks.

    packed: int32 [16 * ceil(in / 128), out]; nibbles beyond `num_in` are 0. scales, offsets: [in / group, out].
    """

    packed: torch.Tensor
    scales: torch.Tensor
    offsets: torch.Tensor
    num_in: int

    @property
    def num_out(self) -> int:
        return self.packed.shape[1]

    @property
    def group_size(self) -> int:
        return self.num_in // self.scales.shape[0]

    @property
    def num_bytes(self) -> int:
        return sum(part.numel() * part.element_size() for part in (self.packed, self.scales, self.offsets))

    def to(self, *, dtype: torch.dtype, device: torch.device) -> Int4Weight:
        """Scales and offsets in `dtype`, the activations'; everything on `device`."""
        return Int4Weight(
            self.packed.to(device),
            self.scales.to(device=device, dtype=dtype),
            self.offsets.to(device=device, dtype=dtype),
            self.num_in,
        )


@dataclass(frozen=True, slots=True, eq=False)
class CpuInt4Weight:
    """A quantized weight in torch's own layout. packed: uint8 [out, in / 2]; scales_and_zeros: [in / group, out, 2]."""

    packed: torch.Tensor
    scales_and_zeros: torch.Tensor
    group_size: int

    @property
    def num_out(self) -> int:
        return self.packed.shape[0]

    @property
    def num_bytes(self) -> int:
        return sum(part.numel() * part.element_size() for part in (self.packed, self.scales_and_zeros))


def can_quantize(num_in: int, num_out: int, group_size: int) -> bool:
    """Whether a layer of this shape can be int4 with groups of this size."""
    return group_size in GROUP_SIZES and num_in % group_size == 0 and num_out % OUT_MULTIPLE == 0


def quantize_weight(weight: torch.Tensor, group_size: int) -> Int4Weight:
    """Quantize a checkpoint's weight [out, in] on its device; scales and offsets are float32.

    For each group the range of its weights is shrunk by the factor that leaves the least squared error; then the scale
    and offset that fit the rounded weights best, and rounding to them, take turns.
    Raises: ValueError where the shape does not fit the group size.
    """
    num_out, num_in = weight.shape
    if not can_quantize(num_in, num_out, group_size):
        raise ValueError(
            f"a weight of {num_out} outputs and {num_in} inputs cannot have int4 groups of {group_size}: groups are 32,"
            f" 64 or 128 and divide the inputs, and {OUT_MULTIPLE} divides the outputs"
        )
    groups = weight.reshape(num_out, num_in // group_size, group_size)
    rows = max(1, _QUANTIZE_ROWS // num_in)
    parts = [_quantize_groups(part.float()) for part in groups.split(rows)]
    codes, scales, offsets = (torch.cat([part[i] for part in parts]) for i in range(3))
    packed = pack_int4(codes.view(num_out, num_in).t())
    return Int4Weight(packed, scales.t().contiguous(), offsets.t().contiguous(), num_in)


def _quantize_groups(groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[out, in / G, G] float32 -> codes uint8 of that shape, scales and offsets [out, in / G]."""
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    best = _round(groups, low, high)
    for shrink in _SHRINKS[1:]:
        best = _better(best, _round(groups, low * shrink, high * shrink))
    for _ in range(_REFITS):
        best = _better(best, _refit(groups, best.codes))
    return best.codes.to(torch.uint8), best.scale.squeeze(-1), best.offset.squeeze(-1)


@dataclass(frozen=True, slots=True, eq=False)
class _Fit:
    codes: torch.Tensor
    scale: torch.Tensor
    offset: torch.Tensor
    error: torch.Tensor


def _fit(groups: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor) -> _Fit:
    codes = ((groups - offset) / scale).round_().clamp_(0, 15)
    error = (groups - codes * scale - offset).square_().sum(-1, keepdim=True)
    return _Fit(codes, scale, offset, error)


def _round(groups: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> _Fit:
    # A group of equal weights has no range; its offset says all.
    scale = torch.where(high > low, (high - low) / 15, torch.ones_like(low))
    return _fit(groups, scale, low)


def _refit(groups: torch.Tensor, codes: torch.Tensor) -> _Fit:
    """The scale and offset of least squared error for given codes, by linear regression."""
    mean, center = groups.mean(-1, keepdim=True), codes.mean(-1, keepdim=True)
    spread = (codes - center).square().sum(-1, keepdim=True)
    slope = ((codes - center) * (groups - mean)).sum(-1, keepdim=True) / spread.clamp(min=1e-12)
    scale = torch.where(slope > 0, slope, torch.ones_like(slope))
    return _fit(groups, scale, mean - scale * center)


def _better(a: _Fit, b: _Fit) -> _Fit:
    is_better = b.error < a.error
    return _Fit(
        torch.where(is_better, b.codes, a.codes),
        torch.where(is_better, b.scale, a.scale),
        torch.where(is_better, b.offset, a.offset),
        torch.where(is_better, b.error, a.error),
    )


def pack_int4(codes: torch.Tensor) -> torch.Tensor:
    """Codes 0 .. 15 [in, out] of any integer type -> int32 [16 * ceil(in / 128), out] in planar blocks."""
    num_in, num_out = codes.shape
    blocks = F.pad(codes, (0, 0, 0, -num_in % _BLOCK)).view(-1, 8, _WORDS, num_out)
    packed = torch.zeros(len(blocks), _WORDS, num_out, dtype=torch.int32, device=codes.device)
    for nibble in range(8):
        packed |= blocks[:, nibble].to(torch.int32) << (4 * nibble)
    return packed.view(-1, num_out)


def unpack_int4(packed: torch.Tensor, num_in: int) -> torch.Tensor:
    """The inverse of `pack_int4`: uint8 [num_in, out]."""
    words = packed.view(-1, _WORDS, packed.shape[1])
    nibbles = [(words >> (4 * nibble) & 15).to(torch.uint8) for nibble in range(8)]
    return torch.stack(nibbles, 1).view(-1, packed.shape[1])[:num_in]


def concatenate_outputs(weights: Sequence[Int4Weight]) -> Int4Weight:
    """One weight whose outputs are those of all, side by side; they have the same inputs and group size."""
    packed, scales, offsets = (
        torch.cat([getattr(weight, name) for weight in weights], 1) for name in ("packed", "scales", "offsets")
    )
    return Int4Weight(packed, scales, offsets, weights[0].num_in)


def lay_out_int4(weight: Int4Weight, *, dtype: torch.dtype, device: torch.device) -> Int4Weight | CpuInt4Weight:
    """Place a weight for `w4a16_matmul` with activations of `dtype` on `device`."""
    placed = weight.to(dtype=dtype, device=device)
    return placed if backend.use_triton(placed.packed) else to_cpu_layout(weight)


def to_cpu_layout(weight: Int4Weight) -> CpuInt4Weight:
    """Lay a weight out for torch's CPU product, which has w = (q - 8) * scale + zero, both bfloat16."""
    codes = unpack_int4(weight.packed, weight.num_in).t().contiguous().to(torch.int32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 2)
    zeros = weight.offsets.float() + 8 * weight.scales.float()
    both = torch.stack([weight.scales.float(), zeros], -1).to(torch.bfloat16).contiguous()
    return CpuInt4Weight(packed, both, weight.group_size)


def w4a16_dequantize_reference(weight: Int4Weight) -> torch.Tensor:
    """float32 [in, out]."""
    codes = unpack_int4(weight.packed, weight.num_in).float()
    scales, offsets = (part.float().repeat_interleave(weight.group_size, 0) for part in (weight.scales, weight.offsets))
    return codes * scales + offsets


def w4a16_matmul_reference(
    x: torch.Tensor,
    weight: Int4Weight,
    *,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    is_gated: bool = False,
) -> torch.Tensor:
    """x @ dequantized + bias, gated or + residual: in float32, then cast to the dtype of x."""
    y = x.float() @ w4a16_dequantize_reference(weight)
    if bias is not None:
        y = y + bias.float()
    if is_gated:
        gate, up = y.chunk(2, dim=-1)
        y = F.silu(gate) * up
    return (y if residual is None else y + residual.float()).to(x.dtype)


@triton.jit(do_not_specialize=["num_rows"])
def _w4a16_kernel(
    x,
    packed,
    scales,
    offsets,
    bias,
    residual,
    out,
    x_stride,
    residual_stride,
    num_rows,
    num_in,
    num_out,
    part_blocks,
    GROUP: tl.constexpr,
    HAS_IN_TAIL: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
):
    """out[s] = x[:, s-th part] @ (q * scale + offset)[s-th part] (+ bias) (+ residual). out: [splits, M, N]."""
    m = tl.program_id(0).to(tl.int64) * TILE_M + tl.arange(0, TILE_M)
    n = tl.program_id(1) * TILE_N + tl.arange(0, TILE_N)
    first = tl.program_id(2) * part_blocks
    words = tl.arange(0, 16)
    is_row, is_column = m < num_rows, n < num_out
    x_tile = x + m[:, None] * x_stride + words[None, :]
    total = tl.zeros((TILE_M, TILE_N), tl.float32)
    for block in range(first, tl.minimum(first + part_blocks, tl.cdiv(num_in, 128))):
        rows = (block * 16 + words).to(tl.int64)
        word = tl.load(packed + rows[:, None] * num_out + n[None, :], mask=is_column[None, :], other=0)
        for i in tl.static_range(128 // GROUP):
            group = block * (128 // GROUP) + i
            if HAS_IN_TAIL:
                # Any group will do beyond the inputs, where x is taken for 0.
                group = tl.minimum(group, num_in // GROUP - 1)
            place = group.to(tl.int64) * num_out + n
            scale = tl.load(scales + place, mask=is_column, other=0.0).to(tl.float32)
            offset = tl.load(offsets + place, mask=is_column, other=0.0).to(tl.float32)
            for j in tl.static_range(GROUP // 16):
                shift = 4 * (i * (GROUP // 16) + j)
                begin = block * 128 + i * GROUP + 16 * j
                mask = is_row[:, None]
                if HAS_IN_TAIL:
                    mask &= (begin + words < num_in)[None, :]
                a = tl.load(x_tile + begin, mask=mask, other=0.0)
                code = ((word >> shift) & 15).to(tl.float32)
                b = (code * scale[None, :] + offset[None, :]).to(DOT_DTYPE)
                total = tl.dot(a.to(DOT_DTYPE), b, total, input_precision="ieee")
    inside = is_row[:, None] & is_column[None, :]
    if bias is not None:
        total += tl.load(bias + n, mask=is_column, other=0.0).to(tl.float32)[None, :]
    if residual is not None:
        gained = tl.load(residual + m[:, None] * residual_stride + n[None, :], mask=inside, other=0.0)
        total += gained.to(tl.float32)
    target = out + (tl.program_id(2).to(tl.int64) * num_rows + m[:, None]) * num_out + n[None, :]
    tl.store(target, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _dequantize_kernel(
    packed,
    scales,
    offsets,
    out,
    num_in,
    num_out,
    GROUP: tl.constexpr,
    HAS_IN_TAIL: tl.constexpr,
    TILE_N: tl.constexpr,
):
    """One block of 128 inputs, one tile of outputs: out = q * scale + offset."""
    block = tl.program_id(0)
    n = tl.program_id(1) * TILE_N + tl.arange(0, TILE_N)
    words = tl.arange(0, 16)
    is_column = n < num_out
    rows = (block * 16 + words).to(tl.int64)
    word = tl.load(packed + rows[:, None] * num_out + n[None, :], mask=is_column[None, :], other=0)
    for i in tl.static_range(128 // GROUP):
        group = block * (128 // GROUP) + i
        if HAS_IN_TAIL:
            # Any group will do beyond the inputs, where nothing is stored.
            group = tl.minimum(group, num_in // GROUP - 1)
        place = group.to(tl.int64) * num_out + n
        scale = tl.load(scales + place, mask=is_column, other=0.0).to(tl.float32)
        offset = tl.load(offsets + place, mask=is_column, other=0.0).to(tl.float32)
        for j in tl.static_range(GROUP // 16):
            shift = 4 * (i * (GROUP // 16) + j)
            code = ((word >> shift) & 15).to(tl.float32)
            value = code * scale[None, :] + offset[None, :]
            k = (block * 128 + i * GROUP + 16 * j + words).to(tl.int64)
            mask = is_column[None, :]
            if HAS_IN_TAIL:
                mask &= (k < num_in)[:, None]
            tl.store(out + k[:, None] * num_out + n[None, :], value.to(out.dtype.element_ty), mask=mask)


def w4a16_matmul(
    x: torch.Tensor,
    weight: Int4Weight | CpuInt4Weight,
    *,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    is_gated: bool = False,
) -> torch.Tensor:
    """x [M, in] times a quantized weight, + bias [out], gated, or + residual [M, out] -> [M, out] in the dtype of x.

    is_gated: silu(first half of the outputs) * second half, [M, out / 2].
    From compute capability 8.0 and on the CPU a row's bits do not depend on the other rows; below 8.0 the weight is
    dequantized and multiplied by cuBLAS, which promises no such thing.
    Raises: ValueError for shapes, strides or dtypes that do not fit.
    """
    check_epilogue(residual, is_gated=is_gated)
    if isinstance(weight, CpuInt4Weight):
        return finish(_matmul_cpu(x, weight), bias, residual, is_gated=is_gated)
    _check(x, weight)
    capability = backend.capability_of(x)
    if len(x) > DEQUANTIZE_ROWS or capability < MIN_CAPABILITY:
        dense = w4a16_dequantize(weight, dtype=x.dtype)
        return matmul(x, dense, num_out=weight.num_out, bias=bias, residual=residual, is_gated=is_gated)
    split = split_of(weight.num_in, weight.num_out, capability=capability)
    if is_gated and split.count == 1:
        return silu_and_mul(_launch(x, weight, split, bias=bias, residual=None)[0])
    if split.count == 1:
        return _launch(x, weight, split, bias=bias, residual=residual)[0]
    parts = _launch(x, weight, split, bias=None, residual=None)
    return sum_parts(parts, bias, dtype=x.dtype, residual=residual, is_gated=is_gated)


def w4a16_dequantize(weight: Int4Weight, *, dtype: torch.dtype) -> torch.Tensor:
    """The weight as [in, out], each element rounded once from float32, as `w4a16_matmul` rounds it."""
    if not backend.use_triton(weight.packed):
        return w4a16_dequantize_reference(weight).to(dtype)
    out = torch.empty(weight.num_in, weight.num_out, dtype=dtype, device=weight.packed.device)
    backend.launch(
        _dequantize_kernel,
        (triton.cdiv(weight.num_in, _BLOCK), triton.cdiv(weight.num_out, _DEQUANTIZE_TILE)),
        {
            "packed": weight.packed,
            "scales": weight.scales,
            "offsets": weight.offsets,
            "out": out,
            "num_in": weight.num_in,
            "num_out": weight.num_out,
        },
        {"GROUP": weight.group_size, "HAS_IN_TAIL": weight.num_in % _BLOCK != 0, "TILE_N": _DEQUANTIZE_TILE},
        warps=4,
        stages=1,
    )
    return out


def _launch(
    x: torch.Tensor, weight: Int4Weight, split: Split, *, bias: torch.Tensor | None, residual: torch.Tensor | None
) -> torch.Tensor:
    """[splits, M, out]: float32 parts, or the one part in the dtype of x."""
    num_rows, num_out = len(x), weight.num_out
    dtype = x.dtype if split.count == 1 else torch.float32
    out = torch.empty(split.count, num_rows, num_out, dtype=dtype, device=x.device)
    tile_rows = 16 if num_rows <= 16 else 32
    backend.launch(
        _w4a16_kernel,
        (triton.cdiv(num_rows, tile_rows), triton.cdiv(num_out, _TILE_N), split.count),
        {
            "x": x,
            "packed": weight.packed,
            "scales": weight.scales,
            "offsets": weight.offsets,
            "bias": bias,
            "residual": residual,
            "out": out,
            "x_stride": x.stride(0),
            "residual_stride": 0 if residual is None else residual.stride(0),
            "num_rows": num_rows,
            "num_in": weight.num_in,
            "num_out": num_out,
            "part_blocks": split.part // _BLOCK,
        },
        {
            "GROUP": weight.group_size,
            "HAS_IN_TAIL": weight.num_in % _BLOCK != 0,
            "TILE_M": tile_rows,
            "TILE_N": _TILE_N,
            "DOT_DTYPE": backend.dot_dtype(x),
        },
        warps=4,
        stages=_STAGES,
    )
    return out


def _matmul_cpu(x: torch.Tensor, weight: CpuInt4Weight) -> torch.Tensor:
    rows = x.to(torch.bfloat16).contiguous()
    if len(rows) == 0:
        return x.new_empty(0, weight.num_out)
    y: torch.Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
        rows, weight.packed, weight.group_size, weight.scales_and_zeros
    )
    return y.to(x.dtype)


def _check(x: torch.Tensor, weight: Int4Weight) -> None:
    if x.dim() != 2 or x.stride(1) != 1 or x.shape[1] != weight.num_in:
        raise ValueError(
            f"x has shape {tuple(x.shape)} and strides {x.stride()}: this layer takes [M, {weight.num_in}], the"
            " elements of a row side by side"
        )
    if weight.scales.dtype != x.dtype:
        raise ValueError(f"x is {x.dtype} and the scales are {weight.scales.dtype}: make them alike by Int4Weight.to")
