"""A `declaim serve` of a benchmark's own: started, ready, watched and stopped.

Owns the process, and the questions whether it lives and whether anything is left in it. Asks nothing of its speech.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import aiohttp
import psutil
from prometheus_client.parser import text_string_to_metric_families

READY_S = 180.0
STOP_S = 60.0
DRAIN_S = 30.0
# What must be back at nothing once nobody asks.
IDLE_GAUGES = (
    "declaim_running_sequences",
    "declaim_waiting_sequences",
    "declaim_kv_blocks_used",
    "declaim_streams",
    "declaim_vocoder_pending",
    "declaim_requests_in_flight",
)


class ServerDied(Exception):
    """The server's process has ended, and nobody told it to."""


def log_of(name: str) -> Path:
    """Where `own_server` has a server's log."""
    return Path(tempfile.gettempdir()) / f"declaim-{name}.log"


def check_alive(process: psutil.Process) -> None:
    """Raises: ServerDied."""
    # One that ended is a zombie until somebody waits for it.
    if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
        raise ServerDied("the server's process has ended by itself")


@contextmanager
def own_server(
    name: str, arguments: Sequence[str], *, environment: Mapping[str, str] | None = None
) -> Iterator[tuple[str, psutil.Process]]:
    """Serve on a free port, ready; its log is `log_of(name)`. Gives the URL, the process.

    Nobody is refused for slowness, unless the arguments say so: what is judged here is whether streams are whole.
    environment: variables beside this process's own.
    """
    command = [sys.executable, "-c", "from declaim.api.cli import main; main()"]
    command += ["serve", "--port", "0", "--shed", "full", *arguments]
    log = log_of(name)
    with (
        log.open("w") as stderr,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=stderr, text=True, env={**os.environ, **(environment or {})}
        ) as process,
    ):
        try:
            assert process.stdout is not None
            match = re.search(r"http://127\.0\.0\.1:\d+", process.stdout.readline())
            if match is None:
                raise SystemExit(f"the server did not start: see {log}")
            _wait_ready(match.group(), process, log=log)
            yield match.group(), psutil.Process(process.pid)
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()


def _wait_ready(url: str, process: subprocess.Popen[str], *, log: Path) -> None:
    until_s = time.monotonic() + READY_S
    while time.monotonic() < until_s and process.poll() is None:
        try:
            with urllib.request.urlopen(url + "/ready", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise SystemExit(f"the server was not ready within {READY_S:g} s: see {log}")


async def gauges(session: aiohttp.ClientSession, url: str) -> dict[str, float]:
    """The server's metrics that have no labels, by name."""
    async with session.get(url + "/metrics") as answer:
        text = await answer.text()
    return {
        sample.name: sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if not sample.labels
    }


async def left_over(session: aiohttp.ClientSession, url: str) -> dict[str, float]:
    """What is left of IDLE_GAUGES when DRAIN_S is over, or nothing as soon as nothing is."""
    until_s = time.monotonic() + DRAIN_S
    while True:
        told = await gauges(session, url)
        left = {name: told[name] for name in IDLE_GAUGES if told.get(name)}
        if not left or time.monotonic() > until_s:
            return left
        await asyncio.sleep(0.5)
