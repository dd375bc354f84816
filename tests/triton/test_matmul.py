"""The dense product under the interpreter: against float32, and a row's bits among any other rows."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from declaim.kernels.linear import gated_linear, linear, pack_linear
from declaim.kernels.matmul import matmul, matmul_reference, split_of, sum_parts
from tests.triton.guards import guard_allocations, random

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Of the largest element. The interpreter truncates to bfloat16, so that its bound is twice that of a GPU.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}


@pytest.fixture(autouse=True)
def guarded_empty(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    yield from guard_allocations(monkeypatch)


def assert_near(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert got.dtype == expected.dtype and got.shape == expected.shape and got.is_contiguous()
    error = (got.float() - expected.float()).abs().max()
    assert error <= TOLERANCE[got.dtype] * expected.float().abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_in", "num_out"), [(1, 1), (7, 3), (80, 112), (258, 65), (320, 448), (1024, 130)])
@pytest.mark.parametrize("num_rows", [1, 16, 17, 65])
def test_the_product_is_its_reference(num_rows: int, num_in: int, num_out: int, dtype: torch.dtype) -> None:
    weight, bias = random(num_out, num_in, dtype=dtype), random(num_out, seed=1, dtype=dtype)
    x = random(num_rows, num_in, seed=2, dtype=dtype)
    assert_near(linear(x, pack_linear(weight, bias=bias)), matmul_reference(x, weight.t(), bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("num_in", [96, 1024])
def test_a_gated_product_is_the_gate_of_the_product(num_in: int, dtype: torch.dtype) -> None:
    weight, bias = random(96, num_in, dtype=dtype) / 8, random(96, seed=1, dtype=dtype)
    x = random(5, num_in, seed=2, dtype=dtype)
    gate, up = matmul_reference(x.float(), weight.t(), bias).chunk(2, dim=-1)
    got = gated_linear(x, pack_linear(weight, bias=bias))
    assert_near(got, (torch.nn.functional.silu(gate) * up).to(dtype))


@pytest.mark.parametrize("num_in", [64, 1024])
def test_a_residual_is_added_before_rounding(num_in: int) -> None:
    x, weight = random(3, num_in, dtype=torch.float16), random(num_in, 48, seed=1, dtype=torch.float16)
    residual = random(3, 64, seed=2, dtype=torch.float16)[:, 5:53]
    got = matmul(x, weight, num_out=48, residual=residual)
    assert_near(got, (x.float() @ weight.float() + residual.float()).half())
    assert torch.equal(linear(x, pack_linear(weight.t()), residual=residual), got)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_in", "num_out"), [(80, 48), (1024, 64)])
def test_a_row_has_the_same_bits_alone_in_any_batch_and_at_any_place(
    num_in: int, num_out: int, dtype: torch.dtype
) -> None:
    layer = pack_linear(random(num_out, num_in, dtype=dtype))
    x = random(67, num_in, seed=2, dtype=dtype)
    together = linear(x, layer)
    for count in (1, 2, 15, 16, 17, 33):
        for first in (0, 5, 67 - count):
            assert torch.equal(linear(x[first : first + count], layer), together[first : first + count]), count


@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100, 120])
@pytest.mark.parametrize("num_out", [16, 320, 2048, 9252, 16384])
@pytest.mark.parametrize("num_in", [1, 127, 320, 960, 2048, 8192])
def test_splits_cover_the_inputs_in_whole_blocks(num_in: int, num_out: int, capability: int) -> None:
    split = split_of(num_in, num_out, capability=capability)
    assert split.part % 128 == 0
    assert (split.count - 1) * split.part < num_in <= split.count * split.part
    assert 1 <= split.count <= 16


def test_parts_are_summed_in_order() -> None:
    """Next to a large part the small one before its opposite is lost, the one after it is not."""
    parts = torch.tensor([1e8, 1.0, -1e8, 3.0]).view(4, 1, 1).expand(4, 2, 600).contiguous()
    assert (sum_parts(parts, None, dtype=torch.float32) == 3.0).all()


def test_rows_may_lie_apart_and_what_lies_between_is_not_read() -> None:
    wide = torch.full((9, 200), math.nan)
    wide[:, 24:120] = random(9, 96)
    layer = pack_linear(random(40, 96, seed=1))
    assert torch.equal(linear(wide[:, 24:120], layer), linear(wide[:, 24:120].clone(), layer))


def test_no_rows_give_no_rows() -> None:
    layer = pack_linear(random(6, 5))
    assert linear(torch.zeros(0, 5), layer).shape == (0, 6)
    assert gated_linear(torch.zeros(0, 5), layer).shape == (0, 3)


def test_what_does_not_fit_is_refused() -> None:
    x, weight = random(3, 8), random(8, 16)
    for bad in (lambda: matmul(x[:, :7], weight, num_out=16), lambda: matmul(x.t(), random(3, 16), num_out=16)):
        with pytest.raises(ValueError, match="matmul takes"):
            bad()
    with pytest.raises(ValueError, match="one dtype"):
        matmul(x.half(), weight, num_out=16)
    with pytest.raises(ValueError, match="columns enough"):
        matmul(x, weight, num_out=17)
    with pytest.raises(ValueError, match="a gated product takes none"):
        matmul(x, weight, num_out=16, residual=random(3, 8), is_gated=True)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(st.integers(1, 40), st.integers(1, 300), st.integers(1, 100), st.booleans())
def test_any_shape(num_rows: int, num_in: int, num_out: int, has_bias: bool) -> None:
    weight, x = random(num_out, num_in, seed=num_in), random(num_rows, num_in, seed=num_rows)
    bias = random(num_out) if has_bias else None
    expected = matmul_reference(x, weight.t(), bias)
    got = linear(x, pack_linear(weight, bias=bias))
    assert (got - expected).abs().max() <= 2e-6 * math.sqrt(num_in) * max(1.0, float(expected.abs().max()))
