"""A `declaim serve` of a benchmark's own: started, ready, watched and stopped.

Owns the process, and the question whether anything is left in it. Asks nothing of its speech.
"""

from __future__ import annotations

import asyncio
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
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


@contextmanager
def own_server(name: str, arguments: Sequence[str]) -> Iterator[tuple[str, psutil.Process]]:
    """Serve on a free port, ready; its log is declaim-NAME.log in the temporary folder. Gives the URL, the process."""
    command = [sys.executable, "-c", "from declaim.api.cli import main; main()", "serve", "--port", "0", *arguments]
    log = Path(tempfile.gettempdir()) / f"declaim-{name}.log"
    with (
        log.open("w") as stderr,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True) as process,
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


async def left_over(session: aiohttp.ClientSession, url: str) -> dict[str, float]:
    """What is left of IDLE_GAUGES when DRAIN_S is over, or nothing as soon as nothing is."""
    until_s = time.monotonic() + DRAIN_S
    while True:
        async with session.get(url + "/metrics") as answer:
            text = await answer.text()
        left = {
            sample.name: sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name in IDLE_GAUGES and sample.value
        }
        if not left or time.monotonic() > until_s:
            return left
        await asyncio.sleep(0.5)
