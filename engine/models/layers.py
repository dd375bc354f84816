"""The blocks that the families share: RMSNorm, rotary attention over the paged cache, SwiGLU, Mamba-2.

A decoder keeps its residual stream as a pair: x, and `added`, what the last sublayer gave, which the next norm adds to
x in its own launch (`add_rms_norm`). `attend` and `swiglu` go between two such norms. An encoder's stream is one
tensor: `full_attention` and `mlp` are sublayers with their norm, and add x where they multiply last.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from declaim.engine.models.base import LayerCache
from declaim.engine.spec import StateSpec
from declaim.engine.states import LayerState
from declaim.kernels.attention import AttentionPlan, paged_attention
from declaim.kernels.linear import Linear, gated_linear, linear
from declaim.kernels.mamba import SCAN_BLOCK, StatePlan, causal_conv, gated_rms_norm, state_scan
from declaim.kernels.norm import rms_norm
from declaim.kernels.rope import apply_rotary, rotary_and_cache


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """num_heads is a multiple of num_kv_heads; scale multiplies q k^T; interleaved: which pairs rotate together."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    interleaved: bool = False

    @property
    def qkv_size(self) -> int:
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim


@dataclass(frozen=True, slots=True, eq=False)
class AttentionWeights:
    """qkv: C -> [heads | kv heads | kv heads] * head_dim."""

    norm: torch.Tensor
    qkv: Linear
    out: Linear


@dataclass(frozen=True, slots=True, eq=False)
class MlpWeights:
    """gate_up: C -> [gate | up]."""

    norm: torch.Tensor
    gate_up: Linear
    down: Linear


@dataclass(frozen=True, slots=True)
class MambaShape:
    """A Mamba-2 layer: heads of head_dim, each with a state of head_dim x size; width: the convolution's taps."""

    num_heads: int
    head_dim: int
    size: int
    width: int
    eps: float

    @property
    def inner(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def num_channels(self) -> int:
        """What the convolution mixes along time: [x | B | C]."""
        return self.inner + 2 * self.size

    @property
    def num_projected(self) -> int:
        """[z | x | B | C | dt]."""
        return self.inner + self.num_channels + self.num_heads

    def state_spec(self, num_layers: int) -> StateSpec:
        return StateSpec(
            num_layers,
            num_conv=self.width - 1,
            conv_size=self.num_channels,
            num_heads=self.num_heads,
            head_dim=self.head_dim,
            size=self.size,
            scan_block=SCAN_BLOCK,
        )


@dataclass(frozen=True, slots=True, eq=False)
class MambaWeights:
    """inputs: C -> [z | x | B | C | dt]; taps: [width, channels]; decay (negative), skip, dt_bias: float32 [heads]."""

    inputs: Linear
    taps: torch.Tensor
    taps_bias: torch.Tensor
    decay: torch.Tensor
    skip: torch.Tensor
    dt_bias: torch.Tensor
    norm: torch.Tensor
    out: Linear


def attend(
    normed: torch.Tensor,
    weights: AttentionWeights,
    shape: AttentionShape,
    *,
    angles: torch.Tensor,
    slots: torch.Tensor,
    cache: LayerCache,
    plan: AttentionPlan,
) -> torch.Tensor:
    """Attention of N new positions over their sequences' caches, their own K and V written first.

    normed: [N, C]; angles: [N, 2D]; slots: int64 [N] -> what the residual stream gains, [N, C].
    """
    k_cache, v_cache = cache
    q = rotary_and_cache(
        linear(normed, weights.qkv),
        angles,
        slots,
        k_cache,
        v_cache,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        interleaved=shape.interleaved,
    )
    mixed = paged_attention(q, k_cache, v_cache, plan, scale=shape.scale)
    return linear(mixed.flatten(1), weights.out)


def mamba(
    normed: torch.Tensor, weights: MambaWeights, shape: MambaShape, *, state: LayerState, plan: StatePlan
) -> torch.Tensor:
    """A Mamba-2 mixer over N new positions, the states moved on in place. normed: [N, C] -> [N, C].

    Source: Dao & Gu 2024, figure 6, and state-spaces/mamba `Mamba2`.
    """
    projected = linear(normed, weights.inputs)
    inner, end = shape.inner, shape.inner + shape.num_channels
    newest_inputs, matrices = state
    mixed = causal_conv(projected[:, inner:end], weights.taps, weights.taps_bias, newest_inputs, plan)
    y = state_scan(mixed, projected[:, end:], weights.decay, weights.skip, weights.dt_bias, matrices, plan)
    return linear(gated_rms_norm(y, projected[:, :inner], weights.norm, eps=shape.eps), weights.out)


def swiglu(normed: torch.Tensor, weights: MlpWeights, *, residual: torch.Tensor | None = None) -> torch.Tensor:
    """[N, C] -> what the residual stream gains, or with `residual` the stream after it, [N, C]."""
    return linear(gated_linear(normed, weights.gate_up), weights.down, residual=residual)


def full_attention(
    x: torch.Tensor, weights: AttentionWeights, shape: AttentionShape, *, eps: float, angles: torch.Tensor
) -> torch.Tensor:
    """x + attention of a text to all of itself, behind its norm. x: [L, C]; angles: [L, 2D] -> [L, C]."""
    qkv = linear(rms_norm(x, weights.norm, eps=eps), weights.qkv)
    heads = qkv.view(len(x), -1, shape.head_dim)
    first_v = shape.num_heads + shape.num_kv_heads
    rotated = apply_rotary(heads[:, :first_v], angles, interleaved=shape.interleaved)
    q, k, v = rotated[:, : shape.num_heads], rotated[:, shape.num_heads :], heads[:, first_v:]
    group = shape.num_heads // shape.num_kv_heads
    queries = q.transpose(0, 1)[None]
    keys = k.repeat_interleave(group, 1).transpose(0, 1)[None]
    values = v.repeat_interleave(group, 1).transpose(0, 1)[None]
    mixed = F.scaled_dot_product_attention(queries, keys, values, scale=shape.scale)
    return linear(mixed[0].transpose(0, 1).reshape(len(x), -1), weights.out, residual=x)


def mlp(x: torch.Tensor, weights: MlpWeights, *, eps: float) -> torch.Tensor:
    """x + `swiglu` behind its norm. x: [N, C] -> [N, C]."""
    return swiglu(rms_norm(x, weights.norm, eps=eps), weights, residual=x)
