"""Convolutions in tiles against plain ones."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from declaim.engine.tiled_conv import TiledConv


def _convolution(channels: int) -> torch.nn.Conv2d:
    torch.manual_seed(channels)
    conv = torch.nn.Conv2d(channels, channels, 3, padding=1).requires_grad_(False)
    return conv.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def _image(*shape: int) -> torch.Tensor:
    return torch.randn(shape).relu().to(memory_format=torch.channels_last)


@settings(max_examples=60, deadline=None)
@given(height=st.integers(1, 13), width=st.integers(1, 40), channels=st.sampled_from([3, 16]), tiles=st.integers(1, 99))
def test_a_convolution_in_tiles_is_the_plain_one(height: int, width: int, channels: int, tiles: int) -> None:
    """Whatever its edges cut off, in however many parts, and over its own input too."""
    conv, x = _convolution(channels), _image(1, channels, height, width)
    tiled, expected = TiledConv(conv), conv(x)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("declaim.engine.tiled_conv._TILE_ELEMENTS", tiles * channels)
        torch.testing.assert_close(tiled(x), expected, rtol=0, atol=2e-5)
        assert tiled(x, into=x) is x
    torch.testing.assert_close(x, expected, rtol=0, atol=2e-5)


def test_a_convolution_in_tiles_takes_a_quarter_of_the_products() -> None:
    conv, x = _convolution(64), _image(1, 64, 80, 400)
    flops = []
    for module in (conv, TiledConv(conv)):
        with FlopCounterMode(display=False) as counter:
            module(x)
        flops.append(counter.get_total_flops())
    assert 0.25 <= flops[1] / flops[0] < 0.26
