"""The figures of RESULTS.md: which benchmark each runs, and the tables that it makes of what that printed.

Runs nothing and reads no file: `results.py` does. Every column is taken by its name: the order of a record's keys means
nothing.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

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

    command: what python is called with. tables: from the result that it printed. minutes: how long it takes, about, on
    two cores; thrice that and ten minutes more are too long. quick: further arguments that make it as short as can be.
    is_default: whether `run` takes it unless told otherwise. needs_gpu: left out where there is none. awaited: what it
    will measure, told until it did.
    """

    name: str
    title: str
    command: tuple[str, ...]
    tables: Callable[[Result], Sequence[Table]]
    minutes: float = 1.0
    quick: tuple[str, ...] = ()
    is_default: bool = True
    needs_gpu: bool = False
    awaited: tuple[str, ...] = ()

    @property
    def limit_s(self) -> float:
        """When it is ended."""
        return 60 * (3 * self.minutes + 10)

    def shortest(self) -> Figure:
        """The same in its shortest form."""
        return replace(self, command=(*self.command, *self.quick), minutes=min(self.minutes, 1.0))


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
    names = ("system", "wall_s", "audio_s_per_s", "vs_one_by_one", "vs_static_batch")
    tables = [Table(columns, [_named(row, *names) for row in result["systems"]])]
    if "greedy" in result:
        shares = ("identical_requests_percent", "identical_codes_percent")
        pairs = [(name, *_named(pair, *shares)) for name, pair in result["greedy"].items()]
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
    ends = [(name, *_named(end, "first_audio_ratio", "throughput_ratio")) for name, end in result["ends"].items()]
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
            _ms(run["first_audio_s"]["p95"]),
            *(100 * share for share in _named(run["underruns"], "0", "0.1", "0.2")),
            run["audio_s_per_s"],
            run["goodput_audio_s_per_s"],
            run["num_refused"],
            _ms(run["refusal_s"]["p95"]),
        )
        for run in result["runs"]
    ]
    columns = ["offered", "good %", "first audio ms p95", "dry % at 0 ms", "100 ms", "200 ms", "audio s/s", "goodput"]
    claims = [(claim["claim"], claim["measured"], "yes" if claim["holds"] else "NO") for claim in result["claims"]]
    return [
        Table([*columns, "refused", "refusal ms p95"], rows),
        Table(("claim", "measured", "holds"), claims),
    ]


def _named(values: Result, *names: str) -> tuple[Any, ...]:
    return tuple(values[name] for name in names)


def _ms(seconds: float | None) -> float | str:
    return "none" if seconds is None else 1000 * seconds


def _tester(result: Result) -> list[Table]:
    rows = [_named(row, "what", "count", "p50_ms", "p95_ms", "max_ms") for row in result["errors"]]
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
    names = ("agreement", "kl_nats", "duration_error_percent")
    rows = [(name, *_named(scores, *names)) for name, scores in result["precisions"].items()]
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
    tables = [
        Table(("who", "word errors %", "of said.tsv %", "DNSMOS", "seconds heard"), rows),
        Table(("lengths by the teacher's, and cost", "value"), lengths),
    ]
    alike = [_named(pair, "one", "other", "cosine") for pair in result.get("likeness", [])]
    return [*tables, Table(("one speaker", "another", "cosine of their embeddings"), alike)] if alike else tables


def _zonos(result: Result) -> list[Table]:
    columns = (
        "family, size, vocoder",
        "audio s",
        "one by one s",
        "together s",
        "times",
        "of computing",
        "memory's swing MB",
    )
    rows = [
        (
            f"{trial['family']}, {trial['size']}, {trial['vocoder']}",
            trial["audio_s"],
            trial["one_by_one_s"],
            statistics.median(trial["together_s"]),
            trial["ratio"],
            trial["cpu_ratio"],
            trial["swing_mb"],
        )
        for trial in result["trials"]
    ]
    return [Table(columns, rows)]


def _cost(result: Result) -> list[Table]:
    names = ("schedule_us", "launch_us", "commit_us", "step_us", "median_us")
    rows = [
        (crowd if len(result["cost"]) == 1 else f"{crowd}, {version}", *_named(cost, *names))
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
    names = ("num_streams", "rss_mb", "heap_mb", "python_blocks", "threads", "handles")
    columns = ("after streams", "RSS MB", "malloc MB", "Python blocks", "threads", "handles")
    return [Table(columns, [_named(left, *names) for left in result["left"]]), _faults(result)]


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
    blocks = []
    if (live := result["server_live"]) is not None:
        growth.append(("of the server's, alive by malloc", *live["growth_mb_per_hour"]))
        blocks.append(("Python blocks", *live["python_blocks"]))
    return [
        Table(("process", "grows by MB an hour", "+-"), growth),
        Table(("alive in the server", "after the warm-up", "at the end"), blocks),
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
        minutes=3,
        quick=("--quick",),
    ),
    Figure(
        "one_configuration",
        "One configuration from one request at a time to saturation, against two fixed ones",
        ("benchmarks/one_configuration.py",),
        _one_configuration,
        minutes=4,
        quick=("--quick",),
    ),
    Figure(
        "saturation",
        "At 70 % and at 150 % of what the server bears",
        ("benchmarks/saturation.py",),
        _saturation,
        minutes=6,
        quick=("--requests", "2", "--max-chars", "40", "--first-audio-ms", "60000", "--buffer-ms", "60000"),
    ),
    Figure(
        "vs_transformers",
        "Dia's architecture, random weights: transformers and declaim",
        ("benchmarks/vs_transformers.py",),
        _vs_transformers,
        minutes=8,
        quick=("--quick",),
    ),
    Figure(
        "zonos",
        "Zonos' architecture, random weights: together and one by one",
        ("-m", "benchmarks.zonos_throughput"),
        _zonos,
        minutes=6,
        quick=("--requests", "2", "--seconds", "0.2"),
    ),
    Figure(
        "determinism",
        "Does the same seed give the same codes in a crowd?",
        ("benchmarks/determinism.py", "--requests", "8"),
        _determinism,
        minutes=6,
        quick=("--quick",),
    ),
    Figure(
        "cost",
        "The scheduler's own cost of a step",
        ("benchmarks/simulate.py", "--cost"),
        _cost,
        minutes=1,
        quick=("--quick",),
    ),
    Figure(
        "quality",
        "What each precision costs the next codes",
        ("benchmarks/quality.py",),
        _quality,
        minutes=3,
        quick=("--quick",),
    ),
    Figure(
        "voice",
        "What a recogniser hears of the embedded voice",
        ("benchmarks/voice.py", "--sentences", "24", "--lengths", "60", "--voice", "lark", "rook", "wren"),
        _voice,
        minutes=8,
        quick=("--quick",),
    ),
    Figure(
        "api_workers",
        "Encoding in several API processes",
        ("-m", "benchmarks.api_workers"),
        _api_workers,
        minutes=3,
        quick=("--rounds", "1", "--answers", "4", "--clients", "2", "--seconds", "2"),
    ),
    Figure(
        "tester",
        "Does the load tester tell the delays it was given?",
        ("-m", "benchmarks.tester"),
        _tester,
        minutes=1,
        quick=("--quick",),
    ),
    Figure(
        "first_audio",
        "First audio of a server, one stream at a time",
        ("benchmarks/first_audio.py",),
        _first_audio,
        minutes=2,
        quick=("--vocoder", "inline", "--requests", "2", "--warm-up", "1"),
    ),
    Figure(
        "fairness",
        "One tenant's flood beside another; shares by weight",
        ("benchmarks/fairness.py",),
        _fairness,
        minutes=8,
        quick=("--vocoder", "inline", "--flood", "6", "--asks", "2", "--crowd", "4", "--seconds", "3", "--settle", "1"),
        is_default=False,
    ),
    Figure(
        "dropped",
        "What dropped streams leave",
        ("benchmarks/dropped.py",),
        _dropped,
        minutes=8,
        quick=("--vocoder", "inline", "--streams", "16", "--warm-up", "16", "--clients", "4", "--growth", "60"),
        is_default=False,
    ),
    Figure(
        "soak",
        "What grows in half an hour of mixed traffic",
        ("benchmarks/soak.py",),
        _soak,
        minutes=33,
        quick=("--vocoder", "inline", "--minutes", "0.2", "--sample", "0.5", "--settling", "150"),
        is_default=False,
    ),
    Figure(
        "chaos",
        "Streams under faults, 20 minutes",
        ("benchmarks/chaos.py",),
        _chaos,
        minutes=24,
        quick=("--vocoder", "inline", "--minutes", "0.3", "--every", "2", "--texts", "3"),
        is_default=False,
    ),
    Figure(
        "gpu",
        "On a GPU: kernels, steps and whole models of real size",
        ("benchmarks/gpu.py",),
        _gpu,
        minutes=10,
        quick=("--quick",),
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
        minutes=10,
        quick=("--quick",),
        needs_gpu=True,
        awaited=("transformers, one by one", "transformers, static batch", "declaim", "greedy codes"),
    ),
)
BY_NAME: Mapping[str, Figure] = {figure.name: figure for figure in FIGURES}
