"""What does declaim measure, all in one place? Runs the benchmarks, keeps what they said, and writes RESULTS.md.

A record is the last line of a benchmark's output with the machine, the commit and the command, one file a figure in
benchmarks/results/. RESULTS.md is written from the records alone, so that every number has its origin under it; a
figure without a record is there, and says that it was not run. `run` takes the figures one after the other, on a
machine that does nothing else; what needs a GPU is left out where there is none. The page is written after each: a
figure that fails or takes too long is recorded as failed and stops no other, and `run --resume` goes on where a run was
broken off. `rehearse` runs the shortest form of each, to see that it works, and keeps nothing.

    python benchmarks/results.py run [NAME ...] [--all] [--resume]   run, keep and write; without names the usual ones
    python benchmarks/results.py rehearse [NAME ...] [--all]         run the shortest form, and keep nothing
    python benchmarks/results.py add NAME FILE      keep a run made elsewhere, on this commit: FILE is its output
    python benchmarks/results.py write              only write the page
    python benchmarks/results.py list               the figures
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import machine
import psutil
from figures import BY_NAME, FIGURES, Figure, Table

FOLDER = machine.ROOT / "benchmarks" / "results"
PAGE = machine.ROOT / "benchmarks" / "RESULTS.md"
# What `run` itself writes does not make a tree dirty.
NOT_DIRT = (":!benchmarks/results", ":!benchmarks/RESULTS.md")
STOP_S = 60.0  # from SIGTERM to SIGKILL


class RecordError(Exception):
    """A run or a file of one that makes no record; the message says what is wrong with it."""


def run_figure(figure: Figure, folder: Path) -> None:
    """Run a benchmark, its output shown, and keep its record, of a failure too. Raises: RecordError for a failure."""
    about = _about()
    began_s, stolen_s = time.monotonic(), _stolen_s()
    last, status, is_late = _last_line(figure)
    result: object = None
    failure = None
    try:
        if is_late:
            raise RecordError(f"{figure.name} was ended after {figure.limit_s:.0f} s")
        result = _result_of(last, name=figure.name, status=status)
        _tables(figure, result)
    except RecordError as error:
        failure = str(error)
    took_s = time.monotonic() - began_s
    about["stolen_s"] = round(_stolen_s() - stolen_s, 2)
    _keep(figure, folder, result=result, about=about, took_s=took_s, status=status, failure=failure)
    if failure is not None:
        raise RecordError(failure)


def _stolen_s() -> float:
    """CPU time since the machine began that its host gave to others; 0 where no host says so."""
    return float(getattr(psutil.cpu_times(), "steal", 0.0))


def _last_line(figure: Figure) -> tuple[str, int, bool]:
    """Run a benchmark and show what it prints but for its last line. Returns that, the exit status, and whether it was
    ended for taking too long. It takes its own processes with it, however this ends."""
    last = ""
    is_late = threading.Event()
    with ExitStack() as stack:
        with _signal_kept(signal.SIGTERM):
            process = stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-u", *figure.command],
                    cwd=machine.ROOT,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    text=True,
                    encoding="utf-8",
                    errors="replace",
                    start_new_session=True,
                )
            )
            stack.callback(_stop, process)

            def end() -> None:
                is_late.set()
                _stop(process)

            clock = threading.Timer(figure.limit_s, end)
            stack.callback(clock.cancel)
            clock.start()
        assert process.stdout is not None
        for line in process.stdout:
            if last:
                print(last, end="", flush=True)
            last = line
        status = process.wait()
    return last, status, is_late.is_set()


@contextmanager
def _signal_kept(number: signal.Signals) -> Iterator[None]:
    """A signal that comes meanwhile takes effect at the end: what is begun here has its owner by then."""
    has_come: list[int] = []
    before = signal.signal(number, lambda *_: has_come.append(number))
    try:
        yield
    finally:
        signal.signal(number, before)
        if has_come:
            signal.raise_signal(number)


def _stop(process: subprocess.Popen[str]) -> None:
    """End it, and all that it has started and left behind."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            return
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_S)


def add_output(figure: Figure, path: Path, folder: Path) -> None:
    """Keep a run made elsewhere, by its output, whose last line says where. Raises: RecordError, OSError."""
    lines = path.read_text(encoding="utf-8").splitlines()
    last = lines[-1] if lines else ""
    document = _document(last, name=figure.name, status=0)
    about = document.get("machine")
    if about is None and "card" in document:  # gpu.py, where neither git nor this checkout is
        about = {"gpu": document["card"], "torch": document["torch"]} | {
            key: value for key, value in _about().items() if key in ("commit", "dirty", "date")
        }
    if not isinstance(about, dict):
        raise RecordError(f"{path} does not say on which machine it was made: run it by `results.py run {figure.name}`")
    result = _result_of(last, name=figure.name, status=0)
    _tables(figure, result)
    _keep(figure, folder, result=result, about=about, took_s=None, status=0, failure=None)


def _keep(
    figure: Figure,
    folder: Path,
    *,
    result: object,
    about: Mapping[str, object],
    took_s: float | None,
    status: int,
    failure: str | None,
) -> None:
    record = {
        "name": figure.name,
        "command": shown(figure),
        "machine": about,
        "took_s": took_s,
        "status": status,
        "failure": failure,
        "result": result,
    }
    folder.mkdir(exist_ok=True)
    fresh = folder / f"{figure.name}.new"
    fresh.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    fresh.replace(_path(figure, folder))


def _path(figure: Figure, folder: Path) -> Path:
    return folder / f"{figure.name}.json"


def _record(figure: Figure, folder: Path) -> dict[str, Any] | None:
    """None where there is none. Raises: RecordError where it cannot be read."""
    path = _path(figure, folder)
    if not path.exists():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RecordError(f"{path} cannot be read ({error}): run it again") from error
    if not isinstance(record, dict):
        raise RecordError(f"{path} is no record: run it again")
    return record


def _is_current(record: Mapping[str, Any], figure: Figure) -> bool:
    """Whether a record is what a run now would measure again: it did not fail, and nothing has changed since."""
    about = record.get("machine", {})
    if record.get("failure") is not None or record.get("command") != shown(figure) or about.get("dirty") is not False:
        return False
    command = ["git", "-C", str(machine.ROOT), "diff", "--quiet", str(about.get("commit")), "--", ".", *NOT_DIRT]
    return subprocess.run(command, capture_output=True).returncode == 0


def _document(line: str, *, name: str, status: int) -> dict[str, Any]:
    try:
        document = json.loads(line)
    except ValueError:
        document = None
    if not isinstance(document, dict):
        raise RecordError(
            f"{name} ended with status {status} and not with a JSON document but with {line.strip()[:80]!r}: see what "
            "it printed"
        )
    return document


def _result_of(line: str, *, name: str, status: int) -> object:
    """gpu.py stands alone on a lent machine, and its document is its result."""
    document = _document(line, name=name, status=status)
    return document.get("result", document)


def _tables(figure: Figure, result: Any) -> Sequence[Table]:
    """Raises: RecordError for a result that is not as the figure's benchmark writes it."""
    try:
        return figure.tables(result)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, statistics.StatisticsError) as error:
        raise RecordError(f"its result is not as {shown(figure)} writes it ({error!r}): run it again") from error


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
    """The page, from the records in a folder; a record that cannot be shown is said to be one."""
    parts = [
        "# Results",
        "Written by `python benchmarks/results.py write` from the records in `benchmarks/results/`, not by hand; `run`"
        " measures. Every figure has its command, commit and machine under it. Numbers compare what ran side by side in"
        " one run, not one machine or day with another; predictions and experiments are in `LOG.md`.",
    ]
    for figure in FIGURES:
        parts.append(f"## {figure.title}")
        try:
            record = _record(figure, folder)
            parts += _not_run(figure) if record is None else _section(figure, record)
        except RecordError as error:
            parts.append(f"**It cannot be shown: {error}**")
    return "\n\n".join(parts) + "\n"


def _not_run(figure: Figure) -> list[str]:
    where = " on a GPU" if figure.needs_gpu else ""
    awaited = [(name, "not run") for name in figure.awaited]
    tables = [_markdown(Table(("figure", "measured"), awaited))] if awaited else []
    return [*tables, f"Not run{where}. Command: `{shown(figure)}`"]


def _section(figure: Figure, record: Mapping[str, Any]) -> list[str]:
    """Raises: RecordError."""
    try:
        origin = _origin(record)
        failure, status = record.get("failure"), record["status"]
    except (KeyError, TypeError) as error:
        raise RecordError(f"the record {figure.name} has no {error}: run it again") from error
    if failure is not None:
        return [f"**It failed: {failure}**", origin]
    failed = [f"**It ended with status {status}.**"] if status else []
    return [*failed, *map(_markdown, _tables(figure, record["result"])), origin]


def _origin(record: Mapping[str, Any]) -> str:
    """The line under a figure."""
    about = record["machine"]
    dirty = ", with changes that were not committed" if about["dirty"] else ""
    parts = [f"Command: `{record['command']}`", f"commit {about['commit']}{dirty}"]
    if about.get("cpu"):
        stolen = f", {about['stolen_s']:.1f} s of a core stolen meanwhile" if about.get("stolen_s") is not None else ""
        parts.append(f"{about['cpu']}, {about['cores']} cores, load {about['load_1min']:.1f} before{stolen}")
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


def _expected_s(figure: Figure, folder: Path) -> tuple[float, str]:
    """How long a figure will take, and how that is known."""
    try:
        record = _record(figure, folder) or {}
    except RecordError:
        record = {}
    if record.get("took_s") and record.get("failure") is None and record.get("command") == shown(figure):
        return float(record["took_s"]), "as last time"
    return 60 * figure.minutes, "a guess"


def _run(figures: Sequence[Figure], folder: Path, *, after_each: Callable[[], object] = lambda: None) -> list[str]:
    """One figure after the other. Returns what failed, each with why."""
    has_gpu = _gpu_name() is not None
    wanted = [figure for figure in figures if has_gpu or not figure.needs_gpu]
    for figure in figures:
        if figure not in wanted:
            print(f"== {figure.name}: not run, there is no GPU here", flush=True)
    expected = [_expected_s(figure, folder) for figure in wanted]
    left_s = sum(seconds for seconds, _ in expected)
    failures = []
    for i, (figure, (seconds, how)) in enumerate(zip(wanted, expected, strict=True)):
        print(
            f"== {time.strftime('%H:%M:%S')} {i + 1} of {len(wanted)}, {figure.name}: about {seconds / 60:.1f} min"
            f" ({how}), ended after {figure.limit_s / 60:.0f}; all that is left about {left_s / 60:.0f} min:"
            f" {shown(figure)}",
            flush=True,
        )
        began_s = time.monotonic()
        try:
            run_figure(figure, folder)
        except RecordError as error:
            failures.append(str(error))
        print(f"== {figure.name} took {(time.monotonic() - began_s) / 60:.1f} min", flush=True)
        left_s -= seconds
        after_each()
    return failures


def _write_page() -> None:
    PAGE.write_text(render(FOLDER), encoding="utf-8")


def _has_current_record(figure: Figure, folder: Path) -> bool:
    try:
        record = _record(figure, folder)
    except RecordError:
        return False
    return record is not None and _is_current(record, figure)


def _run_and_write(figures: Sequence[Figure], *, resume: bool) -> list[str]:
    done = [figure for figure in figures if resume and _has_current_record(figure, FOLDER)]
    for figure in done:
        print(f"== {figure.name}: has its record, and nothing has changed since", flush=True)
    return _run([figure for figure in figures if figure not in done], FOLDER, after_each=_write_page)


def _rehearse(figures: Sequence[Figure]) -> list[str]:
    with tempfile.TemporaryDirectory(prefix="declaim-rehearsal-") as folder:
        return _run([figure.shortest() for figure in figures], Path(folder))


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, what in (("run", "run, keep and write"), ("rehearse", "run the shortest forms, and keep nothing")):
        run = commands.add_parser(name, help=what)
        run.add_argument("names", nargs="*", help="figures; without any the usual ones")
        run.add_argument("--all", action="store_true", help="the long ones too")
        if name == "run":
            run.add_argument("--resume", action="store_true", help="leave out what has a record of this very tree")
    add = commands.add_parser("add", help="keep a run made elsewhere")
    add.add_argument("name")
    add.add_argument("file", type=Path, help="its output")
    commands.add_parser("write", help="only write the page")
    commands.add_parser("list", help="the figures")
    return parser.parse_args()


def main() -> int:
    args = _parse_arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no benchmark outlives this process
    failures: list[str] = []
    try:
        match args.command:
            case "list":
                for figure in FIGURES:
                    usual = "usual" if figure.is_default else ""
                    print(f"{figure.name:20} {usual:6} {figure.minutes:3g} min  {shown(figure)}")
                return 0
            case "rehearse":
                failures = _rehearse(_selected(args.names, everything=args.all))
            case "run":
                failures = _run_and_write(_selected(args.names, everything=args.all), resume=args.resume)
            case "add":
                add_output(*_selected([args.name], everything=False), args.file, FOLDER)
        if args.command != "rehearse":
            _write_page()
    except (RecordError, OSError) as error:
        failures.append(str(error))
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
