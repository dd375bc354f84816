"""One step's work: which sequences run, and how many of their positions. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass

from declaim.engine.sequence import Sequence


@dataclass(frozen=True, slots=True, eq=False)
class Entry:
    """`num_positions` of a sequence, from its `num_cached` on, in every branch.

    draws: whether they reach the last known position, from which the next row is drawn.
    """

    sequence: Sequence
    num_positions: int
    draws: bool


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """The entries of one step, most urgent first."""

    entries: tuple[Entry, ...]
