"""Streams dropped at random points leave nothing: a short run of benchmarks/dropped.py, and its verdict."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def dropped() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        import dropped

        yield dropped


def test_every_kind_of_stream_dropped_anywhere_leaves_nothing() -> None:
    command = [sys.executable, str(BENCHMARKS / "dropped.py"), "--vocoder", "inline"]
    # So few streams say nothing of small leaks: the script's own form of 500 does.
    command += ["--streams", "24", "--warm-up", "24", "--clients", "8", "--growth", "40"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    ends = json.loads(done.stdout.splitlines()[-1])["result"]["ends"]
    assert sum(ends.values()) == 48
    for kind in ("mp3", "pcm", "sse", "live", "deepgram"):
        assert any(end.startswith(f"{kind} ") for end in ends)
    for point in ("before", "within", "after"):
        assert any(end.endswith(f" {point}") for end in ends)
    assert not [end for end in ends if "http" in end or "Error" in end]


def test_the_verdict_sees_what_is_left_and_what_grew(dropped: Any) -> None:
    idle = {"heap_mb": 270.0, "python_blocks": 1e6, "cache_mb": 60.0, "threads": 20, "handles": 30, "left": {}}
    begin = dropped.Left(100, rss_mb=400.0, **idle)

    def faults(**changes: Any) -> str:
        fields: dict[str, Any] = {"rss_mb": 405.0} | idle | changes
        return "; ".join(dropped.faults_of([begin, dropped.Left(600, **fields)], most_growth_mb=12.0))

    assert not faults() and not faults(threads=24, handles=46)
    assert "declaim_kv_blocks_used is left: 3" in faults(left={"declaim_kv_blocks_used": 3.0})
    assert "threads: 20 after the warm-up, 25 at the end" in faults(threads=25)
    assert "handles: 30 after the warm-up, 47 at the end" in faults(handles=47)
    assert not faults(rss_mb=471.0, heap_mb=272.0, python_blocks=1.009e6)
    assert "resident memory grew by 80.0 MB" in faults(rss_mb=480.0)
    assert "what malloc has handed out grew by 4.0 MB" in faults(heap_mb=274.0)
    assert "Python held 1000000 blocks and holds 1020000" in faults(python_blocks=1.02e6)
