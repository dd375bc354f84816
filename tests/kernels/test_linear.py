"""The law that the engine rests on: a row's bits do not depend on the rows beside it.

Checked on the sizes of the models served, on odd ones, and with as many threads as the law is known to hold for.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from declaim.kernels.activation import silu_and_mul
from declaim.kernels.linear import compile_ahead, linear, pack_linear

ODD = [(i, o) for i in (1, 7, 48, 80, 129, 513) for o in (1, 2, 3, 16, 112, 257, 1028)]
LARK_TEXT = [(256, 768), (256, 256), (256, 1536), (768, 256), (256, 1), (258, 320)]
LARK = [*LARK_TEXT, (320, 448), (320, 320), (320, 1920), (960, 320), (320, 8192)]
DIA = [(2048, 3072), (2048, 2048), (1024, 2048), (1024, 4096)]


@pytest.fixture(params=[1, 2])
def num_threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("num_in", "num_out"), ODD + LARK + DIA)
def test_a_row_has_the_same_bits_alone_in_any_batch_and_at_any_place(
    num_in: int, num_out: int, num_threads: int
) -> None:
    layer = pack_linear(random(num_out, num_in), bias=random(num_out, seed=1))
    x = random(67, num_in, seed=2)
    together = linear(x, layer)
    for count in (1, 2, 3, 8, 15, 16, 17, 31, 33):
        for first in (0, 5, 67 - count):
            got = linear(x[first : first + count].clone(), layer)
            assert torch.equal(got, together[first : first + count]), (count, first)


def test_any_cut_of_the_rows_into_pieces_gives_the_bits_of_the_whole(num_threads: int) -> None:
    layer = pack_linear(random(448, 320))
    x = random(100, 320, seed=3)
    together = linear(x, layer)
    for size in range(1, 101, 3):
        assert torch.equal(torch.cat([linear(piece, layer) for piece in x.split(size)]), together)


def test_the_result_is_the_product_and_the_bias() -> None:
    for num_in, num_out in ODD:
        weight, bias, x = random(num_out, num_in), random(num_out, seed=1), random(19, num_in, seed=2)
        expected = x.double() @ weight.double().t() + bias.double()
        scale = float(expected.abs().max())
        got = linear(x, pack_linear(weight, bias=bias))
        assert got.is_contiguous()
        torch.testing.assert_close(got.double(), expected, atol=1e-5 * scale, rtol=0)


@pytest.mark.parametrize(("num_in", "num_out"), [(80, 112), (2048, 2048)])
@pytest.mark.parametrize("num_rows", [1, 19])
def test_a_residual_is_added_to_the_product(num_rows: int, num_in: int, num_out: int) -> None:
    layer = pack_linear(random(num_out, num_in), bias=random(num_out, seed=1))
    x, residual = random(num_rows, num_in, seed=2), random(num_rows, num_out, seed=3)
    assert torch.equal(linear(x, layer, residual=residual), residual + linear(x, layer))


def test_each_shape_of_layer_that_was_computed_is_compiled_ahead_once(num_threads: int) -> None:
    """What models of before left over comes first, and what is no more is passed over."""
    while compile_ahead():
        pass
    layers = [pack_linear(random(num_out, 1500), bias=bias) for num_out, bias in ((1501, None), (1502, random(1502)))]
    assert all(layer.is_packed for layer in layers)
    assert not compile_ahead()
    for layer in (*layers, pack_linear(random(1501, 1500))):
        linear(random(3, 1500), layer)
    for _ in layers:
        assert compile_ahead()
    assert not compile_ahead()
    gone = pack_linear(random(1503, 1500))
    linear(random(3, 1500), gone)
    torch.set_num_threads(3)
    assert not compile_ahead()
    torch.set_num_threads(num_threads)
    del gone
    assert not compile_ahead()


def test_no_rows_give_no_rows() -> None:
    assert linear(torch.zeros(0, 5), pack_linear(random(3, 5))).shape == (0, 3)


@pytest.mark.parametrize("size", [64, 100, 704, 1001, 8192, 40_000])
@pytest.mark.parametrize("threads", [1, 3, 7])
def test_the_gated_activation_of_a_row_has_the_same_bits_in_any_batch_and_with_any_threads(
    size: int, threads: int
) -> None:
    """Threads cut a large tensor in the middle of a row, where torch computes the last elements by another exp."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        gate_up = random(min(131, 600_000 // size), 2 * size, seed=4) * 3
        together = silu_and_mul(gate_up)
        assert together.is_contiguous()
        for i in range(len(gate_up)):
            assert torch.equal(silu_and_mul(gate_up[i : i + 1].clone())[0], together[i])
    finally:
        torch.set_num_threads(before)
    gate, up = gate_up.double().chunk(2, dim=1)
    torch.testing.assert_close(together.double(), gate / (1 + (-gate).exp()) * up, atol=1e-5, rtol=1e-5)
