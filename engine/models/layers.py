"""The transformer block that the families share: RMSNorm, rotary attention over the paged cache, SwiGLU.

A decoder keeps its residual stream as a pair: x, and `added`, what the last sublayer gave, which the next norm adds to
x in its own launch (`add_rms_norm`). `attend` and `swiglu` go between two such norms. `self_attention`,
`full_attention` and `mlp` are sublayers with their norm, for a stream that is one tensor.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from declaim.engine.models.base import LayerCache
from declaim.kernels.activation import silu_and_mul
from declaim.kernels.attention import AttentionPlan, paged_attention
from declaim.kernels.linear import Linear, linear
from declaim.kernels.norm import rms_norm
from declaim.kernels.rope import apply_rotary, rotary_and_cache


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """num_heads is a multiple of num_kv_heads; scale multiplies q k^T."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float

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
    )
    mixed = paged_attention(q, k_cache, v_cache, plan, scale=shape.scale)
    return linear(mixed.flatten(1), weights.out)


def swiglu(normed: torch.Tensor, weights: MlpWeights) -> torch.Tensor:
    """[N, C] -> what the residual stream gains, [N, C]."""
    return linear(silu_and_mul(linear(normed, weights.gate_up)), weights.down)


def self_attention(
    x: torch.Tensor,
    weights: AttentionWeights,
    shape: AttentionShape,
    *,
    eps: float,
    angles: torch.Tensor,
    slots: torch.Tensor,
    cache: LayerCache,
    plan: AttentionPlan,
) -> torch.Tensor:
    """`attend` behind its norm. x: [N, C] -> what the residual stream gains, [N, C]."""
    normed = rms_norm(x, weights.norm, eps=eps)
    return attend(normed, weights, shape, angles=angles, slots=slots, cache=cache, plan=plan)


def full_attention(
    x: torch.Tensor, weights: AttentionWeights, shape: AttentionShape, *, eps: float, angles: torch.Tensor
) -> torch.Tensor:
    """Bidirectional attention within one text. x: [L, C]; angles: [L, 2D] -> what the residual stream gains, [L, C]."""
    qkv = linear(rms_norm(x, weights.norm, eps=eps), weights.qkv)
    heads = qkv.view(len(x), -1, shape.head_dim)
    first_v = shape.num_heads + shape.num_kv_heads
    rotated = apply_rotary(heads[:, :first_v], angles)
    q, k, v = rotated[:, : shape.num_heads], rotated[:, shape.num_heads :], heads[:, first_v:]
    group = shape.num_heads // shape.num_kv_heads
    queries = q.transpose(0, 1)[None]
    keys = k.repeat_interleave(group, 1).transpose(0, 1)[None]
    values = v.repeat_interleave(group, 1).transpose(0, 1)[None]
    mixed = F.scaled_dot_product_attention(queries, keys, values, scale=shape.scale)
    return linear(mixed[0].transpose(0, 1).reshape(x.shape[0], -1), weights.out)


def mlp(x: torch.Tensor, weights: MlpWeights, *, eps: float) -> torch.Tensor:
    """`swiglu` behind its norm. x: [N, C] -> what the residual stream gains, [N, C]."""
    return swiglu(rms_norm(x, weights.norm, eps=eps), weights)
