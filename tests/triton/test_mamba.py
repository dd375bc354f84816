"""Mamba-2's kernels under the interpreter, against their references."""

from __future__ import annotations

import pytest
import torch

from declaim.kernels.mamba import (
    StatePlan,
    causal_conv,
    causal_conv_reference,
    gated_rms_norm,
    gated_rms_norm_reference,
    state_scan,
    state_scan_reference,
)

HEADS, WIDTH = 3, 4
# (absolute, relative). The interpreter truncates to bfloat16.
TOLERANCE = {torch.float32: (1e-5, 1e-5), torch.float16: (4e-3, 4e-3), torch.bfloat16: (4e-2, 4e-2)}


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def plan_of(counts: list[int], slots: list[int], is_new: list[bool]) -> StatePlan:
    starts = torch.tensor([0, *counts]).cumsum(0).to(torch.int32)
    return StatePlan(starts, torch.tensor(slots), torch.tensor(is_new))


# Old and new sequences, one position and several, fewer than the convolution's width, and a graph's padding.
PLAN = plan_of([1, 6, 2, 1, 1], [3, 0, 4, -1, 1], [False, True, False, False, True])
NUM_ROWS, NUM_SLOTS = 11, 6


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("head_dim", "size"), [(8, 16), (40, 24), (64, 128)])
def test_every_kernel_is_its_reference_and_touches_no_other_slot(dtype: torch.dtype, head_dim: int, size: int) -> None:
    atol, rtol = TOLERANCE[dtype]
    inner, channels = HEADS * head_dim, HEADS * head_dim + 2 * size
    projected = random(NUM_ROWS, inner + channels + HEADS, seed=1, dtype=dtype)
    z, xbc, dt = projected.split([inner, channels, HEADS], dim=1)
    dt = dt * 12  # on both sides of where softplus becomes linear
    taps, bias = random(WIDTH, channels, seed=2, dtype=dtype), random(channels, seed=3, dtype=dtype)
    conv = random(NUM_SLOTS, WIDTH - 1, channels, seed=4, dtype=dtype)
    ssm = random(NUM_SLOTS, HEADS, head_dim, size, seed=5, dtype=dtype)
    wanted_conv, wanted_ssm = conv.clone(), ssm.clone()

    mixed = causal_conv(xbc, taps, bias, conv, PLAN)
    wanted = causal_conv_reference(xbc, taps, bias, wanted_conv, PLAN)
    torch.testing.assert_close(mixed, wanted, atol=atol, rtol=rtol)
    assert torch.equal(conv, wanted_conv)

    numbers = (-random(HEADS, seed=6).exp(), random(HEADS, seed=7), random(HEADS, seed=8))
    y = state_scan(wanted, dt, *numbers, ssm, PLAN)
    wanted_y = state_scan_reference(wanted, dt, *numbers, wanted_ssm, PLAN)
    scale = float(wanted_y.float().abs().max())
    torch.testing.assert_close(y, wanted_y, atol=atol * scale, rtol=rtol)
    torch.testing.assert_close(ssm, wanted_ssm, atol=atol * float(wanted_ssm.float().abs().max()), rtol=rtol)
    assert torch.equal(ssm[[2, 5]], wanted_ssm[[2, 5]])

    norm = random(inner, seed=9, dtype=dtype)
    got = gated_rms_norm(wanted_y, z, norm, eps=1e-5)
    torch.testing.assert_close(got, gated_rms_norm_reference(wanted_y, z, norm, eps=1e-5), atol=atol, rtol=rtol)


def test_a_sequence_has_the_same_bits_whole_and_position_by_position() -> None:
    head_dim, size, count = 8, 16, 9
    channels = HEADS * head_dim + 2 * size
    xbc, dt = random(count, channels, seed=1), random(count, HEADS, seed=2)
    taps, bias = random(WIDTH, channels, seed=3), random(channels, seed=4)
    numbers = (-random(HEADS, seed=6).exp(), random(HEADS, seed=7), random(HEADS, seed=8))
    nan = float("nan")
    conv = torch.full((2, WIDTH - 1, channels), nan)
    ssm = torch.full((2, HEADS, head_dim, size), nan)
    plan = plan_of([count], [0], [True])
    whole = state_scan(causal_conv(xbc, taps, bias, conv, plan), dt, *numbers, ssm, plan)
    for t in range(count):
        plan = plan_of([1], [1], [t == 0])
        mixed = causal_conv(xbc[t : t + 1], taps, bias, conv, plan)
        assert torch.equal(state_scan(mixed, dt[t : t + 1], *numbers, ssm, plan)[0], whole[t])
    assert torch.equal(ssm[0], ssm[1]) and torch.equal(conv[0], conv[1])
