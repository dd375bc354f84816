"""Mamba-2's kernels under the interpreter, against their references."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from declaim.kernels.mamba import (
    StatePlan,
    causal_conv,
    causal_conv_reference,
    gated_rms_norm,
    gated_rms_norm_reference,
    state_scan,
    state_scan_reference,
)
from tests.state_plans import plan_of
from tests.triton.guards import guard_allocations, random, strided

HEADS, WIDTH = 3, 4
# (of the largest, relative). The interpreter truncates to bfloat16.
TOLERANCE = {torch.float32: (1e-5, 1e-5), torch.float16: (4e-3, 4e-3), torch.bfloat16: (4e-2, 4e-2)}


@pytest.fixture(autouse=True)
def guarded_empty(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    yield from guard_allocations(monkeypatch)


def state_of(plan: StatePlan, num_slots: int, *shape: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    """NaN in the slots of those who are not there, and of those who are new."""
    state = torch.full((num_slots, *shape), math.nan, dtype=dtype)
    old = [
        slot for slot, is_new in zip(plan.slots.tolist(), plan.is_new.tolist(), strict=True) if slot >= 0 and not is_new
    ]
    state[old] = random(len(old), *shape, seed=seed, dtype=dtype)
    return state


def assert_near(got: torch.Tensor, expected: torch.Tensor) -> None:
    absolute, relative = TOLERANCE[got.dtype]
    largest = float(expected.float().nan_to_num().abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(got, expected, atol=absolute * max(1.0, largest), rtol=relative, equal_nan=True)


def check(plan: StatePlan, num_slots: int, *, head_dim: int, size: int, dtype: torch.dtype) -> None:
    """Each kernel against its reference, with NaN between rows; slots that are nobody's stay as they were."""
    num_rows = int(plan.query_start[-1])
    inner, channels = HEADS * head_dim, HEADS * head_dim + 2 * size
    xbc = strided(random(num_rows, channels, seed=1, dtype=dtype))
    # On both sides of where softplus becomes linear.
    dt = strided(random(num_rows, HEADS, seed=2, dtype=dtype) * 12)
    z = strided(random(num_rows, inner, seed=3, dtype=dtype))
    taps, bias = random(WIDTH, channels, seed=4, dtype=dtype), random(channels, seed=5, dtype=dtype)
    conv = state_of(plan, num_slots, WIDTH - 1, channels, seed=6, dtype=dtype)
    ssm = state_of(plan, num_slots, HEADS, head_dim, size, seed=7, dtype=dtype)
    expected_conv, expected_ssm = conv.clone(), ssm.clone()

    mixed = causal_conv(xbc, taps, bias, conv, plan)
    expected = causal_conv_reference(xbc, taps, bias, expected_conv, plan)
    assert_near(mixed, expected)
    torch.testing.assert_close(conv, expected_conv, atol=0, rtol=0, equal_nan=True)

    numbers = (-random(HEADS, seed=8).exp(), random(HEADS, seed=9), random(HEADS, seed=10))
    y = state_scan(strided(expected), dt, *numbers, ssm, plan)
    expected_y = state_scan_reference(expected, dt, *numbers, expected_ssm, plan)
    assert_near(y, expected_y)
    assert_near(ssm, expected_ssm)

    norm = random(inner, seed=11, dtype=dtype)
    got = gated_rms_norm(strided(expected_y), z, norm, eps=1e-5)
    assert_near(got, gated_rms_norm_reference(expected_y, z, norm, eps=1e-5))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("head_dim", "size"), [(8, 16), (40, 24), (64, 128)])
def test_every_kernel_is_its_reference_and_touches_no_other_slot(dtype: torch.dtype, head_dim: int, size: int) -> None:
    """Old and new sequences, one position and several, fewer than the convolution's width, and a graph's padding."""
    plan = plan_of([1, 6, 2, 1, 1], [3, 0, 4, -1, 1], [False, True, False, False, True])
    check(plan, 6, head_dim=head_dim, size=size, dtype=dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("head_dim", "size"), [(8, 16), (40, 24), (64, 128)])
def test_prompts_are_scanned_in_blocks(dtype: torch.dtype, head_dim: int, size: int) -> None:
    """Beside one that decodes: two blocks and a rest, a block that goes on from a state, padding."""
    plan = plan_of([1, 35, 16, 1], [3, 0, 4, -1], [False, True, False, False], [0, 32, 16, 0])
    check(plan, 6, head_dim=head_dim, size=size, dtype=dtype)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_sequences(data: st.DataObject) -> None:
    counts = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=3))
    slots = data.draw(st.permutations(range(5)))[: len(counts)]
    slots = [-1 if data.draw(st.integers(0, 4)) == 0 else slot for slot in slots]
    is_new = [data.draw(st.booleans()) for _ in counts]
    check(
        plan_of(counts, slots, is_new),
        5,
        head_dim=data.draw(st.integers(1, 40)),
        size=data.draw(st.integers(1, 20)),
        dtype=data.draw(st.sampled_from([torch.float32, torch.float16])),
    )


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


def test_a_prompt_has_the_same_bits_wherever_it_is_cut_between_its_blocks() -> None:
    head_dim, size, count, num_blocked = 8, 16, 37, 32
    channels = HEADS * head_dim + 2 * size
    xbc, dt = random(count, channels, seed=1), random(count, HEADS, seed=2)
    numbers = (-random(HEADS, seed=6).exp(), random(HEADS, seed=7), random(HEADS, seed=8))
    ssm = torch.full((3, HEADS, head_dim, size), math.nan)
    whole = state_scan(xbc, dt, *numbers, ssm, plan_of([count], [0], [True], [num_blocked]))
    for slot, cuts in ((1, [0, 16, 37]), (2, [0, 32, 33, 37])):
        parts = []
        for first, last in zip(cuts, cuts[1:], strict=False):
            blocked = [max(0, min(last, num_blocked) - first)]
            plan = plan_of([last - first], [slot], [first == 0], blocked if blocked[0] else None)
            parts.append(state_scan(xbc[first:last], dt[first:last], *numbers, ssm, plan))
        assert torch.equal(torch.cat(parts), whole)
        assert torch.equal(ssm[slot], ssm[0])
