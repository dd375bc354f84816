"""Draws runs: a page with tables and plots that needs nothing else, and the plots as PNG."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from declaim.load.client import Outcome
from declaim.load.summary import Distribution, Summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_TIMELINE_STREAMS = 60


@dataclass(frozen=True, slots=True)
class Run:
    """One point of a sweep, or the only run. label: what was offered, such as "4 requests/s"."""

    label: str
    offered_per_s: float | None
    outcomes: Sequence[Outcome]
    summary: Summary


def write_report(folder: Path, title: str, facts: Sequence[str], runs: Sequence[Run]) -> Path:
    """Write `report.html` and its plots into a folder, made if need be. Returns the page. Raises: OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    figures = {
        "latency": _draw_latency(runs),
        "distributions": _draw_distributions(runs),
        "timeline": _draw_timeline(runs[-1]),
    }
    images = []
    for name, figure in figures.items():
        path = folder / f"{name}.png"
        figure.savefig(path, dpi=110)
        data = base64.b64encode(path.read_bytes()).decode("ascii")
        images.append(f'<figure><img alt="{name}" src="data:image/png;base64,{data}"></figure>')
    page = folder / "report.html"
    page.write_text(_page(title, facts, runs, images), encoding="utf-8")
    return page


def table_rows(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    """Columns and cells of the main table, for a terminal and for the page."""
    columns = ["run", "requests", "whole", "good %", "first audio ms p50 / p95 / p99", "RTF p50 / p95", "audio s/s"]
    columns += ["goodput", "dry % at 0 / 100 / 200 ms", "errors", "fairness"]
    rows = []
    for run in runs:
        s = run.summary
        rows.append(
            [
                run.label,
                str(s.num_requests),
                str(s.num_whole),
                f"{100 * s.good_share:.1f}",
                " / ".join(f"{1000 * v:.0f}" for v in (s.first_audio_s.p50, s.first_audio_s.p95, s.first_audio_s.p99)),
                f"{s.rtf.p50:.2f} / {s.rtf.p95:.2f}",
                f"{s.audio_s_per_s:.1f}",
                f"{s.goodput_audio_s_per_s:.1f}",
                " / ".join(f"{100 * share:.1f}" for share in s.underruns.values()),
                ", ".join(f"{count} {kind}" for kind, count in s.errors.items()) or "none",
                f"{s.fairness:.3f}",
            ]
        )
    return columns, rows


def _figure(num_axes: int) -> tuple[Figure, Sequence[Axes]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * num_axes, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, [figure.add_subplot(1, num_axes, i + 1) for i in range(num_axes)]


def _draw_latency(runs: Sequence[Run]) -> Figure:
    figure, (first, rate) = _figure(2)
    offered = [run.offered_per_s if run.offered_per_s is not None else i for i, run in enumerate(runs)]
    for name in ("p50", "p95", "p99"):
        first.plot(offered, [1000 * getattr(run.summary.first_audio_s, name) for run in runs], "o-", label=name)
    first.set(xlabel="offered requests/s", ylabel="first audible audio, ms", yscale="log", title="Latency by rate")
    first.legend()
    rate.plot(offered, [run.summary.audio_s_per_s for run in runs], "o-", label="all")
    rate.plot(offered, [run.summary.goodput_audio_s_per_s for run in runs], "s--", label="within the objective")
    rate.set(xlabel="offered requests/s", ylabel="audio seconds per second", ylim=(0, None), title="Throughput by rate")
    rate.legend()
    return figure


def _draw_distributions(runs: Sequence[Run]) -> Figure:
    figure, (first, rtf, gap) = _figure(3)
    for run in runs:
        whole = [outcome for outcome in run.outcomes if outcome.error is None]
        _cdf(first, [1000 * (o.first_audio_s or 0.0) for o in whole], run.label)
        _cdf(rtf, [o.rtf or 0.0 for o in whole], run.label)
        _cdf(gap, [1000 * value for o in whole for value in o.listener.gaps_s()], run.label)
    first.set(xlabel="first audible audio, ms", ylabel="share of requests")
    rtf.set(xlabel="real-time factor")
    gap.set(xlabel="between chunks, ms")
    first.legend(fontsize="small")
    return figure


def _cdf(axes: Axes, values: Sequence[float], label: str) -> None:
    ordered = np.sort(np.asarray(values, dtype=float))
    if len(ordered):
        axes.step(ordered, np.arange(1, len(ordered) + 1) / len(ordered), where="post", label=label)


def _draw_timeline(run: Run) -> Figure:
    """Each stream's audio received against the clock: a line below its playback's slope has run dry."""
    figure, (axes,) = _figure(1)
    figure.set_size_inches(10, 5)
    for i, outcome in enumerate(sorted(run.outcomes, key=lambda o: o.sent_s)[:MAX_TIMELINE_STREAMS]):
        arrivals = outcome.listener.arrivals
        axes.plot([outcome.sent_s, outcome.ended_s], [i, i], color="0.85", linewidth=1)
        if outcome.error is not None:
            axes.plot(outcome.ended_s, i, "rx", markersize=4)
        if arrivals:
            start_s = arrivals[0][0]
            axes.plot([start_s, start_s + outcome.listener.audio_s], [i, i], color="tab:green", linewidth=3, alpha=0.35)
            axes.plot([time_s for time_s, _ in arrivals], [i] * len(arrivals), "|", color="tab:blue", markersize=5)
    axes.set(
        xlabel="seconds of the run",
        ylabel="stream",
        title=f"{run.label}: pieces arriving (blue) against playback (green)",
    )
    return figure


def _page(title: str, facts: Sequence[str], runs: Sequence[Run], images: Sequence[str]) -> str:
    columns, rows = table_rows(runs)
    tenants = [
        [run.label, t.name, str(t.num_requests), str(t.num_errors), f"{t.audio_s:.1f}", _ms(t.first_audio_s)]
        for run in runs
        for t in run.summary.tenants
    ]
    tester = [[run.label, _ms(run.summary.lag_s), _ms(run.summary.refusal_s)] for run in runs]
    style = (
        "body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:72rem;padding:0 1rem}"
        ":root{color-scheme:light dark}table{border-collapse:collapse;margin:1rem 0}"
        "td,th{padding:.2rem .7rem;border-bottom:1px solid #8884;text-align:right}"
        "td:first-child,th:first-child{text-align:left}img{max-width:100%;background:#fff}figure{margin:1rem 0}"
    )
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(title)}</title><style>{style}</style>",
        f"<h1>{html.escape(title)}</h1><ul>{''.join(f'<li>{html.escape(fact)}</li>' for fact in facts)}</ul>",
        _table(columns, rows),
        *images,
        "<h2>Tenants</h2>",
        _table(["run", "tenant", "requests", "errors", "audio s", "first audio ms p50 / p95 / p99"], tenants),
        "<h2>The tester itself</h2>",
        _table(["run", "sent late, ms p50 / p95 / p99", "refusals took, ms p50 / p95 / p99"], tester),
    ]
    return "\n".join(parts)


def _ms(values: Distribution) -> str:
    return " / ".join(f"{1000 * value:.1f}" for value in (values.p50, values.p95, values.p99))


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"
