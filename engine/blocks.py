"""Who owns which KV block. Integers only: the tensors belong to the runner.

Blocks are handed out next to each other where there is room: a run of neighbours reads faster on the CPU
(kernels/attention.py) and is otherwise no different.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator

import numpy as np


class BlockPool:
    """A fixed number of blocks, each free or owned once."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._is_free = bytearray(b"\x01" * num_blocks)
        self._num_free = num_blocks
        self._runs: list[tuple[int, int]] = []  # a heap of (-length, start): free when last looked for
        self._num_freed = 0  # since then

    @property
    def num_free(self) -> int:
        return self._num_free

    @property
    def num_used(self) -> int:
        return self.num_blocks - self._num_free

    def allocate(self, count: int, *, after: int | None) -> list[int] | None:
        """Take `count` blocks, following block `after` where they are free; None (and nothing taken) if too few."""
        if count > self._num_free:
            return None
        taken: list[int] = []
        cursor = self.num_blocks if after is None else after + 1
        while len(taken) < count:
            if cursor >= self.num_blocks or not self._is_free[cursor]:
                cursor = self._run_start(count - len(taken))
            self._is_free[cursor] = False
            taken.append(cursor)
            cursor += 1
        self._num_free -= count
        return taken

    def free(self, blocks: Iterable[int]) -> None:
        """Give blocks back. Raises: RuntimeError if one is not owned, for then two sequences share it."""
        for block in blocks:
            if self._is_free[block]:
                raise RuntimeError(f"block {block} was freed twice")
            self._is_free[block] = True
            self._num_free += 1
            self._num_freed += 1

    def _run_start(self, count: int) -> int:
        """Where to start a new run: in the middle of the longest free one, so that what lies before it can grow.

        A search through all blocks takes 100 us for 100,000, so the runs it found are used, less what tables have grown
        into since, until they are too short or enough was freed that there may be much longer ones.
        """
        is_fresh = False
        while True:
            longest = -self._runs[0][0] if self._runs else 0
            if longest < count and not is_fresh or self._num_freed >= max(longest, self.num_blocks // 64, 1):
                self._runs = [(start - end, start) for start, end in self._free_runs(0, self.num_blocks)]
                heapq.heapify(self._runs)
                self._num_freed = 0
                is_fresh = True
            length, start = heapq.heappop(self._runs)
            end = start - length
            if self._is_free.find(0, start, end) >= 0:
                for part_start, part_end in self._free_runs(start, end):
                    heapq.heappush(self._runs, (part_start - part_end, part_start))
                continue
            if start > 0 and end - start >= 2 * count:
                middle = start + (end - start) // 2
                heapq.heappush(self._runs, (start - middle, start))
                start = middle
            if end - start > count:
                heapq.heappush(self._runs, (start + count - end, start + count))
            return start

    def _free_runs(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        """The runs of free blocks, (start, end), within first .. last (exclusive)."""
        is_free = np.frombuffer(self._is_free, dtype=np.int8)[first:last]
        edges = np.flatnonzero(np.diff(is_free, prepend=0, append=0)) + first
        return zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)


def blocks_for(num_positions: int, block_size: int) -> int:
    """How many blocks hold `num_positions`."""
    return -(-num_positions // block_size)
