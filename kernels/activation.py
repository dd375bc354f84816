"""Gated activations over merged projections."""

from __future__ import annotations

import torch
import torch.nn.functional as F

SERIAL_ELEMENTS = 32767  # torch spreads larger elementwise work over threads


def silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up.

    gate_up: [N, 2F], the gate in the first half -> [N, F], contiguous. Source: Shazeer 2020, SwiGLU.
    On the CPU row i of the result depends on row i alone, to the last bit.
    """
    gate, up = gate_up.chunk(2, dim=-1)
    tile_rows = max(1, SERIAL_ELEMENTS // gate.shape[1])
    if gate.is_cuda or len(gate) <= tile_rows:
        return F.silu(gate).mul_(up)
    # Threads would cut a larger tensor in the middle of a row, and the last elements before a cut are computed by
    # another exp than the rest.
    return torch.cat([F.silu(gate[i : i + tile_rows]) for i in range(0, len(gate), tile_rows)]).mul_(up)
