"""The GPU's dense product, and the sum of split products that the int4 one shares.

A row's bits depend on that row alone. An output element is the sum of its products in order of k, 16 at a time, on the
same instruction whatever the number of rows (tiles of 16 and 32 rows both take mma.sync; taller ones would take the
wgmma of Hopper). Where a product is split along k, the parts are the same for any number of rows, and are summed in
order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from declaim.kernels import backend
from declaim.kernels.activation import silu_and_mul

MIN_CAPABILITY = 80  # without mma.sync for 16-bit types of its own, Triton multiplies on plain cores
PART_MULTIPLE = 128  # parts of k begin at multiples of this, an int4 block
_TILE_N = 64  # of the table below, for counting programs
_REDUCE_TILE = 512
_MAX_SPLITS = 16
_MIN_PART = 256
# Programs a product should have at least, by capability: two or three for each processor of the smaller cards.
_MIN_PROGRAMS = {80: 216, 86: 128, 89: 192, 90: 256, 100: 288}


@dataclass(frozen=True, slots=True)
class Split:
    """A product over k cut into `count` parts of `part` (the last may be shorter)."""

    count: int
    part: int


@dataclass(frozen=True, slots=True)
class _Tiles:
    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


# By largest number of rows. Only the columns and the pipeline may differ: neither changes a sum.
_TILES = (
    (16, _Tiles(rows=16, columns=64, depth=64, warps=4, stages=4)),
    (64, _Tiles(rows=32, columns=64, depth=64, warps=4, stages=4)),
    (2**62, _Tiles(rows=32, columns=128, depth=64, warps=4, stages=3)),
)
_TILES_FLOAT32 = _Tiles(rows=16, columns=64, depth=32, warps=4, stages=2)


def split_of(num_in: int, num_out: int, *, capability: int) -> Split:
    """How a product of this shape is split; the number of rows has no say in it."""
    wanted = _MIN_PROGRAMS[max(key for key in _MIN_PROGRAMS if key <= max(capability, MIN_CAPABILITY))]
    tiles, most = triton.cdiv(num_out, _TILE_N), min(_MAX_SPLITS, num_in // _MIN_PART)
    count = 1
    while count * 2 <= most and tiles * count < wanted:
        count *= 2
    part = triton.cdiv(triton.cdiv(num_in, count), PART_MULTIPLE) * PART_MULTIPLE
    return Split(triton.cdiv(num_in, part), part)


def matmul_reference(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x @ weight + bias in float32, then cast to the dtype of x."""
    y = x.float() @ weight.float()
    return (y if bias is None else y + bias.float()).to(x.dtype)


@triton.jit(do_not_specialize=["num_rows"])
def _matmul_kernel(
    x,
    weight,
    bias,
    residual,
    out,
    x_stride,
    weight_stride,
    residual_stride,
    num_rows,
    num_in,
    num_out,
    part,
    HAS_IN_TAIL: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
):
    """out[s] = x[:, s-th part] @ weight[s-th part] (+ bias) (+ residual). out: [splits, M, N]."""
    m = tl.program_id(0).to(tl.int64) * TILE_M + tl.arange(0, TILE_M)
    n = tl.program_id(1) * TILE_N + tl.arange(0, TILE_N)
    first = tl.program_id(2) * part
    k = tl.arange(0, TILE_K)
    # Columns that only fill the weight's rows up are read too: a mask that ends on a multiple of 16 keeps loads wide.
    is_row, is_column, is_read = m < num_rows, n < num_out, n < weight_stride
    x_tile = x + m[:, None] * x_stride + k[None, :]
    weight_tile = weight + k[:, None].to(tl.int64) * weight_stride + n[None, :]
    total = tl.zeros((TILE_M, TILE_N), tl.float32)
    for begin in range(first, tl.minimum(first + part, num_in), TILE_K):
        row_mask, column_mask = is_row[:, None], is_read[None, :]
        if HAS_IN_TAIL:
            row_mask &= (begin + k < num_in)[None, :]
            column_mask &= (begin + k < num_in)[:, None]
        a = tl.load(x_tile + begin, mask=row_mask, other=0.0)
        b = tl.load(weight_tile + begin * weight_stride.to(tl.int64), mask=column_mask, other=0.0)
        total = tl.dot(a.to(DOT_DTYPE), b.to(DOT_DTYPE), total, input_precision="ieee")
    if bias is not None:
        total += tl.load(bias + n, mask=is_column, other=0.0).to(tl.float32)[None, :]
    inside = is_row[:, None] & is_column[None, :]
    if residual is not None:
        gained = tl.load(residual + m[:, None] * residual_stride + n[None, :], mask=inside, other=0.0)
        total += gained.to(tl.float32)
    target = out + (tl.program_id(2).to(tl.int64) * num_rows + m[:, None]) * num_out + n[None, :]
    tl.store(target, total.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_rows"])
def _sum_parts_kernel(
    parts,
    bias,
    residual,
    out,
    residual_stride,
    num_rows,
    num_parts_out,
    num_out,
    SPLITS: tl.constexpr,
    IS_GATED: tl.constexpr,
    TILE: tl.constexpr,
):
    """One tile of one row: the sum of the parts in order (+ bias), gated by its first half or not (+ residual)."""
    m = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = n < num_out
    plane = num_rows.to(tl.int64) * num_parts_out
    source = parts + m * num_parts_out + n
    total = tl.zeros((TILE,), tl.float32)
    for i in tl.static_range(SPLITS):
        total += tl.load(source + i * plane, mask=inside, other=0.0)
    if bias is not None:
        total += tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)
    if IS_GATED:
        up = tl.zeros((TILE,), tl.float32)
        for i in tl.static_range(SPLITS):
            up += tl.load(source + num_out + i * plane, mask=inside, other=0.0)
        if bias is not None:
            up += tl.load(bias + num_out + n, mask=inside, other=0.0).to(tl.float32)
        total = total * tl.sigmoid(total) * up
    if residual is not None:
        total += tl.load(residual + m * residual_stride + n, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + m * num_out + n, total.to(out.dtype.element_ty), mask=inside)


def matmul(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    num_out: int,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    is_gated: bool = False,
) -> torch.Tensor:
    """x [M, in] @ weight [in, >= num_out] + bias [num_out], gated, or + residual, in the dtype of x, on the GPU.

    is_gated: silu(first half) * second half, so that the result is [M, num_out / 2]. residual: [M, num_out].
    Sums are float32. From compute capability 8.0 a row's bits do not depend on the other rows; below it this is cuBLAS,
    which promises no such thing.
    Raises: ValueError for shapes, strides or dtypes that the kernel cannot read.
    """
    _check(x, weight, num_out)
    check_epilogue(residual, is_gated=is_gated)
    capability = backend.capability_of(x)
    if capability < MIN_CAPABILITY:
        return finish(x @ weight[:, :num_out], bias, residual, is_gated=is_gated)
    num_rows, num_in = x.shape
    split = split_of(num_in, num_out, capability=capability)
    if num_rows == 0:
        return x.new_empty(0, num_out // 2 if is_gated else num_out)
    if is_gated and split.count == 1:
        return silu_and_mul(matmul(x, weight, num_out=num_out, bias=bias))
    is_split = split.count > 1
    out = torch.empty(split.count, num_rows, num_out, dtype=torch.float32 if is_split else x.dtype, device=x.device)
    tiles = _TILES_FLOAT32 if x.dtype == torch.float32 else next(tiles for most, tiles in _TILES if num_rows <= most)
    direct = None if is_split else residual
    backend.launch(
        _matmul_kernel,
        (triton.cdiv(num_rows, tiles.rows), triton.cdiv(num_out, tiles.columns), split.count),
        {
            "x": x,
            "weight": weight,
            "bias": None if is_split else bias,
            "residual": direct,
            "out": out,
            "x_stride": x.stride(0),
            "weight_stride": weight.stride(0),
            "residual_stride": 0 if direct is None else direct.stride(0),
            "num_rows": num_rows,
            "num_in": num_in,
            "num_out": num_out,
            "part": split.part,
        },
        {
            "HAS_IN_TAIL": num_in % tiles.depth != 0,
            "TILE_M": tiles.rows,
            "TILE_N": tiles.columns,
            "TILE_K": tiles.depth,
            "DOT_DTYPE": backend.dot_dtype(x),
        },
        warps=tiles.warps,
        stages=tiles.stages,
    )
    return sum_parts(out, bias, dtype=x.dtype, residual=residual, is_gated=is_gated) if is_split else out[0]


def finish(
    y: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor | None, *, is_gated: bool
) -> torch.Tensor:
    """The epilogue of a product that torch computed: the same sums, each rounded to the dtype of y."""
    if bias is not None:
        y = y + bias
    if is_gated:
        y = silu_and_mul(y)
    return y if residual is None else residual + y


def sum_parts(
    parts: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    dtype: torch.dtype,
    residual: torch.Tensor | None = None,
    is_gated: bool = False,
) -> torch.Tensor:
    """Sum float32 parts [splits, M, N] in order; add bias [N]; gate, or add residual [M, N]. All in float32.

    Returns [M, N], or gated [M, N / 2], in `dtype`.
    """
    num_splits, num_rows, num_parts_out = parts.shape
    num_out = num_parts_out // 2 if is_gated else num_parts_out
    out = torch.empty(num_rows, num_out, dtype=dtype, device=parts.device)
    backend.launch(
        _sum_parts_kernel,
        (num_rows, triton.cdiv(num_out, _REDUCE_TILE)),
        {
            "parts": parts,
            "bias": bias,
            "residual": residual,
            "out": out,
            "residual_stride": 0 if residual is None else residual.stride(0),
            "num_rows": num_rows,
            "num_parts_out": num_parts_out,
            "num_out": num_out,
        },
        {"SPLITS": num_splits, "IS_GATED": is_gated, "TILE": _REDUCE_TILE},
        warps=4,
        stages=1,
    )
    return out


def check_epilogue(residual: torch.Tensor | None, *, is_gated: bool) -> None:
    """Raises: ValueError."""
    if residual is not None and (is_gated or residual.stride(1) != 1):
        raise ValueError(
            f"residual has strides {residual.stride()}, is_gated is {is_gated}: elements of its rows must lie side by"
            " side, and a gated product takes none"
        )


def _check(x: torch.Tensor, weight: torch.Tensor, num_out: int) -> None:
    if x.dim() != 2 or x.stride(1) != 1 or not weight.is_contiguous() or x.shape[1] != weight.shape[0]:
        raise ValueError(
            f"x has shape {tuple(x.shape)} and strides {x.stride()}, weight {tuple(weight.shape)} and"
            f" {weight.stride()}: matmul takes [M, in], the elements of a row side by side, and [in, out], contiguous"
        )
    if x.dtype != weight.dtype or num_out > weight.shape[1]:
        raise ValueError(
            f"x is {x.dtype}, weight {weight.dtype} with {weight.shape[1]} columns, of which {num_out} are asked for:"
            " both must be of one dtype, with columns enough"
        )
