"""What the commands show on a terminal: errors of one line, stages as bars, rows in columns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import NoReturn, Self

import typer
from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

BYTE_STAGES = ("download", "verify", "read", "quantize")


def exit_with(message: str, *, code: int) -> NoReturn:
    """End the command with one line on stderr; code 1: something failed, 2: the command was wrong."""
    Console(stderr=True).print(Text(" ".join(message.split()), style="red"), soft_wrap=True)
    raise typer.Exit(code)


@contextmanager
def exits_on_error() -> Iterator[None]:
    """Turn declaim's errors, and the operating system's, into exit codes."""
    from declaim.engine.errors import DeclaimError, InvalidConfig, RequestError

    try:
        yield
    except (RequestError, InvalidConfig) as error:
        exit_with(str(error), code=2)
    except (DeclaimError, OSError) as error:
        exit_with(str(error), code=1)


def print_columns(rows: Sequence[Sequence[str]]) -> None:
    """Print rows on stdout, aligned; the last column may be as long as it likes."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


class StageBars:
    """A `Progress` callback that draws one bar a stage on stderr, if that is a terminal; they go when it is closed."""

    def __init__(self) -> None:
        self._progress = Progress(
            TextColumn("{task.description:<9}"),
            BarColumn(32),
            TextColumn("{task.percentage:>3.0f} %  {task.fields[amount]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.stop()

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage not in self._tasks:
            self._tasks[stage] = self._progress.add_task(stage, amount="")
        is_bytes = stage in BYTE_STAGES
        amount = f"{decimal(done)} of {decimal(total)}" if is_bytes else f"{done} of {total}"
        self._progress.update(self._tasks[stage], completed=done, total=total, amount=amount)
