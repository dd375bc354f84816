"""Dense layers, with results that do not depend on how many rows run beside a row.

On the CPU the weight is kept [in, out] and rows go through the GEMM at most 16 and at least 2 at a time. MKL and
oneDNN then sum every row in the same order whatever the batch: a row computed alone, in a batch, or again after a
preemption has the same bits. (Measured: with the usual [out, in] weight a row changes between 1, 2-12 and 16+ rows,
and 16 rows take 2-5 times as long; see benchmarks/LOG.md.)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

TILE_ROWS = 16


@dataclass(frozen=True, slots=True, eq=False)
class Linear:
    """A dense layer ready to multiply from the right. weight: [in, out], contiguous; bias: [out] or None."""

    weight: torch.Tensor
    bias: torch.Tensor | None = None


def pack_linear(weight: torch.Tensor, *, bias: torch.Tensor | None = None) -> Linear:
    """Make a Linear from a checkpoint's weight [out, in]; copies it once."""
    return Linear(weight.t().contiguous(), bias)


def linear(x: torch.Tensor, layer: Linear) -> torch.Tensor:
    """x [M, in] contiguous -> [M, out] in the dtype of x.

    On the CPU row i of the result depends on row i of x alone, to the last bit.
    """
    y = x @ layer.weight if x.is_cuda else _matmul_by_tiles(x, layer.weight)
    return y if layer.bias is None else y + layer.bias


def _matmul_by_tiles(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    num_rows = x.shape[0]
    if weight.shape[1] == 1:
        # So would one column.
        return _matmul_by_tiles(x, weight.expand(-1, 2).contiguous())[:, :1].contiguous()
    if num_rows == 1:
        # One row would take the GEMV path, which sums in another order.
        return torch.mm(x.expand(2, -1), weight)[:1]
    if num_rows <= TILE_ROWS:
        return x @ weight
    out = x.new_empty(num_rows, weight.shape[1])
    num_tiles = -(-num_rows // TILE_ROWS)
    edges = [num_rows * i // num_tiles for i in range(num_tiles + 1)]
    for begin, end in zip(edges, edges[1:], strict=False):
        torch.mm(x[begin:end], weight, out=out[begin:end])
    return out
