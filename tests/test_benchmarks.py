"""Every benchmark runs, in its --quick form, and ends with a JSON document that says what it should."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


def run_quick(script: str, *options: str) -> tuple[dict[str, Any], str]:
    """The document on the last line, and what was printed before it."""
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / script), "--quick", "--threads", "1", *options],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    *printed, last = done.stdout.splitlines()
    document = json.loads(last)
    assert set(document) == {"question", "machine", "config", "result"}
    assert document["machine"]["torch_threads"] == 1
    assert document["machine"]["cpu"]
    assert document["config"]["quick"] is True
    return document["result"], "\n".join(printed)


@pytest.mark.slow
def test_all_systems_make_the_same_greedy_codes_and_are_timed() -> None:
    result, printed = run_quick("vs_transformers.py", "--alone")
    assert result["num_requests"] == 3
    systems = {system["system"]: system for system in result["systems"]}
    assert list(systems) == [
        "transformers, one by one",
        "transformers, static batch",
        "declaim",
        "declaim, one by one",
        "declaim, with vocoder",
    ]
    for system in systems.values():
        assert system["audio_s_per_s"] == pytest.approx(result["audio_s"] / system["wall_s"])
        assert system["audio_s_per_s"] > 0
    ratio = systems["transformers, one by one"]["wall_s"] / systems["declaim"]["wall_s"]
    assert systems["declaim"]["vs_one_by_one"] == pytest.approx(ratio)
    assert len(result["greedy"]) == 3
    for agreement in result["greedy"].values():
        assert agreement == {"identical_requests_percent": 100.0, "identical_codes_percent": 100.0}
    assert "declaim, with vocoder" in printed


@pytest.mark.slow
def test_the_phases_of_a_step_add_up_to_it() -> None:
    result, printed = run_quick("vs_transformers.py", "--sampled", "--profile")
    phases = result["phase_ms"]
    assert sum(phases.values()) == pytest.approx(result["step_ms"])
    for phase in ("schedule", "embed", "forward", "logits", "sampling", "commit"):
        assert phases[phase] > 0
    assert phases["forward"] < result["step_ms"]
    assert phases["everything else"] >= 0
    assert "scaled_dot_product" in printed
    assert "aten::mm" in printed


def test_the_embedded_voice_is_timed_alone_and_in_a_crowd() -> None:
    result, printed = run_quick("embedded.py")
    assert list(result["vocoders"]) == ["inline"]
    inline = result["vocoders"]["inline"]
    assert 0 < inline["first_audio_ms"]["p50"] <= inline["first_audio_ms"]["p99"]
    assert 0 < inline["rtf"]["p50"] <= inline["rtf"]["p99"]
    ratio = inline["concurrent_audio_s_per_s"] / inline["one_by_one_audio_s_per_s"]
    assert inline["concurrent_vs_one_by_one"] == pytest.approx(ratio)
    assert "first audio ms" in printed


@pytest.mark.ray
@pytest.mark.slow
def test_both_vocoders_are_compared_in_one_run() -> None:
    result, _ = run_quick("embedded.py", "--vocoder", "both")
    inline, ray = result["vocoders"]["inline"], result["vocoders"]["ray"]
    added = ray["first_audio_ms"]["p50"] - inline["first_audio_ms"]["p50"]
    assert result["ray_adds"]["first_audio_ms"] == pytest.approx(added)
    assert inline["concurrent_audio_s_per_s"] > 0
    assert ray["concurrent_audio_s_per_s"] > 0


@pytest.mark.slow
def test_no_code_depends_on_what_runs_beside_it_and_the_plain_product_shows_why_it_might() -> None:
    result, _ = run_quick("determinism.py")
    trials = [trial for trial in result["codes"] if trial["dtype"] == "float32"]
    assert {trial["model"] for trial in trials} == {"lark", "dia, random"}
    assert {trial["dtype"] for trial in result["codes"]} == {"float32", "bfloat16"}
    for trial in trials:
        assert trial["draws"] > 0
        assert trial["different_requests"] == trial["different_draws"] == 0
        assert (trial["preemptions"] > 0) == trial["condition"].endswith("blocks")
    ours = [row for row in result["rows"] if row["method"] == "kernels/linear.py" and row["dtype"] == "float32"]
    assert len(ours) == 2
    assert all(row["unlike_alone"] == row["unlike_16"] == "none" for row in ours)
    assert any(row["different_percent"] > 0 for row in result["rows"] if row["method"].startswith("F.linear"))
