"""The int4 product under the interpreter: each weight read exactly, sums against float32, a row's bits."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from declaim.kernels.int4 import (
    DEQUANTIZE_ROWS,
    Int4Weight,
    lay_out_int4,
    pack_int4,
    quantize_weight,
    w4a16_dequantize,
    w4a16_dequantize_reference,
    w4a16_matmul,
    w4a16_matmul_reference,
)
from declaim.kernels.linear import Linear, gated_linear, linear
from tests.triton.guards import CPU, guard_allocations, random

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Of the largest element. The interpreter multiplies bfloat16 as float32, and truncates the result.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
FROBENIUS = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@pytest.fixture(autouse=True)
def guarded_empty(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    yield from guard_allocations(monkeypatch)


def random_weight(num_in: int, num_out: int, group: int, dtype: torch.dtype, *, seed: int = 0) -> Int4Weight:
    """Codes, scales and offsets that no quantizer need have made; words beyond the inputs hold garbage."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (num_in, num_out), generator=generator)
    beyond = ~pack_int4(torch.full_like(codes, 15))
    packed = pack_int4(codes) | beyond
    scales = torch.rand(num_in // group, num_out, generator=generator).to(dtype) / 8
    return Int4Weight(packed, scales, random(num_in // group, num_out, seed=seed + 1).to(dtype) / 2, num_in)


def assert_near(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert got.dtype == expected.dtype and got.shape == expected.shape and got.is_contiguous()
    error = got.double() - expected.double()
    assert error.abs().max() <= TOLERANCE[got.dtype] * expected.double().abs().max()
    assert error.norm() <= FROBENIUS[got.dtype] * expected.double().norm()


@pytest.mark.parametrize(("num_in", "group"), [(128, 32), (128, 128), (320, 64), (288, 32)])
def test_a_one_hot_row_reads_each_weight_exactly(num_in: int, group: int) -> None:
    weight = random_weight(num_in, 48, group, torch.float32)
    eye = torch.eye(num_in)
    got = torch.cat([w4a16_matmul(rows, weight) for rows in eye.split(DEQUANTIZE_ROWS)])
    assert torch.equal(got, w4a16_dequantize_reference(weight))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("num_in", "num_out", "group"), [(128, 16, 128), (320, 208, 64), (96, 48, 32), (1024, 64, 128)]
)
def test_dequantized_is_the_reference(num_in: int, num_out: int, group: int, dtype: torch.dtype) -> None:
    weight = random_weight(num_in, num_out, group, dtype)
    expected = w4a16_dequantize_reference(weight)
    got = w4a16_dequantize(weight, dtype=dtype)
    if dtype == torch.bfloat16:  # which the interpreter truncates
        torch.testing.assert_close(got.float(), expected, atol=0, rtol=8e-3)
    else:
        assert torch.equal(got, expected.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [1, 2, 3, 15, 16, 17, 33])
def test_the_product_is_its_reference_with_any_rows(num_rows: int, dtype: torch.dtype) -> None:
    weight = random_weight(320, 112, 64, dtype)
    x = random(num_rows, 320, seed=2, dtype=dtype)
    assert_near(w4a16_matmul(x, weight), w4a16_matmul_reference(x, weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("num_in", [128, 384, 1024])
def test_groups_and_splits(num_in: int, group: int, dtype: torch.dtype) -> None:
    weight = random_weight(num_in, 80, group, dtype)
    x = random(5, num_in, seed=2, dtype=dtype)
    bias = random(80, seed=3, dtype=dtype)
    assert_near(w4a16_matmul(x, weight, bias=bias), w4a16_matmul_reference(x, weight, bias=bias))


@pytest.mark.parametrize("num_rows", [3, DEQUANTIZE_ROWS + 1])
@pytest.mark.parametrize("num_in", [128, 512])
def test_the_epilogues(num_in: int, num_rows: int) -> None:
    weight = random_weight(num_in, 32, 64, torch.float16)
    x, bias = random(num_rows, num_in, seed=2, dtype=torch.float16) / 8, random(32, seed=3, dtype=torch.float16)
    residual = random(num_rows, 40, seed=4, dtype=torch.float16)[:, 3:35]
    got = w4a16_matmul(x, weight, bias=bias, residual=residual)
    assert_near(got, w4a16_matmul_reference(x, weight, bias=bias, residual=residual))
    got = w4a16_matmul(x, weight, bias=bias, is_gated=True)
    assert_near(got, w4a16_matmul_reference(x, weight, bias=bias, is_gated=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_in", [192, 512])
def test_a_row_has_the_same_bits_alone_in_any_batch_and_at_any_place(num_in: int, dtype: torch.dtype) -> None:
    weight = random_weight(num_in, 32, 64, dtype)
    x = random(49, num_in, seed=2, dtype=dtype)
    together = w4a16_matmul(x, weight)
    for count in (1, 2, 15, 16, 17, 33):
        for first in (0, 5, 49 - count):
            assert torch.equal(w4a16_matmul(x[first : first + count], weight), together[first : first + count]), count


def test_beyond_the_dequantized_rows_the_same_products_are_summed() -> None:
    """To the bit on a GPU, where both take 16 inputs at a time; the interpreter sums 64 in its own order."""
    weight, x = random_weight(512, 16, 128, torch.float16), random(DEQUANTIZE_ROWS + 1, 512, dtype=torch.float16)
    assert_near(w4a16_matmul(x, weight)[:7], w4a16_matmul(x[:7], weight))


def test_a_quantized_layer_is_what_linear_dispatches_on() -> None:
    weight = quantize_weight(random(64, 256) / 16, 64)
    placed = lay_out_int4(weight, dtype=torch.float16, device=CPU)
    assert isinstance(placed, Int4Weight)
    layer = Linear(placed, random(64, dtype=torch.float16), 64, is_packed=False)
    x = random(4, 256, seed=2, dtype=torch.float16)
    assert_near(linear(x, layer), w4a16_matmul_reference(x, placed, bias=layer.bias))
    assert_near(gated_linear(x, layer), w4a16_matmul_reference(x, placed, bias=layer.bias, is_gated=True))
    gained = linear(x, layer, residual=x[:, :64])
    assert_near(gained, w4a16_matmul_reference(x, placed, bias=layer.bias, residual=x[:, :64]))


def test_what_does_not_fit_is_refused() -> None:
    weight = random_weight(128, 16, 64, torch.float32)
    with pytest.raises(ValueError, match="this layer takes"):
        w4a16_matmul(random(3, 127), weight)
    with pytest.raises(ValueError, match="make them alike"):
        w4a16_matmul(random(3, 128).half(), weight)
    with pytest.raises(ValueError, match="a gated product takes none"):
        w4a16_matmul(random(3, 128), weight, residual=random(3, 8), is_gated=True)
    assert w4a16_matmul(random(0, 128), weight).shape == (0, 16)
    assert w4a16_matmul(random(0, 128), weight, is_gated=True).shape == (0, 8)


@settings(max_examples=6, deadline=None, derandomize=True)
@given(st.integers(1, 40), st.integers(1, 5), st.integers(1, 6), st.sampled_from([32, 64, 128]))
def test_any_shape(num_rows: int, num_groups: int, out_16: int, group: int) -> None:
    weight = random_weight(num_groups * group, 16 * out_16, group, torch.float16, seed=num_rows)
    x = random(num_rows, num_groups * group, seed=2, dtype=torch.float16)
    assert_near(w4a16_matmul(x, weight), w4a16_matmul_reference(x, weight))
