"""How much more does `declaim serve` encode with several API workers than with one?

    python -m benchmarks.api_workers [--workers 2] [--clients 8] [--rounds 3] [--seconds 20]

The engine is the tests' fake, which makes audio for nothing, so that encoding and HTTP are all the work there is. Both
servers run at the same time and are asked in turns, with mp3 and with opus: each client asks for one answer after the
other, each over a connection of its own. A ratio is of seconds of audio in a second, median over the rounds. How many
cores there are bounds it: the clients and the engine's process need theirs too. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from benchmarks import machine

ROOT = Path(__file__).parents[1]
SERVER = """
import sys
from declaim.api.cli import build_cli
from tests.api.fake_engine import scripted
build_cli(lambda model, config, progress: scripted(num_chunks=int(sys.argv[1]), frames_per_chunk=25))(sys.argv[2:])
"""
FORMATS = ("mp3", "opus")
READY_S = 60.0


@contextmanager
def server(num_workers: int, *, seconds: int) -> Iterator[str]:
    """A ready server whose answers last so long; gives its URL."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", SERVER, str(seconds), "serve", "--port", "0", "--log-level", "warning"]
        environment = {**os.environ, "XDG_STATE_HOME": folder, "DECLAIM_DATABASE_URL": f"sqlite:///{folder}/declaim.db"}
        with subprocess.Popen(
            [*command, "--api-workers", str(num_workers), "--no-auth"],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        ) as process:
            try:
                assert process.stdout is not None
                match = re.search(r"http://[\d.]+:\d+", process.stdout.readline())
                if match is None:
                    raise SystemExit("the server did not start")
                _wait_ready(match.group())
                yield match.group()
            finally:
                process.send_signal(signal.SIGTERM)
                process.wait(30)


def _wait_ready(url: str) -> None:
    """Several times in a row, so that every worker has been asked."""
    until_s = time.monotonic() + READY_S
    num_ready = 0
    while num_ready < 8:
        if time.monotonic() > until_s:
            raise SystemExit(f"the server was not ready within {READY_S:g} s")
        try:
            with urllib.request.urlopen(url + "/ready", timeout=READY_S):
                num_ready += 1
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)


def ask(url: str, response_format: str) -> None:
    """One whole answer."""
    body = json.dumps({"model": "lark", "input": "Hello.", "response_format": response_format}).encode()
    request = urllib.request.Request(url + "/v1/audio/speech", body, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        while answer.read(1 << 16):
            pass


def audio_rate(url: str, response_format: str, *, num_clients: int, num_answers: int, seconds: int) -> float:
    """Seconds of audio delivered in a second."""
    began = time.perf_counter()
    with ThreadPoolExecutor(num_clients) as pool:
        list(pool.map(lambda _: ask(url, response_format), range(num_answers)))
    return num_answers * seconds / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=20, help="of audio in an answer")
    parser.add_argument("--answers", type=int, default=32, help="in a round, for each format")
    arguments = parser.parse_args()
    document = machine.begin(f"{arguments.workers} API workers against one process", vars(arguments))
    rates: dict[str, dict[str, list[float]]] = {name: {"one": [], "several": []} for name in FORMATS}
    with server(1, seconds=arguments.seconds) as one, server(arguments.workers, seconds=arguments.seconds) as several:
        for url in (one, several):
            audio_rate(url, "mp3", num_clients=arguments.clients, num_answers=8, seconds=arguments.seconds)
        for _ in range(arguments.rounds):
            for name in FORMATS:
                for which, url in (("one", one), ("several", several)):
                    rates[name][which].append(
                        audio_rate(
                            url,
                            name,
                            num_clients=arguments.clients,
                            num_answers=arguments.answers,
                            seconds=arguments.seconds,
                        )
                    )
    medians = {name: {which: float(np.median(values)) for which, values in rates[name].items()} for name in FORMATS}
    ratios = {name: medians[name]["several"] / medians[name]["one"] for name in FORMATS}
    machine.print_table(
        f"seconds of audio in a second, {arguments.clients} clients, median of {arguments.rounds}",
        ("format", "one process", f"{arguments.workers} workers", "times as much"),
        [
            (name, f"{medians[name]['one']:.0f}", f"{medians[name]['several']:.0f}", f"{ratios[name]:.2f}")
            for name in FORMATS
        ],
    )
    machine.end(document, {"rates": rates, "ratios": ratios, "cores": os.cpu_count()})


if __name__ == "__main__":
    main()
