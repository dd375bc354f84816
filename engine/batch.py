"""One step's work: which sequences run, and how many of their positions. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from declaim.engine.sequence import Sequence


@dataclass(frozen=True, slots=True, eq=False)
class Entry:
    """`num_positions` of a sequence, from its `num_cached` on, in every branch.

    draws: whether they reach the last known position, from which the next row is drawn.
    is_plain: whether the next row is what is drawn, whole, unless that ends the audio.
    """

    sequence: Sequence
    num_positions: int
    draws: bool
    is_plain: bool = False


@dataclass(frozen=True, eq=False)
class Batch:
    """The entries of one step, most urgent first. is_plain: whether every one of them is."""

    entries: tuple[Entry, ...]
    is_plain: bool = False

    @cached_property
    def drawing(self) -> tuple[Entry, ...]:
        """Those that draw, in order."""
        return self.entries if self.is_plain else tuple(entry for entry in self.entries if entry.draws)
