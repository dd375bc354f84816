"""Guidance, filters, noise and draw in one launch: from logits to one code per sequence and codebook.

A family's sampling ops arrive as a tuple known at compile time, so a kernel holds these ops in this order and nothing
else; what a request turns off is skipped by value, so one CUDA graph serves any mix of requests. Nothing is sorted:
top-k and top-p bisect for the largest value that is out, on an integer image of the floats that keeps their order.

There is no torch path here: on the CPU engine/sampler.py draws, op by op, and it is what the tests compare with.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

import torch
import triton
import triton.language as tl

from declaim.kernels import backend
from declaim.kernels.noise import triton_draw_key, triton_gumbel_noise

MAX_VOCAB = 4096  # one program holds all ids of a codebook

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_PARAM_DTYPES = {"top_k": torch.int32, "seed": torch.int64}  # the others are float32
_OUT = tl.constexpr(float("-inf"))
_INFINITE = tl.constexpr(0x7F800000)  # the bits of infinity
_OUT_KEY = tl.constexpr(-0x7F800000)

# Numbers, because Triton 3.6 takes no strings in a tuple.
_GUIDANCE = tl.constexpr(0)
_ALLOWED_IDS = tl.constexpr(1)
_EOS_GATE = tl.constexpr(2)
_REPETITION_PENALTY = tl.constexpr(3)
_TEMPERATURE = tl.constexpr(4)
_TOP_K = tl.constexpr(5)
_TOP_P = tl.constexpr(6)
_MIN_P = tl.constexpr(7)

SampleOp = tuple[int, ...]
"""Which op, and what it needs to know, made by one of the functions below."""

TEMPERATURE: SampleOp = (_TEMPERATURE.value,)
TOP_K: SampleOp = (_TOP_K.value,)
TOP_P: SampleOp = (_TOP_P.value,)
MIN_P: SampleOp = (_MIN_P.value,)


def guidance(*, center: Literal["cond", "uncond"], keep: Literal["cond", "guided"], top_k_filter: bool) -> SampleOp:
    """center + scale * (cond - uncond). With `top_k_filter` only the top_k guided ids stay, with their conditional
    logits if `keep` is "cond"."""
    return (_GUIDANCE.value, int(center == "cond"), int(keep == "cond"), int(top_k_filter))


def allowed_ids(limits: tuple[int, ...]) -> SampleOp:
    """Codebook q may draw ids below `limits[q]` only."""
    return (_ALLOWED_IDS.value, *limits)


def eos_gate(*, eos: int, codebook: int) -> SampleOp:
    """On `codebook`, `eos` survives only where it is the most likely id, and then alone."""
    return (_EOS_GATE.value, eos, codebook)


def repetition_penalty(*, window: int, compounding: bool) -> SampleOp:
    """Penalise the ids of the last `window` rows of the same codebook: each time they occur, or once."""
    return (_REPETITION_PENALTY.value, window, int(compounding))


@dataclass(frozen=True, slots=True, eq=False)
class SampleParams:
    """How each of B sequences draws; every tensor is [B], contiguous, and may be a CUDA graph's static buffer.

    temperature 0 draws the most likely id. top_k 0, top_p 1, min_p 0 and repetition_penalty 1 are off.
    """

    temperature: torch.Tensor  # float32
    top_k: torch.Tensor  # int32
    top_p: torch.Tensor  # float32
    min_p: torch.Tensor  # float32
    repetition_penalty: torch.Tensor  # float32
    guidance_scale: torch.Tensor  # float32
    seed: torch.Tensor  # int64


def guided_sample(
    logits: torch.Tensor,
    params: SampleParams,
    *,
    rows: torch.Tensor,
    uncond_rows: torch.Tensor,
    history: torch.Tensor,
    ops: tuple[SampleOp, ...],
) -> torch.Tensor:
    """Draw one code per sequence and codebook; of equals, the smallest id.

    logits: float32, float16 or bfloat16 [M, Q, V], the last axis contiguous, V <= 4096; row b < B is the conditional
    branch of sequence b. rows: int64 [B], the grid row each draws; where it is negative (a graph's padding) nothing
    else of the sequence is read. uncond_rows: int32 or int64 [B], the row of `logits` that holds the unconditional
    branch, or -1. history: int32 or int64 [B, W, Q] contiguous, the last rows of the grid, -1 before the first, W at
    least the largest window of `ops`.

    Returns int32 [B, Q]. A codebook is -1 where its logits, of either branch, are not finite, where nothing is left to
    draw, and on padding. It is judged by its own logits alone, so one negative code condemns the sequence's row.

    Raises ValueError for shapes, dtypes or strides other than these.
    """
    _check(logits, params, rows=rows, uncond_rows=uncond_rows, history=history, ops=ops)
    num_sequences, num_codebooks = len(rows), logits.shape[1]
    codes = torch.empty((num_sequences, num_codebooks), dtype=torch.int32, device=logits.device)
    if num_sequences == 0:
        return codes
    block = triton.next_power_of_2(logits.shape[2])
    backend.launch(
        _guided_sample_kernel,
        (num_sequences, num_codebooks),
        {
            "logits": logits,
            "codes": codes,
            "rows": rows,
            "uncond_rows": uncond_rows,
            "history": history,
            "temperature": params.temperature,
            "top_k": params.top_k,
            "top_p": params.top_p,
            "min_p": params.min_p,
            "repetition_penalty": params.repetition_penalty,
            "guidance_scale": params.guidance_scale,
            "seed": params.seed,
        },
        {
            "OPS": ops,
            "NUM_OPS": len(ops),
            "NUM_CODEBOOKS": num_codebooks,
            "VOCAB": logits.shape[2],
            "BLOCK": block,
            "STRIDE_ROW": logits.stride(0),
            "STRIDE_CODEBOOK": logits.stride(1),
            "HISTORY": history.shape[1],
        },
        warps=max(1, min(8, block // 512)),
        stages=1,
    )
    return codes


def _check(
    logits: torch.Tensor,
    params: SampleParams,
    *,
    rows: torch.Tensor,
    uncond_rows: torch.Tensor,
    history: torch.Tensor,
    ops: tuple[SampleOp, ...],
) -> None:
    if not backend.use_triton(logits):
        raise ValueError("guided_sample needs a GPU tensor, got one on the CPU; there engine/sampler.py draws")
    if logits.ndim != 3 or logits.stride(2) != 1 or logits.dtype not in _FLOATS:
        raise ValueError(
            f"logits are {logits.dtype} {tuple(logits.shape)} of strides {logits.stride()};"
            " pass float32, float16 or bfloat16 [M, Q, V] with a contiguous last axis"
        )
    num_sequences, num_codebooks, vocab = len(rows), logits.shape[1], logits.shape[2]
    if not 1 <= vocab <= MAX_VOCAB:
        raise ValueError(f"{vocab} ids in a codebook; one program holds 1 to {MAX_VOCAB}: draw in torch instead")
    if logits.shape[0] < num_sequences:
        raise ValueError(f"{logits.shape[0]} rows of logits for {num_sequences} sequences; pass one each at least")
    shape = (num_sequences,)
    _check_tensor("rows", rows, shape, (torch.int64,))
    _check_tensor("uncond_rows", uncond_rows, shape, (torch.int32, torch.int64))
    for field in fields(SampleParams):
        _check_tensor(field.name, getattr(params, field.name), shape, (_PARAM_DTYPES.get(field.name, torch.float32),))
    _check_tensor("history", history, (num_sequences, *history.shape[1:2], num_codebooks), (torch.int32, torch.int64))
    for kind, *operands in ops:
        if kind == _ALLOWED_IDS.value and len(operands) != num_codebooks:
            raise ValueError(f"allowed_ids has {len(operands)} limits for {num_codebooks} codebooks; pass one for each")
        if kind == _REPETITION_PENALTY.value and operands[0] > history.shape[1]:
            raise ValueError(
                f"a repetition penalty looks at {operands[0]} rows and history holds {history.shape[1]};"
                " pass as many, -1 before the first"
            )


def _check_tensor(name: str, x: torch.Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> None:
    if tuple(x.shape) != shape or x.dtype not in dtypes or not x.is_contiguous():
        allowed = " or ".join(str(dtype) for dtype in dtypes)
        raise ValueError(
            f"{name} is {x.dtype} {tuple(x.shape)} of strides {x.stride()}; pass contiguous {allowed} {shape}"
        )


@triton.jit
def _guided_sample_kernel(
    logits,
    codes,
    rows,
    uncond_rows,
    history,
    temperature,
    top_k,
    top_p,
    min_p,
    repetition_penalty,
    guidance_scale,
    seed,
    OPS: tl.constexpr,
    NUM_OPS: tl.constexpr,
    NUM_CODEBOOKS: tl.constexpr,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
    STRIDE_ROW: tl.constexpr,
    STRIDE_CODEBOOK: tl.constexpr,
    HISTORY: tl.constexpr,
):
    """One program draws one code: axis 0 is the sequence, axis 1 the codebook. Ids that are out are at -inf."""
    sequence = tl.program_id(0).to(tl.int64)
    codebook = tl.program_id(1)
    codes += sequence * NUM_CODEBOOKS + codebook
    row = tl.load(rows + sequence)
    if row < 0:
        tl.store(codes, -1)
        return

    ids = tl.arange(0, BLOCK)
    exists = ids < VOCAB
    uncond_row = tl.load(uncond_rows + sequence).to(tl.int64)
    is_guided = uncond_row >= 0
    logits += codebook * STRIDE_CODEBOOK
    cond = tl.load(logits + sequence * STRIDE_ROW + ids, mask=exists, other=0.0).to(tl.float32)
    num_uncond = tl.where(is_guided, VOCAB, 0)
    uncond = tl.load(logits + uncond_row * STRIDE_ROW + ids, mask=ids < num_uncond, other=0.0).to(tl.float32)

    divisor = tl.load(temperature + sequence)
    is_random = divisor > 0
    guided_k = tl.load(top_k + sequence)
    kept_k = tl.where(is_random, guided_k, 0)
    kept_p = tl.where(is_random, tl.load(top_p + sequence), 1.0)
    least_p = tl.where(is_random, tl.load(min_p + sequence), 0.0)
    penalty = tl.load(repetition_penalty + sequence)
    scale = tl.load(guidance_scale + sequence)
    draw_seed = tl.load(seed + sequence)

    if tl.max(tl.maximum(_magnitude(cond), _magnitude(uncond)), 0) >= _INFINITE:
        tl.store(codes, -1)
        return

    values = tl.where(exists, cond, _OUT)
    for i in tl.static_range(NUM_OPS):
        if OPS[i][0] == _GUIDANCE:
            if is_guided:
                values = _guide(cond, uncond, exists, scale, guided_k, OPS[i][1], OPS[i][2], OPS[i][3])
        elif OPS[i][0] == _ALLOWED_IDS:
            limit = 0
            for q in tl.static_range(NUM_CODEBOOKS):
                limit = tl.where(codebook == q, OPS[i][q + 1], limit)
            values = tl.where(ids < limit, values, _OUT)
        elif OPS[i][0] == _EOS_GATE:
            if codebook == OPS[i][2]:
                values = _gate_eos(values, ids == OPS[i][1])
        elif OPS[i][0] == _REPETITION_PENALTY:
            if penalty != 1.0:
                past = history + ((sequence + 1) * HISTORY - OPS[i][1]) * NUM_CODEBOOKS + codebook
                values = _penalise(values, ids, past, penalty, NUM_CODEBOOKS, OPS[i][1], OPS[i][2])
        elif OPS[i][0] == _TEMPERATURE:
            if is_random:
                values = tl.div_rn(values, divisor)
        elif OPS[i][0] == _TOP_K:
            if kept_k > 0:
                values = _keep_top_k(values, kept_k)
        elif OPS[i][0] == _TOP_P:
            if kept_p < 1.0:
                values = _keep_top_p(values, kept_p)
        elif OPS[i][0] == _MIN_P:
            if least_p > 0:
                values = tl.where(values < tl.max(values, 0) + tl.log(least_p), _OUT, values)
        else:
            tl.static_assert(False, "unknown op: build ops with the functions of kernels/sample.py")

    if is_random:
        values += triton_gumbel_noise(triton_draw_key(draw_seed, row, codebook), ids)
    best, drawn = tl.max(values, 0, return_indices=True)
    tl.store(codes, tl.where(best > _OUT, drawn, -1))


@triton.jit
def _guide(
    cond, uncond, exists, scale, top_k, CENTERS_COND: tl.constexpr, KEEPS_COND: tl.constexpr, TOP_K_FILTER: tl.constexpr
):
    """Source: Ho & Salimans 2022, equation 6, with the centre and the filter of the family."""
    center = cond if CENTERS_COND else uncond
    values = tl.where(exists, (cond - uncond) * scale + center, _OUT)
    if TOP_K_FILTER:
        if top_k > 0:
            kept = _keep_top_k(values, top_k)
            values = tl.where(kept > _OUT, cond, _OUT) if KEEPS_COND else kept
    return values


@triton.jit
def _gate_eos(values, is_eos):
    eos_value = tl.max(tl.where(is_eos, values, _OUT), 0)
    eos_leads = (eos_value >= tl.max(values, 0)) & (eos_value > _OUT)
    return tl.where(is_eos == eos_leads, values, _OUT)


@triton.jit
def _penalise(values, ids, past, penalty, STRIDE: tl.constexpr, WINDOW: tl.constexpr, COMPOUNDING: tl.constexpr):
    """Source: Keskar et al. 2019, section 4.1. past: the codebook's oldest code in the window, a row every STRIDE."""
    seen = ids < 0
    for w in range(WINDOW):
        matches = ids == tl.load(past + w * STRIDE).to(tl.int32)
        if COMPOUNDING:
            values = tl.where(matches, _penalised(values, penalty), values)
        else:
            seen |= matches
    return values if COMPOUNDING else tl.where(seen, _penalised(values, penalty), values)


@triton.jit
def _penalised(values, penalty):
    return tl.where(values > 0, tl.div_rn(values, penalty), values * penalty)


@triton.jit
def _keep_top_k(values, k):
    """The k largest and the equals of the smallest of them."""
    keys = _ordered(values)
    return tl.where(keys > _largest_out(keys, (keys > _OUT_KEY).to(tl.int32), k), values, _OUT)


@triton.jit
def _keep_top_p(values, p):
    """An id stays while those before it weigh less than p of all: so the one that crosses p does; of equals, the
    smaller id comes first. Source: Holtzman et al. 2019, section 3.1."""
    top = tl.max(values, 0)
    weights = tl.exp(values - tl.where(top > _OUT, top, 0.0))
    limit = p * tl.sum(weights, 0)
    keys = _ordered(values)
    kept = keys > _largest_out(keys, weights, limit)
    smallest = tl.min(tl.where(kept, keys, _INFINITE), 0)
    larger_ones = tl.sum(tl.where(keys > smallest, weights, 0.0), 0)
    is_smallest = keys == smallest
    rank = tl.cumsum(is_smallest.to(tl.int32), 0) - 1
    kept &= (larger_ones + rank.to(tl.float32) * weights < limit) | ~is_smallest
    return tl.where(kept, values, _OUT)


@triton.jit
def _largest_out(keys, weights, limit):
    """The largest key to drop, where a key stays if the larger ones together weigh less than `limit`.

    It need not be one of the keys: any number between the last that is dropped and the first that stays will do, and so
    does the search end once the rest weighs `limit` exactly, as counts soon do.
    """
    low, high = _OUT_KEY, tl.max(keys, 0)
    above_low = tl.sum(tl.where(keys > low, weights, 0), 0)
    while (above_low > limit) & (low + 1 < high):
        middle = (low & high) + ((low ^ high) >> 1)
        above = tl.sum(tl.where(keys > middle, weights, 0), 0)
        stays = above < limit
        high = tl.where(stays, middle, high)
        low = tl.where(stays, low, middle)
        above_low = tl.where(stays, above_low, above)
    return low


@triton.jit
def _ordered(values):
    """int32 in the order of the float32 values; both zeros are 0, -inf is -_INFINITE."""
    bits = values.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, -0x80000000 - bits, bits)


@triton.jit
def _magnitude(values):
    """int32 in the order of the absolute values; infinities and NaN are _INFINITE or above."""
    return values.to(tl.int32, bitcast=True) & 0x7FFFFFFF
