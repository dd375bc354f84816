"""Convolutions of 3x3 with a quarter of the products, for the CPU: Winograd's F(4x4, 3x3).

A tile of 6x6 inputs, spread by sums and differences, is multiplied number by number with a kernel spread likewise, and
gathered to 4x4 outputs. Sums are float32's: errors are those of an ordinary convolution.
Source: Lavin and Gray 2015, "Fast Algorithms for Convolutional Neural Networks", section 4.3.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

_TILE_ELEMENTS = 1 << 16  # of a part's tiles, each of 36 numbers: so that a core's caches hold what is made of them


class TiledConv(nn.Module):
    """A convolution of 3x3 and stride 1, padded by 1, of C to C channels, for the CPU: tiles of 6x6 to tiles of 4x4, by
    36 products where there were 144. The weights are kept as they are and spread in each call: spread, they are four
    times as many."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.weight = nn.Parameter(conv.weight.permute(2, 3, 1, 0).reshape(9, -1).contiguous(), requires_grad=False)
        self.bias = conv.bias

    def forward(self, x: torch.Tensor, into: torch.Tensor | None = None) -> torch.Tensor:
        """[1, C, H, W] -> the same, both channels last. into: overwritten by the result; may be `x`."""
        if into is None:
            into = torch.empty_like(x)
        x, y = x[0].permute(1, 2, 0), into[0].permute(1, 2, 0)
        height, width, size = x.shape
        num_down, num_across = -(-height // 4), -(-width // 4)
        kernels = torch.mm(_SPREAD_KERNEL, self.weight).view(6, 6, size, size)
        step = max(1, _TILE_ELEMENTS // (num_down * size))
        edge = x.new_zeros(height, size)
        for first in range(0, num_across, step):
            last = min(num_across, first + step)
            part = x[:, 4 * first : 4 * last + 1]
            part = F.pad(part, (0, 0, 1, 4 * (last - first) + 1 - part.shape[1], 1, 4 * num_down + 1 - height))
            part[1 : height + 1, 0] = edge
            edge = part[1 : height + 1, -2]
            columns = _spread([part[:, i::4][:, : last - first] for i in range(6)])
            products = [self._down(column, kernels[:, i]) for i, column in enumerate(columns)]
            if self.bias is not None:
                products[1] += self.bias  # which each of the four takes once
            _gather(products, [y[:, 4 * first + i : 4 * last : 4] for i in range(4)])
        return into

    @staticmethod
    def _down(column: torch.Tensor, kernels: torch.Tensor) -> torch.Tensor:
        """The other direction: [4 n + 2, W, C] by kernels [6, C, C] -> [4 n, W, C]."""
        num_down, width, size = len(column) // 4, *column.shape[1:]
        spread = _spread([column[i::4][:num_down] for i in range(6)])
        products = [
            torch.mm(part.view(-1, size), kernel).view(num_down, width, size)
            for part, kernel in zip(spread, kernels, strict=True)
        ]
        y = column.new_empty(num_down, 4, width, size)
        _gather(products, y.unbind(1))
        return y.view(4 * num_down, width, size)


def _spread(d: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Six neighbours to what six products take, by the points 0, 1, -1, 2, -2 and infinity."""
    even, odd = torch.add(d[4], d[2], alpha=-4), torch.add(d[3], d[1], alpha=-4)
    outer, inner = d[4] - d[2], d[3] - d[1]
    first = (even - d[2]).add_(d[0], alpha=4)
    last = torch.add(d[5], d[3], alpha=-5).add_(d[1], alpha=4)
    return (first, even + odd, even.sub_(odd), torch.add(outer, inner, alpha=2), outer.sub_(inner, alpha=2), last)


def _gather(products: Sequence[torch.Tensor], y: Sequence[torch.Tensor]) -> None:
    """Six products, which are overwritten, to four neighbours, cut where these end."""
    m0, m1, m2, m3, m4, m5 = products
    near, far = m1 + m2, m3 + m4
    near_odd, far_odd = m1.sub_(m2), m3.sub_(m4)
    sums = ((m0.add_(near), far, 1), (near_odd, far_odd, 2), (near, far, 4), (m5.add_(near_odd), far_odd, 8))
    for target, (one, other, factor) in zip(y, sums, strict=True):
        rows, columns = target.shape[:2]
        torch.add(one[:rows, :columns], other[:rows, :columns], alpha=factor, out=target)


def _spread_kernel() -> torch.Tensor:
    """What makes 36 numbers of a kernel's nine."""
    rows = [[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]]
    one = torch.tensor(rows, dtype=torch.float64) / 24
    return torch.kron(one, one).float()


_SPREAD_KERNEL = _spread_kernel()
