"""A `declaim serve` in a process of its own, as an operator runs it, for any test that must stop, kill or watch one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil

from tests.api.fake_engine import eventually

ROOT = Path(__file__).parents[2]
COMMAND = "from declaim.api.cli import main; main()"
READY_S = 120.0


@contextmanager
def server_process(
    folder: Path,
    *options: str,
    code: str = COMMAND,
    arguments: tuple[str, ...] = (),
    environment: Mapping[str, str] | None = None,
) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """A ready server on a free port; gives its URL and its process, which is killed with its children in the end.

    It refuses nobody for being late, unless options say so: tests do not depend on how fast the machine is.

    folder: of its database, its state and its log (`log_of`). code: Python that runs the command line, which is after
    `arguments`. environment: variables beside this process's own.
    """
    with (
        log_of(folder).open("w") as log,
        subprocess.Popen(
            [sys.executable, "-c", code, *arguments, "serve", "--port", "0", "--shed", "full", *options],
            cwd=ROOT,
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "XDG_STATE_HOME": str(folder),
                "DECLAIM_DATABASE_URL": f"sqlite:///{folder}/declaim.db",
                **(environment or {}),
            },
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        ) as process,
    ):
        try:
            assert process.stdout is not None
            match = re.search(r"http://[\d.]+:\d+", process.stdout.readline())
            assert match is not None, log_of(folder).read_text()
            url = match.group().replace("0.0.0.0", "127.0.0.1")
            assert eventually(lambda: is_ready(url), within_s=READY_S)
            yield url, process
        finally:
            children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
            for each in (*children, process):
                each.kill()


def is_ready(url: str) -> bool:
    """All its workers: connections go to any."""
    return all(httpx.get(url + "/ready", timeout=READY_S).status_code == 200 for _ in range(8))


def log_of(folder: Path) -> Path:
    """Where a server has its log."""
    return folder / "stderr.txt"
