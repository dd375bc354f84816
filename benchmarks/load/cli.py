"""`declaim bench serve`: the settings of a load test, and what is printed of it."""

from __future__ import annotations

import asyncio
import json
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from declaim.load.client import Outcome, Target
from declaim.load.report import Run, table_rows, write_report
from declaim.load.session import run_closed, run_open
from declaim.load.summary import Objective, summarize
from declaim.load.workload import (
    Job,
    Tenant,
    WorkloadError,
    closed_loop,
    open_loop,
    parse_tenant,
    read_prompts,
    trace,
)

PROMPTS = Path(__file__).with_name("prompts.txt")
SWEEP_STEPS = 12
SWEEP_FACTOR = 1.6
SWEEP_PRECISION = 1.08  # the search ends when the rates that hold and do not are this close


def build_bench_cli() -> typer.Typer:
    """The `bench` commands."""
    app = typer.Typer(help="Load tests of any OpenAI-compatible speech server.", no_args_is_help=True)

    @app.callback()
    def bench() -> None:
        """Keeps `serve` a command of its own while it is the only one."""

    app.command()(serve)
    return app


def serve(
    url: Annotated[str, typer.Option(help="The server, up to and with /v1.")] = "http://127.0.0.1:8000/v1",
    rate: Annotated[float | None, typer.Option(min=0.001, help="Requests a second that wait for nobody.")] = None,
    concurrency: Annotated[int | None, typer.Option(min=1, max=10_000, help="Instead: this many at a time.")] = None,
    trace_file: Annotated[
        Path | None, typer.Option("--trace", help="Instead: a CSV with at_s[, tenant, text].")
    ] = None,
    sweep: Annotated[
        bool, typer.Option(help="Search the highest rate that holds the objective, from --rate up.")
    ] = False,
    num: Annotated[int, typer.Option(min=1, max=1_000_000, help="Requests, in each run of a sweep.")] = 50,
    burstiness: Annotated[
        float, typer.Option(min=0.0, max=100.0, help="0 even gaps, 1 Poisson, more in bursts.")
    ] = 1.0,
    tenant: Annotated[list[str] | None, typer.Option(help="NAME[:KEY[:RATE_WEIGHT[:SHARE]]]; may be repeated.")] = None,
    model: Annotated[str, typer.Option(help="Sent as `model`.")] = "tts-1",
    voice: Annotated[str, typer.Option(help="Sent as `voice`.")] = "alloy",
    protocol: Annotated[Literal["http", "sse", "ws"], typer.Option(help="ws feeds the text word by word.")] = "http",
    response_format: Annotated[
        Literal["pcm", "wav"], typer.Option(help="Formats whose sound can be told as it comes.")
    ] = "pcm",
    sample_rate: Annotated[int, typer.Option(min=8000, max=192_000, help="Of the audio that comes, Hz.")] = 24_000,
    words_per_s: Annotated[float, typer.Option(min=0.1, max=10_000, help="How fast ws feeds words.")] = 20.0,
    extra: Annotated[str, typer.Option(help="Further fields of the body, as JSON.")] = "{}",
    prompts: Annotated[Path, typer.Option(help="Texts to speak, one a line.")] = PROMPTS,
    first_audio_ms: Annotated[float, typer.Option(min=1, help="The objective: first audible sound within.")] = 500.0,
    buffer_ms: Annotated[float, typer.Option(min=0, help="The objective: no under-run with this buffer.")] = 100.0,
    share: Annotated[float, typer.Option(min=0.01, max=1.0, help="The objective: for this share of requests.")] = 0.95,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds until a request counts as lost.")] = 120.0,
    seed: Annotated[int, typer.Option(min=0, help="Of arrivals and texts.")] = 0,
    report: Annotated[Path | None, typer.Option(help="A folder for report.html and plots.")] = None,
) -> None:
    """Ask a speech server for many texts, and tell what its listeners would hear."""
    try:
        tenants = [parse_tenant(value) for value in tenant or ["all"]]
        texts = read_prompts(prompts)
        target = Target(
            url=url.rstrip("/"),
            model=model,
            voice=voice,
            protocol=protocol,
            response_format=response_format,
            sample_rate_hz=sample_rate,
            words_per_s=words_per_s,
            timeout_s=timeout,
            extra=_parse_extra(extra),
        )
        if sum(choice is not None for choice in (rate, concurrency, trace_file)) != 1:
            raise WorkloadError("give one of --rate, --concurrency and --trace")
        if sweep and rate is None:
            raise WorkloadError("--sweep searches a rate: give --rate to begin with")
        jobs = trace(trace_file, texts, tenants, seed=seed) if trace_file is not None else []
    except WorkloadError as error:
        _exit_with(str(error))
    objective = Objective(first_audio_ms / 1000, buffer_ms / 1000, share)
    runs: list[Run] = []
    if sweep and rate is not None:
        runs = _sweep(target, texts, tenants, objective, begin_per_s=rate, num=num, burstiness=burstiness, seed=seed)
    elif rate is not None:
        jobs = open_loop(texts, tenants, rate_per_s=rate, num_jobs=num, burstiness=burstiness, seed=seed)
        runs = [_run(target, jobs, objective, label=f"{rate:g} requests/s", offered_per_s=rate)]
    elif concurrency is not None:
        jobs = closed_loop(texts, tenants, num_jobs=num, seed=seed)
        runs = [_run(target, jobs, objective, label=f"{concurrency} at a time", concurrency=concurrency)]
    else:
        offered = len(jobs) / max(jobs[-1].at_s or 0.0, 1e-9)
        runs = [_run(target, jobs, objective, label=str(trace_file), offered_per_s=offered)]
    _print(runs)
    highest = max((run.offered_per_s or 0.0 for run in runs if run.summary.holds_objective), default=0.0)
    if sweep:
        typer.echo(f"the highest rate that holds the objective: {highest:.3g} requests/s")
    facts = [
        f"{target.url}, model {model}, voice {voice}, {protocol}, {response_format}",
        f"{time.strftime('%Y-%m-%d %H:%M')} on {platform.node()} ({platform.machine()})",
        f"objective: first audible sound within {first_audio_ms:g} ms and no under-run with {buffer_ms:g} ms of buffer"
        f" for {100 * share:g} % of requests",
    ]
    if report is not None:
        typer.echo(f"written: {write_report(report, 'Load test of a speech server', facts, runs)}")
    result = {"facts": facts, "runs": [{"label": r.label, **r.summary.as_dict()} for r in runs]}
    if sweep:
        result["highest_rate_per_s"] = highest
    typer.echo(json.dumps(result))
    if not any(run.summary.num_whole for run in runs):
        _exit_with("no request came back whole: is the server up, and the key right?", code=1)


def _run(
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


def _sweep(
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
        run = _run(target, jobs, objective, label=f"{rate:.3g} requests/s", offered_per_s=rate)
        runs.append(run)
        if run.summary.holds_objective:
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


def _print(runs: Sequence[Run]) -> None:
    columns, rows = table_rows(runs)
    table = Table(title="what listeners heard", title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def _parse_extra(value: str) -> dict[str, object]:
    try:
        fields = json.loads(value)
    except ValueError:
        fields = None
    if not isinstance(fields, dict):
        raise WorkloadError(f"--extra is {value!r}: give a JSON object")
    return fields


def _exit_with(message: str, *, code: int = 2) -> NoReturn:
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(code)
