"""Steps of recurrent layers, for the tests of their kernels."""

from __future__ import annotations

import torch

from declaim.kernels.mamba import StatePlan


def plan_of(counts: list[int], slots: list[int], is_new: list[bool], num_blocked: list[int] | None = None) -> StatePlan:
    """One step of sequences with so many rows each, of which the first `num_blocked` are whole blocks of a prompt."""
    starts = torch.tensor([0, *counts]).cumsum(0).to(torch.int32)
    blocked = torch.tensor(num_blocked or [0] * len(counts), dtype=torch.int32)
    return StatePlan(
        starts,
        torch.tensor(slots),
        torch.tensor(is_new),
        blocked,
        has_new=any(is_new),
        has_blocks=bool(blocked.any()),
    )
