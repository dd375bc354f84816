"""Weighted fair shares of the step's places between tenants. Numbers only: it knows neither sequences nor blocks.

Start-time fair queueing (Goyal, Vin, Cheng: "Start-time Fair Queuing", SIGCOMM 1996), with a batch of places instead
of one link. A tenant's virtual time is what it has been given, divided by its weight; the next place goes to the
tenant whose virtual time is least. Time counts only while somebody has to wait: where everybody runs there is nothing
to share, and what was used then is not held against anybody later. Who wanted less than its share, or nothing, starts
again at the present and not in the past, so idling earns no credit.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import TypeVar

T = TypeVar("T")


class FairShares:
    """The virtual times of the tenants that compete with each other."""

    def __init__(self) -> None:
        self._now = 0.0  # the least virtual time of those who have to wait
        self._times: dict[str, float] = {}  # of tenants that are ahead of `_now`

    def time(self, tenant: str) -> float:
        """When the tenant's next place would start, in virtual time."""
        return self._times.get(tenant, self._now)

    def charge(self, tenant: str, weight: float) -> None:
        """Count one place for one step."""
        self._times[tenant] = self._times.get(tenant, self._now) + 1.0 / weight

    def in_turn(self, queues: Mapping[str, Iterable[T]], *, quantum: int = 1) -> Iterator[T]:
        """What the tenants' queues hold, each queue in its order, next always from the tenant with the least time.

        The caller charges what it takes before it asks for the next; what it leaves costs nothing. quantum: as many are
        given out between two looks at the times, which is cheaper and only as unfair as that within one step.
        """
        heap = [(self.time(tenant), tenant, iter(queue)) for tenant, queue in queues.items()]
        heapq.heapify(heap)
        while heap:
            _, tenant, queue = heap[0]
            num_given = 0
            for item in islice(queue, quantum):
                yield item
                num_given += 1
            if num_given < quantum:
                heapq.heappop(heap)
            else:
                heapq.heapreplace(heap, (self.time(tenant), tenant, queue))

    def settle(self, waiting: Iterable[str]) -> None:
        """End a step. waiting: the tenants that wanted more than they were given."""
        present = min((self.time(tenant) for tenant in waiting), default=None)
        if present is None:
            self._now = 0.0
            self._times.clear()
            return
        self._now = present
        self._times = {tenant: time for tenant, time in self._times.items() if time > self._now}
