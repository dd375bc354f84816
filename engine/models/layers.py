"""The transformer block that the families share: RMSNorm, rotary attention over the paged cache, SwiGLU."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from declaim.engine.models.base import LayerCache
from declaim.kernels.activation import silu_and_mul
from declaim.kernels.attention import AttentionPlan, paged_attention
from declaim.kernels.kv_cache import write_cache
from declaim.kernels.linear import Linear, linear
from declaim.kernels.norm import rms_norm
from declaim.kernels.rope import apply_rotary


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
    """Attention of N new positions over their sequences' caches, their own K and V written first.

    x: [N, C]; angles: [N, 2D]; slots: int64 [N] -> what the residual stream gains, [N, C].
    """
    q, k, v = _project(x, weights, shape, eps=eps, angles=angles)
    k_cache, v_cache = cache
    write_cache(k, v, slots, k_cache, v_cache)
    mixed = paged_attention(q, k_cache, v_cache, plan, scale=shape.scale)
    return linear(mixed.flatten(1), weights.out)


def full_attention(
    x: torch.Tensor, weights: AttentionWeights, shape: AttentionShape, *, eps: float, angles: torch.Tensor
) -> torch.Tensor:
    """Bidirectional attention within one text. x: [L, C]; angles: [L, 2D] -> what the residual stream gains, [L, C]."""
    q, k, v = _project(x, weights, shape, eps=eps, angles=angles)
    group = shape.num_heads // shape.num_kv_heads
    queries = q.transpose(0, 1)[None]
    keys = k.repeat_interleave(group, 1).transpose(0, 1)[None]
    values = v.repeat_interleave(group, 1).transpose(0, 1)[None]
    mixed = F.scaled_dot_product_attention(queries, keys, values, scale=shape.scale)
    return linear(mixed[0].transpose(0, 1).reshape(x.shape[0], -1), weights.out)


def mlp(x: torch.Tensor, weights: MlpWeights, *, eps: float) -> torch.Tensor:
    """SwiGLU. [N, C] -> what the residual stream gains, [N, C]."""
    return linear(silu_and_mul(linear(rms_norm(x, weights.norm, eps=eps), weights.gate_up)), weights.down)


def _project(
    x: torch.Tensor, weights: AttentionWeights, shape: AttentionShape, *, eps: float, angles: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Normed, projected and rotated: q [N, H, D], k and v [N, kv_heads, D]. q and k are rotated as one tensor."""
    qkv = linear(rms_norm(x, weights.norm, eps=eps), weights.qkv)
    heads = qkv.view(len(x), -1, shape.head_dim)
    first_v = shape.num_heads + shape.num_kv_heads
    rotated = apply_rotary(heads[:, :first_v], angles)
    return rotated[:, : shape.num_heads], rotated[:, shape.num_heads :], heads[:, first_v:]
