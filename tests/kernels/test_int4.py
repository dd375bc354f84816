"""int4 on the CPU: the planar layout, what the quantizer chooses, and torch's packed product against the reference.

The Triton kernels have the same tests under the interpreter: tests/triton/test_int4.py.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from declaim.kernels.activation import silu_and_mul
from declaim.kernels.int4 import (
    GROUP_SIZES,
    CpuInt4Weight,
    can_quantize,
    concatenate_outputs,
    lay_out_int4,
    pack_int4,
    quantize_weight,
    to_cpu_layout,
    unpack_int4,
    w4a16_dequantize,
    w4a16_dequantize_reference,
    w4a16_matmul,
    w4a16_matmul_reference,
)
from declaim.kernels.linear import Linear, gated_linear, linear

CPU = torch.device("cpu")
# Inputs, outputs and group size: whole blocks of 128, a tail, less than one block, the embedded voice, and Dia.
SHAPES = [(128, 16, 128), (320, 208, 64), (96, 48, 32), (320, 448, 64), (960, 320, 64), (2048, 512, 128)]


@pytest.fixture(params=[1, 2])
def num_threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_near(got: torch.Tensor, expected: torch.Tensor) -> None:
    """As bfloat16 multiplies: 1 % of the largest element, and 4e-3 of the whole."""
    assert got.dtype == expected.dtype and got.shape == expected.shape
    error = got.double() - expected.double()
    assert error.abs().max() <= 1e-2 * expected.double().abs().max()
    assert error.norm() <= 6e-3 * expected.double().norm()


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(1, 300), st.integers(1, 40), st.integers(0, 2**31))
def test_codes_come_back_from_their_blocks(num_in: int, num_out: int, seed: int) -> None:
    codes = torch.randint(0, 16, (num_in, num_out), generator=torch.Generator().manual_seed(seed))
    packed = pack_int4(codes)
    assert packed.shape == (16 * -(-num_in // 128), num_out) and packed.dtype == torch.int32
    unpacked = unpack_int4(packed, num_in)
    assert unpacked.dtype == torch.uint8 and torch.equal(unpacked.long(), codes)


@pytest.mark.parametrize(
    ("k", "word", "nibble"), [(0, 0, 0), (15, 15, 0), (16, 0, 1), (127, 15, 7), (128, 16, 0), (200, 24, 4)]
)
def test_where_an_inputs_nibble_lies(k: int, word: int, nibble: int) -> None:
    """Nibble j of word r in block b is input 128 b + 16 j + r: the layout of the files that quantize writes."""
    codes = torch.zeros(256, 3, dtype=torch.uint8)
    codes[k, 1] = 15
    packed = pack_int4(codes).long() & 0xFFFFFFFF
    expected = torch.zeros_like(packed)
    expected[word, 1] = 15 << (4 * nibble)
    assert torch.equal(packed, expected)


@pytest.mark.parametrize(("num_in", "num_out", "group"), SHAPES)
def test_a_one_hot_row_reads_each_weight_as_bfloat16_has_it(num_in: int, num_out: int, group: int) -> None:
    weight = quantize_weight(random(num_out, num_in, seed=3), group)
    got = w4a16_matmul(torch.eye(num_in), to_cpu_layout(weight))
    codes = unpack_int4(weight.packed, num_in).float() - 8
    scales, zeros = weight.scales, weight.offsets + 8 * weight.scales
    scales, zeros = (part.bfloat16().float().repeat_interleave(group, 0) for part in (scales, zeros))
    expected = codes * scales + zeros
    # The op dequantizes in bfloat16: two roundings.
    torch.testing.assert_close(got, expected, atol=2 * 2**-8 * float(expected.abs().max()), rtol=0)
    worst = (got - w4a16_dequantize_reference(weight)).abs() / weight.scales.repeat_interleave(group, 0)
    assert worst.max() < 0.25  # of the distance between two codes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("num_in", "num_out", "group"), SHAPES)
def test_the_product_is_its_reference(num_in: int, num_out: int, group: int, dtype: torch.dtype) -> None:
    weight = quantize_weight(random(num_out, num_in, seed=3), group)
    x = random(7, num_in, seed=2).to(dtype)
    assert_near(w4a16_matmul(x, to_cpu_layout(weight)), w4a16_matmul_reference(x, weight))


def test_bias_residual_and_gate() -> None:
    weight = quantize_weight(random(64, 256, seed=3), 128)
    placed = to_cpu_layout(weight)
    x, bias, residual = random(5, 256, seed=2) / 16, random(64, seed=4), random(5, 64, seed=5)
    got = w4a16_matmul(x, placed, bias=bias, residual=residual)
    assert_near(got, w4a16_matmul_reference(x, weight, bias=bias, residual=residual))
    got = w4a16_matmul(x, placed, bias=bias, is_gated=True)
    assert torch.equal(got, silu_and_mul(w4a16_matmul(x, placed, bias=bias)))
    layer = Linear(placed, bias, 64, is_packed=False)
    assert torch.equal(linear(x, layer), w4a16_matmul(x, placed, bias=bias))
    assert torch.equal(linear(x, layer, residual=residual), residual + linear(x, layer))
    assert torch.equal(gated_linear(x, layer), got)
    with pytest.raises(ValueError, match="a gated product takes none"):
        w4a16_matmul(x, placed, residual=residual, is_gated=True)
    assert w4a16_matmul(x[:0], placed).shape == (0, 64)


@pytest.mark.parametrize(("num_in", "num_out", "group"), [(320, 448, 64), (960, 320, 64), (2048, 512, 128)])
def test_a_row_has_the_same_bits_alone_in_any_batch_and_at_any_place(
    num_in: int, num_out: int, group: int, num_threads: int
) -> None:
    placed = to_cpu_layout(quantize_weight(random(num_out, num_in, seed=3), group))
    x = random(67, num_in, seed=2)
    together = w4a16_matmul(x, placed)
    for count in (1, 2, 3, 4, 5, 8, 15, 16, 17, 31, 33):
        for first in (0, 5, 67 - count):
            assert torch.equal(w4a16_matmul(x[first : first + count], placed), together[first : first + count]), count


@pytest.mark.parametrize("group", GROUP_SIZES)
def test_weights_that_sixteen_levels_can_hold_are_kept_exactly(group: int) -> None:
    """Levels of 1/8 around an offset, both ends of the range in use: nothing is lost."""
    codes = torch.randint(0, 16, (32, 256), generator=torch.Generator().manual_seed(0))
    codes[:, ::group], codes[:, 1::group] = 0, 15
    weight = codes / 8 - 1
    quantized = quantize_weight(weight, group)
    assert torch.equal(unpack_int4(quantized.packed, 256).t().long(), codes)
    torch.testing.assert_close(w4a16_dequantize(quantized, dtype=torch.float32).t(), weight, atol=1e-6, rtol=0)


def test_groups_of_equal_weights_and_of_zeros_are_exact() -> None:
    weight = torch.zeros(16, 256)
    weight[3], weight[4, 128:] = 0.7, -5e3
    quantized = quantize_weight(weight, 128)
    assert torch.isfinite(quantized.scales).all()
    torch.testing.assert_close(w4a16_dequantize_reference(quantized).t(), weight, atol=0, rtol=1e-6)


@pytest.mark.parametrize("group", GROUP_SIZES)
def test_the_search_and_the_fit_lose_less_than_rounding_over_the_range(group: int) -> None:
    weight = random(64, 512, seed=1)
    groups = weight.view(64, -1, group)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scale = (high - low) / 15
    rounded = ((groups - low) / scale).round() * scale + low
    range_error = (rounded - groups).square().sum(-1)
    got = w4a16_dequantize_reference(quantize_weight(weight, group)).t().reshape(64, -1, group)
    error = (got - groups).square().sum(-1)
    assert (error <= range_error * 1.0001).all()
    assert error.mean() < 0.95 * range_error.mean()


def test_what_is_quantized_in_pieces_is_what_is_quantized_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = random(96, 256)
    whole = quantize_weight(weight, 64)
    monkeypatch.setattr("declaim.kernels.int4._QUANTIZE_ROWS", 5 * 256)
    pieces = quantize_weight(weight, 64)
    parts = [quantize_weight(part, 64) for part in weight.split(32)]
    for other in (pieces, concatenate_outputs(parts)):
        assert torch.equal(other.packed, whole.packed)
        assert torch.equal(other.scales, whole.scales) and torch.equal(other.offsets, whole.offsets)


def test_a_checkpoints_half_precision_is_quantized_as_its_float32_is() -> None:
    weight = random(32, 128).bfloat16()
    got, expected = quantize_weight(weight, 32), quantize_weight(weight.float(), 32)
    assert torch.equal(got.packed, expected.packed) and torch.equal(got.scales, expected.scales)
    assert got.scales.dtype == torch.float32


@pytest.mark.parametrize(
    ("num_in", "num_out", "group"),
    [(100, 16, 32), (96, 16, 64), (128, 24, 128), (128, 16, 16), (256, 16, 256), (0, 8, 32)],
)
def test_a_shape_that_does_not_fit_is_refused_with_its_numbers(num_in: int, num_out: int, group: int) -> None:
    assert not can_quantize(num_in, num_out, group)
    with pytest.raises(ValueError, match=f"{num_out} outputs and {num_in} inputs cannot have int4 groups of {group}"):
        quantize_weight(torch.zeros(num_out, num_in), group)


def test_a_placed_weight_says_its_size() -> None:
    """Half a byte a weight; a scale and an offset of 16 bits for each 128."""
    weight = quantize_weight(random(512, 2048), 128)
    placed = lay_out_int4(weight, dtype=torch.float32, device=CPU)
    assert isinstance(placed, CpuInt4Weight) and placed.num_out == 512
    halves = weight.to(dtype=torch.bfloat16, device=CPU)
    assert placed.num_bytes == halves.num_bytes == 512 * 2048 // 2 + 512 * 2048 // 128 * 4
    assert (weight.num_out, weight.group_size, weight.num_in) == (512, 128, 2048)
