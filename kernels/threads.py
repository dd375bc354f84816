"""Who may compute in parallel: the engine thread alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Keep torch in this thread to one core.

    OpenMP gives every thread that computes in parallel a team of its own, for ever; with more members than cores, all
    teams sleep at each barrier instead of spinning, and the engine thread's steps take twice as long.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
