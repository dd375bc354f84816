"""One step's work: which sequences run, and how many of their positions. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass

from declaim.engine.sequence import Sequence


@dataclass(frozen=True, slots=True, eq=False)
class Entry:
    """`num_positions` of a sequence, from `sequence.num_cached` on, in every branch."""

    sequence: Sequence
    num_positions: int

    @property
    def draws(self) -> bool:
        """Whether the step reaches the last known position, from which the next row is drawn."""
        return self.num_positions == self.sequence.num_pending


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """The entries of one step, most urgent first."""

    entries: tuple[Entry, ...]
