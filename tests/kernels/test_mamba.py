"""Mamba-2's kernels against transformers' mixer, against their references, and against themselves in other company."""

from __future__ import annotations

import pytest
import torch
from transformers import Mamba2Config
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

from declaim.kernels.mamba import (
    SCAN_BLOCK,
    StatePlan,
    allocate_states,
    causal_conv,
    causal_conv_reference,
    gated_rms_norm,
    gated_rms_norm_reference,
    state_scan,
    state_scan_reference,
)
from tests.state_plans import plan_of

HEADS, DIM, SIZE, WIDTH = 6, 8, 16, 4
INNER, CHANNELS = HEADS * DIM, HEADS * DIM + 2 * SIZE


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {
        "taps": random(WIDTH, CHANNELS, seed=1).to(dtype),
        "bias": random(CHANNELS, seed=2).to(dtype),
        "decay": -random(HEADS, seed=3).exp(),
        "skip": random(HEADS, seed=4),
        "dt_bias": random(HEADS, seed=5),
        "norm": random(INNER, seed=6).to(dtype),
    }


def run(projected: torch.Tensor, plan: StatePlan, conv: torch.Tensor, ssm: torch.Tensor) -> torch.Tensor:
    """The layer between its two projections, the states moved on in place."""
    weights = layer(projected.dtype)
    z, xbc, dt = projected.split([INNER, CHANNELS, HEADS], dim=1)
    mixed = causal_conv(xbc, weights["taps"], weights["bias"], conv, plan)
    y = state_scan(mixed, dt, weights["decay"], weights["skip"], weights["dt_bias"], ssm, plan)
    return gated_rms_norm(y, z, weights["norm"], eps=1e-5)


def states(num_slots: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """Nothing may be read of a new sequence's slot: it holds NaN."""
    nan = float("nan")
    matrices = allocate_states(num_slots, HEADS, head_dim=DIM, size=SIZE, dtype=dtype, device=torch.device("cpu"))
    return torch.full((num_slots, WIDTH - 1, CHANNELS), nan, dtype=dtype), matrices.fill_(nan)


@pytest.mark.parametrize("num_blocked", [None, [16], [32]])
def test_a_layer_is_that_of_transformers(num_blocked: list[int] | None) -> None:
    """Position by position, and by blocks with a rest."""
    count = 37
    config = Mamba2Config(
        hidden_size=INNER // 2,
        num_heads=HEADS,
        head_dim=DIM,
        state_size=SIZE,
        expand=2,
        n_groups=1,
        conv_kernel=WIDTH,
        chunk_size=8,
        use_bias=False,
        use_conv_bias=True,
        time_step_limit=(0.0, float("inf")),
    )
    mixer = Mamba2Mixer(config, layer_idx=0).eval()
    with torch.no_grad():
        for i, weight in enumerate(mixer.parameters()):
            if weight.ndim > 1:
                weight.copy_(random(*weight.shape, seed=i) * 0.3)
        x = random(1, count, INNER // 2, seed=50)
        expected = mixer(x)[0]
        plan, (conv, ssm) = plan_of([count], [2], [True], num_blocked), states(3)
        z, xbc, dt = mixer.in_proj(x[0]).split([INNER, CHANNELS, HEADS], dim=1)
        taps = mixer.conv1d.weight[:, 0].t().contiguous()
        mixed = causal_conv(xbc, taps, mixer.conv1d.bias, conv, plan)
        y = state_scan(mixed, dt, -mixer.A_log.exp(), mixer.D, mixer.dt_bias, ssm, plan)
        got = mixer.out_proj(gated_rms_norm(y, z, mixer.norm.weight, eps=1e-5))
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_is_its_reference_and_leaves_the_same_states(dtype: torch.dtype) -> None:
    counts, slots, is_new = [1, 5, 2, 1, 35, 16], [3, 0, 4, 1, 5, 2], [False, True, False, False, True, False]
    plan = plan_of(counts, slots, is_new, [0, 0, 0, 0, 32, 16])
    projected = random(sum(counts), INNER + CHANNELS + HEADS, seed=7).to(dtype)
    z, xbc, dt = projected.split([INNER, CHANNELS, HEADS], dim=1)
    weights = layer(dtype)
    conv = random(6, WIDTH - 1, CHANNELS, seed=8).to(dtype)
    ssm = random(6, HEADS, DIM, SIZE, seed=9).to(dtype)
    wanted_conv, wanted_ssm = conv.clone(), ssm.clone()
    mixed = causal_conv(xbc, weights["taps"], weights["bias"], conv, plan)
    wanted = causal_conv_reference(xbc, weights["taps"], weights["bias"], wanted_conv, plan)
    tolerance = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 2e-2, "rtol": 2e-2}
    torch.testing.assert_close(mixed, wanted, **tolerance)
    assert torch.equal(conv, wanted_conv)
    numbers = (weights["decay"], weights["skip"], weights["dt_bias"])
    y = state_scan(wanted, dt, *numbers, ssm, plan)
    torch.testing.assert_close(y, state_scan_reference(wanted, dt, *numbers, wanted_ssm, plan), **tolerance)
    torch.testing.assert_close(ssm, wanted_ssm, **tolerance)
    got = gated_rms_norm(y, z, weights["norm"], eps=1e-5)
    torch.testing.assert_close(got, gated_rms_norm_reference(y, z, weights["norm"], eps=1e-5), **tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("threads", [1, 3])
def test_a_sequence_has_the_same_bits_in_any_company_and_however_it_is_cut(dtype: torch.dtype, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        lengths = [13, 1, 29, 6]
        inputs = [random(length, INNER + CHANNELS + HEADS, seed=20 + i).to(dtype) for i, length in enumerate(lengths)]
        conv, ssm = states(9, dtype)
        alone = [run(x, plan_of([len(x)], [i], [True]), conv, ssm) for i, x in enumerate(inputs)]
        whole = run(torch.cat(inputs), plan_of(lengths, [7, 5, 6, 8], [True] * 4), conv, ssm)
        assert torch.equal(whole, torch.cat(alone))
        assert torch.equal(ssm[[7, 5, 6, 8]], ssm[:4]) and torch.equal(conv[[7, 5, 6, 8]], conv[:4])
        # Position by position, each in a batch with whoever is not done.
        done = [torch.empty(0, INNER, dtype=dtype) for _ in lengths]
        for t in range(max(lengths)):
            live = [i for i, length in enumerate(lengths) if t < length]
            rows = torch.cat([inputs[i][t : t + 1] for i in live])
            step = run(rows, plan_of([1] * len(live), live, [t == 0] * len(live)), conv, ssm)
            for i, row in zip(live, step, strict=True):
                done[i] = torch.cat([done[i], row[None]])
        for got, wanted in zip(done, alone, strict=True):
            assert torch.equal(got, wanted)
        assert torch.equal(ssm[[7, 5, 6, 8]], ssm[:4])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_prompts_blocks_have_the_same_bits_in_any_company_and_wherever_it_is_cut_between_them(
    dtype: torch.dtype, threads: int
) -> None:
    """A rest of some positions behind them, and some that were drawn; the prompt is 53 positions long."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        length, num_blocked, num_drawn = 53, 48, 6
        inputs = [random(length + num_drawn, INNER + CHANNELS + HEADS, seed=30 + i).to(dtype) for i in range(3)]
        conv, ssm = states(9, dtype)
        wanted = []
        for slot, x in enumerate(inputs):
            plan = plan_of([length + num_drawn], [slot], [True], [num_blocked])
            wanted.append(run(x, plan, conv, ssm))
        assert not torch.equal(run(inputs[0], plan_of([59], [8], [True]), conv, ssm), wanted[0])
        for cuts in ([0, 16, 48, 59], [0, 48, 50, 53, 59], [0, 32, 59], [0, 16, 32, 48, *range(49, 60)]):
            done = [torch.empty(0, INNER, dtype=dtype) for _ in inputs]
            for first, last in zip(cuts, cuts[1:], strict=False):
                # Beside a whole prompt in a block of its own, and one that is a position further.
                rows = torch.cat([inputs[2], *(x[first:last] for x in inputs[:2])])
                blocked = max(0, min(last, num_blocked) - first)
                counts = [59, last - first, last - first]
                plan = plan_of(counts, [7, 3, 4], [True, first == 0, first == 0], [num_blocked, blocked, blocked])
                whole, *parts = run(rows, plan, conv, ssm).split(counts)
                assert torch.equal(whole, wanted[2])
                done = [torch.cat([old, new]) for old, new in zip(done, parts, strict=False)]
            for got, expected in zip(done, wanted, strict=False):
                assert torch.equal(got, expected), cuts
            assert torch.equal(ssm[[3, 4]], ssm[:2]) and torch.equal(conv[[3, 4]], conv[:2])
    finally:
        torch.set_num_threads(before)
    assert SCAN_BLOCK == 16


def test_what_does_not_fit_is_refused_with_its_shape() -> None:
    conv, ssm = states(2)
    plan, weights = plan_of([2], [0], [True]), layer(torch.float32)
    with pytest.raises(ValueError, match=r"rows of 80"):
        causal_conv(random(2, 79), weights["taps"], weights["bias"], conv, plan)
    with pytest.raises(ValueError, match=r"\[2, 80\]|\(2, 79\)"):
        state_scan(random(2, 79), random(2, HEADS), *[weights[n] for n in ("decay", "skip", "dt_bias")], ssm, plan)
    with pytest.raises(ValueError, match="float32"):
        state_scan(random(2, 80), random(2, HEADS), *[weights["skip"].double()] * 3, ssm, plan)
    with pytest.raises(ValueError, match="do not fit"):
        gated_rms_norm(random(2, 8), random(2, 9), random(8), eps=1e-5)
