"""Mamba-2's recurrent layer: a short causal convolution, the state's recurrence, and the gated norm after it.

Each sequence has one slot of state, of one size however long it is. A step brings it some new positions: one while
decoding, which moves the state on and rounds it to its dtype, as the reference does; more in a prefill. A prompt is
scanned in blocks of SCAN_BLOCK positions, by matrix products, and the state rounded after each; the reference, whose
blocks are 256, rounds after the last. Blocks begin at multiples of SCAN_BLOCK and are never cut between steps, what is
left of a prompt is taken position by position, and so is whatever was drawn, also when it is computed again after a
preemption: so however a prompt is cut into steps, and whatever runs beside it, the bits are the same.
Source: Dao & Gu 2024, section 6; state-spaces/mamba `selective_state_update`, `causal_conv1d_update`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from declaim.kernels import backend
from declaim.kernels.activation import by_rows
from declaim.kernels.norm import MAX_SIZE, rms_norm

SCAN_BLOCK = 16  # positions; as many as a matrix instruction takes rows
_TILE_CHANNELS = 256
_TILE_DIM = 32
_BLOCK_TILE_DIM, _BLOCK_WARPS = 16, 8  # with more dims or fewer warps the products' operands do not fit registers
_GROUP_BYTES = 1 << 18  # of states that the CPU works on together: they and what is made of them fit a core's cache
_NOT_LATER = torch.full((SCAN_BLOCK, SCAN_BLOCK), -math.inf).triu_(1)  # to what is added: [t, j], -inf for j > t
_LINEAR_FROM = 20.0  # softplus of more than this is its argument, as torch has it


@dataclass(frozen=True, slots=True, eq=False)
class StatePlan:
    """Whose state each row moves on. S sequences, their rows one after the other.

    query_start: int32 [S + 1], each one's first row. slots: int64 [S], where its state lies; -1 is padding of a
    captured graph, which stores nothing. is_new: bool [S], whether it has no position yet: its state is then zero.
    num_blocked: int32 [S], how many of each one's rows, the first ones, are whole blocks of its prompt: a multiple of
    SCAN_BLOCK, as is then the position of its first row.
    has_new, has_blocks: whether any sequence is, or has any.
    """

    query_start: torch.Tensor
    slots: torch.Tensor
    is_new: torch.Tensor
    num_blocked: torch.Tensor
    has_new: bool
    has_blocks: bool


def allocate_states(
    num_slots: int, num_heads: int, *, head_dim: int, size: int, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """One layer's states, zero, [num_slots, num_heads, head_dim, size].

    Contiguous for the kernels. On the CPU the dims of all heads lie side by side: its operations take long rows, and
    a head's `size` numbers are a short one.
    """
    states = torch.zeros(num_slots, num_heads, head_dim, size, dtype=dtype, device=device)
    if backend.use_triton(states):
        return states
    return states.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)


def causal_conv_reference(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, state: torch.Tensor, plan: StatePlan
) -> torch.Tensor:
    """Sequence by sequence: silu(bias + sum over k of weight[k] * x[t - width + 1 + k]) in float32."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    for begin, end, slot, is_new in _runs(plan):
        past = torch.zeros_like(state[0]) if is_new or slot < 0 else state[slot]
        inputs = torch.cat([past, x[begin:end]])
        total = bias.float().expand(end - begin, -1)
        for k in range(len(weight)):
            total = total + weight[k].float() * inputs[k : k + end - begin].float()
        out[begin:end] = F.silu(total).to(x.dtype)
        if slot >= 0:
            state[slot] = inputs[end - begin :]
    return out


def state_scan_reference(
    xbc: torch.Tensor,
    dt: torch.Tensor,
    decay: torch.Tensor,
    skip: torch.Tensor,
    dt_bias: torch.Tensor,
    state: torch.Tensor,
    plan: StatePlan,
) -> torch.Tensor:
    """Position by position, head by head: S = S exp(dt a) + dt x B^T, y = S C + D x, in float32; S is rounded after
    each block, and after each position that is in none."""
    _, num_heads, head_dim, size = state.shape
    out = xbc.new_empty(len(xbc), num_heads * head_dim)
    for (begin, end, slot, is_new), num_blocked in zip(_runs(plan), plan.num_blocked.tolist(), strict=True):
        matrix = torch.zeros_like(state[0]) if is_new or slot < 0 else state[slot]
        for t in range(begin, end):
            x, b, c = xbc[t].float().split([num_heads * head_dim, size, size])
            x = x.view(num_heads, head_dim)
            step = F.softplus(dt[t].float() + dt_bias)
            wide = matrix.float() * torch.exp(step * decay)[:, None, None]
            wide = wide + x[:, :, None] * (step[:, None] * b)[:, None]
            out[t] = ((wide * c).sum(-1) + skip[:, None] * x).flatten().to(xbc.dtype)
            is_within = t - begin < num_blocked and (t - begin + 1) % SCAN_BLOCK
            matrix = wide if is_within else wide.to(state.dtype)
        if slot >= 0:
            state[slot] = matrix
    return out


def gated_rms_norm_reference(y: torch.Tensor, z: torch.Tensor, weight: torch.Tensor, *, eps: float) -> torch.Tensor:
    """g / sqrt(mean(g^2) + eps) * weight with g = y silu(z), all in float32, then cast."""
    gated = y.float() * F.silu(z.float())
    return (gated * torch.rsqrt(gated.pow(2).mean(-1, keepdim=True) + eps) * weight.float()).to(y.dtype)


@triton.jit
def _causal_conv_kernel(
    x,
    weight,
    bias,
    state,
    query_start,
    slots,
    is_new,
    out,
    x_stride,
    CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    TILE_WIDTH: tl.constexpr,
):
    """Some channels of all new positions of one sequence, then of its state: the newest WIDTH - 1 inputs."""
    sequence = tl.program_id(0)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = column < CHANNELS
    begin = tl.load(query_start + sequence)
    end = tl.load(query_start + sequence + 1)
    slot = tl.load(slots + sequence)
    # Masks compare with a number: where nothing may be read it is 0.
    num_past = tl.where((slot >= 0) & (tl.load(is_new + sequence) == 0), CHANNELS, 0)
    past = state + tl.maximum(slot, 0) * ((WIDTH - 1) * CHANNELS) + column
    constant = tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    for offset in range(end - begin):
        row = (begin + offset).to(tl.int64)
        total = constant
        for k in tl.static_range(WIDTH):
            source = row - (WIDTH - 1) + k
            num_new = tl.where(source >= begin, CHANNELS, 0)
            num_old = tl.where(source >= begin, 0, num_past)
            new = tl.load(x + source * x_stride + column, mask=column < num_new, other=0.0)
            old = tl.load(past + (source - begin + WIDTH - 1) * CHANNELS, mask=column < num_old, other=0.0)
            tap = tl.load(weight + k * CHANNELS + column, mask=inside, other=0.0).to(tl.float32)
            total += tap * (new.to(tl.float32) + old.to(tl.float32))
        result = total * tl.sigmoid(total)
        tl.store(out + row * CHANNELS + column, result.to(out.dtype.element_ty), mask=inside)
    if slot >= 0:
        kept = tl.arange(0, TILE_WIDTH)[:, None]
        source = end - (WIDTH - 1) + kept
        exists = inside[None] & (kept < WIDTH - 1)
        is_past = source < begin
        new = tl.load(x + source.to(tl.int64) * x_stride + column[None], mask=exists & (source >= begin), other=0.0)
        shifted = past[None] + (source - begin + WIDTH - 1) * CHANNELS
        old = tl.load(shifted, mask=exists & is_past & (column < num_past)[None], other=0.0)
        # What is stored first must not be what another thread still reads.
        tl.debug_barrier()
        newest = tl.where(is_past, old.to(tl.float32), new.to(tl.float32)).to(state.dtype.element_ty)
        tl.store(past[None] + kept * CHANNELS, newest, mask=exists)


@triton.jit
def _softplus(raw, LINEAR_FROM: tl.constexpr):
    """log1p(exp(raw)) to the last digits: log(u) e / (u - 1) with u = 1 + e."""
    e = tl.exp(tl.minimum(raw, LINEAR_FROM))
    u = 1.0 + e
    smooth = tl.where(u == 1.0, e, tl.log(u) * (e / tl.where(u == 1.0, 1.0, u - 1.0)))
    return tl.where(raw > LINEAR_FROM, raw, smooth)


@triton.jit
def _block_scan_kernel(
    xbc,
    dt,
    decay,
    skip,
    dt_bias,
    state,
    query_start,
    num_blocked,
    slots,
    is_new,
    out,
    xbc_stride,
    dt_stride,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SIZE: tl.constexpr,
    TILE_DIM: tl.constexpr,
    TILE_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    LINEAR_FROM: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """`_state_scan_kernel` for the rows of one sequence that are whole blocks.

    With l the sum of dt a from a block's first position on, its y are exp(l) C S^T + (C B^T * exp(l_t - l_j)) dt x,
    j <= t, and then S = exp(l) S + (exp(l - l_j) dt x)^T B. What products take in 16 bits, B, C and S as it was stored,
    has no more; the others are in float32.
    """
    sequence = tl.program_id(0)
    num_rows = tl.load(num_blocked + sequence)
    if num_rows > 0:
        head = tl.program_id(1)
        dim = tl.program_id(2) * TILE_DIM + tl.arange(0, TILE_DIM)
        element = tl.arange(0, TILE_SIZE)
        t = tl.arange(0, BLOCK)
        of_head, of_size = (dim < HEAD_DIM)[None], (element < SIZE)[None]
        begin = tl.load(query_start + sequence)
        slot = tl.load(slots + sequence)
        num_past = tl.where(tl.load(is_new + sequence) == 0, SIZE, 0)
        # [size, dims], as the products take it.
        place = state + (slot * NUM_HEADS + head) * (HEAD_DIM * SIZE) + dim[None] * SIZE + element[:, None]
        matrix = tl.load(place, mask=of_head & (element < num_past)[:, None], other=0.0).to(tl.float32)
        rate = tl.load(decay + head)
        through = tl.load(skip + head)
        shift = tl.load(dt_bias + head)
        x_columns = (head * HEAD_DIM + dim)[None]
        b_columns = (NUM_HEADS * HEAD_DIM + element)[None]
        for offset in range(0, num_rows, BLOCK):
            rows = (begin + offset + t).to(tl.int64)
            step = _softplus(tl.load(dt + rows * dt_stride + head).to(tl.float32) + shift, LINEAR_FROM)
            log_kept = tl.cumsum(step * rate, 0)
            inputs = xbc + (rows * xbc_stride)[:, None]
            x = tl.load(inputs + x_columns, mask=of_head, other=0.0).to(tl.float32)
            b = tl.load(inputs + b_columns, mask=of_size, other=0.0)
            c = tl.load(inputs + SIZE + b_columns, mask=of_size, other=0.0).to(OPERAND)
            gain = step[:, None] * x
            between = tl.where(t[:, None] >= t[None], log_kept[:, None] - log_kept[None], float("-inf"))
            within = tl.dot(c, tl.trans(b.to(OPERAND)), input_precision="ieee") * tl.exp(between)
            y = tl.exp(log_kept)[:, None] * tl.dot(c, matrix.to(OPERAND), input_precision="ieee")
            y += tl.dot(within, gain, input_precision="ieee") + through * x
            to = out + (rows * (NUM_HEADS * HEAD_DIM))[:, None] + x_columns
            tl.store(to, y.to(out.dtype.element_ty), mask=of_head)
            last = tl.sum(tl.where(t == BLOCK - 1, log_kept, 0.0), 0)
            carried = gain * tl.exp(last - log_kept)[:, None]
            matrix = matrix * tl.exp(last) + tl.dot(tl.trans(b.to(tl.float32)), carried, input_precision="ieee")
            matrix = matrix.to(state.dtype.element_ty).to(tl.float32)
        tl.store(place, matrix.to(state.dtype.element_ty), mask=of_head & (element < SIZE)[:, None])


@triton.jit
def _state_scan_kernel(
    xbc,
    dt,
    decay,
    skip,
    dt_bias,
    state,
    query_start,
    num_blocked,
    slots,
    is_new,
    out,
    xbc_stride,
    dt_stride,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SIZE: tl.constexpr,
    TILE_DIM: tl.constexpr,
    TILE_SIZE: tl.constexpr,
    LINEAR_FROM: tl.constexpr,
):
    """S = S exp(dt a) + dt x B^T, y = S C + D x for some dims of one head, over the rows of one sequence that are in no
    block."""
    sequence = tl.program_id(0)
    head = tl.program_id(1)
    dim = tl.program_id(2) * TILE_DIM + tl.arange(0, TILE_DIM)
    element = tl.arange(0, TILE_SIZE)
    inside = (dim < HEAD_DIM)[:, None] & (element < SIZE)[None]
    num_rows = tl.load(num_blocked + sequence)
    begin = tl.load(query_start + sequence) + num_rows
    end = tl.load(query_start + sequence + 1)
    slot = tl.load(slots + sequence)
    has_past = (slot >= 0) & ((num_rows > 0) | (tl.load(is_new + sequence) == 0))
    num_past = tl.where(has_past, SIZE, 0)
    place = (tl.maximum(slot, 0) * NUM_HEADS + head) * (HEAD_DIM * SIZE)
    place = state + place + dim[:, None] * SIZE + element[None]
    matrix = tl.load(place, mask=inside & (element < num_past)[None], other=0.0).to(tl.float32)
    rate = tl.load(decay + head)
    through = tl.load(skip + head)
    shift = tl.load(dt_bias + head)
    for offset in range(end - begin):
        row = (begin + offset).to(tl.int64)
        step = _softplus(tl.load(dt + row * dt_stride + head).to(tl.float32) + shift, LINEAR_FROM)
        inputs = xbc + row * xbc_stride
        x = tl.load(inputs + head * HEAD_DIM + dim, mask=dim < HEAD_DIM, other=0.0).to(tl.float32)
        b = tl.load(inputs + NUM_HEADS * HEAD_DIM + element, mask=element < SIZE, other=0.0).to(tl.float32)
        c = tl.load(inputs + NUM_HEADS * HEAD_DIM + SIZE + element, mask=element < SIZE, other=0.0).to(tl.float32)
        matrix = matrix * tl.exp(step * rate) + x[:, None] * (step * b)[None]
        y = tl.sum(matrix * c[None], 1) + through * x
        to = out + row * (NUM_HEADS * HEAD_DIM) + head * HEAD_DIM + dim
        tl.store(to, y.to(out.dtype.element_ty), mask=dim < HEAD_DIM)
        matrix = matrix.to(state.dtype.element_ty).to(tl.float32)
    if slot >= 0:
        tl.store(place, matrix.to(state.dtype.element_ty), mask=inside)


@triton.jit
def _gated_rms_norm_kernel(y, z, weight, out, y_stride, z_stride, eps, SIZE: tl.constexpr, TILE: tl.constexpr):
    """One row: g / sqrt(mean(g^2) + eps) * weight with g = y silu(z)."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, TILE)
    inside = column < SIZE
    gate = tl.load(z + row * z_stride + column, mask=inside, other=0.0).to(tl.float32)
    values = tl.load(y + row * y_stride + column, mask=inside, other=0.0).to(tl.float32) * gate * tl.sigmoid(gate)
    scale = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    result = values * tl.rsqrt(tl.sum(values * values, 0) / SIZE + eps) * scale
    tl.store(out + row * SIZE + column, result.to(out.dtype.element_ty), mask=inside)


def causal_conv(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, state: torch.Tensor, plan: StatePlan
) -> torch.Tensor:
    """Depthwise causal convolution and silu of new positions; `state` keeps each sequence's newest inputs, in place.

    x: [N, C], the elements of a row side by side; weight: [width, C], the newest input's tap last; bias: [C];
    state: [slots, width - 1, C], oldest first, in the dtype of x -> [N, C] contiguous, in the dtype of x.
    A row depends on its own sequence alone, to the last bit.
    Raises: ValueError for shapes, strides or dtypes that do not fit.
    """
    width, channels = weight.shape
    is_read = x.dim() == 2 and x.shape[1] == channels and x.stride(1) == 1
    if not is_read or state.shape[1:] != (width - 1, channels) or state.dtype != x.dtype or not state.is_contiguous():
        raise ValueError(
            f"inputs {tuple(x.shape)} {x.dtype}, strides {x.stride()}, state {tuple(state.shape)} {state.dtype} and"
            f" taps {tuple(weight.shape)} do not fit: rows of {channels} side by side, and a contiguous state"
            f" [slots, {width - 1}, {channels}] of their dtype"
        )
    if not backend.use_triton(x):
        return _causal_conv_cpu(x, weight, bias, state, plan)
    out = torch.empty(len(x), channels, dtype=x.dtype, device=x.device)
    backend.launch(
        _causal_conv_kernel,
        (len(plan.slots), triton.cdiv(channels, _TILE_CHANNELS)),
        {
            "x": x,
            "weight": weight,
            "bias": bias,
            "state": state,
            "query_start": plan.query_start,
            "slots": plan.slots,
            "is_new": plan.is_new,
            "out": out,
            "x_stride": x.stride(0),
        },
        {
            "CHANNELS": channels,
            "WIDTH": width,
            "TILE": _TILE_CHANNELS,
            "TILE_WIDTH": triton.next_power_of_2(width - 1),
        },
        warps=2,
        stages=1,
    )
    return out


def state_scan(
    xbc: torch.Tensor,
    dt: torch.Tensor,
    decay: torch.Tensor,
    skip: torch.Tensor,
    dt_bias: torch.Tensor,
    state: torch.Tensor,
    plan: StatePlan,
) -> torch.Tensor:
    """Move each sequence's state over its new positions, in place.

    xbc: [N, heads * D + 2 * size], [x | B | C]; dt: [N, heads] before bias and softplus; the elements of their rows
    side by side. decay (negative), skip, dt_bias: float32 [heads]; state: [slots, heads, D, size], as `allocate_states`
    lays it out (on the CPU another layout costs copies).
    Returns y [N, heads * D] in the dtype of xbc. A row depends on its own sequence alone, to the last bit, and the
    state is rounded to its dtype after every block, and after every position that is in none.
    Raises: ValueError for shapes, strides or dtypes that do not fit.
    Source: Dao & Gu 2024, equation 1 with a scalar times identity.
    """
    _, num_heads, head_dim, size = state.shape
    fits = xbc.shape[1] == num_heads * head_dim + 2 * size and dt.shape == (len(xbc), num_heads)
    is_laid_out = state.is_contiguous() or not backend.use_triton(xbc)
    if not fits or xbc.stride(1) != 1 or dt.stride(1) != 1 or not is_laid_out:
        raise ValueError(
            f"[x | B | C] {tuple(xbc.shape)}, dt {tuple(dt.shape)} and state {tuple(state.shape)} do not fit:"
            " [N, heads * D + 2 * size], [N, heads] and a contiguous [slots, heads, D, size]"
        )
    for vector in (decay, skip, dt_bias):
        if vector.shape != (num_heads,) or vector.dtype != torch.float32:
            raise ValueError(f"decay, skip and dt_bias are float32 [{num_heads}], not {vector.dtype} {vector.shape}")
    if not backend.use_triton(xbc):
        return _state_scan_cpu(xbc, dt, decay, skip, dt_bias, state, plan)
    out = torch.empty(len(xbc), num_heads * head_dim, dtype=xbc.dtype, device=xbc.device)
    arguments = {
        "xbc": xbc,
        "dt": dt,
        "decay": decay,
        "skip": skip,
        "dt_bias": dt_bias,
        "state": state,
        "query_start": plan.query_start,
        "num_blocked": plan.num_blocked,
        "slots": plan.slots,
        "is_new": plan.is_new,
        "out": out,
        "xbc_stride": xbc.stride(0),
        "dt_stride": dt.stride(0),
    }
    shape = {"NUM_HEADS": num_heads, "HEAD_DIM": head_dim, "SIZE": size, "LINEAR_FROM": _LINEAR_FROM}
    # A kernel of their own: in one that has both, products could change the order in which a position's y is summed.
    if plan.has_blocks:
        grid = (len(plan.slots), num_heads, triton.cdiv(head_dim, _BLOCK_TILE_DIM))
        tiles = {
            "TILE_DIM": _BLOCK_TILE_DIM,
            "TILE_SIZE": max(16, triton.next_power_of_2(size)),
            "BLOCK": SCAN_BLOCK,
            "OPERAND": backend.dot_dtype(xbc) if state.dtype == xbc.dtype else tl.float32,
        }
        backend.launch(_block_scan_kernel, grid, arguments, shape | tiles, warps=_BLOCK_WARPS, stages=1)
    tile_dim = min(_TILE_DIM, triton.next_power_of_2(head_dim))
    tiles = {"TILE_DIM": tile_dim, "TILE_SIZE": triton.next_power_of_2(size)}
    grid = (len(plan.slots), num_heads, triton.cdiv(head_dim, tile_dim))
    backend.launch(_state_scan_kernel, grid, arguments, shape | tiles, warps=4, stages=1)
    return out


def gated_rms_norm(y: torch.Tensor, z: torch.Tensor, weight: torch.Tensor, *, eps: float) -> torch.Tensor:
    """Root-mean-square norm of y silu(z).

    y, z: [N, C], the elements of a row side by side; weight: [C] -> [N, C] in the dtype of y. Each row depends on
    itself alone, to the last bit. Raises: ValueError for shapes or strides that do not fit.
    Source: state-spaces/mamba `RMSNormGated` with norm_before_gate=False.
    """
    size = y.shape[1]
    if y.shape != z.shape or weight.shape != (size,) or y.stride(1) != 1 or z.stride(1) != 1 or size > MAX_SIZE:
        raise ValueError(
            f"y {tuple(y.shape)}, z {tuple(z.shape)} and weight {tuple(weight.shape)} do not fit: [N, C], [N, C] and"
            f" [C] with C <= {MAX_SIZE}, rows side by side"
        )
    if not backend.use_triton(y):
        gated = y.float() * by_rows(F.silu, z.float())
        return rms_norm(gated, weight.float(), eps=eps).to(y.dtype)
    out = torch.empty(len(y), size, dtype=y.dtype, device=y.device)
    tile = triton.next_power_of_2(size)
    backend.launch(
        _gated_rms_norm_kernel,
        (len(y),),
        {
            "y": y,
            "z": z,
            "weight": weight,
            "out": out,
            "y_stride": y.stride(0),
            "z_stride": z.stride(0),
            "eps": eps,
        },
        {"SIZE": size, "TILE": tile},
        warps=min(8, max(1, tile // 512)),
        stages=1,
    )
    return out


def _runs(plan: StatePlan) -> list[tuple[int, int, int, bool]]:
    """First row, last row (exclusive), slot, and whether it is new, of each sequence."""
    starts = plan.query_start.tolist()
    return list(zip(starts, starts[1:], plan.slots.tolist(), plan.is_new.tolist(), strict=False))


def _past(state: torch.Tensor, plan: StatePlan) -> torch.Tensor:
    """A copy of each sequence's state, zero for new ones, float32 [S, ...]."""
    past = state.index_select(0, plan.slots).float()
    return past.masked_fill_(plan.is_new[:, None, None], 0.0) if plan.has_new else past


def _causal_conv_cpu(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, state: torch.Tensor, plan: StatePlan
) -> torch.Tensor:
    past, taps, wide = _past(state, plan), weight.float(), x.float()
    if len(plan.slots) == len(x):  # one position each
        total = taps[0] * past[:, 0]
        total += bias.float()
        for k in range(1, len(taps) - 1):
            total += taps[k] * past[:, k]
        total += taps[-1] * wide
        state.index_copy_(0, plan.slots, torch.cat([past[:, 1:], wide[:, None]], dim=1).to(state.dtype))
    else:
        parts = []
        for i, (begin, end, slot, _) in enumerate(_runs(plan)):
            inputs, count = torch.cat([past[i], wide[begin:end]]), end - begin
            total = bias.float() + taps[0] * inputs[:count]
            for k in range(1, len(taps)):
                total = total + taps[k] * inputs[k : k + count]
            parts.append(total)
            state[slot] = inputs[count:].to(state.dtype)
        total = torch.cat(parts)
    return by_rows(F.silu, total).to(x.dtype)


def _state_scan_cpu(
    xbc: torch.Tensor,
    dt: torch.Tensor,
    decay: torch.Tensor,
    skip: torch.Tensor,
    dt_bias: torch.Tensor,
    state: torch.Tensor,
    plan: StatePlan,
) -> torch.Tensor:
    """One sequence after the other, and in place: a state then stays in the processor's cache while it is worked on,
    where those of a whole batch would go through memory at every operation. States so small that several together stay
    there are taken out in groups and put back: it is calls that they cost."""
    _, num_heads, head_dim, size = state.shape
    inner = num_heads * head_dim
    x, b, c = xbc.float().split([inner, size, size], dim=1)
    step = by_rows(F.softplus, dt.float() + dt_bias)
    log_kept = step * decay
    kept = _for_each_dim(by_rows(torch.exp, log_kept), head_dim)[:, None]
    gain = (_for_each_dim(step, head_dim) * x)[:, None]
    inputs, reads = b[..., None], _aligned_rows(c)[:, None]
    out = torch.empty(len(xbc), 1, inner)

    def move(stored: torch.Tensor, rows: slice) -> None:
        """Move states [S, size, inner] on by one position each, that of these S rows."""
        matrices = stored.float()  # of a float32 state no copy
        matrices.mul_(kept[rows]).addcmul_(inputs[rows], gain[rows])
        torch.bmm(reads[rows], matrices, out=out[rows])
        if stored is not matrices:
            stored.copy_(matrices)

    # A view where `allocate_states` laid the states out, else a copy, which is copied back.
    states = state.permute(0, 3, 1, 2).contiguous().flatten(2)
    group_size = max(1, _GROUP_BYTES // (4 * size * inner))
    if group_size > 1 and len(plan.slots) == len(xbc):  # one position each
        for first in range(0, len(xbc), group_size):
            rows = slice(first, first + group_size)
            group = states.index_select(0, plan.slots[rows])
            if plan.has_new:
                group.masked_fill_(plan.is_new[rows, None, None], 0.0)
            move(group, rows)
            states.index_copy_(0, plan.slots[rows], group)
    else:
        for (begin, end, slot, is_new), num_blocked in zip(_runs(plan), plan.num_blocked.tolist(), strict=True):
            stored = states[slot : slot + 1]
            if is_new:
                stored.zero_()
            for first in range(begin, begin + num_blocked, SCAN_BLOCK):
                rows = slice(first, first + SCAN_BLOCK)
                out[rows, 0] = _scan_block(stored[0], log_kept[rows], gain[rows, 0], b[rows], c[rows])
            for row in range(begin + num_blocked, end):
                move(stored, slice(row, row + 1))
    if states.data_ptr() != state.data_ptr():
        state.copy_(states.unflatten(2, (num_heads, head_dim)).permute(0, 2, 3, 1))
    return out[:, 0].add_(_for_each_dim(skip[None], head_dim) * x).to(xbc.dtype)


def _scan_block(
    stored: torch.Tensor, log_kept: torch.Tensor, gain: torch.Tensor, b: torch.Tensor, c: torch.Tensor
) -> torch.Tensor:
    """Move a state [size, inner] over a block, as `_block_scan_kernel` does; every product is of one shape.

    log_kept: [L, heads], dt a; gain: [L, inner], dt x; b, c: [L, size] -> y without D x, [L, inner].
    """
    length, num_heads = log_kept.shape
    head_dim = gain.shape[1] // num_heads
    b, c, gain = _aligned_rows(b), _aligned_rows(c), gain.contiguous()
    log_kept = log_kept.cumsum(0)
    between = log_kept.t()[:, :, None] - log_kept.t()[:, None]  # [heads, t, j]
    within = (c @ b.t()) * between.add_(_NOT_LATER).exp_()
    of_heads = gain.view(length, num_heads, head_dim).transpose(0, 1)
    matrix = stored.float()  # of a float32 state no copy
    y = _for_each_dim(log_kept.exp(), head_dim) * (c @ matrix)
    y += torch.bmm(within, of_heads).transpose(0, 1).flatten(1)
    carried = gain * _for_each_dim((log_kept[-1] - log_kept).exp(), head_dim)
    matrix.mul_(_for_each_dim(log_kept[-1:].exp(), head_dim)).addmm_(b.t(), carried)
    if matrix is not stored:
        stored.copy_(matrix)
    return y


def _for_each_dim(of_heads: torch.Tensor, head_dim: int) -> torch.Tensor:
    """[N, heads] -> [N, heads * head_dim], each number once for every dim of its head."""
    return of_heads[:, :, None].expand(-1, -1, head_dim).flatten(1)


def _aligned_rows(x: torch.Tensor) -> torch.Tensor:
    """x [N, C], each row begun at a multiple of 64 bytes: a product may sum in another order elsewhere."""
    num_rows, size = x.shape
    return x.new_empty(num_rows, -(-size // 16) * 16)[:, :size].copy_(x)
