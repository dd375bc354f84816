"""Gated activations over merged projections."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from declaim.kernels import backend

SERIAL_ELEMENTS = 32767  # torch spreads larger elementwise work over threads
_VECTOR_ELEMENTS = 32  # of two registers of AVX-512, as many as torch computes at a time
_TILE = 1024


def silu_and_mul_reference(gate_up: torch.Tensor) -> torch.Tensor:
    """gate * sigmoid(gate) * up in float32, then cast to the dtype of gate_up."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (gate * torch.sigmoid(gate) * up).to(gate_up.dtype)


@triton.jit
def _silu_and_mul_kernel(gate_up, out, row_stride, SIZE: tl.constexpr, TILE: tl.constexpr):
    """One tile of one row of silu(gate) * up."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = column < SIZE
    source = gate_up + row * row_stride + column
    gate = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(source + SIZE, mask=inside, other=0.0).to(tl.float32)
    product = gate * tl.sigmoid(gate) * up
    tl.store(out + row * SIZE + column, product.to(out.dtype.element_ty), mask=inside)


def silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up.

    gate_up: [N, 2F], the gate in the first half -> [N, F], contiguous. Source: Shazeer 2020, SwiGLU.
    Row i of the result depends on row i alone, to the last bit.
    Raises: ValueError (on the GPU) for shapes or strides that the kernel cannot read.
    """
    if backend.use_triton(gate_up):
        return _silu_and_mul_triton(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return by_rows(F.silu, gate).mul_(up)


def by_rows(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """An elementwise function of the CPU whose last digits depend on an element's place: each row on its own.

    torch computes elements that do not fill its vectors by another exp than the rest: those at the end of a tensor and
    before a cut between threads. In rows of whole vectors on one thread there are none; rows of another size must not
    run into one another, and rows for several threads are so few at a time that they are not cut.
    x: [N, C] -> [N, C], contiguous. Row i of the result depends on row i alone, to the last bit.
    """
    num_rows, size = x.shape
    if size % _VECTOR_ELEMENTS and x.stride(0) == size:
        x = x.new_empty(num_rows, size + 1)[:, :size].copy_(x)
    tile_rows = num_rows if torch.get_num_threads() == 1 else max(1, SERIAL_ELEMENTS // size)
    if num_rows <= tile_rows:
        return function(x).contiguous()
    return torch.cat([function(x[i : i + tile_rows]) for i in range(0, num_rows, tile_rows)])


def _silu_and_mul_triton(gate_up: torch.Tensor) -> torch.Tensor:
    if gate_up.dim() != 2 or gate_up.shape[1] % 2 or gate_up.stride(1) != 1:
        raise ValueError(
            f"gate_up has shape {tuple(gate_up.shape)} and strides {gate_up.stride()}: silu_and_mul takes [N, 2F], the"
            " elements of a row side by side"
        )
    num_rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(num_rows, size, dtype=gate_up.dtype, device=gate_up.device)
    backend.launch(
        _silu_and_mul_kernel,
        (num_rows, triton.cdiv(size, _TILE)),
        {"gate_up": gate_up, "out": out, "row_stride": gate_up.stride(0)},
        {"SIZE": size, "TILE": _TILE},
        warps=4,
        stages=1,
    )
    return out
