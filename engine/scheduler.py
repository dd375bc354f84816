"""Who runs in the next step. Owns the queue, the running set and the block pools; torch-free, clock given.

Order: streams without first audio, by arrival; streams by how soon their playback runs dry; requests nobody listens to,
by arrival; streams and segments more than `max_lead_s` ahead, which run only when nobody else can. A sequence of an
earlier class is admitted however many of a later one run: those wait, with their blocks or, where blocks are short,
without. Everyone chosen decodes one position a step; prefill fills what is left of the step's budget, in pieces, so
that a long prompt stalls nobody. Branches of a sequence are never apart.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from declaim.engine.batch import Batch, Entry
from declaim.engine.blocks import BlockPool, blocks_for
from declaim.engine.errors import TooLong
from declaim.engine.sequence import Sequence

YIELDING = 3  # the first part of the rank of a stream too far ahead
SEGMENT_LEAD_S = 2.0  # how much later a segment is needed for each unfinished one before it


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """max_batch: sequences in a step. max_step_positions: positions in a step, over all branches.
    max_lead_s: a stream further ahead of its playback than this yields."""

    block_size: int
    max_batch: int
    max_step_positions: int
    max_lead_s: float


class Scheduler:
    """Continuous batching over a fixed number of blocks."""

    def __init__(self, pool: BlockPool, cross_pool: BlockPool, *, limits: SchedulerLimits) -> None:
        self._pool = pool
        self._cross_pool = cross_pool
        self._limits = limits
        self._waiting: list[Sequence] = []
        self._running: list[Sequence] = []
        self.num_preemptions = 0

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_blocks_used(self) -> int:
        return self._pool.num_used + self._cross_pool.num_used

    @property
    def num_blocks(self) -> int:
        return self._pool.num_blocks + self._cross_pool.num_blocks

    def check_fits(self, sequence: Sequence) -> None:
        """Raises: TooLong if the sequence could not run even alone."""
        block_size = self._limits.block_size
        needed = blocks_for(sequence.max_positions, block_size) * sequence.num_branches
        if needed > self._pool.num_blocks:
            raise TooLong(
                f"this request may need {sequence.max_positions} positions in {sequence.num_branches} branches"
                f" ({needed} blocks), and the cache has {self._pool.num_blocks}: lower max_seconds, shorten the voice"
                " prompt, turn guidance off, or start the engine with more memory_gb"
            )
        needed = blocks_for(sequence.prompt.cross_len, block_size)
        if needed > self._cross_pool.num_blocks:
            raise TooLong(
                f"this text takes {sequence.prompt.cross_len} positions ({needed} blocks) of cross-attention cache,"
                f" which has {self._cross_pool.num_blocks}: shorten the text or start the engine with more memory_gb"
            )
        if sequence.num_branches > self._limits.max_step_positions:
            raise TooLong(
                f"a step of {self._limits.max_step_positions} positions cannot hold"
                f" {sequence.num_branches} branches: raise max_step_positions"
            )

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence that `check_fits`."""
        self._waiting.append(sequence)

    def schedule(self, now: float) -> Batch:
        """Choose the next step's entries, admitting and preempting as blocks allow. Empty if nobody can run."""
        limits = self._limits
        self._admit(now)
        ranks = sorted((self._rank(sequence, now), sequence) for sequence in self._running)  # no two ranks are equal
        ranked = [sequence for _, sequence in ranks]
        able = [sequence for sequence in ranked if sequence.can_step]
        urgent = [sequence for rank, sequence in ranks if rank[0] != YIELDING and sequence.can_step]
        chosen = (urgent or able)[: limits.max_batch]
        counts = _shares(chosen, limits.max_step_positions)
        entries: list[Entry] = []
        for sequence, count in zip(chosen, counts, strict=True):
            # Blocks are taken from the least urgent, so nobody who has got an entry loses it again.
            if count and sequence.is_admitted and self._hold(sequence, sequence.num_cached + count, ranked):
                entries.append(Entry(sequence, count, draws=count == sequence.num_pending))
        return Batch(tuple(entries))

    def launch(self, batch: Batch) -> None:
        """Record that a step is under way: its positions are as good as cached, the rows it draws are in flight."""
        for entry in batch.entries:
            entry.sequence.num_cached += entry.num_positions
            entry.sequence.num_in_flight += entry.draws

    def commit(self, batch: Batch, drawn: dict[int, NDArray[np.int32]]) -> None:
        """Record what a launched step gave: drawn rows ([Q], by sequence id) are appended, the done leave."""
        for entry in batch.entries:
            sequence = entry.sequence
            if entry.draws:
                sequence.num_in_flight -= 1
                sequence.append(drawn[sequence.sequence_id])
            if sequence.is_done:
                self.remove(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it is, and free its blocks. No effect if it has left already."""
        if sequence in self._waiting:
            self._waiting.remove(sequence)
        if sequence in self._running:
            self._running.remove(sequence)
            self._release(sequence)

    def sequences(self) -> Iterable[Sequence]:
        """Everything queued or running."""
        return [*self._running, *self._waiting]

    def check_integrity(self) -> None:
        """Raises: RuntimeError if the pools' books and the running sequences disagree."""
        held = sum(len(table) for sequence in self._running for table in sequence.block_tables)
        cross_held = sum(len(sequence.cross_blocks) for sequence in self._running)
        if held != self._pool.num_used or cross_held != self._cross_pool.num_used:
            raise RuntimeError(
                f"blocks leaked: sequences hold {held} + {cross_held},"
                f" the pools say {self._pool.num_used} + {self._cross_pool.num_used}"
            )

    def _rank(self, sequence: Sequence, now: float) -> tuple[int, float, float, int]:
        playback, given = sequence.playback, sequence.given
        if not playback.paced:
            return (2, given.arrived_at, given.segment, given.sequence_id)
        if playback.first_audio_at is None and given.segment == playback.segment:
            return (0, given.arrived_at, given.segment, given.sequence_id)
        slack_s = playback.lead_s(now) + SEGMENT_LEAD_S * (given.segment - playback.segment)
        return (YIELDING if slack_s > self._limits.max_lead_s else 1, slack_s, given.segment, given.sequence_id)

    def _admit(self, now: float) -> None:
        """Move the most urgent waiting sequences into the running set while places and blocks last."""
        if not self._waiting:
            return
        running = [(self._rank(sequence, now), sequence) for sequence in self._running]
        waiting = sorted((self._rank(sequence, now), sequence) for sequence in self._waiting if sequence.can_step)
        for rank, sequence in waiting:
            if sum(other[0] <= rank[0] for other, _ in running) >= self._limits.max_batch:
                return
            # Only what nobody listens to, or what is far ahead, gives up its blocks to a newcomer.
            later = sorted(pair for pair in running if pair[0][0] > max(rank[0], 1))
            if not self._has_room(sequence, without=[other for _, other in later]):
                return
            while not self._has_room(sequence, without=[]):
                running.remove(later[-1])
                self._preempt(later.pop()[1])
            self._give_blocks(sequence)
            self._waiting.remove(sequence)
            self._running.append(sequence)
            running.append((rank, sequence))

    def _give_blocks(self, sequence: Sequence) -> None:
        """Blocks for all its known positions, so that the next to be admitted sees what is left."""
        block_size = self._limits.block_size
        cross = self._cross_pool.allocate(blocks_for(sequence.prompt.cross_len, block_size), after=None)
        sequence.cross_blocks = cross or []
        sequence.block_tables = [[] for _ in range(sequence.num_branches)]
        sequence.is_admitted = True
        self._grow(sequence, sequence.num_positions)

    def _has_room(self, sequence: Sequence, *, without: list[Sequence]) -> bool:
        """Whether all its known positions would fit now, were those `without` gone."""
        block_size = self._limits.block_size
        needed = blocks_for(sequence.num_positions, block_size) * sequence.num_branches
        cross_needed = blocks_for(sequence.prompt.cross_len, block_size)
        num_free = self._pool.num_free + sum(len(table) for other in without for table in other.block_tables)
        num_cross_free = self._cross_pool.num_free + sum(len(other.cross_blocks) for other in without)
        return needed <= num_free and cross_needed <= num_cross_free

    def _hold(self, sequence: Sequence, num_positions: int, ranked: list[Sequence]) -> bool:
        """Make every branch's table long enough, preempting the least urgent until it is.

        False if the sequence itself was the least urgent one left, and has been preempted.
        """
        while not self._grow(sequence, num_positions):
            victim = next(other for other in reversed(ranked) if other.is_admitted)
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _grow(self, sequence: Sequence, num_positions: int) -> bool:
        needed = blocks_for(num_positions, self._limits.block_size)
        for table in sequence.block_tables:
            if len(table) >= needed:
                continue
            blocks = self._pool.allocate(needed - len(table), after=table[-1] if table else None)
            if blocks is None:
                return False
            table += blocks
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Back to the queue without blocks: its positions will be computed again."""
        self._release(sequence)
        self._running.remove(sequence)
        self._waiting.append(sequence)
        sequence.num_preemptions += 1
        self.num_preemptions += 1

    def _release(self, sequence: Sequence) -> None:
        for table in sequence.block_tables:
            self._pool.free(table)
        self._cross_pool.free(sequence.cross_blocks)
        sequence.block_tables, sequence.cross_blocks = [], []
        sequence.num_cached = 0
        sequence.is_admitted = False


def _shares(chosen: list[Sequence], budget: int) -> list[int]:
    """Positions for each sequence: one in the order given, while the budget lasts; then prefill takes what is left."""
    branches = [sequence.num_branches for sequence in chosen]
    counts = [0] * len(chosen)
    for i, num_branches in enumerate(branches):
        if num_branches <= budget:
            counts[i] = 1
            budget -= num_branches
    for i, sequence in enumerate(chosen):
        most = budget // branches[i]
        if counts[i] and most:
            more = min(sequence.num_pending - 1, most)
            counts[i] += more
            budget -= more * branches[i]
    return counts
