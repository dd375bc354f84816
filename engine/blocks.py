"""Who owns which KV block. Integers only: the tensors belong to the runner.

Blocks are handed out next to each other where there is room: a run of neighbours reads faster on the CPU
(kernels/attention.py) and is otherwise no different.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np


class BlockPool:
    """A fixed number of blocks, each free or owned once."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._is_free = np.ones(num_blocks, dtype=np.bool_)
        self._num_free = num_blocks

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
        if count == 0:
            return []
        taken: list[int] = []
        cursor = self._run_start(count) if after is None else after + 1
        while len(taken) < count:
            if cursor >= self.num_blocks or not self._is_free[cursor]:
                cursor = self._run_start(count - len(taken))
            self._is_free[cursor] = False
            self._num_free -= 1
            taken.append(cursor)
            cursor += 1
        return taken

    def free(self, blocks: Iterable[int]) -> None:
        """Give blocks back. Raises: RuntimeError if one is not owned, for then two sequences share it."""
        for block in blocks:
            if self._is_free[block]:
                raise RuntimeError(f"block {block} was freed twice")
            self._is_free[block] = True
            self._num_free += 1

    def _run_start(self, count: int) -> int:
        """Where to start a new run: in the middle of the longest free one, so that what lies before it can grow."""
        edges = np.flatnonzero(np.diff(self._is_free.astype(np.int8), prepend=0, append=0))
        starts, ends = edges[::2], edges[1::2]
        longest = int(np.argmax(ends - starts))
        start, end = int(starts[longest]), int(ends[longest])
        if start == 0 or end - start < 2 * count:
            return start
        return start + (end - start) // 2


def blocks_for(num_positions: int, block_size: int) -> int:
    """How many blocks hold `num_positions`."""
    return -(-num_positions // block_size)
