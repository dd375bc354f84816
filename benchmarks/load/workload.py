"""What is asked, by whom and when: arrival processes, tenants and texts. Everything follows from the seed."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

MAX_TRACE_ROWS = 1_000_000


class WorkloadError(ValueError):
    """A workload that cannot be made from what was given; the message names the value and the remedy."""


@dataclass(frozen=True, slots=True)
class Tenant:
    """name labels the results, key is sent, rate_weight is its part of the arrivals; share, what it may expect."""

    name: str
    key: str | None = None
    rate_weight: float = 1.0
    share: float = 1.0


@dataclass(frozen=True, slots=True)
class Job:
    """One request. at_s: when it is sent, from the start of the run; None in a closed loop: when its turn comes."""

    index: int
    at_s: float | None
    tenant: Tenant
    text: str


def parse_tenant(value: str) -> Tenant:
    """`NAME[:KEY[:RATE_WEIGHT[:SHARE]]]`. Raises: WorkloadError."""
    name, *rest = value.split(":")
    try:
        if not name or len(rest) > 3:
            raise ValueError
        numbers = [float(part) for part in rest[1:]]
        if any(not 0 < number < 1e6 for number in numbers):
            raise ValueError
    except ValueError:
        raise WorkloadError(
            f"--tenant is {value!r}: give NAME[:KEY[:RATE_WEIGHT[:SHARE]]], such as acme:sk-1:2"
        ) from None
    return Tenant(name, (rest[0] or None) if rest else None, *numbers)


def read_prompts(path: Path) -> list[str]:
    """The non-empty lines of a text file. Raises: WorkloadError."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise WorkloadError(f"--prompts {path} cannot be read ({error}): give a UTF-8 file, a text a line") from error
    prompts = [line for line in lines if line]
    if not prompts:
        raise WorkloadError(f"--prompts {path} has no text: give a UTF-8 file, a text a line")
    return prompts


def open_loop(
    prompts: Sequence[str],
    tenants: Sequence[Tenant],
    *,
    rate_per_s: float,
    num_jobs: int,
    burstiness: float,
    seed: int,
) -> list[Job]:
    """Arrivals that do not wait for answers: gaps from a gamma distribution with mean 1 / rate_per_s.

    burstiness: the variance of a gap over that of a Poisson process; 1 is Poisson, 0 even, above 1 in bursts.
    """
    rng = np.random.default_rng(seed)
    if burstiness > 0:
        gaps = rng.gamma(1 / burstiness, burstiness / rate_per_s, size=num_jobs)
    else:
        gaps = np.full(num_jobs, 1 / rate_per_s)
    times = np.cumsum(gaps) - gaps[0]
    weights = np.array([tenant.rate_weight for tenant in tenants])
    whose = rng.choice(len(tenants), size=num_jobs, p=weights / weights.sum())
    texts = _texts(prompts, num_jobs, rng)
    return [Job(i, float(times[i]), tenants[whose[i]], texts[i]) for i in range(num_jobs)]


def closed_loop(prompts: Sequence[str], tenants: Sequence[Tenant], *, num_jobs: int, seed: int) -> list[Job]:
    """Jobs without a time: each worker takes the next when its last has ended."""
    texts = _texts(prompts, num_jobs, np.random.default_rng(seed))
    return [Job(i, None, tenants[i % len(tenants)], texts[i]) for i in range(num_jobs)]


def trace(path: Path, prompts: Sequence[str], tenants: Sequence[Tenant], *, seed: int) -> list[Job]:
    """Recorded arrivals: CSV with a column `at_s` and, where known, `tenant` and `text`. Raises: WorkloadError."""
    by_name = {tenant.name: tenant for tenant in tenants}
    jobs: list[Job] = []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(_limited(csv.DictReader(file), path))
        texts = _texts(prompts, len(rows), np.random.default_rng(seed))
        for i, row in enumerate(rows):
            tenant = by_name.get(row.get("tenant") or tenants[0].name)
            if tenant is None:
                raise WorkloadError(f"{path} row {i + 1} names the tenant {row['tenant']!r}: give it with --tenant")
            jobs.append(Job(i, float(row["at_s"]), tenant, row.get("text") or texts[i]))
    except (OSError, UnicodeDecodeError, KeyError, ValueError, csv.Error) as error:
        if isinstance(error, WorkloadError):
            raise
        raise WorkloadError(f"--trace {path} cannot be read ({error!r}): give a CSV with a column at_s") from error
    if not jobs:
        raise WorkloadError(f"--trace {path} has no rows: give a CSV with a column at_s")
    return sorted(jobs, key=lambda job: job.at_s or 0.0)


def _limited(rows: csv.DictReader[str], path: Path) -> Iterator[dict[str, str]]:
    for i, row in enumerate(rows):
        if i >= MAX_TRACE_ROWS:
            raise WorkloadError(f"--trace {path} has more than {MAX_TRACE_ROWS} rows: cut it")
        yield row


def _texts(prompts: Sequence[str], num_jobs: int, rng: np.random.Generator) -> list[str]:
    """Every prompt comes once before one comes again."""
    order: list[int] = []
    while len(order) < num_jobs:
        order.extend(rng.permutation(len(prompts)).tolist())
    return [prompts[i] for i in order[:num_jobs]]
