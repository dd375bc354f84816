"""Runs a workload against a server: when each job is sent, and who waits for whom."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence

import aiohttp

from declaim.load.client import Outcome, Target, ask
from declaim.load.workload import Job

OnOutcome = Callable[[Outcome], None]


async def run_open(target: Target, jobs: Sequence[Job], on_outcome: OnOutcome) -> list[Outcome]:
    """Send every job at its time, whatever has become of those before."""
    async with _session() as session:
        origin_s = time.perf_counter()

        async def one(job: Job) -> Outcome:
            await asyncio.sleep(max(0.0, origin_s + (job.at_s or 0.0) - time.perf_counter()))
            outcome = await ask(session, target, job, origin_s=origin_s)
            on_outcome(outcome)
            return outcome

        return list(await asyncio.gather(*(one(job) for job in jobs)))


async def run_closed(target: Target, jobs: Sequence[Job], on_outcome: OnOutcome, *, concurrency: int) -> list[Outcome]:
    """`concurrency` workers; each sends its next job when its last has ended, and rests as told after a refusal."""
    queue = iter(jobs)
    outcomes: list[Outcome] = []
    async with _session() as session:
        origin_s = time.perf_counter()

        async def worker() -> None:
            for job in queue:
                outcome = await ask(session, target, job, origin_s=origin_s)
                outcomes.append(outcome)
                on_outcome(outcome)
                if outcome.error is not None:
                    await asyncio.sleep(min(outcome.retry_after_s or 0.1, 5.0))

        await asyncio.gather(*(worker() for _ in range(concurrency)))
    return outcomes


def _session() -> aiohttp.ClientSession:
    """No limit on connections: a tester that queues measures itself. Nothing decodes or waits for whole chunks."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, force_close=False),
        timeout=aiohttp.ClientTimeout(total=None),
        auto_decompress=False,
        read_bufsize=1 << 16,
    )
