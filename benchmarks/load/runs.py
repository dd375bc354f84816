"""Runs of a load test: one, a search for the highest rate that holds the objective, or what happens below and above
that rate; and their table."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from declaim.load.client import Outcome, Target
from declaim.load.playback import underruns
from declaim.load.report import Run, table_rows
from declaim.load.session import run_closed, run_open
from declaim.load.summary import Objective, summarize
from declaim.load.workload import Job, Tenant, open_loop

SWEEP_STEPS = 12
SWEEP_FACTOR = 1.6
SWEEP_FLOOR = 1 / 16
SWEEP_PRECISION = 1.08  # the search ends when the rates that hold and do not are this close
CALM, FLOOD = 0.7, 1.5  # of the highest rate that holds the objective
MAX_REFUSAL_S = 0.05
MIN_GOODPUT = 0.9  # of the most that any run had
MIN_JOBS = 20


@dataclass(frozen=True, slots=True)
class Claim:
    """What a server under load should do, what it did, and whether that is it."""

    claim: str
    measured: str
    holds: bool


@dataclass(frozen=True, slots=True)
class Arrivals:
    """What comes in each run of a search, as of `open_loop`.

    num: requests; seconds: rather as many as come in so long, but MIN_JOBS at least.
    """

    texts: Sequence[str]
    tenants: Sequence[Tenant]
    num: int
    burstiness: float
    seed: int
    seconds: float | None = None

    def at_rate(self, rate_per_s: float, *, step: int) -> list[Job]:
        """step: which run of the search, so that each has other texts and times."""
        num_jobs = self.num if self.seconds is None else max(MIN_JOBS, round(rate_per_s * self.seconds))
        return open_loop(
            self.texts,
            self.tenants,
            rate_per_s=rate_per_s,
            num_jobs=num_jobs,
            burstiness=self.burstiness,
            seed=self.seed + step,
        )


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


def sweep(target: Target, arrivals: Arrivals, objective: Objective, *, begin_per_s: float) -> list[Run]:
    """Raise the rate until the objective breaks, then halve the ratio between what holds and what does not.

    If nothing holds at a SWEEP_FLOOR of begin_per_s, nothing slower is tried.
    """
    runs: list[Run] = []
    holds, breaks, rate = 0.0, float("inf"), begin_per_s
    for step in range(SWEEP_STEPS):
        point = _at_rate(target, arrivals, objective, rate, step=step)
        runs.append(point)
        if point.summary.holds_objective:
            holds = max(holds, rate)
        else:
            breaks = min(breaks, rate)
        if breaks == float("inf"):
            rate *= SWEEP_FACTOR
        elif holds == 0.0 and rate <= SWEEP_FLOOR * begin_per_s:
            break
        elif holds == 0.0:
            rate /= SWEEP_FACTOR
        elif breaks / holds < SWEEP_PRECISION:
            break
        else:
            rate = (holds * breaks) ** 0.5
    return _by_rate(runs)


def highest_rate(runs: Sequence[Run]) -> float:
    """That held the objective; 0 if none did."""
    return max((run.offered_per_s or 0.0 for run in runs if run.summary.holds_objective), default=0.0)


def saturate(
    target: Target, arrivals: Arrivals, objective: Objective, *, begin_per_s: float
) -> tuple[list[Run], list[Claim]]:
    """Find the highest rate that holds the objective, and try CALM and FLOOD times that.

    Returns all runs, by rate, and what should hold of the last two.
    """
    runs = sweep(target, arrivals, objective, begin_per_s=begin_per_s)
    highest = highest_rate(runs)
    if not highest:
        tried = ", ".join(f"{run.offered_per_s:.3g}" for run in runs)
        return runs, [Claim("some rate holds the objective", f"none of {tried} requests/s", False)]
    calm, flood = (
        _at_rate(target, arrivals, objective, factor * highest, step=SWEEP_STEPS + i)
        for i, factor in enumerate((CALM, FLOOD))
    )
    runs = _by_rate([*runs, calm, flood])
    return runs, judge(runs, calm=calm, flood=flood, objective=objective)


def _by_rate(runs: Sequence[Run]) -> list[Run]:
    return sorted(runs, key=lambda run: run.offered_per_s or 0.0)


def judge(runs: Sequence[Run], *, calm: Run, flood: Run, objective: Objective) -> list[Claim]:
    """What should hold of a run at CALM and one at FLOOD times the highest rate, and whether it does; runs: all."""
    low, high = calm.summary, flood.summary
    num_dry = sum(
        o.error is None and underruns(o.listener.arrivals, buffer_s=objective.buffer_s).count > 0 for o in calm.outcomes
    )
    num_unserved = low.num_requests - low.num_whole
    num_lost = high.num_requests - high.num_whole - high.num_refused
    most = max(run.summary.goodput_audio_s_per_s for run in runs)
    share = high.goodput_audio_s_per_s / most
    at_low, at_high = f"at {100 * CALM:g} % ({calm.label})", f"at {100 * FLOOD:g} % ({flood.label})"
    return [
        Claim(
            f"{at_low} all are served, and no player with {1000 * objective.buffer_s:g} ms of buffer runs dry",
            f"{num_dry} of {low.num_whole} ran dry, {num_unserved} of {low.num_requests} not served",
            num_dry == 0 and low.num_whole == low.num_requests,
        ),
        Claim(
            f"{at_high} requests are refused with 429 or 503, and lost in no other way",
            f"{high.num_refused} of {high.num_requests} refused, {num_lost} lost otherwise",
            high.num_refused > 0 and num_lost == 0,
        ),
        Claim(
            f"{at_high} refusals take less than {1000 * MAX_REFUSAL_S:g} ms (95th percentile)",
            f"{1000 * high.refusal_s.p95:.1f} ms, at most {1000 * high.refusal_s.max:.1f}",
            high.refusal_s.p95 < MAX_REFUSAL_S,
        ),
        Claim(
            f"{at_high} goodput is {100 * MIN_GOODPUT:g} % of its peak or more",
            f"{100 * share:.0f} %: {high.goodput_audio_s_per_s:.2f} of {most:.2f} audio s/s",
            share >= MIN_GOODPUT,
        ),
    ]


def _at_rate(target: Target, arrivals: Arrivals, objective: Objective, rate: float, *, step: int) -> Run:
    jobs = arrivals.at_rate(rate, step=step)
    return run(target, jobs, objective, label=f"{rate:.3g} requests/s", offered_per_s=rate)


def print_claims(claims: Sequence[Claim]) -> None:
    for claim in claims:
        Console().print(f"{'holds' if claim.holds else 'DOES NOT HOLD'}: {claim.claim}: {claim.measured}", markup=False)


def print_runs(runs: Sequence[Run]) -> None:
    columns, rows = table_rows(runs)
    table = Table(title="what listeners heard", title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*row)
    Console().print(table)
