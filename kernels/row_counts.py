"""How many rows at a time a CPU's GEMM takes without changing their bits: found by trying.

MKL has kernels of its own for few rows, which sum in another order, and cuts rows between threads, by rules that depend
on the processor. On Intel's, 2 rows and more have the same bits (up to 4 threads); on AMD's 4 and more, and fewer than
4 sum in an order that depends even on where an operand begins in memory.
"""

from __future__ import annotations

from functools import cache

import torch

TILE_ROWS = 16
_SIZES = ((7, 31), (48, 64), (320, 320), (129, 1028))  # [in, out] of small and odd layers


@cache
def equal_counts(dtype: torch.dtype, num_threads: int) -> tuple[int, ...]:
    """The numbers of rows, ascending, at which a row has the bits that it has among TILE_ROWS.

    num_threads: as many as torch computes with now.
    """
    generator = torch.Generator().manual_seed(0)
    products = []
    for size in _SIZES:
        x, weight = (torch.randn(shape, generator=generator).to(dtype) for shape in ((TILE_ROWS, size[0]), size))
        products.append((x, weight, x @ weight))

    def is_equal(count: int) -> bool:
        places = {0, (TILE_ROWS - count) // 2, TILE_ROWS - count}
        return all(
            torch.equal(x[i : i + count].clone() @ weight, whole[i : i + count])
            for x, weight, whole in products
            for i in places
        )

    return tuple(count for count in range(2, TILE_ROWS + 1) if is_equal(count))


def takes_pairs(dtype: torch.dtype) -> bool:
    """Whether 2 rows, those of a guided sequence, go through the GEMM as they are."""
    return 2 in equal_counts(dtype, torch.get_num_threads())
