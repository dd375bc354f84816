"""What this processor's GEMM is found to keep, against products that were not tried."""

from __future__ import annotations

import pytest
import torch

from declaim.kernels.row_counts import TILE_ROWS, equal_counts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_threads", [1, 2])
def test_rows_have_the_bits_of_a_whole_tile_at_every_number_that_was_found(
    dtype: torch.dtype, num_threads: int
) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        counts = equal_counts(dtype, num_threads)
        assert counts[-1] == TILE_ROWS and list(counts) == sorted(set(counts))
        generator = torch.Generator().manual_seed(5)
        for num_in, num_out in ((64, 192), (31, 33), (256, 768), (960, 320), (5, 257)):
            x = torch.randn(TILE_ROWS, num_in, generator=generator).to(dtype)
            weight = torch.randn(num_in, num_out, generator=generator).to(dtype)
            whole = x @ weight
            for count in counts:
                for first in range(TILE_ROWS - count + 1):
                    assert torch.equal(x[first : first + count].clone() @ weight, whole[first : first + count])
    finally:
        torch.set_num_threads(before)
