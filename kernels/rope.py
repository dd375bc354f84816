"""Rotary position embedding."""

from __future__ import annotations

import torch


def rotary_table(num_positions: int, head_dim: int, *, theta: float, device: torch.device) -> torch.Tensor:
    """Cosines and signed sines of every position, float32 [num_positions, 2 * head_dim].

    The first half is [cos, cos], the second [-sin, sin], over the head_dim / 2 frequencies theta^(-2i / head_dim): so
    that a rotation is one product with x and one with x whose halves are swapped.
    Source: Su et al. 2021, equation 15.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    inverse_frequencies = 1.0 / (theta**exponents)
    angles = torch.arange(num_positions, dtype=torch.float32, device=device)[:, None] * inverse_frequencies
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos, -sin, sin], dim=-1)


def apply_rotary(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Rotate the half-split pairs (i, i + D/2) of x.

    x: [N, H, D]; angles: [N, 2D], rows of `rotary_table` at the positions of x -> [N, H, D], contiguous.
    """
    head_dim = x.shape[-1]
    half = head_dim // 2
    rows = angles.to(x.dtype)[:, None]
    swapped = torch.cat([x[..., half:], x[..., :half]], dim=-1)
    return torch.addcmul(x * rows[..., :head_dim], swapped, rows[..., head_dim:])
