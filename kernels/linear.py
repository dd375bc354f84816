"""Linear layers, dense or int4, with results that do not depend on how many rows run beside a row.

On the GPU they are kernels/matmul.py and kernels/int4.py. On the CPU torch's int4 product keeps the law as it is, and
dense layers have two ways, chosen by a layer's size when it is packed. A large float32 weight is laid out for oneDNN,
whose product sums every row in the same order whatever the batch and the number of threads. A small one (where oneDNN's
call costs more than it saves) or one of another dtype is kept [in, out], and rows go through the GEMM up to 16 at a
time, as many as have the bits of 16 on this processor: 2 or more on Intel's, 4 or more on AMD's, where MKL takes fewer
by another kernel (`row_counts.py`). That holds up to 4 threads. Either way a row computed alone, in a batch, in a long
prefill, or again after a preemption has the same bits. With the usual `F.linear` they change between 1, 2-12 and 16+
rows, and 16 or 32 rows take twice as long; see benchmarks/LOG.md.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

from declaim.kernels import backend
from declaim.kernels.activation import silu_and_mul
from declaim.kernels.int4 import CpuInt4Weight, Int4Weight, w4a16_matmul
from declaim.kernels.matmul import finish, matmul
from declaim.kernels.row_counts import TILE_ROWS, equal_counts, takes_pairs

ONEDNN_MIN_WEIGHTS = 700_000
ONEDNN_MIN_WEIGHTS_PADDED = 64_000  # where the GEMM computes rows that nobody asked for
_ONEDNN_ROWS_HINT = 16  # the batch the layout is chosen for; any batch may use it
# The numbers of rows that oneDNN is given: it compiles half a megabyte for each, in a millisecond, so there are few.
# Two rows, those of a guided sequence, would take longer than four.
_ONEDNN_ROWS = (4, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 64)
_GPU_OUT_MULTIPLE = 16  # rows of the weight then begin at 32 bytes, and are read 16 bytes at a time


class _Shape(NamedTuple):
    """What oneDNN compiles for, but for the number of rows."""

    num_in: int
    num_out: int
    has_bias: bool
    num_threads: int


# Those that were computed, with a layer's weight until `compile_ahead` has had it, and then None.
_met: dict[_Shape, weakref.ref[torch.Tensor] | None] = {}


@dataclass(frozen=True, slots=True, eq=False)
class Linear:
    """A layer ready to multiply from the right.

    weight: [in, out], contiguous (on the GPU `out` is rounded up, with zeros); or where `is_packed` oneDNN's own
    layout; or int4. bias: [out] or None.
    """

    weight: torch.Tensor | Int4Weight | CpuInt4Weight
    bias: torch.Tensor | None
    num_out: int
    is_packed: bool


def pack_linear(weight: torch.Tensor, *, bias: torch.Tensor | None = None) -> Linear:
    """Make a Linear from a checkpoint's weight [out, in]; copies it once."""
    num_out = weight.shape[0]
    if backend.use_triton(weight):
        return Linear(F.pad(weight.t(), (0, -num_out % _GPU_OUT_MULTIPLE)).contiguous(), bias, num_out, is_packed=False)
    if _fits_onednn(weight):
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _ONEDNN_ROWS_HINT)
        return Linear(packed, bias, num_out, is_packed=True)
    return Linear(weight.t().contiguous(), bias, num_out, is_packed=False)


def linear(x: torch.Tensor, layer: Linear, *, residual: torch.Tensor | None = None) -> torch.Tensor:
    """x [M, in] contiguous, through the layer, + residual [M, out] -> [M, out] in the dtype of x.

    Row i of the result depends on row i of x and of residual alone, to the last bit; GPUs below compute capability 8.0
    excepted.
    """
    weight = layer.weight
    if not isinstance(weight, torch.Tensor):
        return w4a16_matmul(x, weight, bias=layer.bias, residual=residual)
    if backend.use_triton(x):
        return matmul(x, weight, num_out=layer.num_out, bias=layer.bias, residual=residual)
    if layer.is_packed:
        return finish(_matmul_onednn(x, weight, layer), None, residual, is_gated=False)
    return finish(_matmul_by_tiles(x, weight), layer.bias, residual, is_gated=False)


def gated_linear(x: torch.Tensor, layer: Linear) -> torch.Tensor:
    """`silu_and_mul(linear(x, layer))`, in fewer launches where the GPU sums the product in parts: [M, out / 2]."""
    weight = layer.weight
    if not isinstance(weight, torch.Tensor):
        return w4a16_matmul(x, weight, bias=layer.bias, is_gated=True)
    if backend.use_triton(x):
        return matmul(x, weight, num_out=layer.num_out, bias=layer.bias, is_gated=True)
    return silu_and_mul(linear(x, layer))


def compile_ahead() -> bool:
    """Have oneDNN compile one layer that was computed with as many threads as this one has, for every number of rows
    that it may be given: else the programs of a new number are made, and memory for them taken, in the middle of a
    stream. For a moment with nothing else to do. Returns whether there was such a layer.
    """
    for shape, ref in list(_met.items()):
        if ref is None or shape.num_threads != torch.get_num_threads():
            continue
        weight = ref()
        if weight is None:  # its model is gone; another may have such a layer
            del _met[shape]
            continue
        _met[shape] = None
        bias = torch.zeros(shape.num_out) if shape.has_bias else None
        for count in _ONEDNN_ROWS:
            _multiply(torch.zeros(count, shape.num_in), weight, bias)
        return True
    return False


def _fits_onednn(weight: torch.Tensor) -> bool:
    """Whether oneDNN's product is there for a weight, and worth its call."""
    # These two operations are what torch's own compiler calls for a frozen linear layer.
    names = ("_linear_pointwise", "_reorder_linear_weight")
    has_onednn = torch._C._has_mkldnn and all(hasattr(torch.ops.mkldnn, name) for name in names)
    if weight.device.type != "cpu" or weight.dtype != torch.float32 or not has_onednn:
        return False
    return weight.numel() >= (ONEDNN_MIN_WEIGHTS if takes_pairs(weight.dtype) else ONEDNN_MIN_WEIGHTS_PADDED)


def _matmul_onednn(x: torch.Tensor, weight: torch.Tensor, layer: Linear) -> torch.Tensor:
    num_rows, num_in = x.shape
    if num_rows == 0:
        return x.new_empty(0, layer.num_out)
    if num_rows > _ONEDNN_ROWS[-1]:
        return torch.cat([_matmul_onednn(part, weight, layer) for part in x.split(_ONEDNN_ROWS[-1])])

    shape = _Shape(num_in, layer.num_out, layer.bias is not None, torch.get_num_threads())
    if shape not in _met:
        _met[shape] = weakref.ref(weight)
    count = next(c for c in _ONEDNN_ROWS if c >= num_rows)
    return _multiply(F.pad(x, (0, 0, 0, count - num_rows)) if num_rows < count else x, weight, layer.bias)[:num_rows]


def _multiply(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    return y


def _matmul_by_tiles(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    num_rows = x.shape[0]
    if weight.shape[1] == 1:
        # One column takes a matrix-vector product, which sums in another order.
        return _matmul_by_tiles(x, weight.expand(-1, 2).contiguous())[:, :1].contiguous()
    if num_rows > TILE_ROWS:
        out = x.new_empty(num_rows, weight.shape[1])
        num_tiles = -(-num_rows // TILE_ROWS)
        edges = [num_rows * i // num_tiles for i in range(num_tiles + 1)]
        for begin, end in zip(edges, edges[1:], strict=False):
            _matmul_tile(x[begin:end], weight, out=out[begin:end])
        return out
    return _matmul_tile(x, weight)


def _matmul_tile(x: torch.Tensor, weight: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """Up to TILE_ROWS rows, with others beside them where so many alone would be summed differently."""
    num_rows = x.shape[0]
    count = next((c for c in equal_counts(x.dtype, torch.get_num_threads()) if c >= num_rows), TILE_ROWS)
    if count == num_rows:
        return torch.mm(x, weight, out=out)
    padded = x.expand(count, -1) if num_rows == 1 else F.pad(x, (0, 0, 0, count - num_rows))
    product = torch.mm(padded, weight)[:num_rows]
    return product if out is None else out.copy_(product)
