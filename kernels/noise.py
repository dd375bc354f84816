"""Counter-based noise: a pure function of what is drawn, never of where in the batch it is drawn.

A draw's key mixes (seed, row, codebook); candidate id v then takes output v + 1 of the SplitMix64 stream of that
key. All arithmetic is modulo 2^64 in int64, so every backend that multiplies integers gives the same bits.
Source: Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators", figure 17.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_GAMMA = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
_MASK = (1 << 64) - 1
# What a Triton kernel may read: in it they are uint64.
_WORD_GAMMA = tl.constexpr(_GAMMA)
_WORD_MIX_1 = tl.constexpr(_MIX_1)
_WORD_MIX_2 = tl.constexpr(_MIX_2)


def mix64(value: int) -> int:
    """SplitMix64's output function on a Python integer; returns 0 .. 2^64 - 1."""
    value &= _MASK
    value = ((value ^ (value >> 30)) * _MIX_1) & _MASK
    value = ((value ^ (value >> 27)) * _MIX_2) & _MASK
    return value ^ (value >> 31)


def draw_keys(seeds: torch.Tensor, rows: torch.Tensor, *, num_codebooks: int) -> torch.Tensor:
    """The keys of the draws of one step. seeds, rows: int64 [B] -> int64 [B, num_codebooks, 1]."""
    gamma = _signed(_GAMMA)
    codebooks = torch.arange(1, num_codebooks + 1, device=seeds.device)
    of_row = _mix(_mix(seeds + gamma) + rows * gamma)
    return _mix(of_row[:, None] + codebooks * gamma)[..., None]


def gumbel_noise(keys: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise of candidate ids.

    keys: int64 [..., 1] from `draw_keys`; ids: int64 [..., K] -> float32 [..., K]. argmax(logits + noise) is a draw
    from softmax(logits). Source: Gumbel 1954; Maddison et al. 2014.
    """
    # 23 bits and a half are all a float32 holds: with 24 the last value would round to 1, and its noise to infinity.
    bits = _shift(_mix(keys + (ids + 1) * _signed(_GAMMA)), 41)
    uniform = (bits.to(torch.float32) + 0.5) * 2.0**-23
    return -torch.log(-torch.log(uniform))


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _shift(value: torch.Tensor, count: int) -> torch.Tensor:
    """Logical right shift: torch's own repeats the sign bit."""
    return (value >> count) & ((1 << (64 - count)) - 1)


def _mix(value: torch.Tensor) -> torch.Tensor:
    value = (value ^ _shift(value, 30)) * _signed(_MIX_1)
    value = (value ^ _shift(value, 27)) * _signed(_MIX_2)
    return value ^ _shift(value, 31)


@triton.jit
def triton_draw_key(seed, row, codebook):
    """Twin of `draw_keys` for one draw. seed, row: int64, codebook: int32 -> uint64."""
    of_row = _triton_mix(_triton_mix(seed.to(tl.uint64) + _WORD_GAMMA) + row.to(tl.uint64) * _WORD_GAMMA)
    return _triton_mix(of_row + (codebook + 1).to(tl.uint64) * _WORD_GAMMA)


@triton.jit
def triton_gumbel_noise(key, ids):
    """Twin of `gumbel_noise`. key: uint64 from `triton_draw_key`; ids: int32 [K] -> float32 [K]."""
    uniform = (triton_noise_bits(key, ids).to(tl.float32) + 0.5) * 2.0**-23
    return -tl.log(-tl.log(uniform))


@triton.jit
def triton_noise_bits(key, ids):
    """The 23 random bits of candidate ids: int32 [K]."""
    return (_triton_mix(key + (ids + 1).to(tl.uint64) * _WORD_GAMMA) >> 41).to(tl.int32)


@triton.jit
def _triton_mix(value):
    value = (value ^ (value >> 30)) * _WORD_MIX_1
    value = (value ^ (value >> 27)) * _WORD_MIX_2
    return value ^ (value >> 31)
