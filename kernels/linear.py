"""Dense layers, with results that do not depend on how many rows run beside a row.

Two ways to keep that law on the CPU, chosen by a layer's size when it is packed. A large float32 weight is laid out for
oneDNN, whose product sums every row in the same order whatever the batch and the number of threads. A small one (where
oneDNN's call costs more than it saves) or one of another dtype is kept [in, out], and rows go through the GEMM 2 to 16
at a time; that holds up to 4 threads. Either way a row computed alone, in a batch, in a long prefill, or again after a
preemption has the same bits. With the usual `F.linear` they change between 1, 2-12 and 16+ rows, and 16 or 32 rows take
twice as long; see benchmarks/LOG.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

TILE_ROWS = 16
ONEDNN_MIN_WEIGHTS = 700_000
_ONEDNN_ROWS_HINT = 16  # the batch the layout is chosen for; any batch may use it


@dataclass(frozen=True, slots=True, eq=False)
class Linear:
    """A dense layer ready to multiply from the right.

    weight: [in, out], contiguous, or where `is_packed` oneDNN's own layout. bias: [out] or None.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    num_out: int
    is_packed: bool


def pack_linear(weight: torch.Tensor, *, bias: torch.Tensor | None = None) -> Linear:
    """Make a Linear from a checkpoint's weight [out, in]; copies it once."""
    num_out = weight.shape[0]
    is_large = weight.numel() >= ONEDNN_MIN_WEIGHTS
    if is_large and weight.device.type == "cpu" and weight.dtype == torch.float32 and _has_onednn():
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _ONEDNN_ROWS_HINT)
        return Linear(packed, bias, num_out, is_packed=True)
    return Linear(weight.t().contiguous(), bias, num_out, is_packed=False)


def linear(x: torch.Tensor, layer: Linear) -> torch.Tensor:
    """x [M, in] contiguous -> [M, out] in the dtype of x.

    On the CPU row i of the result depends on row i of x alone, to the last bit.
    """
    if layer.is_packed:
        return _matmul_onednn(x, layer)
    y = x @ layer.weight if x.is_cuda else _matmul_by_tiles(x, layer.weight)
    return y if layer.bias is None else y + layer.bias


def _has_onednn() -> bool:
    # These two operations are what torch's own compiler calls for a frozen linear layer.
    names = ("_linear_pointwise", "_reorder_linear_weight")
    return torch._C._has_mkldnn and all(hasattr(torch.ops.mkldnn, name) for name in names)


def _matmul_onednn(x: torch.Tensor, layer: Linear) -> torch.Tensor:
    num_rows = x.shape[0]
    if num_rows == 0:
        return x.new_empty(0, layer.num_out)
    rows = x.repeat(2, 1) if num_rows == 1 else x
    y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(rows, layer.weight, layer.bias, "none", [], "")
    return y[:num_rows]


def _matmul_by_tiles(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    num_rows = x.shape[0]
    if weight.shape[1] == 1:
        # One column takes a matrix-vector product, which sums in another order.
        return _matmul_by_tiles(x, weight.expand(-1, 2).contiguous())[:, :1].contiguous()
    if num_rows == 1:
        # So does one row.
        return torch.mm(x.expand(2, -1), weight)[:1]
    if num_rows <= TILE_ROWS:
        return x @ weight
    out = x.new_empty(num_rows, weight.shape[1])
    num_tiles = -(-num_rows // TILE_ROWS)
    edges = [num_rows * i // num_tiles for i in range(num_tiles + 1)]
    for begin, end in zip(edges, edges[1:], strict=False):
        torch.mm(x[begin:end], weight, out=out[begin:end])
    return out
