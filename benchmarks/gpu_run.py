"""What every section of gpu.py shares: where it runs, how it is timed, and how its results outlive it.

A section is a process of its own: a fault that leaves the card's context unusable, or a hang, costs that section alone,
and what it had found by then is kept.
"""

from __future__ import annotations

import json
import os
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

# Without a card the script runs, meaninglessly, under Triton's interpreter: a rehearsal (--quick).
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
REPLAYS, CALLS = 30, 20
L2_BYTES = 2e8  # inputs that rotate take more than any cache holds


@dataclass
class Run:
    """One section at work. folder: the sections' results, and the models that they share."""

    section: str
    folder: Path
    quick: bool
    batches: tuple[int, ...]
    found: dict[str, Any] = field(default_factory=dict)

    def say(self, text: str) -> None:
        print(text, flush=True)

    def put(self, key: str, value: Any) -> None:
        """Keep a result, whatever becomes of this process."""
        self.found[key] = value
        path = self.folder / f"{self.section}.json"
        fresh = path.with_suffix(".new")
        fresh.write_text(json.dumps(self.found))
        fresh.replace(path)

    def earlier(self, section: str) -> dict[str, Any]:
        """What another section has found; empty if nothing."""
        path = self.folder / f"{section}.json"
        found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        return found

    @property
    def copy_gb_per_s(self) -> float:
        """The card's bandwidth, as the section `ceilings` measured it."""
        measured: float = self.earlier("ceilings")["copy_gb_per_s"]
        return measured


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def median_s(run: Callable[[], object]) -> float:
    """Median seconds of a call, by events."""
    if DEVICE == "cpu":
        begin_s = time.perf_counter()
        run()
        return time.perf_counter() - begin_s
    for _ in range(5):
        run()
    times = []
    for _ in range(REPLAYS):
        begin = Mark()
        run()
        times.append(begin.seconds_to(Mark()))
    return statistics.median(times)


def graph_us(run: Callable[[int], object]) -> float:
    """Median microseconds of one of CALLS calls inside a graph."""
    if DEVICE == "cpu":
        return 1e6 * median_s(lambda: run(0))
    for i in range(CALLS):
        run(i)
    synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(CALLS):
            run(i)
    return 1e6 * median_s(graph.replay) / CALLS


class Mark:
    """A moment of the device's, recorded where it is made; on the CPU the clock's."""

    def __init__(self) -> None:
        self._event: Any = None
        self._at_s = time.perf_counter()
        if DEVICE == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)
            self._event.record()

    def seconds_to(self, later: Mark) -> float:
        """Waits for the later one."""
        if self._event is None:
            return later._at_s - self._at_s
        later._event.synchronize()
        seconds: float = self._event.elapsed_time(later._event) / 1e3
        return seconds


def used_bytes() -> int:
    """Of the card, by all its processes; without one, what this process has resident."""
    if DEVICE == "cuda":
        free, total = torch.cuda.mem_get_info()
        return int(total - free)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Watch:
    """The most memory in use between the beginning and the end of a `with`, looked at every few milliseconds."""

    def __enter__(self) -> Watch:
        self.peak_bytes = self.first_bytes = used_bytes()
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()
        self.peak_bytes = max(self.peak_bytes, used_bytes())

    def _look(self) -> None:
        while not self._is_over.wait(0.01):
            self.peak_bytes = max(self.peak_bytes, used_bytes())

    @property
    def growth_bytes(self) -> int:
        return self.peak_bytes - self.first_bytes
