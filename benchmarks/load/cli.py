"""`declaim bench serve`: the settings of a load test, and what is printed of it."""

from __future__ import annotations

import json
import platform
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal, NoReturn

import typer

PROMPTS = Path(__file__).with_name("prompts.txt")


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
    search: Annotated[
        bool, typer.Option("--sweep", help="Search the highest rate that holds the objective, from --rate up.")
    ] = False,
    saturation: Annotated[
        bool, typer.Option("--saturation", help="--sweep, then 70 % and 150 % of that rate, and a verdict.")
    ] = False,
    num: Annotated[int, typer.Option(min=1, max=1_000_000, help="Requests, in each run of a sweep.")] = 50,
    seconds: Annotated[
        float | None, typer.Option(min=0.1, help="In a sweep, instead of --num: as many as come in so long.")
    ] = None,
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
        # Not before they are needed: they are slow to import, and an extra of their own.
        from declaim.load.client import Target
        from declaim.load.report import Run, write_report
        from declaim.load.runs import Arrivals, Claim, highest_rate, print_claims, print_runs, run, saturate, sweep
        from declaim.load.summary import Objective
    except ImportError as error:
        _exit_with(f"{error.name} is not installed: pip install 'declaim[bench]'")
    from declaim.load.workload import WorkloadError, closed_loop, open_loop, parse_tenant, read_prompts, trace

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
        if (search or saturation) and rate is None:
            option = "--saturation" if saturation else "--sweep"
            raise WorkloadError(f"{option} searches a rate: give --rate to begin with")
        if seconds is not None and not (search or saturation):
            raise WorkloadError("--seconds is for --sweep and --saturation: give --num")
        jobs = trace(trace_file, texts, tenants, seed=seed) if trace_file is not None else []
    except WorkloadError as error:
        _exit_with(str(error))
    objective = Objective(first_audio_ms / 1000, buffer_ms / 1000, share)
    arrivals = Arrivals(texts, tenants, num, burstiness, seed, seconds)
    runs: list[Run] = []
    claims: list[Claim] = []
    if saturation and rate is not None:
        runs, claims = saturate(target, arrivals, objective, begin_per_s=rate)
    elif search and rate is not None:
        runs = sweep(target, arrivals, objective, begin_per_s=rate)
    elif rate is not None:
        jobs = open_loop(texts, tenants, rate_per_s=rate, num_jobs=num, burstiness=burstiness, seed=seed)
        runs = [run(target, jobs, objective, label=f"{rate:g} requests/s", offered_per_s=rate)]
    elif concurrency is not None:
        jobs = closed_loop(texts, tenants, num_jobs=num, seed=seed)
        runs = [run(target, jobs, objective, label=f"{concurrency} at a time", concurrency=concurrency)]
    else:
        offered = len(jobs) / max(jobs[-1].at_s or 0.0, 1e-9)
        runs = [run(target, jobs, objective, label=str(trace_file), offered_per_s=offered)]
    print_runs(runs)
    if search or saturation:
        typer.echo(f"the highest rate that holds the objective: {highest_rate(runs):.3g} requests/s")
    print_claims(claims)
    facts = [
        f"{target.url}, model {model}, voice {voice}, {protocol}, {response_format}",
        f"{time.strftime('%Y-%m-%d %H:%M')} on {platform.node()} ({platform.machine()})",
        f"objective: first audible sound within {first_audio_ms:g} ms and no under-run with {buffer_ms:g} ms of buffer"
        f" for {100 * share:g} % of requests",
    ]
    if report is not None:
        typer.echo(f"written: {write_report(report, 'Load test of a speech server', facts, runs)}")
    result: dict[str, object] = {"facts": facts, "runs": [{"label": r.label, **r.summary.as_dict()} for r in runs]}
    if search or saturation:
        result["highest_rate_per_s"] = highest_rate(runs)
    if saturation:
        result["claims"] = [asdict(claim) for claim in claims]
    typer.echo(json.dumps(result))
    if not any(run.summary.num_whole for run in runs):
        _exit_with("no request came back whole: is the server up, and the key right?", code=1)
    if not all(claim.holds for claim in claims):
        raise typer.Exit(1)


def _parse_extra(value: str) -> dict[str, object]:
    try:
        fields = json.loads(value)
    except ValueError:
        fields = None
    if not isinstance(fields, dict):
        _exit_with(f"--extra is {value!r}: give a JSON object")
    return fields


def _exit_with(message: str, *, code: int = 2) -> NoReturn:
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(code)
