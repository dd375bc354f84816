"""What every benchmark says about where it ran, and how it says it.

Owns the description of the machine and the form of the output: a heading, tables, and one JSON document as the last
line of stdout. Never measures anything.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
CONSOLE = Console(width=118, highlight=False)


def describe() -> dict[str, object]:
    """The machine, the versions and the commit, as plain data."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load_1min": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_threads": torch.get_num_threads(),
        "transformers": importlib.metadata.version("transformers"),
        "commit": _git("rev-parse", "--short=12", "HEAD"),
        "dirty": _is_dirty(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def begin(question: str, config: Mapping[str, object]) -> dict[str, object]:
    """Print the heading. Returns the document that `end` prints, without its result."""
    document: dict[str, object] = {"question": question, "machine": describe(), "config": dict(config)}
    CONSOLE.print(f"[bold]{question}[/bold]", soft_wrap=True)
    for part in ("machine", "config"):
        items = document[part]
        if isinstance(items, dict):
            line = ", ".join(f"{key} {value}" for key, value in items.items())
            CONSOLE.print(f"{part}: {line}", markup=False, soft_wrap=True)
    return document


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A table whose first column is text and whose others are numbers; floats get three significant digits or more."""
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*(_cell(value) for value in row))
    CONSOLE.print(table)


def end(document: Mapping[str, object], result: Mapping[str, object]) -> None:
    """Print the last line of stdout: the whole as one JSON document."""
    print(json.dumps({**document, "result": dict(result)}), flush=True)


def _cell(value: object) -> str:
    if not isinstance(value, float):
        return escape(str(value))
    if value != 0 and abs(value) < 0.001:
        return f"{value:.2e}"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _git(*arguments: str) -> str | None:
    """None where this is not a checkout, or git is not installed."""
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _is_dirty() -> bool | None:
    status = _git("status", "--porcelain")
    return None if status is None else bool(status)
