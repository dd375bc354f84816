"""Gated activations over merged projections."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up.

    gate_up: [N, 2F], the gate in the first half -> [N, F], contiguous. Source: Shazeer 2020, SwiGLU.
    """
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)
