"""The soak's verdict: it sees what grows, and lets pass what only scatters; and a short run of the whole."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
SERVER, WORKER = 100, 200
ALIVE = {"declaim_heap_used_bytes": 3e8, "declaim_python_blocks": 1e6, "declaim_kv_cache_bytes": 6e7}
ENDS = {"whole": 100, "hung up": 20}


@pytest.fixture(scope="module")
def soak() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        import soak

        yield soak


def samples_of(
    soak: Any, *, hours: float = 0.5, cache_mb: float = 0.0, **values: Callable[[float], float]
) -> list[Any]:
    """A server and a worker, sampled 900 times; values: of the server, or with a leading `worker_` of the worker, by
    the hour."""
    rng = np.random.default_rng(0)

    def process(name: str, prefix: str, at: float) -> Any:
        fields = {"rss_mb": 600.0, "threads": 30, "handles": 40, "vram_mb": 0.0, "heap_mb": 0.0, "python_blocks": 0.0}
        fields["cache_mb"] = cache_mb
        fields |= {key: values[prefix + key](at) for key in fields if prefix + key in values}
        fields["rss_mb"] += rng.normal(0.0, 4.0)
        return soak.Process(name, **fields)

    times = np.linspace(0.0, hours, 900)
    return [
        soak.Sample(3600 * at, {SERVER: process("server", "", at), WORKER: process("worker", "worker_", at)})
        for at in times
    ]


def judged(soak: Any, samples: list[Any], **changes: Any) -> list[str]:
    fields = {
        "silence": samples[-1],
        "ends": ENDS,
        "left": {},
        "growth_mb": 20.0,
        "settling_mb": 0.0,
        "live_mb": 5.0,
    } | changes
    faults: list[str] = soak.judge(samples, **fields)
    return faults


def test_what_scatters_and_what_was_taken_in_the_warm_up_is_no_leak(soak: Any) -> None:
    assert judged(soak, samples_of(soak, rss_mb=lambda at: 500.0 + min(100.0, 1000.0 * at))) == []


def test_pages_of_the_cache_that_are_written_are_no_leak(soak: Any) -> None:
    assert judged(soak, samples_of(soak, rss_mb=lambda at: 600.0 + 80.0 * at, cache_mb=60.0)) == []


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"rss_mb": lambda at: 600.0 + 80.0 * at}, "server (100): its memory grows by"),
        ({"worker_rss_mb": lambda at: 600.0 + 80.0 * at}, "worker (200): its memory grows by"),
        ({"worker_vram_mb": lambda at: 900.0 + 80.0 * at}, "worker (200): its GPU memory grows by"),
        ({"heap_mb": lambda at: 300.0 + 9.0 * at}, "server (100): its live memory grows by 9 MB an hour"),
        ({"python_blocks": lambda at: 1e6 + 1e5 * at}, "server (100): Python holds 10"),
        ({"threads": lambda at: 30 + int(40 * at)}, "server (100): 37 threads after the warm-up, 47 at the end"),
        ({"worker_handles": lambda at: 40 + int(100 * at)}, "worker (200): 58 handles after the warm-up"),
    ],
)
def test_what_grows_is_named(soak: Any, values: dict[str, Callable[[float], float]], told: str) -> None:
    (fault,) = judged(soak, samples_of(soak, **values))
    assert fault.startswith(told)


def test_in_minutes_memory_may_settle_and_a_leak_is_seen_beyond_that(soak: Any) -> None:
    grown = samples_of(soak, hours=0.02, rss_mb=lambda at: 600.0 + 1000.0 * at)
    assert "grows" in judged(soak, grown)[0]
    assert judged(soak, grown, settling_mb=30.0) == []
    assert judged(soak, samples_of(soak, hours=0.02, rss_mb=lambda at: 600.0 + 9000.0 * at), settling_mb=30.0)


def test_what_is_left_and_what_did_not_end_well_is_named(soak: Any) -> None:
    samples = samples_of(soak)
    more = soak.Sample(1801.0, samples[-1].processes | {i: soak.Process("ray::X", 1.0, 1, 1) for i in (7, 8)})
    faults = judged(soak, samples, silence=more, left={"declaim_streams": 1.0}, ends={"http 500": 2, "whole": 9})
    assert faults == [
        "declaim_streams: 1 in the silence after the run",
        "2 processes after the warm-up, 4 in silence",
        "2 streams ended so: http 500",
    ]
    assert judged(soak, samples, ends={"hung up": 3}) == ["no stream ended whole"]


def test_a_process_is_sampled_with_its_memory_on_the_gpu_and_a_dead_one_is_told(
    soak: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        fake = tmp_path / "nvidia-smi"
        fake.write_text(f"#!/bin/sh\necho '{child.pid}, 1000'\necho '1, [N/A]'\n")
        fake.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
        found = soak.sample(psutil.Process(child.pid), ALIVE, time.monotonic()).processes[child.pid]
        assert (found.name, round(found.vram_mb)) == ("server", 1049)
        assert (found.heap_mb, found.python_blocks, found.cache_mb) == (300, 1e6, 60)
        assert found.rss_mb > 1 and found.threads >= 1 and found.handles >= 3
        server = psutil.Process(child.pid)
        child.send_signal(signal.SIGKILL)
        end_s = time.monotonic() + 10
        while server.status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < end_s
        with pytest.raises(Exception, match="ended by itself") as caught:
            soak.sample(server, ALIVE, time.monotonic())
        assert type(caught.value).__name__ == "ServerDied"


@pytest.mark.parametrize(
    ("command", "name"),
    [
        (["ray::DecodeWorker.decode"], "ray::DecodeWorker"),
        (["ray::IDLE"], "ray::IDLE"),
        (["/x/raylet/raylet", "--port=1"], "raylet"),
        (["python", "-u", "/x/log_monitor.py", "--a"], "log_monitor.py"),
        ([], "?"),
    ],
)
def test_rays_processes_have_names(soak: Any, command: list[str], name: str) -> None:
    assert soak._name_of(command) == name


def test_a_short_soak_passes(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "soak.py"), "--vocoder", "inline", "--minutes", "0.2", "--rest", "0.1"]
    command += ["--listeners", "2", "--sample", "0.5", "--settling", "150"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=200, env={**os.environ, "TMPDIR": str(tmp_path)}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    document = json.loads(done.stdout.splitlines()[-1])
    assert document["result"]["verdict"].startswith("nothing grows")
    assert document["result"]["ends"]["whole"] >= 1
