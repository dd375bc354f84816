"""Recurrent state: fixed-size slots on the device beside the paged cache, and which sequence each belongs to.

A slot cannot grow and cannot be shared, and unlike K and V it forgets: what a step does to it cannot be done again. So
the books say how many positions each state has taken in. A sequence whose state is not where it should be, because its
slot went to another or because a step failed half way, has its positions run again (`Runner`).
"""

from __future__ import annotations

from collections.abc import Sequence as Items

import torch

from declaim.engine.spec import StateSpec
from declaim.kernels.mamba import allocate_states

LayerState = tuple[torch.Tensor, torch.Tensor]
"""One layer's newest convolution inputs [slots, num_conv, conv_size], and matrices [slots, heads, head_dim, size]."""


class StateSlots:
    """`num_seats` sequences of `num_branches` slots each. Slot `seat * num_branches + branch` is a branch's."""

    def __init__(
        self, spec: StateSpec, num_seats: int, *, num_branches: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        num_slots = num_seats * num_branches

        def layer() -> LayerState:
            matrices = allocate_states(
                num_slots, spec.num_heads, head_dim=spec.head_dim, size=spec.size, dtype=dtype, device=device
            )
            return torch.zeros(num_slots, spec.num_conv, spec.conv_size, dtype=dtype, device=device), matrices

        self.num_branches = num_branches
        self.scan_block = spec.scan_block
        self.layers: tuple[LayerState, ...] = tuple(layer() for _ in range(spec.num_layers))
        self._num_seats = num_seats
        self._free = list(range(num_seats))
        self._seat_of: dict[int, int] = {}  # by sequence id, least recently used first
        self._num_taken: dict[int, int] = {}  # positions a state has taken in; absent while that is unknown

    def hold(self, sequence_ids: Items[int]) -> None:
        """Give each of these a seat, taking it from whoever has not run for longest.

        Raises: ValueError if there are more of them than seats.
        """
        if len(sequence_ids) > self._num_seats:
            raise ValueError(
                f"a step of {len(sequence_ids)} sequences needs as many states, and there are {self._num_seats}"
            )
        for sequence_id in sequence_ids:
            seat = self._seat_of.pop(sequence_id, None)
            if seat is not None:
                self._seat_of[sequence_id] = seat
        wanted = set(sequence_ids)
        for sequence_id in sequence_ids:
            if sequence_id in self._seat_of:
                continue
            if not self._free:
                self.release(next(other for other in self._seat_of if other not in wanted))
            self._seat_of[sequence_id] = self._free.pop()

    def release(self, sequence_id: int) -> None:
        """Free a sequence's seat. No effect if it has none."""
        seat = self._seat_of.pop(sequence_id, None)
        self._num_taken.pop(sequence_id, None)
        if seat is not None:
            self._free.append(seat)

    def slot(self, sequence_id: int, branch: int) -> int:
        """Where a branch of a sequence that is held has its state."""
        return self._seat_of[sequence_id] * self.num_branches + branch

    def has_taken(self, sequence_id: int, num_positions: int) -> bool:
        """Whether a state is that of exactly so many positions. Nobody has to remember a state of none."""
        return num_positions == 0 or self._num_taken.get(sequence_id) == num_positions

    def begin_step(self, sequence_id: int) -> None:
        """Until the step is done, nobody can say what this state has taken in."""
        self._num_taken.pop(sequence_id, None)

    def end_step(self, sequence_id: int, num_positions: int) -> None:
        """Record that a state has now taken in so many positions."""
        self._num_taken[sequence_id] = num_positions
