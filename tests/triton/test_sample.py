"""The one-launch sampler against engine/sampler.py on the same logits, the same noise and the same settings."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from declaim.engine.request import ResolvedSampling
from declaim.engine.sampler import DrawInputs, draw, filter_logits, sample_ops
from declaim.engine.spec import (
    AllowedIds,
    EosGate,
    Guidance,
    MinP,
    RepetitionPenalty,
    SamplingDefaults,
    SamplingOp,
    SamplingSpec,
    Temperature,
    TopK,
    TopP,
)
from declaim.kernels import sample
from declaim.kernels.noise import (
    draw_keys,
    gumbel_noise,
    mix64,
    triton_draw_key,
    triton_gumbel_noise,
    triton_noise_bits,
)
from declaim.kernels.sample import SampleParams, guided_sample
from tests.triton.guards import guard_allocations

EOS = 1024
DIA: tuple[SamplingOp, ...] = (
    Guidance(center="cond", keep="cond", top_k_filter=True),
    Temperature(),
    AllowedIds((EOS + 1,) + (EOS,) * 8),
    EosGate(EOS),
    TopK(),
    TopP(),
)
LARK: tuple[SamplingOp, ...] = (Temperature(), TopK(), TopP())
ZONOS: tuple[SamplingOp, ...] = (
    Guidance(center="uncond", keep="guided", top_k_filter=False),
    AllowedIds((EOS + 1,) + (EOS,) * 8),
    RepetitionPenalty(window=2, compounding=True),
    Temperature(),
    TopP(),
    TopK(),
    MinP(),
)
PLAIN = ResolvedSampling(
    temperature=1.0,
    top_k=0,
    top_p=1.0,
    min_p=0.0,
    repetition_penalty=1.0,
    guidance_scale=1.0,
    seed=0,
    max_seconds=30.0,
)
GREEDY = replace(PLAIN, temperature=0.0)


@pytest.fixture(autouse=True)
def guarded_empty(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    yield from guard_allocations(monkeypatch)


def params_of(params: list[ResolvedSampling]) -> SampleParams:
    def floats(name: str) -> torch.Tensor:
        return torch.tensor([getattr(p, name) for p in params], dtype=torch.float32)

    return SampleParams(
        temperature=floats("temperature"),
        top_k=torch.tensor([p.top_k for p in params], dtype=torch.int32),
        top_p=floats("top_p"),
        min_p=floats("min_p"),
        repetition_penalty=floats("repetition_penalty"),
        guidance_scale=floats("guidance_scale"),
        seed=torch.tensor([p.seed for p in params], dtype=torch.int64),
    )


def inputs_of(
    cond: torch.Tensor,
    params: list[ResolvedSampling],
    *,
    uncond: torch.Tensor | None = None,
    guided: list[int] | None = None,
    rows: list[int] | None = None,
    history: torch.Tensor | None = None,
) -> DrawInputs:
    """All sequences are guided if there are unconditional logits and `guided` does not say which."""
    size = len(params)
    return DrawInputs(
        cond=cond,
        uncond=cond[:0] if uncond is None else uncond,
        guided=torch.tensor(guided if guided is not None else [] if uncond is None else list(range(size))).long(),
        params=tuple(params),
        rows=tuple(rows or range(size)),
        history=torch.empty((size, 0, cond.shape[1]), dtype=torch.int64) if history is None else history,
    )


def kernel_draw(inputs: DrawInputs, ops: tuple[SamplingOp, ...]) -> torch.Tensor:
    uncond_rows = torch.full((len(inputs.params),), -1)
    uncond_rows[inputs.guided] = len(inputs.params) + torch.arange(len(inputs.guided))
    return guided_sample(
        torch.cat([inputs.cond, inputs.uncond]),
        params_of(list(inputs.params)),
        rows=torch.tensor(inputs.rows, dtype=torch.int64),
        uncond_rows=uncond_rows,
        history=inputs.history,
        ops=sample_ops(spec_of(*ops)),
    )


def spec_of(*ops: SamplingOp) -> SamplingSpec:
    return SamplingSpec(ops=ops, defaults=SamplingDefaults())


def assert_same_draw(inputs: DrawInputs, *ops: SamplingOp) -> torch.Tensor:
    got = kernel_draw(inputs, ops)
    assert got.dtype == torch.int32
    assert got.tolist() == draw(inputs, spec_of(*ops)).tolist()
    return got


def logits_of(seed: int, *shape: int, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def support_of(logits: list[float], params: ResolvedSampling, op: SamplingOp) -> set[int]:
    """The ids that the kernel draws after `op`: made almost equally likely then, 24 draws show them all."""
    cond = torch.tensor(logits).expand(24, 1, -1).contiguous()
    inputs = inputs_of(cond, [replace(params, seed=seed, temperature=50.0) for seed in range(24)])
    return set(kernel_draw(inputs, (op, Temperature())).flatten().tolist())


# Noise.


@triton.jit
def _noise_kernel(seeds, rows, ids, keys, bits, noise, BLOCK: tl.constexpr):
    draw, codebook = tl.program_id(0), tl.program_id(1)
    key = triton_draw_key(tl.load(seeds + draw), tl.load(rows + draw), codebook)
    at = draw * tl.num_programs(1) + codebook
    tl.store(keys + at, key.to(tl.int64))
    candidates = tl.load(ids + tl.arange(0, BLOCK))
    tl.store(bits + at * BLOCK + tl.arange(0, BLOCK), triton_noise_bits(key, candidates))
    tl.store(noise + at * BLOCK + tl.arange(0, BLOCK), triton_gumbel_noise(key, candidates))


def test_noise_has_the_integers_of_splitmix64_and_the_floats_of_torch() -> None:
    seeds = torch.tensor([0, 1, 1234567, 2**63 - 1, -1])
    rows = torch.tensor([0, 1, 99, 2**31, 7])
    ids = torch.tensor([0, 1, 2, 3, 1023, 1024, 1027, 4095], dtype=torch.int32)
    keys = torch.empty(5, 3, dtype=torch.int64)
    bits, noise = torch.empty(5, 3, 8, dtype=torch.int32), torch.empty(5, 3, 8)
    _noise_kernel[(5, 3)](seeds, rows, ids, keys, bits, noise, 8)
    expected_keys = draw_keys(seeds, rows, num_codebooks=3)
    assert torch.equal(keys[..., None], expected_keys)
    words = [[[mix64(int(k) + (int(v) + 1) * 0x9E3779B97F4A7C15) for v in ids] for k in of_row] for of_row in keys]
    assert bits.tolist() == [[[word >> 41 for word in of_key] for of_key in of_row] for of_row in words]
    expected = gumbel_noise(expected_keys, ids.long().expand(5, 3, -1))
    # One ulp of each logarithm: the inner one's relative error is an absolute error of the outer one.
    torch.testing.assert_close(noise, expected, atol=2.0**-23, rtol=2.0**-23)


# Families.


@pytest.mark.parametrize("family", [DIA, ZONOS], ids=["dia", "zonos"])
@pytest.mark.parametrize("is_coarse", [False, True], ids=["", "ties"])
def test_families_with_guidance_draw_as_the_oracle(family: tuple[SamplingOp, ...], is_coarse: bool) -> None:
    """Guided and not, greedy and not, filters on and off, in one batch; coarse logits are full of ties."""
    cond, uncond = logits_of(1, 4, 9, 1028), logits_of(2, 3, 9, 1028)
    cond[0, 0, EOS] = 40.0
    uncond[0, 0, EOS] = 0.0
    if is_coarse:
        cond, uncond = cond.round(), uncond.round()
    params = [
        replace(PLAIN, guidance_scale=3.0, temperature=1.2, top_k=45, top_p=0.95, seed=11),
        replace(PLAIN, temperature=0.7, top_p=0.8, min_p=0.1, repetition_penalty=3.0, seed=2**62),
        replace(GREEDY, guidance_scale=3.0, top_k=45, top_p=0.1, repetition_penalty=3.0),
        replace(PLAIN, guidance_scale=2.0, min_p=0.05, seed=5),
    ]
    history = torch.randint(-1, 1028, (4, 3, 9), generator=torch.Generator().manual_seed(3))
    history[:, -1] = cond.argmax(-1)
    inputs = inputs_of(cond, params, uncond=uncond, guided=[0, 2, 3], rows=[0, 31, 7, 2**33], history=history)
    got = assert_same_draw(inputs, *family)
    assert int(got[0, 0]) == EOS or family is ZONOS


def test_lark_draws_as_the_oracle() -> None:
    params = [
        replace(PLAIN, temperature=0.6, top_k=20, seed=1),
        replace(PLAIN, temperature=0.6, top_k=20, top_p=0.9, seed=1),
        replace(GREEDY, top_k=20),
    ]
    assert_same_draw(inputs_of(logits_of(4, 3, 8, 1024), params), *LARK)


@pytest.mark.parametrize("vocab", [1, 2, 33, 1025, 1028, 1100, 4096])
def test_any_vocabulary_draws_as_the_oracle(vocab: int) -> None:
    params = [replace(PLAIN, top_k=9, top_p=0.9, seed=vocab), GREEDY, replace(PLAIN, seed=vocab)]
    assert_same_draw(inputs_of(logits_of(vocab, 3, 1, vocab), params), Temperature(), TopK(), TopP(), MinP())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_logits_of_16_bits_are_taken_as_the_float32_they_are(dtype: torch.dtype) -> None:
    inputs = inputs_of(logits_of(5, 2, 3, 70).to(dtype), [GREEDY, replace(PLAIN, top_k=9, top_p=0.9, seed=3)])
    wide = replace(inputs, cond=inputs.cond.float(), uncond=inputs.uncond.float())
    assert torch.equal(kernel_draw(inputs, LARK), draw(wide, spec_of(*LARK)).int())


@pytest.mark.parametrize("compounding", [True, False])
def test_the_repetition_penalty_counts_what_the_oracle_counts(compounding: bool) -> None:
    """Flat logits: where the largest ends up says how often it was penalised."""
    cond = torch.tensor([[[4.0, 3.9, 1.5, 0.9, -1.0]] * 3])
    history = torch.tensor([[[0, 0, 1], [0, 0, 0], [1, 0, 0], [0, -1, 3]]])
    inputs = inputs_of(cond, [replace(GREEDY, repetition_penalty=2.0)], history=history)
    assert_same_draw(inputs, RepetitionPenalty(window=3, compounding=compounding))
    narrow = replace(inputs, history=history.int())
    assert torch.equal(
        kernel_draw(narrow, (RepetitionPenalty(window=4, compounding=compounding),)),
        draw(inputs, spec_of(RepetitionPenalty(window=4, compounding=compounding))).int(),
    )


@pytest.mark.parametrize("keep", ["cond", "guided"])
@pytest.mark.parametrize("center", ["cond", "uncond"])
@pytest.mark.parametrize("top_k", [0, 1, 7, 50])
def test_guidance_is_the_oracles(center: str, keep: str, top_k: int) -> None:
    params = [
        replace(GREEDY, guidance_scale=2.5, top_k=top_k),
        replace(PLAIN, guidance_scale=1.5, top_k=top_k, temperature=3.0, seed=9),
    ]
    op = Guidance(center=center, keep=keep, top_k_filter=True)  # type: ignore[arg-type]
    assert_same_draw(inputs_of(logits_of(6, 2, 3, 50), params, uncond=logits_of(7, 2, 3, 50)), op, Temperature())


# What can be drawn.


@pytest.mark.parametrize(("top_k", "expected"), [(2, {1, 4}), (3, {0, 1, 2, 4}), (5, {0, 1, 2, 3, 4})])
def test_top_k_keeps_the_equals_of_the_smallest_it_keeps(top_k: int, expected: set[int]) -> None:
    logits = [0.0, 0.5, -0.0, -0.5, 0.5]  # both zeros are equal
    assert support_of(logits, replace(PLAIN, top_k=top_k), TopK()) == expected


@pytest.mark.parametrize(("top_p", "expected"), [(0.55, {0, 2}), (0.8, {0, 1, 2}), (0.9, {0, 1, 2, 3})])
def test_top_p_keeps_the_id_that_crosses_it_and_of_equals_the_smaller(top_p: float, expected: set[int]) -> None:
    logits = [math.log(p) for p in (0.25, 0.125, 0.5, 0.125, 1e-9)]
    assert support_of(logits, replace(PLAIN, top_p=top_p), TopP()) == expected


@pytest.mark.parametrize(("top_p", "count"), [(0.125, 1), (0.13, 2), (0.5, 4)])
def test_top_p_among_equals_keeps_the_smallest_ids(top_p: float, count: int) -> None:
    assert support_of([-3.0] * 8, replace(PLAIN, top_p=top_p), TopP()) == set(range(count))


def test_min_p_keeps_what_is_likely_enough() -> None:
    logits = [0.0, math.log(0.31), math.log(0.29), -9.0]
    assert support_of(logits, replace(PLAIN, min_p=0.3), MinP()) == {0, 1}


def test_draws_follow_the_oracles_distribution() -> None:
    """Total variation of 250 draws over 5 ids: about 0.05 is chance."""
    ops = (Temperature(), AllowedIds((5,)))
    params = replace(PLAIN, temperature=1.5)
    cond = torch.tensor([1.0, 0.0, 2.0, -1.0, 0.5, 5.0]).expand(250, 1, -1).contiguous()
    expected = filter_logits(inputs_of(cond[:1], [params]), spec_of(*ops)).values[0, 0].softmax(-1)
    inputs = inputs_of(cond, [replace(params, seed=seed) for seed in range(250)])
    drawn = kernel_draw(inputs, ops).flatten().bincount(minlength=6) / 250
    assert float((drawn - expected).abs().sum()) / 2 < 0.09
    assert drawn[5] == 0.0


# What a batch must not change, and what is no logits.


def test_a_draw_does_not_depend_on_its_neighbours() -> None:
    cond, uncond = logits_of(8, 3, 2, 100), logits_of(9, 2, 2, 100)
    params = [
        replace(PLAIN, guidance_scale=3.0, top_k=5, top_p=0.9, seed=1),
        replace(PLAIN, top_p=0.5, seed=2),
        replace(GREEDY, guidance_scale=2.0),
    ]
    ops = (Guidance(center="uncond", keep="guided", top_k_filter=True), Temperature(), TopK(), TopP())
    together = kernel_draw(inputs_of(cond, params, uncond=uncond, guided=[0, 2], rows=[5, 6, 7]), ops)
    for i, of_uncond in enumerate([uncond[:1], None, uncond[1:]]):
        alone = kernel_draw(inputs_of(cond[i : i + 1], [params[i]], uncond=of_uncond, rows=[5 + i]), ops)
        assert torch.equal(alone[0], together[i])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_draw_nothing(bad: float) -> None:
    cond, uncond = logits_of(10, 4, 2, 40), logits_of(11, 2, 2, 40)
    cond[1, 0, 3] = uncond[1, 1, 39] = bad
    params = [GREEDY, replace(PLAIN, top_k=3, top_p=0.9), replace(PLAIN, top_k=3), GREEDY]
    ops = (Guidance(center="cond", keep="cond", top_k_filter=True), Temperature(), TopK(), TopP())
    inputs = inputs_of(cond, params, uncond=uncond, guided=[0, 2])
    got = kernel_draw(inputs, ops)
    is_bad = torch.tensor([[False, False], [True, False], [False, True], [False, False]])
    assert torch.equal(got == -1, is_bad)
    # The oracle condemns a sequence for one bad codebook.
    assert torch.equal(got.masked_fill(is_bad.any(1, keepdim=True), -1), draw(inputs, spec_of(*ops)).int())


def test_a_codebook_with_nothing_left_draws_nothing() -> None:
    cond = torch.tensor([[[0.0, 1.0, 9.0], [0.0, 1.0, 2.0]]] * 2)
    params = [replace(PLAIN, top_k=1, top_p=0.9, min_p=0.1), GREEDY]
    inputs = inputs_of(cond, params, uncond=cond, guided=[0, 1])
    ops = (AllowedIds((0, 2)), Temperature(), TopK(), TopP(), MinP())
    assert assert_same_draw(inputs, *ops)[:, 0].tolist() == [-1, -1]


def test_padding_reads_nothing_but_its_row() -> None:
    logits = logits_of(12, 3, 2, 40)
    logits[1] = math.nan
    params = params_of([GREEDY, replace(PLAIN, temperature=math.nan, top_k=-5), GREEDY])
    got = guided_sample(
        logits,
        params,
        rows=torch.tensor([0, -1, 2]),
        uncond_rows=torch.tensor([-1, 10**15, -1]),
        history=torch.full((3, 1, 2), 10**9),
        ops=sample_ops(spec_of(*ZONOS[:1], *ZONOS[3:])),
    )
    expected = logits.argmax(-1).int()
    expected[1] = -1
    assert torch.equal(got, expected)


def test_no_sequence_gives_no_code() -> None:
    assert kernel_draw(inputs_of(torch.empty(0, 2, 8), []), LARK).shape == (0, 2)


def test_strided_logits_are_read_where_they_are() -> None:
    padded = torch.full((8, 4, 64), math.nan)
    view = padded[::2, 1:4, :50]
    view.copy_(logits_of(13, 4, 3, 50))
    params = [GREEDY, replace(PLAIN, guidance_scale=2.0, seed=4)]
    arguments = {
        "rows": torch.tensor([3, 4]),
        "uncond_rows": torch.tensor([-1, 3], dtype=torch.int32),
        "history": torch.empty(2, 0, 3, dtype=torch.int32),
        "ops": sample_ops(spec_of(*ZONOS[:1], *ZONOS[3:])),
    }
    got = guided_sample(view, params_of(params), **arguments)
    assert torch.equal(got, guided_sample(view.contiguous(), params_of(params), **arguments))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(2, 3, 5000)}, "5000 ids"),
        ({"logits": torch.zeros(2, 3, 8, dtype=torch.float64)}, "float64"),
        ({"logits": torch.zeros(2, 8, 3).transpose(1, 2)}, "contiguous last axis"),
        ({"logits": torch.zeros(1, 3, 8)}, "1 rows of logits for 2"),
        ({"rows": torch.zeros(2, dtype=torch.int32)}, "rows is torch.int32"),
        ({"uncond_rows": torch.zeros(3, dtype=torch.int64)}, "uncond_rows is"),
        ({"history": torch.zeros(2, 1, 4, dtype=torch.int64)}, "history is"),
        ({"params": params_of([PLAIN] * 3)}, "temperature is"),
        ({"ops": (sample.allowed_ids((1, 2)),)}, "2 limits for 3 codebooks"),
        ({"ops": (sample.repetition_penalty(window=2, compounding=True),)}, "looks at 2 rows and history holds 1"),
    ],
)
def test_wrong_inputs_are_named(change: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {
        "logits": torch.zeros(2, 3, 8),
        "params": params_of([PLAIN] * 2),
        "rows": torch.zeros(2, dtype=torch.int64),
        "uncond_rows": torch.full((2,), -1),
        "history": torch.full((2, 1, 3), -1),
        "ops": (sample.TOP_K,),
    }
    with pytest.raises(ValueError, match=message):
        guided_sample(**(arguments | change))  # type: ignore[arg-type]


# Anything.


@st.composite
def settings_of(drawn: st.DrawFn) -> ResolvedSampling:
    return ResolvedSampling(
        temperature=drawn(st.sampled_from([0.0, 0.6, 1.0, 1.7])),
        top_k=drawn(st.sampled_from([0, 1, 2, 5, 100])),
        top_p=drawn(st.sampled_from([0.013, 0.37, 0.93, 1.0])),
        min_p=drawn(st.sampled_from([0.0, 0.07, 0.6])),
        repetition_penalty=drawn(st.sampled_from([1.0, 1.3])),
        guidance_scale=drawn(st.sampled_from([1.0, 3.1])),
        seed=drawn(st.integers(0, 2**63 - 1)),
        max_seconds=30.0,
    )


ANY_OP = st.sampled_from(
    [
        AllowedIds((17, 19)),
        EosGate(3, codebook=1),
        RepetitionPenalty(window=3, compounding=False),
        RepetitionPenalty(window=2),
        Temperature(),
        TopK(),
        TopP(),
        MinP(),
    ]
)
ANY_GUIDANCE = st.builds(
    Guidance,
    center=st.sampled_from(["cond", "uncond"]),
    keep=st.sampled_from(["cond", "guided"]),
    top_k_filter=st.booleans(),
)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    guidance=ANY_GUIDANCE,
    ops=st.lists(ANY_OP, max_size=6),
    params=st.lists(settings_of(), min_size=2, max_size=2),
    seed=st.integers(0, 99),
    step=st.sampled_from([0.01, 0.5, 4.0]),
)
def test_any_ops_in_any_order_draw_as_the_oracle(
    guidance: Guidance, ops: list[SamplingOp], params: list[ResolvedSampling], seed: int, step: float
) -> None:
    cond, uncond = ((logits_of(seed + i, 2, 2, 20) / step).round() * step for i in (0, 100))
    history = torch.randint(-1, 20, (2, 3, 2), generator=torch.Generator().manual_seed(seed))
    inputs = inputs_of(cond, params, uncond=uncond[:1], guided=[seed % 2], rows=[seed, 1], history=history)
    assert_same_draw(inputs, guidance, *ops)
