"""From logits to drawn codes: interprets a family's ordered list of sampling ops over a whole batch.

Every op works row by row, so a sequence's draw does not depend on its neighbours. Noise is keyed by (seed, row,
codebook, id). Candidates that are out are at -inf; after a top-k the few that are left are kept in a compact form.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Items
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch

from declaim.engine.request import ResolvedSampling
from declaim.engine.spec import (
    AllowedIds,
    EosGate,
    Guidance,
    MinP,
    RepetitionPenalty,
    SamplingOp,
    SamplingSpec,
    Temperature,
    TopK,
    TopP,
)
from declaim.kernels import sample
from declaim.kernels.noise import draw_keys, gumbel_noise
from declaim.kernels.sample import SampleOp


@dataclass(frozen=True, slots=True, eq=False)
class DrawInputs:
    """What B sequences draw from.

    cond: float32 [B, Q, V]. uncond: float32 [G, Q, V], of the guided sequences `guided` (int64 [G], ascending).
    params: B. rows: the grid row each draws. history: int64 [B, W, Q], the last rows (-1 before the first), W the
    largest window of the family's repetition penalties.
    """

    cond: torch.Tensor
    uncond: torch.Tensor
    guided: torch.Tensor
    params: tuple[ResolvedSampling, ...]
    rows: tuple[int, ...]
    history: torch.Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Candidates:
    """values: float32 [B, Q, K], -inf where out; ids: int64 [B, Q, K], or None where K is the whole vocabulary.

    bound: float32 [B, Q, 1], finite; values below it are out, too. None where they all are at -inf.
    """

    values: torch.Tensor
    ids: torch.Tensor | None
    bound: torch.Tensor | None = None

    def with_values(self, values: torch.Tensor) -> Candidates:
        return Candidates(values, self.ids)

    def settled(self) -> Candidates:
        """The same without a bound."""
        if self.bound is None:
            return self
        return self.with_values(self.values.masked_fill(self.values < self.bound, -math.inf))

    def all_ids(self) -> torch.Tensor:
        if self.ids is not None:
            return self.ids
        return torch.arange(self.values.shape[-1], device=self.values.device).expand(self.values.shape)


def filter_logits(inputs: DrawInputs, spec: SamplingSpec) -> Candidates:
    """Apply the family's ops in order. What is left is drawn from in proportion to softmax(values)."""
    return _apply_ops(inputs, spec).settled()


def _apply_ops(inputs: DrawInputs, spec: SamplingSpec) -> Candidates:
    """`filter_logits`, whose last op may have left it at a bound: to write -inf into all that is out takes longer than
    any other op, and whoever draws at random looks at every value once anyway."""
    # Each op may write into the values it is given: a pass over a batch's logits takes as long as all of a small op.
    # Guidance, which comes first where there is any, makes new ones.
    is_guided = any(isinstance(op, Guidance) for op in spec.ops[:1])
    state = Candidates(inputs.cond if is_guided else inputs.cond.clone(), None)
    for op in spec.ops:
        state = state.settled()
        match op:
            case Guidance():
                state = _guide(inputs, op)
            case AllowedIds():
                _keep_allowed(state, op)
            case EosGate():
                _gate_eos(state.values[:, op.codebook], state.all_ids()[:, op.codebook] == op.eos)
            case RepetitionPenalty():
                _penalise(state, op, inputs)
            case Temperature():
                divisors = [1.0 if p.greedy else p.temperature for p in inputs.params]
                if any(divisor != 1.0 for divisor in divisors):
                    state.values.div_(_column(divisors, state.values))
            case TopK():
                state = _keep_top_k(state, [0 if p.greedy else p.top_k for p in inputs.params])
            case TopP():
                state = _keep_top_p(state, [1.0 if p.greedy else p.top_p for p in inputs.params])
            case MinP():
                state = _keep_min_p(state, [0.0 if p.greedy else p.min_p for p in inputs.params])
    return state


def draw(inputs: DrawInputs, spec: SamplingSpec) -> torch.Tensor:
    """Draw one code per sequence and codebook; of equals, the smallest id.

    Returns int64 [B, Q]; -1 where the logits of the sequence were not finite, or nothing was left of a codebook's.
    """
    state = _apply_ops(inputs, spec)
    if all(p.greedy for p in inputs.params):
        drawn = _most_likely(state.settled())
    else:
        drawn = _draw_at_random(state, inputs)
    # A sum is finite exactly if all it sums is, and takes one pass where isfinite takes three.
    is_finite = torch.isfinite(inputs.cond.sum((1, 2)))
    if len(inputs.guided):
        is_finite[inputs.guided] &= torch.isfinite(inputs.uncond.sum((1, 2)))
    return torch.where(is_finite[:, None], drawn, -1)


def sample_ops(spec: SamplingSpec) -> tuple[SampleOp, ...]:
    """The family's ops as `kernels.sample.guided_sample` takes them."""
    return tuple(_sample_op(op) for op in spec.ops)


def _sample_op(op: SamplingOp) -> SampleOp:
    match op:
        case Guidance():
            return sample.guidance(center=op.center, keep=op.keep, top_k_filter=op.top_k_filter)
        case AllowedIds():
            return sample.allowed_ids(op.limits)
        case EosGate():
            return sample.eos_gate(eos=op.eos, codebook=op.codebook)
        case RepetitionPenalty():
            return sample.repetition_penalty(window=op.window, compounding=op.compounding)
        case Temperature():
            return sample.TEMPERATURE
        case TopK():
            return sample.TOP_K
        case TopP():
            return sample.TOP_P
        case MinP():
            return sample.MIN_P


def _most_likely(state: Candidates) -> torch.Tensor:
    """int64 [B, Q], -1 where nothing is left."""
    best = state.values.argmax(-1, keepdim=True)
    drawn = best if state.ids is None else state.ids.gather(-1, best)
    return torch.where(state.values.gather(-1, best) > -math.inf, drawn, -1).squeeze(-1)


def _draw_at_random(state: Candidates, inputs: DrawInputs) -> torch.Tensor:
    """`_most_likely` after noise for the sequences that are not greedy.

    What is left after the filters, a few ids of a thousand, is taken out first: noise costs a hundred comparisons.
    """
    values = state.values
    device, (num_sequences, num_codebooks, width) = values.device, values.shape
    place = _places_left(state)
    draw_of = place // width
    ids = place % width if state.ids is None else state.ids.flatten()[place]
    seeds = torch.tensor([p.seed for p in inputs.params], device=device)
    keys = draw_keys(seeds, torch.tensor(inputs.rows, device=device), num_codebooks=num_codebooks).flatten()
    noise = gumbel_noise(keys[draw_of], ids)
    is_greedy = torch.tensor([p.greedy for p in inputs.params], device=device)
    noisy = values.flatten()[place] + noise.masked_fill_(is_greedy[draw_of // num_codebooks], 0.0)
    num_draws = num_sequences * num_codebooks
    best = noisy.new_full((num_draws,), -math.inf).scatter_reduce_(0, draw_of, noisy, "amax")
    # Of equals, the smallest id: of the others none counts.
    last = torch.iinfo(torch.int64).max
    ids = ids.masked_fill(noisy < best[draw_of], last)
    drawn = ids.new_full((num_draws,), last).scatter_reduce_(0, draw_of, ids, "amin")
    return drawn.masked_fill_(drawn == last, -1).view(num_sequences, num_codebooks)


def _column(numbers: Items[float], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(numbers, dtype=like.dtype, device=like.device)[:, None, None]


def _compact(values: torch.Tensor, count: int) -> Candidates:
    """The `count` largest, in the order of their ids: so equals stand as they do in the whole vocabulary."""
    ids = torch.topk(values, max(1, min(count, values.shape[-1])), dim=-1).indices.sort(-1).values
    return Candidates(values.gather(-1, ids), ids)


def _largest(values: torch.Tensor, top_ks: list[int]) -> Candidates:
    """Each row's k largest and their equals, k = 0 keeps all. `ids` of the result index `values`.

    topk picks among equals by how many it is asked for, so by the neighbours' k: its choice counts only where the
    value after the last one is smaller.
    """
    width = values.shape[-1]
    widest = min(max(top_ks), width)
    ranked, ids = torch.topk(values, min(max(1, widest) + 1, width), dim=-1)
    last = torch.tensor([min(k, widest) - 1 if k else 0 for k in top_ks], device=values.device)
    last = last[:, None, None].expand(-1, values.shape[1], 1)
    bound = ranked.gather(-1, last)
    if all(top_ks) and widest < width and bool((ranked.gather(-1, last + 1) < bound).all()):
        ids = ids[..., :widest].sort(-1).values
        ranked = values.gather(-1, ids)
        return Candidates(ranked.masked_fill_(ranked < bound, -math.inf), ids)
    is_off = torch.tensor([k == 0 for k in top_ks], device=values.device)[:, None, None]
    values = values.masked_fill(values < bound.masked_fill(is_off, -math.inf), -math.inf)
    if not all(top_ks):
        return Candidates(values, None)
    return _compact(values, int((values > -math.inf).sum(-1).max()))


def _guide(inputs: DrawInputs, op: Guidance) -> Candidates:
    """Source: Ho & Salimans 2022, equation 6, with the centre and the filter of the family."""
    if not len(inputs.guided):
        return Candidates(inputs.cond.clone(), None)
    is_whole = len(inputs.guided) == len(inputs.params)
    params = [inputs.params[i] for i in inputs.guided.tolist()]
    cond = inputs.cond if is_whole else inputs.cond[inputs.guided]
    center = cond if op.center == "cond" else inputs.uncond
    guided = (cond - inputs.uncond).mul_(_column([p.guidance_scale for p in params], cond)).add_(center)
    top_ks = [p.top_k for p in params]
    state = Candidates(guided, None)
    if op.top_k_filter and any(top_ks):
        state = _largest(guided, top_ks)
        if op.keep == "cond":
            state = _with_conditional(state, cond, top_ks)
    if is_whole:
        return state
    return Candidates(inputs.cond.index_copy(0, inputs.guided, _whole(state, like=cond)), None)


def _with_conditional(state: Candidates, cond: torch.Tensor, top_ks: list[int]) -> Candidates:
    """The conditional logits of the candidates a guided top-k left; where it was off, the guided ones stay."""
    values = cond if state.ids is None else cond.gather(-1, state.ids)
    values = values.masked_fill(state.values == -math.inf, -math.inf)
    return state.with_values(torch.where(_column(top_ks, cond) > 0, values, state.values))


def _whole(state: Candidates, *, like: torch.Tensor) -> torch.Tensor:
    """The candidates' values over the whole vocabulary, -inf for the others."""
    if state.ids is None:
        return state.values
    return torch.full_like(like, -math.inf).scatter(-1, state.ids, state.values)


def _keep_allowed(state: Candidates, op: AllowedIds) -> None:
    if state.ids is not None:
        limits = torch.tensor(op.limits, device=state.ids.device)[:, None]
        state.values.masked_fill_(state.ids >= limits, -math.inf)
        return
    begin = 0
    for limit, codebooks in groupby(op.limits):
        end = begin + len(list(codebooks))
        state.values[:, begin:end, limit:] = -math.inf
        begin = end


def _gate_eos(values: torch.Tensor, is_eos: torch.Tensor) -> None:
    """values, is_eos: of the codebook that ends, [B, K]."""
    eos_value = values.masked_fill(~is_eos, -math.inf).amax(-1, keepdim=True)
    eos_leads = (eos_value >= values.amax(-1, keepdim=True)) & (eos_value > -math.inf)
    values.masked_fill_(torch.where(eos_leads, ~is_eos, is_eos), -math.inf)


def _penalise(state: Candidates, op: RepetitionPenalty, inputs: DrawInputs) -> None:
    """Source: Keskar et al. 2019, section 4.1; an id seen n times in the window is penalised n times, or once."""
    penalty = _column([p.repetition_penalty for p in inputs.params], state.values)
    # One id of each row and codebook a time, not all of them: a vocabulary is mostly ids that nobody saw.
    values, history = state.values, inputs.history[:, -op.window :]
    for w in range(history.shape[1]):
        past = history[:, w, :, None]
        place, applies = _places(state, past)
        if not op.compounding:
            applies &= (history[:, :w] != history[:, w, None]).all(1)[..., None]
        value = values.gather(-1, place)
        penalised = torch.where(value > 0, value / penalty, value * penalty)
        values.scatter_(-1, place, torch.where(applies, penalised, value))


def _places(state: Candidates, wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the ids `wanted` [B, Q, 1] stand among the candidates, and whether they do."""
    if state.ids is None:
        width = state.values.shape[-1]
        return wanted.clamp(0, width - 1), (wanted >= 0) & (wanted < width)
    matches = state.ids == wanted
    return matches.int().argmax(-1, keepdim=True), matches.any(-1, keepdim=True)


def _keep_top_k(state: Candidates, top_ks: list[int]) -> Candidates:
    width = state.values.shape[-1]
    if not any(top_ks) or all(k >= width for k in top_ks):
        return state
    kept = _largest(state.values, top_ks)
    if state.ids is None or kept.ids is None:
        return Candidates(kept.values, state.ids if kept.ids is None else kept.ids)
    return Candidates(kept.values, state.ids.gather(-1, kept.ids))


def _keep_top_p(state: Candidates, top_ps: list[float]) -> Candidates:
    """Keep an id while the probability of those before it is below top_p, so the one that crosses it stays.

    Summed one by one from the largest: ids that are out, and so the neighbours' settings, cannot change a bit.
    Source: Holtzman et al. 2019, section 3.1.
    """
    if all(p >= 1.0 for p in top_ps):
        return state
    values, order = torch.sort(state.values, dim=-1, descending=True, stable=True)
    weights = torch.exp(values - values[..., :1])
    cumulative = weights.cumsum(-1)
    limit = _column([p if p < 1.0 else math.inf for p in top_ps], values) * cumulative[..., -1:]
    is_out = torch.zeros_like(order, dtype=torch.bool).scatter(-1, order, cumulative - weights >= limit)
    return state.with_values(state.values.masked_fill(is_out, -math.inf))


def _keep_min_p(state: Candidates, min_ps: list[float]) -> Candidates:
    """Source: Nguyen et al. 2024, algorithm 1, as a bound on logits."""
    if not any(min_ps):
        return state
    margin = _column([math.log(p) if p else -math.inf for p in min_ps], state.values)
    bound = (state.values.amax(-1, keepdim=True) + margin).clamp_(min=torch.finfo(state.values.dtype).min)
    return Candidates(state.values, state.ids, bound)


def _places_left(state: Candidates) -> torch.Tensor:
    """Where, in the flattened values, those are that are not out: int64, ascending."""
    if state.values.device.type != "cpu":
        return torch.nonzero(state.settled().values.flatten() > -math.inf).flatten()
    # numpy compares and searches several times as fast.
    values = state.values.numpy()
    is_left = values > -math.inf if state.bound is None else values >= state.bound.numpy()
    return torch.from_numpy(np.flatnonzero(is_left))
