"""The sampler against transformers' own processors, straightforward loops, and itself in other company."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper
from transformers.generation.logits_process import (
    DiaClassifierFreeGuidanceLogitsProcessor,
    DiaEOSChannelFilterLogitsProcessor,
)

from declaim.engine.request import ResolvedSampling
from declaim.engine.sampler import DrawInputs, draw, filter_logits
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
from declaim.kernels.noise import draw_keys, gumbel_noise

EOS = 1024
DIA_OPS: tuple[SamplingOp, ...] = (
    Guidance(center="cond", keep="cond", top_k_filter=True),
    Temperature(),
    AllowedIds((EOS + 1,) + (EOS,) * 8),
    EosGate(EOS),
    TopK(),
    TopP(),
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


def spec_of(*ops: SamplingOp) -> SamplingSpec:
    return SamplingSpec(ops=ops, defaults=SamplingDefaults())


def inputs_of(
    cond: torch.Tensor,
    params: list[ResolvedSampling],
    *,
    uncond: torch.Tensor | None = None,
    rows: list[int] | None = None,
    history: torch.Tensor | None = None,
) -> DrawInputs:
    """`uncond` holds all B; those of unguided requests are dropped."""
    guided = torch.tensor([i for i, p in enumerate(params) if p.guidance_scale != 1.0], dtype=torch.int64)
    return DrawInputs(
        cond=cond,
        uncond=cond[:0] if uncond is None else uncond[guided],
        guided=guided if uncond is not None else guided[:0],
        params=tuple(params),
        rows=tuple(rows or [0] * len(params)),
        history=torch.zeros(len(params), 0, cond.shape[1], dtype=torch.int64) if history is None else history,
    )


def probabilities(inputs: DrawInputs, spec: SamplingSpec) -> torch.Tensor:
    """What is drawn from, over the whole vocabulary: [B, Q, V]."""
    state = filter_logits(inputs, spec)
    return torch.zeros_like(inputs.cond).scatter(-1, state.all_ids(), state.values.softmax(-1))


def logits_of(seed: int, *shape: int, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


# Against transformers.


@pytest.mark.parametrize(
    ("guidance_scale", "top_k", "top_p", "temperature"),
    list(itertools.product([1.0, 3.0], [0, 1, 45, 1028], [1.0, 0.95, 0.3], [1.0, 1.2, 0.7])),
)
def test_dias_probabilities_are_those_of_transformers_own_processors(
    guidance_scale: float, top_k: int, top_p: float, temperature: float
) -> None:
    cond, uncond = logits_of(1, 3, 9, 1028), logits_of(2, 3, 9, 1028)
    cond[0, 0, EOS] = 40.0  # the end code leads on this row's first codebook, and must not matter on the second
    cond[1, 1, EOS] = 40.0
    uncond[0, 0, EOS] = uncond[1, 1, EOS] = 0.0
    params = replace(PLAIN, guidance_scale=guidance_scale, top_k=top_k, top_p=top_p, temperature=temperature)
    got = probabilities(inputs_of(cond, [params] * 3, uncond=uncond), spec_of(*DIA_OPS))

    scores = cond.clone()
    unused = torch.LongTensor([[0]] * 3)
    if guidance_scale > 1.0:
        guide = DiaClassifierFreeGuidanceLogitsProcessor(guidance_scale, top_k or None)
        scores = guide(unused, torch.cat([cond, uncond]))
    flat = torch.LongTensor([[0]] * 27)
    scores = TemperatureLogitsWarper(temperature)(flat, scores.reshape(27, 1028))
    scores = DiaEOSChannelFilterLogitsProcessor(9, EOS)(flat, scores)
    if top_k:
        scores = TopKLogitsWarper(top_k)(flat, scores)
    if top_p < 1.0:
        scores = TopPLogitsWarper(top_p)(flat, scores)
    expected = scores.softmax(-1).view(3, 9, 1028)
    # With top_k 1 the guided filter leaves nothing of one codebook but a forbidden id: then both are NaN.
    is_empty = expected.isnan().any(-1)
    assert torch.equal(got.isnan().any(-1), is_empty)
    assert int(is_empty.sum()) == (guidance_scale > 1.0 and top_k == 1)
    torch.testing.assert_close(got[~is_empty], expected[~is_empty], atol=1e-5, rtol=0)
    assert got[0, 0, EOS] == 1.0
    assert (got.nan_to_num()[:, 1:, EOS:] == 0.0).all()


@pytest.mark.parametrize("min_p", [0.01, 0.1, 0.5, 0.99])
def test_min_p_is_that_of_transformers(min_p: float) -> None:
    logits = logits_of(3, 4, 2, 100)
    got = probabilities(inputs_of(logits, [replace(PLAIN, min_p=min_p)] * 4), spec_of(MinP()))
    expected = MinPLogitsWarper(min_p)(torch.LongTensor([[0]] * 8), logits.view(8, 100).clone())
    torch.testing.assert_close(got, expected.softmax(-1).view(4, 2, 100), atol=1e-6, rtol=0)


@pytest.mark.parametrize("keep", ["cond", "guided"])
@pytest.mark.parametrize("center", ["cond", "uncond"])
def test_guidance_keeps_the_top_guided_ids_and_the_logits_it_should(center: str, keep: str) -> None:
    cond, uncond = logits_of(4, 2, 3, 50), logits_of(5, 2, 3, 50)
    op = Guidance(center=center, keep=keep, top_k_filter=True)  # type: ignore[arg-type]
    params = [replace(PLAIN, guidance_scale=2.5, top_k=7), replace(PLAIN, guidance_scale=1.5)]
    state = filter_logits(inputs_of(cond, params, uncond=uncond), spec_of(op))
    for b, q in itertools.product(range(2), range(3)):
        base = cond if center == "cond" else uncond
        guided = base[b, q] + params[b].guidance_scale * (cond[b, q] - uncond[b, q])
        best = sorted(range(50), key=lambda v, guided=guided: -float(guided[v]))[: params[b].top_k or 50]
        source = cond[b, q] if keep == "cond" and params[b].top_k else guided
        for v in range(50):
            expected = float(source[v]) if v in best else -math.inf
            assert float(state.values[b, q, v]) == pytest.approx(expected, abs=1e-5)


# Against loops.


@pytest.mark.parametrize("compounding", [True, False])
def test_the_repetition_penalty_is_the_plain_loops(compounding: bool) -> None:
    logits = logits_of(6, 3, 2, 12)
    history = torch.randint(-1, 12, (3, 6, 2), generator=torch.Generator().manual_seed(7))
    penalties = [1.0, 1.5, 4.0]
    params = [replace(PLAIN, repetition_penalty=penalty) for penalty in penalties]
    op = RepetitionPenalty(window=4, compounding=compounding)
    got = filter_logits(inputs_of(logits, params, history=history), spec_of(op)).values
    for b, q, v in itertools.product(range(3), range(2), range(12)):
        times = sum(int(history[b, w, q]) == v for w in range(2, 6))
        expected = float(logits[b, q, v])
        for _ in range(times if compounding else min(times, 1)):
            expected = expected / penalties[b] if expected > 0 else expected * penalties[b]
        assert float(got[b, q, v]) == pytest.approx(expected, rel=1e-5)


@given(
    seed=st.integers(0, 10_000),
    top_k=st.integers(0, 25),
    top_p=st.floats(0.01, 1.0),
    levels=st.sampled_from([0, 4]),
)
@settings(max_examples=80, deadline=None)
def test_top_k_and_top_p_keep_what_plain_loops_keep(seed: int, top_k: int, top_p: float, levels: int) -> None:
    """levels: with a few values only, most logits are equal to another."""
    logits = logits_of(seed, 1, 1, 20)
    if levels:
        logits = (logits.sigmoid() * levels).floor()
    got = probabilities(inputs_of(logits, [replace(PLAIN, top_k=top_k, top_p=top_p)]), spec_of(TopK(), TopP()))[0, 0]
    values = logits[0, 0].tolist()
    kept = set(range(20))
    if top_k:
        smallest = sorted(values, reverse=True)[min(top_k, 20) - 1]
        kept = {v for v in kept if values[v] >= smallest}
    weights = {v: math.exp(values[v]) for v in kept}
    total, before = sum(weights.values()), 0.0
    for v in sorted(kept, key=lambda v: (-values[v], v)):
        if abs(before - top_p * total) < 1e-4 * total and top_p < 1.0:
            return  # rounding may decide
        if before >= top_p * total and top_p < 1.0:
            kept.discard(v)
        before += weights[v]
    assert {v for v in range(20) if float(got[v]) > 0} == kept


# In other company.


params_strategy = st.builds(
    ResolvedSampling,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 1.7]),
    top_k=st.sampled_from([0, 1, 3, 9, 40, 500]),
    top_p=st.sampled_from([1.0, 0.9, 0.4]),
    min_p=st.sampled_from([0.0, 0.05, 0.5]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    guidance_scale=st.sampled_from([1.0, 2.0, 3.0]),
    seed=st.integers(0, 2**63 - 1),
    max_seconds=st.just(1.0),
)
GUIDANCES = [
    Guidance(center="cond", keep="cond", top_k_filter=True),
    Guidance(center="uncond", keep="guided", top_k_filter=False),
    Guidance(center="uncond", keep="guided", top_k_filter=True),
]


@settings(max_examples=150, deadline=None)
@given(
    crowd=st.lists(params_strategy, min_size=1, max_size=7),
    guidance=st.sampled_from(GUIDANCES),
    levels=st.sampled_from([0, 5, 40]),
    seed=st.integers(0, 1000),
    data=st.data(),
)
def test_a_row_keeps_its_candidates_and_its_draw_in_any_batch(
    crowd: list[ResolvedSampling], guidance: Guidance, levels: int, seed: int, data: st.DataObject
) -> None:
    """Bit for bit, ties included (levels: with a few values only, most logits are equal to another)."""
    count = len(crowd)
    cond, uncond = logits_of(seed, count, 3, 60), logits_of(seed + 1, count, 3, 60)
    if levels:
        cond, uncond = (cond.sigmoid() * levels).floor(), (uncond.sigmoid() * levels).floor()
    history = torch.randint(-1, 60, (count, 4, 3), generator=torch.Generator().manual_seed(seed))
    spec = spec_of(
        guidance,
        RepetitionPenalty(window=4),
        Temperature(),
        AllowedIds((58, 57, 57)),
        EosGate(57),
        TopK(),
        TopP(),
        MinP(),
    )
    rows = data.draw(st.lists(st.integers(0, 3000), min_size=count, max_size=count))

    def pick(items: list[int]) -> DrawInputs:
        return inputs_of(
            cond[items],
            [crowd[i] for i in items],
            uncond=uncond[items],
            rows=[rows[i] for i in items],
            history=history[items],
        )

    def kept(inputs: DrawInputs) -> torch.Tensor:
        state = filter_logits(inputs, spec)
        return torch.full_like(inputs.cond, -math.inf).scatter(-1, state.all_ids(), state.values)

    order = data.draw(st.permutations(range(count)))
    drawn, candidates = draw(pick(order), spec), kept(pick(order))
    for place, i in enumerate(order):
        assert torch.equal(kept(pick([i]))[0], candidates[place])
        assert torch.equal(draw(pick([i]), spec)[0], drawn[place])


# Draws.


def test_draws_follow_the_probabilities() -> None:
    """20,000 draws of 8 ids in each of 3 codebooks; a false alarm once in 10^6 for each, but the seeds are fixed."""
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5, -3.0, 1.5, -0.5]).expand(1, 3, 8)
    count = 20_000
    inputs = inputs_of(logits.expand(count, 3, 8), [replace(PLAIN, seed=7)] * count, rows=list(range(count)))
    drawn = draw(inputs, spec_of(Temperature()))
    expected = logits[0, 0].double().softmax(-1).numpy() * count
    for q in range(3):
        seen = np.bincount(drawn[:, q].numpy(), minlength=8)
        assert chisquare(seen, expected * seen.sum() / expected.sum()).pvalue > 1e-6


def test_draws_of_different_seeds_rows_and_codebooks_are_independent() -> None:
    """Equal pairs among draws from 16 equal ids: 1/16 of 4,096 expected, 256 +- 93 allowed (six sigma)."""
    logits, count = torch.zeros(4096, 2, 16), 4096
    spec = spec_of(Temperature())
    by_row = draw(inputs_of(logits, [replace(PLAIN, seed=5)] * count, rows=list(range(count))), spec)
    by_seed = draw(inputs_of(logits, [replace(PLAIN, seed=i) for i in range(count)], rows=[5] * count), spec)
    other = draw(inputs_of(logits, [replace(PLAIN, seed=6)] * count, rows=list(range(count))), spec)
    pairs = [
        (by_row[:, 0], by_row[:, 1]),
        (by_row[1:, 0], by_row[:-1, 0]),
        (by_seed[1:, 0], by_seed[:-1, 0]),
        (by_row[:, 0], other[:, 0]),
        (by_row[:, 0], by_seed[:, 0]),
    ]
    for left, right in pairs:
        assert abs(int((left == right).sum()) - 256) < 93


def test_the_same_seed_gives_the_same_draws() -> None:
    inputs = inputs_of(logits_of(8, 5, 9, 1028), [replace(PLAIN, seed=3)] * 5, rows=[1, 2, 3, 4, 1])
    assert torch.equal(draw(inputs, spec_of(Temperature())), draw(inputs, spec_of(Temperature())))


@pytest.mark.parametrize("params", [replace(PLAIN, temperature=0.0), replace(PLAIN, top_k=1, seed=9)])
def test_greedy_and_top_one_draw_the_most_likely_id(params: ResolvedSampling) -> None:
    logits = logits_of(9, 4, 9, 1028)
    drawn = draw(inputs_of(logits, [params] * 4), spec_of(Temperature(), TopK(), TopP(), MinP()))
    assert torch.equal(drawn, logits.argmax(-1))


def test_greedy_takes_the_smallest_of_equal_ids_whoever_runs_beside_it() -> None:
    logits = torch.zeros(2, 1, 100)
    spec = spec_of(*DIA_OPS[:2], TopK())
    greedy = replace(PLAIN, temperature=0.0, guidance_scale=3.0, top_k=50)
    for other in (replace(PLAIN, top_k=3), replace(PLAIN, guidance_scale=2.0, top_k=99), greedy):
        assert int(draw(inputs_of(logits, [greedy, other], uncond=logits), spec)[0, 0]) == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_give_minus_one_and_leave_the_neighbours_alone(bad: float) -> None:
    cond, uncond = logits_of(10, 4, 9, 1028), logits_of(11, 4, 9, 1028)
    params = [replace(PLAIN, guidance_scale=g, top_k=45, seed=1) for g in (3.0, 1.0, 3.0, 1.0)]
    good = draw(inputs_of(cond, params, uncond=uncond), spec_of(*DIA_OPS))
    assert (good >= 0).all()
    broken_cond, broken_uncond = cond.clone(), uncond.clone()
    broken_cond[1, 4, 7] = bad
    broken_uncond[2, 0, 0] = bad
    drawn = draw(inputs_of(broken_cond, params, uncond=broken_uncond), spec_of(*DIA_OPS))
    assert (drawn[[1, 2]] == -1).all()
    assert torch.equal(drawn[[0, 3]], good[[0, 3]])


@pytest.mark.parametrize("temperature", [0.0, 1.2])
@pytest.mark.parametrize("other", [[], [replace(PLAIN, seed=2)], [replace(PLAIN, temperature=0.0, top_k=3)]])
def test_a_codebook_with_nothing_left_draws_minus_one_and_never_a_forbidden_id(
    temperature: float, other: list[ResolvedSampling]
) -> None:
    """The guided top-k may hold only ids that may not be drawn."""
    params = [replace(PLAIN, guidance_scale=3.0, top_k=3, temperature=temperature), *other]
    cond = logits_of(12, len(params), 9, 1028)
    uncond = cond.clone()
    cond[0, 3, 1025:] += 100.0
    drawn = draw(inputs_of(cond, params, uncond=uncond), spec_of(*DIA_OPS))
    assert int(drawn[0, 3]) == -1
    assert (drawn[0, [0, 1, 2, 4, 5, 6, 7, 8]] >= 0).all()
    assert (drawn[:, 1:] < EOS).all()
    assert (drawn[1:] >= 0).all()


def test_a_bound_draws_what_minus_infinity_in_its_place_draws() -> None:
    """Beside requests without min_p, greedy ones, and ids that are out already."""
    params = [
        replace(PLAIN, min_p=0.2, seed=3),
        replace(PLAIN, seed=4),
        replace(PLAIN, min_p=0.9, temperature=0.0),
        replace(PLAIN, min_p=0.05, seed=5, top_k=7),
    ]
    logits = logits_of(13, 4, 9, 1028)
    ops: tuple[SamplingOp, ...] = (AllowedIds((1025,) + (1024,) * 8), Temperature(), TopK(), MinP())
    for row in range(50):
        inputs = inputs_of(logits, params, rows=[row] * 4)
        left = filter_logits(inputs, spec_of(*ops))
        written_out = inputs_of(
            torch.full_like(logits, -math.inf).scatter(-1, left.all_ids(), left.values),
            [replace(p, min_p=0.0, top_k=0) for p in params],
            rows=[row] * 4,
        )
        drawn = draw(inputs, spec_of(*ops))
        # Logits at -inf count as broken, so what was drawn is found by the largest of values and noise.
        noise = gumbel_noise(
            draw_keys(torch.tensor([p.seed for p in params]), torch.tensor([row] * 4), num_codebooks=9),
            torch.arange(1028).expand(4, 9, -1),
        )
        noise[2] = 0.0
        assert torch.equal(drawn, (written_out.cond + noise).argmax(-1))


@pytest.mark.parametrize("guided", [True, False])
def test_the_ops_leave_the_logits_they_are_given_alone(guided: bool) -> None:
    cond, uncond = logits_of(14, 3, 9, 1028), logits_of(15, 3, 9, 1028)
    before = cond.clone(), uncond.clone()
    params = [
        replace(PLAIN, guidance_scale=2.0 if guided else 1.0, min_p=0.1, seed=i, temperature=0.7) for i in range(3)
    ]
    history = torch.randint(0, 1028, (3, 2, 9), generator=torch.Generator().manual_seed(0))
    ops = (
        Guidance(center="uncond", keep="guided", top_k_filter=False),
        AllowedIds((1025,) + (1024,) * 8),
        RepetitionPenalty(window=2),
        EosGate(EOS),
        Temperature(),
        MinP(),
    )
    for some in (ops, ops[1:]):
        draw(inputs_of(cond, params, uncond=uncond, history=history), spec_of(*some))
        assert torch.equal(cond, before[0]) and torch.equal(uncond, before[1])
