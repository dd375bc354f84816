"""What the tests of kernels share: random rows, and memory that shows who touches what he should not."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch

CPU = torch.device("cpu")
GUARD = 64
SENTINEL = 77


def guard_allocations(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What `torch.empty` gives is NaN, or the largest number, until written, and lies between guards that nobody may
    touch. For an autouse fixture to yield from."""
    allocated: list[torch.Tensor] = []
    empty: Callable[..., torch.Tensor] = torch.empty

    def poisoned(*sizes: int, dtype: torch.dtype = torch.float32, device: torch.device = CPU) -> torch.Tensor:
        shape = torch.Size(*sizes) if isinstance(sizes[0], tuple) else torch.Size(sizes)
        buffer = empty(shape.numel() + 2 * GUARD, dtype=dtype, device=device).fill_(SENTINEL)
        allocated.append(buffer)
        poison = math.nan if dtype.is_floating_point else torch.iinfo(dtype).max
        return buffer[GUARD : GUARD + shape.numel()].fill_(poison).view(shape)

    with monkeypatch.context() as patched:
        patched.setattr(torch, "empty", poisoned)
        yield
    for buffer in allocated:
        assert (buffer[:GUARD] == SENTINEL).all() and (buffer[-GUARD:] == SENTINEL).all()


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def strided(x: torch.Tensor) -> torch.Tensor:
    """The same rows with NaN between them."""
    wide = torch.full((len(x), x.shape[1] + 24), math.nan, dtype=x.dtype)
    wide[:, 8 : 8 + x.shape[1]] = x
    return wide[:, 8 : 8 + x.shape[1]]
