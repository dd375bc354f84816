"""Which window is decoded next. Torch-free; knows neither workers nor processes.

First windows go before all others: somebody waits for them in silence, and the others are wanted by their playback time
only. Among either, tenants share the decoded frames by their weights (fairness.py), so what one tenant has piled up
delays no other; a tenant's own windows keep their order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from declaim.engine.fairness import FairShares
from declaim.engine.vocoder.base import Window

T = TypeVar("T")


class WindowQueue(Generic[T]):
    """What waits to be decoded: windows, or what their owner has of each. Not thread-safe."""

    def __init__(self, window_of: Callable[[T], Window]) -> None:
        self._window_of = window_of
        # First windows and the others: by tenant, no queue empty.
        self._lines: tuple[dict[str, deque[T]], dict[str, deque[T]]] = ({}, {})
        self._shares = FairShares()

    def __len__(self) -> int:
        return sum(len(queue) for line in self._lines for queue in line.values())

    def __iter__(self) -> Iterator[T]:
        """All of it, in no order."""
        return (item for line in self._lines for queue in line.values() for item in queue)

    def push(self, item: T, *, in_front: bool = False) -> None:
        """Add a window. in_front: before what its tenant has waiting, for one that comes back."""
        window = self._window_of(item)
        queue = self._lines[window.index > 0].setdefault(window.tenant, deque())
        if in_front:
            queue.appendleft(item)
        else:
            queue.append(item)

    def peek(self) -> T:
        """What `pop` would give. Raises: IndexError if it is empty."""
        line, tenant = self._next()
        return line[tenant][0]

    def pop(self) -> T:
        """The next one. Raises: IndexError if it is empty."""
        line, tenant = self._next()
        item = line[tenant].popleft()
        if not line[tenant]:
            del line[tenant]
        window = self._window_of(item)
        self._shares.charge(tenant, window.weight / window.codes.shape[1])
        self._shares.settle({tenant for waiting in self._lines for tenant in waiting})
        return item

    def cancel(self, sequence_id: int) -> None:
        """Forget a sequence's windows."""
        for line in self._lines:
            for tenant, queue in list(line.items()):
                line[tenant] = deque(item for item in queue if self._window_of(item).sequence_id != sequence_id)
                if not line[tenant]:
                    del line[tenant]

    def clear(self) -> None:
        """Forget everything."""
        for line in self._lines:
            line.clear()

    def _next(self) -> tuple[dict[str, deque[T]], str]:
        first, rest = self._lines
        line = first or rest
        if not line:
            raise IndexError("no window waits to be decoded")
        return line, min(line, key=self._shares.time)
