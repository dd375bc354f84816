"""What does declaim measure, all in one place? Runs the benchmarks, keeps what they said, and writes RESULTS.md.

A record is the last line of a benchmark's output with the machine, the commit and the command, one file a figure in
benchmarks/results/. RESULTS.md is written from the records alone, so that every number has its origin under it; a
figure without a record is there, and says that it was not run. `run` takes the figures one after the other, on a
machine that does nothing else; what needs a GPU is left out where there is none.

    python benchmarks/results.py run [NAME ...] [--all]   run, keep and write; without names the default selection
    python benchmarks/results.py add NAME FILE            keep a run made elsewhere, on this commit: FILE is its output
    python benchmarks/results.py write                    only write the page
    python benchmarks/results.py list                     the figures
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import machine

FOLDER = machine.ROOT / "benchmarks" / "results"
PAGE = machine.ROOT / "benchmarks" / "RESULTS.md"
# What `run` itself writes does not make a tree dirty.
NOT_DIRT = (":!benchmarks/results", ":!benchmarks/RESULTS.md")

Cells = Sequence[object]
Result = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Table:
    """The first column is text, the others are numbers."""

    columns: Sequence[str]
    rows: Sequence[Cells]


@dataclass(frozen=True, slots=True)
class Figure:
    """One benchmark on the page.

    command: what python is called with. tables: from the result that it printed. is_default: whether `run` takes it
    unless told otherwise. needs_gpu: left out where there is none. awaited: what it will measure, told until it did.
    """

    name: str
    title: str
    command: tuple[str, ...]
    tables: Callable[[Result], Sequence[Table]]
    is_default: bool = True
    needs_gpu: bool = False
    awaited: tuple[str, ...] = ()


class RecordError(Exception):
    """A run or a file of one that makes no record; the message says what is wrong with it."""


def _embedded(result: Result) -> list[Table]:
    rows = [
        (
            name,
            part["first_audio_ms"]["p50"],
            part["first_audio_ms"]["p95"],
            part["rtf"]["p50"],
            part["one_by_one_audio_s_per_s"],
            part["concurrent_audio_s_per_s"],
            part["concurrent_vs_one_by_one"],
        )
        for name, part in result["vocoders"].items()
    ]
    columns = ("vocoder", "first audio ms p50", "p95", "real-time factor", "audio s/s one by one", "at once", "ratio")
    return [Table(columns, rows)]


def _vs_transformers(result: Result) -> list[Table]:
    columns = ("system", "seconds", "audio s/s", "times one by one", "times static batch")
    tables = [Table(columns, [tuple(row.values()) for row in result["systems"]])]
    if "greedy" in result:
        pairs = [(name, *shares.values()) for name, shares in result["greedy"].items()]
        tables.append(Table(("greedy codes", "identical requests %", "identical codes %"), pairs))
    return tables


def _one_configuration(result: Result) -> list[Table]:
    rows = [
        (
            f"{row['concurrency']} at a time, {row['setup']}",
            row["first_chunk_p50_ms"],
            row["first_audio_p50_ms"],
            row["first_audio_p95_ms"],
            row["rtf_p50"],
            row["dry_percent"],
            row["audio_s_per_s"],
        )
        for row in result["rows"]
    ]
    ends = [(name, *values.values()) for name, values in result["ends"].items()]
    columns = ("load, configuration", "first chunk ms", "first audio ms", "p95", "RTF", "dry %", "audio s/s")
    return [
        Table(columns, rows),
        Table(("against the default, median of rounds", "times its first audio alone", "times its most audio"), ends),
    ]


def _saturation(result: Result) -> list[Table]:
    rows = [
        (
            run["label"],
            100 * run["good_share"],
            1000 * run["first_audio_s"]["p95"],
            *(100 * share for share in run["underruns"].values()),
            run["audio_s_per_s"],
            run["goodput_audio_s_per_s"],
            run["num_refused"],
            1000 * run["refusal_s"]["p95"] if run["num_refused"] else "none",
        )
        for run in result["runs"]
    ]
    columns = ["offered", "good %", "first audio ms p95", "dry % at 0 ms", "100 ms", "200 ms", "audio s/s", "goodput"]
    claims = [(claim["claim"], claim["measured"], "yes" if claim["holds"] else "NO") for claim in result["claims"]]
    return [
        Table([*columns, "refused", "refusal ms p95"], rows),
        Table(("claim", "measured", "holds"), claims),
    ]


def _tester(result: Result) -> list[Table]:
    rows = [(row["what"], row["count"], row["p50_ms"], row["p95_ms"], row["max_ms"]) for row in result["errors"]]
    return [Table(("told against given", "values", "error ms p50", "p95", "largest"), rows)]


def _determinism(result: Result) -> list[Table]:
    rows = [
        (
            f"{trial['model']}, {trial['dtype']}, {trial['condition']}",
            trial["requests"],
            trial["draws"],
            trial["different_requests"],
            trial["different_draws"],
            trial["preemptions"],
        )
        for trial in result["codes"]
    ]
    return [Table(("against alone", "requests", "codes", "other requests", "other codes", "preemptions"), rows)]


def _quality(result: Result) -> list[Table]:
    rows = [(name, *scores.values()) for name, scores in result["precisions"].items()]
    return [Table(("precision", "same next code (share)", "KL nats", "durations off %"), rows)]


def _voice(result: Result) -> list[Table]:
    rows = [
        (
            name,
            part["word_error_percent"],
            part["said_word_error_percent"],
            "not judged" if part["dnsmos_overall"] is None else part["dnsmos_overall"],
            part["audio_s"],
        )
        for name, part in result.items()
        if isinstance(part, dict) and "word_error_percent" in part
    ]
    lengths = [(name.replace("_", " "), value) for name, value in result["lengths"].items()]
    lengths.append(("seconds of computing for a second of audio", result["seconds_per_audio_second"]))
    return [
        Table(("who", "word errors %", "of said.tsv %", "DNSMOS", "seconds heard"), rows),
        Table(("lengths by the teacher's, and cost", "value"), lengths),
    ]


def _zonos(result: Result) -> list[Table]:
    rows = [
        ("on the clock", result["one_by_one_s"], statistics.median(result["together_s"]), result["ratio"]),
        (
            "of computing",
            result["one_by_one_cpu_s"],
            statistics.median(result["together_cpu_s"]),
            result["cpu_ratio"],
        ),
    ]
    return [
        Table((f"{result['audio_s']:.1f} s of audio", "one by one s", "together s", "times as fast"), rows),
        Table(("memory's swing", "MB"), [("after the first round", result["swing_mb"])]),
    ]


def _cost(result: Result) -> list[Table]:
    rows = [
        (crowd if len(result["cost"]) == 1 else f"{crowd}, {version}", *cost.values())
        for version, costs in result["cost"].items()
        for crowd, cost in costs.items()
    ]
    return [Table(("sequences", "schedule us", "launch us", "commit us", "a step, least us", "median us"), rows)]


def _api_workers(result: Result) -> list[Table]:
    rows = []
    for name, rates in result["rates"].items():
        one, several = (sorted(rates[which])[len(rates[which]) // 2] for which in ("one", "several"))
        rows.append((name, one, several, result["ratios"][name]))
    return [Table(("format", "audio s/s, one process", "two workers", "ratio"), rows)]


def _first_audio(result: Result) -> list[Table]:
    rows = [
        (name, part["p50_ms"], part["p95_ms"], max(part["first_ms"]), statistics.median(part["processing_ms"]))
        for name, part in result["formats"].items()
    ]
    return [Table(("format", "first audio ms p50", "p95", "worst", "server's own p50"), rows)]


def _fairness(result: Result) -> list[Table]:
    rows = []
    if "quiet" in result:
        quiet = result["quiet"]
        for name in ("alone", "beside"):
            rows.append((f"first audio ms p50, {name}", statistics.median(quiet[f"{name}_ms"])))
        rows.append(("times as long beside the flood", quiet["ratio"]))
    if "shares" in result:
        rows.append(("audio of weight 2 over weight 1", result["shares"]["shares"]))
    return [Table(("a quiet tenant and a flood; two of weights 2 and 1", "measured"), rows), _faults(result)]


def _dropped(result: Result) -> list[Table]:
    rows = [(part["num_streams"], part["rss_mb"], part["threads"], part["handles"]) for part in result["left"]]
    return [Table(("after streams", "RSS MB", "threads", "handles"), rows), _faults(result)]


def _faults(result: Result) -> Table:
    return Table(("verdict", ""), [("; ".join(result["faults"]) or "holds", "")])


def _chaos(result: Result) -> list[Table]:
    return [
        Table(("faults", "times"), list(result["faults"].items())),
        Table(("how streams ended", "streams"), list(result["ends"].items())),
        Table(("verdict", ""), [(result["verdict"], "")]),
    ]


def _soak(result: Result) -> list[Table]:
    growth = [(name, *values) for name, values in result["growth_mb_per_hour"].items()]
    return [
        Table(("process", "grows by MB an hour", "+-"), growth),
        Table(("how streams ended", "streams"), list(result["ends"].items())),
        Table(("verdict", ""), [(result["verdict"], "")]),
    ]


def _gpu(result: Result) -> list[Table]:
    rows = [
        (row["target"], row["bound"], "not run" if row["measured"] is None else row["measured"], row["verdict"])
        for row in result["targets"]
    ]
    return [Table(("target", "bound", "measured", "verdict"), rows)]


FIGURES: tuple[Figure, ...] = (
    Figure(
        "embedded",
        "The embedded voice: first audio, real-time factor, many at once",
        ("benchmarks/embedded.py", "--vocoder", "both"),
        _embedded,
    ),
    Figure(
        "one_configuration",
        "One configuration from one request at a time to saturation, against two fixed ones",
        ("benchmarks/one_configuration.py",),
        _one_configuration,
    ),
    Figure(
        "saturation",
        "At 70 % and at 150 % of what the server bears",
        ("benchmarks/saturation.py",),
        _saturation,
    ),
    Figure(
        "vs_transformers",
        "Dia's architecture, random weights: transformers and declaim",
        ("benchmarks/vs_transformers.py",),
        _vs_transformers,
    ),
    Figure(
        "zonos",
        "Zonos' architecture, random weights: together and one by one",
        ("-m", "benchmarks.zonos_throughput"),
        _zonos,
    ),
    Figure(
        "determinism",
        "Does the same seed give the same codes in a crowd?",
        ("benchmarks/determinism.py", "--requests", "8"),
        _determinism,
    ),
    Figure("cost", "The scheduler's own cost of a step", ("benchmarks/simulate.py", "--cost"), _cost),
    Figure("quality", "What each precision costs the next codes", ("benchmarks/quality.py",), _quality),
    Figure(
        "voice",
        "What a recogniser hears of the embedded voice",
        ("benchmarks/voice.py", "--sentences", "24", "--lengths", "60"),
        _voice,
    ),
    Figure("api_workers", "Encoding in several API processes", ("-m", "benchmarks.api_workers"), _api_workers),
    Figure("tester", "Does the load tester tell the delays it was given?", ("-m", "benchmarks.tester"), _tester),
    Figure(
        "first_audio", "First audio of a server, one stream at a time", ("benchmarks/first_audio.py",), _first_audio
    ),
    Figure(
        "fairness",
        "One tenant's flood beside another; shares by weight",
        ("benchmarks/fairness.py",),
        _fairness,
        is_default=False,
    ),
    Figure("dropped", "What dropped streams leave", ("benchmarks/dropped.py",), _dropped, is_default=False),
    Figure("soak", "What grows in half an hour of mixed traffic", ("benchmarks/soak.py",), _soak, is_default=False),
    Figure("chaos", "Streams under faults, 20 minutes", ("benchmarks/chaos.py",), _chaos, is_default=False),
    Figure(
        "gpu",
        "On a GPU: kernels, steps and whole models of real size",
        ("benchmarks/gpu.py",),
        _gpu,
        needs_gpu=True,
        awaited=(
            "kernels and greedy codes against their references",
            "decode attention and int4 products against copy bandwidth and cuBLAS",
            "Dia-1.6B's size: a step against its byte floor, in bfloat16 and int4",
            "Dia-1.6B's size: 1 and 64 requests against transformers",
            "Dia and Zonos with their codec: audio seconds per second, memory against the plan",
        ),
    ),
    Figure(
        "vs_transformers_gpu",
        "On a GPU: Dia's architecture, transformers and declaim",
        ("benchmarks/vs_transformers.py", "--device", "cuda"),
        _vs_transformers,
        needs_gpu=True,
        awaited=("transformers, one by one", "transformers, static batch", "declaim", "greedy codes"),
    ),
)
BY_NAME: Mapping[str, Figure] = {figure.name: figure for figure in FIGURES}


def run_figure(figure: Figure, folder: Path) -> None:
    """Run a benchmark, its output shown, and keep its record. Raises: RecordError."""
    about = _about()
    began_s = time.monotonic()
    last = ""
    with subprocess.Popen(
        [sys.executable, *figure.command], cwd=machine.ROOT, stdout=subprocess.PIPE, text=True, encoding="utf-8"
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if last:
                print(last, end="", flush=True)
            last = line
    took_s = time.monotonic() - began_s
    result = _result_of(last, name=figure.name)
    _keep(figure, folder, result=result, about=about, took_s=took_s, status=process.returncode)


def add_output(figure: Figure, path: Path, folder: Path) -> None:
    """Keep a run made elsewhere, by its output, whose last line says where. Raises: RecordError, OSError."""
    lines = path.read_text(encoding="utf-8").splitlines()
    last = lines[-1] if lines else ""
    document = _document(last, name=figure.name)
    about = document.get("machine")
    if about is None and "card" in document:  # gpu.py, where neither git nor this checkout is
        about = {"gpu": document["card"], "torch": document["torch"]} | {
            key: value for key, value in _about().items() if key in ("commit", "dirty", "date")
        }
    if not isinstance(about, dict):
        raise RecordError(f"{path} does not say on which machine it was made: run it by `results.py run {figure.name}`")
    _keep(figure, folder, result=_result_of(last, name=figure.name), about=about, took_s=None, status=0)


def _keep(
    figure: Figure, folder: Path, *, result: object, about: Mapping[str, object], took_s: float | None, status: int
) -> None:
    record = {
        "name": figure.name,
        "command": shown(figure),
        "machine": about,
        "took_s": took_s,
        "status": status,
        "result": result,
    }
    folder.mkdir(exist_ok=True)
    text = json.dumps(record, indent=1, sort_keys=True)
    (folder / f"{figure.name}.json").write_text(text + "\n", encoding="utf-8")


def _document(line: str, *, name: str) -> dict[str, Any]:
    try:
        document = json.loads(line)
    except ValueError:
        document = None
    if not isinstance(document, dict):
        raise RecordError(
            f"{name} did not end with a JSON document but with {line.strip()[:80]!r}: see what it printed"
        )
    return document


def _result_of(line: str, *, name: str) -> object:
    """gpu.py stands alone on a lent machine, and its document is its result."""
    document = _document(line, name=name)
    return document.get("result", document)


def _about() -> dict[str, object]:
    """The machine before the run, so that its load is that of others."""
    status = subprocess.run(
        ["git", "-C", str(machine.ROOT), "status", "--porcelain", "--", ".", *NOT_DIRT], capture_output=True, text=True
    )
    about = machine.describe()
    about["dirty"] = bool(status.stdout.strip()) if status.returncode == 0 else None
    about["gpu"] = _gpu_name()
    return about


def _gpu_name() -> str | None:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def shown(figure: Figure) -> str:
    """The command as one types it."""
    return " ".join(("python", *figure.command))


def render(folder: Path) -> str:
    """The page, from the records in a folder. Raises: RecordError for one that is not as its benchmark writes it."""
    parts = [
        "# Results",
        "Written by `python benchmarks/results.py write` from the records in `benchmarks/results/`, not by hand; `run`"
        " measures. Every figure has its command, commit and machine under it. Numbers compare what ran side by side in"
        " one run, not one machine or day with another; predictions and experiments are in `LOG.md`.",
    ]
    missing = [figure for figure in FIGURES if not (folder / f"{figure.name}.json").exists()]
    for figure in FIGURES:
        parts.append(f"## {figure.title}")
        if figure in missing:
            where = " on a GPU" if figure.needs_gpu else ""
            if figure.awaited:
                parts.append(_markdown(Table(("figure", "measured"), [(name, "not run") for name in figure.awaited])))
            parts.append(f"Not run{where}. Command: `{shown(figure)}`")
            continue
        parts += _section(figure, folder / f"{figure.name}.json")
    return "\n\n".join(parts) + "\n"


def _section(figure: Figure, path: Path) -> list[str]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        tables = [_markdown(table) for table in figure.tables(record["result"])]
        origin = _origin(record)
    except (KeyError, TypeError, ValueError) as error:
        raise RecordError(f"{path} is not as {shown(figure)} writes it ({error!r}): run it again") from error
    failed = [f"**It ended with status {record['status']}.**"] if record.get("status") else []
    return [*failed, *tables, origin]


def _origin(record: Mapping[str, Any]) -> str:
    """The line under a figure."""
    about = record["machine"]
    dirty = ", with changes that were not committed" if about["dirty"] else ""
    parts = [f"Command: `{record['command']}`", f"commit {about['commit']}{dirty}"]
    if about.get("cpu"):
        parts.append(f"{about['cpu']}, {about['cores']} cores, load {about['load_1min']:.1f} before")
    if about.get("gpu"):
        parts.append(str(about["gpu"]))
    parts += [f"torch {about['torch']}", str(about["date"])[:10]]
    if record["took_s"] is not None:
        parts.append(f"{record['took_s']:.0f} s")
    return " · ".join(parts)


def _markdown(table: Table) -> str:
    lines = ["| " + " | ".join(table.columns) + " |", "|" + "---|" + "---:|" * (len(table.columns) - 1)]
    lines += ["| " + " | ".join(_cell(value) for value in row) + " |" for row in table.rows]
    return "\n".join(lines)


def _cell(value: object) -> str:
    if not isinstance(value, float):
        return str(value).replace("|", "\\|")
    if value != value:
        return "none"
    if value and abs(value) < 0.001:
        return f"{value:.1e}"
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"


def _selected(names: Sequence[str], *, everything: bool) -> list[Figure]:
    """Raises: RecordError for a name that is none."""
    unknown = sorted(set(names) - set(BY_NAME))
    if unknown:
        raise RecordError(f"no figure {', '.join(unknown)}: use {', '.join(BY_NAME)}")
    if names:
        return [BY_NAME[name] for name in names]
    return [figure for figure in FIGURES if everything or figure.is_default]


def _run(figures: Sequence[Figure]) -> int:
    num_failed = 0
    has_gpu = _gpu_name() is not None
    for figure in figures:
        if figure.needs_gpu and not has_gpu:
            print(f"== {figure.name}: not run, there is no GPU here", flush=True)
            continue
        print(f"== {figure.name}: {shown(figure)}", flush=True)
        try:
            run_figure(figure, FOLDER)
        except RecordError as error:
            print(f"error: {error}", file=sys.stderr)
            num_failed += 1
    return num_failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="run, keep and write")
    run.add_argument("names", nargs="*", help="figures; without any the default selection")
    run.add_argument("--all", action="store_true", help="the long ones too")
    add = commands.add_parser("add", help="keep a run made elsewhere")
    add.add_argument("name")
    add.add_argument("file", type=Path, help="its output")
    commands.add_parser("write", help="only write the page")
    commands.add_parser("list", help="the figures")
    args = parser.parse_args()
    num_failed = 0
    try:
        if args.command == "list":
            for figure in FIGURES:
                print(f"{figure.name:20} {'default' if figure.is_default else '':8} {shown(figure)}")
            return 0
        if args.command == "run":
            num_failed = _run(_selected(args.names, everything=args.all))
        elif args.command == "add":
            add_output(*_selected([args.name], everything=False), args.file, FOLDER)
        page = render(FOLDER)
    except (RecordError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    PAGE.write_text(page, encoding="utf-8")
    return int(num_failed > 0)


if __name__ == "__main__":
    sys.exit(main())
