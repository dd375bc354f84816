"""Rotary position embedding."""

from __future__ import annotations

import torch


def rotary_table(num_positions: int, head_dim: int, *, theta: float, device: torch.device) -> torch.Tensor:
    """Cosines and sines of every position, float32 [num_positions, head_dim]: cos in the first half, sin in the second.

    Source: Su et al. 2021, equation 15; frequency i is theta^(-2i / head_dim).
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    inverse_frequencies = 1.0 / (theta**exponents)
    angles = torch.arange(num_positions, dtype=torch.float32, device=device)[:, None] * inverse_frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def apply_rotary(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Rotate the half-split pairs (i, i + D/2) of x.

    x: [N, H, D]; angles: [N, D], rows of `rotary_table` at the positions of x -> [N, H, D], contiguous.
    """
    cos, sin = angles.to(x.dtype)[:, None].chunk(2, dim=-1)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
