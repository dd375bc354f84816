"""Runs of a load test: one, or a search for the highest rate that holds the objective; and their table."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from declaim.load.client import Outcome, Target
from declaim.load.report import Run, table_rows
from declaim.load.session import run_closed, run_open
from declaim.load.summary import Objective, summarize
from declaim.load.workload import Job, Tenant, open_loop

SWEEP_STEPS = 12
SWEEP_FACTOR = 1.6
SWEEP_PRECISION = 1.08  # the search ends when the rates that hold and do not are this close


def run(
    target: Target,
    jobs: Sequence[Job],
    objective: Objective,
    *,
    label: str,
    offered_per_s: float | None = None,
    concurrency: int | None = None,
) -> Run:
    """offered_per_s: None in a closed loop, whose `concurrency` is given instead."""
    columns = (TextColumn("{task.description}"), BarColumn(30), MofNCompleteColumn(), TimeElapsedColumn())
    num_errors = 0
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task(label, total=len(jobs))

        def on_outcome(outcome: Outcome) -> None:
            nonlocal num_errors
            num_errors += outcome.error is not None
            progress.update(bar, advance=1, description=f"{label}, {num_errors} errors")

        if concurrency is None:
            outcomes = asyncio.run(run_open(target, jobs, on_outcome))
        else:
            outcomes = asyncio.run(run_closed(target, jobs, on_outcome, concurrency=concurrency))
    return Run(label, offered_per_s, outcomes, summarize(outcomes, objective))


def sweep(
    target: Target,
    texts: Sequence[str],
    tenants: Sequence[Tenant],
    objective: Objective,
    *,
    begin_per_s: float,
    num: int,
    burstiness: float,
    seed: int,
) -> list[Run]:
    """Raise the rate until the objective breaks, then halve the ratio between what holds and what does not."""
    runs: list[Run] = []
    holds, breaks, rate = 0.0, float("inf"), begin_per_s
    for step in range(SWEEP_STEPS):
        jobs = open_loop(texts, tenants, rate_per_s=rate, num_jobs=num, burstiness=burstiness, seed=seed + step)
        point = run(target, jobs, objective, label=f"{rate:.3g} requests/s", offered_per_s=rate)
        runs.append(point)
        if point.summary.holds_objective:
            holds = max(holds, rate)
        else:
            breaks = min(breaks, rate)
        if breaks == float("inf"):
            rate *= SWEEP_FACTOR
        elif holds == 0.0:
            rate /= SWEEP_FACTOR
        elif breaks / holds < SWEEP_PRECISION:
            break
        else:
            rate = (holds * breaks) ** 0.5
    return sorted(runs, key=lambda run: run.offered_per_s or 0.0)


def print_runs(runs: Sequence[Run]) -> None:
    columns, rows = table_rows(runs)
    table = Table(title="what listeners heard", title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*row)
    Console().print(table)
