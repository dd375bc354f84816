"""Normalisation over the last axis, statistics in float32; with the residual sum before it in the same launch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from declaim.kernels import backend

MAX_SIZE = 16384  # one program holds a whole row in registers


def rms_norm_reference(x: torch.Tensor, weight: torch.Tensor, *, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight. The cast to the dtype of x comes before the weight."""
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * normed.to(x.dtype)


def layer_norm_reference(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *, eps: float
) -> torch.Tensor:
    """(x - mean(x)) / sqrt(var(x) + eps) * weight + bias, all in float32, then cast to the dtype of x."""
    wide = x.float()
    centered = wide - wide.mean(-1, keepdim=True)
    normed = centered * torch.rsqrt(centered.pow(2).mean(-1, keepdim=True) + eps) * weight.float()
    return (normed if bias is None else normed + bias.float()).to(x.dtype)


@triton.jit(do_not_specialize=["num_residual"])
def _norm_kernel(
    x,
    residual,
    rest,
    weight,
    bias,
    normed,
    total,
    x_stride,
    residual_stride,
    num_residual,
    eps,
    SIZE: tl.constexpr,
    TILE: tl.constexpr,
    IS_CENTERED: tl.constexpr,
):
    """One row: total = x + residual (`rest` from row num_residual on), normed = norm(total). See the references."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, TILE)
    inside = column < SIZE
    values = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    if residual is not None:
        gains = residual + row * residual_stride + column
        if rest is None:
            gained = tl.load(gains, mask=inside, other=0.0).to(tl.float32)
        elif row < num_residual:
            gained = tl.load(gains, mask=inside, other=0.0).to(tl.float32)
        else:
            gained = tl.load(rest + column, mask=inside, other=0.0).to(tl.float32)
        # What is normed is the sum as stored, rounded to its dtype.
        rounded = (values + gained).to(total.dtype.element_ty)
        tl.store(total + row * SIZE + column, rounded, mask=inside)
        values = rounded.to(tl.float32)
    scale = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    dtype = normed.dtype.element_ty
    if IS_CENTERED:
        values = tl.where(inside, values - tl.sum(values, 0) / SIZE, 0.0)
    inverse = tl.rsqrt(tl.sum(values * values, 0) / SIZE + eps)
    if IS_CENTERED:
        result = values * inverse * scale
    else:
        result = (values * inverse).to(dtype).to(tl.float32) * scale
    if bias is not None:
        result += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(normed + row * SIZE + column, result.to(dtype), mask=inside)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, *, eps: float) -> torch.Tensor:
    """Root-mean-square norm.

    x: [N, C], weight: [C] -> [N, C] in the dtype of x. Each row depends on itself alone, to the last bit.
    Raises: ValueError (on the GPU) for shapes, strides or dtypes that the kernel cannot read.
    Source: Zhang & Sennrich 2019, equation 4.
    """
    if backend.use_triton(x):
        return _norm(x, None, None, weight, None, eps=eps, is_centered=False)[0]
    if x.dtype != torch.float32:
        return rms_norm_reference(x, weight, eps=eps)
    # A few operations in place where torch's own takes ten: on the CPU they cost more than the arithmetic.
    size: torch.Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    inverse = size.square_().mul_(1.0 / x.shape[-1]).add_(eps).rsqrt_()
    normed: torch.Tensor = (x * inverse).mul_(weight)
    return normed


def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    *,
    eps: float,
    rest: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add what a sublayer gave to the residual stream, and norm the sum for the next one.

    x: [N, C]; residual: [N, C], or None where nothing is to be added (the sum is then x itself); weight: [C].
    rest: [C]; residual then has M <= N rows, and each row from M on gains `rest` instead.
    Returns (rms_norm(sum), sum), both [N, C] in the dtype of x. Each row depends on itself alone, to the last bit.
    Raises: ValueError (on the GPU) for shapes, strides or dtypes that the kernel cannot read.
    """
    if backend.use_triton(x):
        return _norm(x, residual, rest, weight, None, eps=eps, is_centered=False)
    total = _add(x, residual, rest)
    return rms_norm(total, weight, eps=eps), total


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *, eps: float) -> torch.Tensor:
    """Layer norm, weight and bias applied in float32.

    x: [N, C], weight, bias: [C] -> [N, C] in the dtype of x. Each row depends on itself alone, to the last bit.
    Raises: ValueError (on the GPU) for shapes, strides or dtypes that the kernel cannot read.
    Source: Ba, Kiros & Hinton 2016, equation 4.
    """
    if backend.use_triton(x):
        return _norm(x, None, None, weight, bias, eps=eps, is_centered=True)[0]
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def add_layer_norm(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, bias: torch.Tensor | None, *, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`add_rms_norm` with `layer_norm`: (layer_norm(x + residual), x + residual), both [N, C]."""
    if backend.use_triton(x):
        return _norm(x, residual, None, weight, bias, eps=eps, is_centered=True)
    total = _add(x, residual, None)
    return layer_norm(total, weight, bias, eps=eps), total


def _add(x: torch.Tensor, residual: torch.Tensor | None, rest: torch.Tensor | None) -> torch.Tensor:
    if residual is None:
        return x
    num_residual = len(residual)
    if rest is None or num_residual == len(x):
        return x + residual
    return torch.cat([x[:num_residual] + residual, x[num_residual:] + rest])


def _norm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    rest: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    eps: float,
    is_centered: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    _check(x, residual, rest, vectors=(weight,) if bias is None else (weight, bias))
    num_rows, size = x.shape
    normed = torch.empty(num_rows, size, dtype=x.dtype, device=x.device)
    total = None if residual is None else torch.empty(num_rows, size, dtype=x.dtype, device=x.device)
    tile = triton.next_power_of_2(size)
    backend.launch(
        _norm_kernel,
        (num_rows,),
        {
            "x": x,
            "residual": residual,
            "rest": rest,
            "weight": weight,
            "bias": bias,
            "normed": normed,
            "total": total,
            "x_stride": x.stride(0),
            "residual_stride": 0 if residual is None else residual.stride(0),
            "num_residual": 0 if residual is None else len(residual),
            "eps": eps,
        },
        {"SIZE": size, "TILE": tile, "IS_CENTERED": is_centered},
        # Chosen by the row's size alone: it decides the order in which a row is summed.
        warps=min(8, max(1, tile // 512)),
        stages=1,
    )
    return normed, x if total is None else total


def _check(
    x: torch.Tensor, residual: torch.Tensor | None, rest: torch.Tensor | None, *, vectors: tuple[torch.Tensor, ...]
) -> None:
    """Raises: ValueError naming the tensor and what is wrong with it."""
    if x.dim() != 2 or x.shape[1] > MAX_SIZE or x.stride(1) != 1:
        raise ValueError(
            f"x has shape {tuple(x.shape)} and strides {x.stride()}: a norm takes [N, C] with C <= {MAX_SIZE},"
            " the elements of a row side by side"
        )
    num_rows, size = x.shape
    for vector in vectors if rest is None else (*vectors, rest):
        if vector.shape != (size,) or not vector.is_contiguous() or vector.dtype != x.dtype:
            raise ValueError(
                f"a vector of {tuple(vector.shape)} {vector.dtype} does not fit rows of {size} {x.dtype}:"
                f" weight, bias and rest are contiguous [{size}] in the dtype of x"
            )
    if residual is None:
        return
    fits = len(residual) == num_rows if rest is None else len(residual) <= num_rows
    if not fits or residual.shape[1:] != (size,) or residual.stride(1) != 1 or residual.dtype != x.dtype:
        raise ValueError(
            f"residual has shape {tuple(residual.shape)}, strides {residual.stride()} and {residual.dtype}; x has shape"
            f" {tuple(x.shape)} and {x.dtype}: they must agree, and only with `rest` may residual have fewer rows"
        )
