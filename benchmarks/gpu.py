"""Is the GPU path right, and how near does it come to what the card can do?

Method. One command on a machine with a CUDA card, torch, triton, transformers, numpy and safetensors, no network, in
under ten minutes. Each section is a process with a time limit, prints as it goes and keeps what it has found: one that
fails or hangs is said to have failed, and costs no other. Then each target of the issues, met or not or not run; the
last line is all of it as JSON. Exit status 1 if a section failed.
- kernels: every kernel against its reference on fresh random inputs, in float16 and bfloat16; twice, and in other
  batches, for equal bits. codes: greedy codes of a tiny Dia from graphs, eager steps and transformers, with preemption,
  so that graphs replay with changing lengths. prepare: a random model of Dia-1.6B's size, and the compiling. These
  run beside one another, and are not timed.
- ceilings: a 2 GiB copy (bytes read plus written), and a bfloat16 matrix product through cuBLAS.
- bfloat16, int4: one replay of the decode step with guidance against its byte floor (weights and KV read once, at the
  measured bandwidth), and the engine as a whole: audio seconds per second, and how long the card waits between steps.
- transformers: its generate() on the same card, the same texts and lengths.
- memory: Dia as it is served, with a DAC of real size: growth after the warm-up, and the plan against what is used.
- zonos, zonos-hybrid: Zonos-v0.1's sizes with that DAC: real-time factor, audio seconds per second, memory.
- attention, products, small: graphs of 20 calls on rotating inputs larger than the L2 cache, median of 30 replays.

    python benchmarks/gpu.py [--only SECTION ...] [--quick] [--batches 1 4 16 64 128] [--minutes 9.5] [--out FILE]
    TRITON_INTERPRET=1 python benchmarks/gpu.py --quick     # no card: does every line run?
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Section:
    """module, function: what runs. limit_s: how long it may take. is_timed: whether it needs the card to itself."""

    name: str
    module: str
    function: str
    limit_s: float
    is_timed: bool = True


SECTIONS = (
    Section("kernels-float16", "gpu_kernels", "check_float16", 200, is_timed=False),
    Section("kernels-bfloat16", "gpu_kernels", "check_bfloat16", 200, is_timed=False),
    Section("codes", "gpu_models", "compare_codes", 200, is_timed=False),
    Section("prepare-bfloat16", "gpu_models", "prepare_bfloat16", 200, is_timed=False),
    Section("prepare-int4", "gpu_models", "prepare_int4", 200, is_timed=False),
    Section("ceilings", "gpu_kernels", "measure_ceilings", 40),
    Section("bfloat16", "gpu_models", "time_bfloat16", 90),
    Section("int4", "gpu_models", "time_int4", 90),
    Section("transformers", "gpu_models", "time_transformers", 100),
    Section("memory", "gpu_models", "watch_dia_memory", 70),
    Section("attention", "gpu_kernels", "time_attention", 60),
    Section("products", "gpu_kernels", "time_products", 60),
    Section("zonos", "gpu_models", "time_zonos_transformer", 100),
    Section("zonos-hybrid", "gpu_models", "time_zonos_hybrid", 100),
    Section("small", "gpu_kernels", "time_small", 30),
)


@dataclass(frozen=True)
class Target:
    """What an issue asks for. measure: the worst case found; at_least: else at most."""

    name: str
    bound: float
    at_least: bool
    measure: Callable[[dict[str, Any]], float]

    def judge(self, found: dict[str, Any]) -> dict[str, Any]:
        try:
            value = self.measure(found)
        except (KeyError, ValueError):  # a section was not run, or found nothing of this
            return {"target": self.name, "bound": self.bound, "measured": None, "verdict": "not run"}
        is_met = value >= self.bound if self.at_least else value <= self.bound
        verdict = "met" if is_met else "MISSED"
        return {"target": self.name, "bound": self.bound, "measured": value, "verdict": verdict}


def _attention_share(found: dict[str, Any]) -> float:
    rows = found["attention"]["rows"]
    return min(row["of_copy"] for row in rows if row["batch"] >= 16 and row["context"] >= 1000)


def _int4_gain(found: dict[str, Any]) -> float:
    shapes = ((2048, 8192), (8192, 2048))
    rows = [row for row in found["products"]["rows"] if (row["in"], row["out"]) in shapes and row["rows"] <= 16]
    return min(row["cublas"] / row["int4"] for row in rows)


def _idle(found: dict[str, Any]) -> float:
    """The worst of both precisions from 16 requests on."""
    shares = [
        engine["idle"]
        for precision in ("bfloat16", "int4")
        for batch, engine in found[precision]["engine"].items()
        if int(batch) >= 16
    ]
    if None in shares:
        raise ValueError("a run had too few steps to tell")
    return max(shares)


def _against_transformers(batch: str) -> Callable[[dict[str, Any]], float]:
    return lambda found: (
        found["bfloat16"]["engine"][batch]["audio_s_per_s"] / found["transformers"]["audio_s_per_s"][batch]
    )


def _worst_zonos(key: str, number: str, *, worst: Callable[..., float]) -> Callable[[dict[str, Any]], float]:
    return lambda found: worst(found[name][key][number] for name in ("zonos", "zonos-hybrid"))


TARGETS = (
    Target("decode attention from 16 x 1000 positions, of copy bandwidth", 0.8, True, _attention_share),
    Target("int4 over cuBLAS bfloat16, 2048 x 8192, up to 16 rows", 2.5, True, _int4_gain),
    Target(
        "Dia step, 1 request, bfloat16, times its byte floor",
        1.35,
        False,
        lambda f: f["bfloat16"]["replay"]["1"]["of_floor"],
    ),
    Target(
        "Dia step, 1 request, bfloat16, real-time factor", 0.11, False, lambda f: f["bfloat16"]["replay"]["1"]["rtf"]
    ),
    Target("Dia step, 1 request, int4, real-time factor", 0.06, False, lambda f: f["int4"]["replay"]["1"]["rtf"]),
    Target(
        "Dia, 64 requests, audio seconds per second",
        200,
        True,
        lambda f: f["bfloat16"]["engine"]["64"]["audio_s_per_s"],
    ),
    Target("Dia, 1 request, times transformers", 10, True, _against_transformers("1")),
    Target("Dia, 64 requests, times transformers", 50, True, _against_transformers("64")),
    Target("card idle between steps from 16 requests on, share", 0.03, False, _idle),
    Target("Dia with DAC, growth of memory after the warm-up, MB", 50, False, lambda f: f["memory"]["growth_mb"]),
    Target(
        "Dia with DAC, memory in use, share of the plan",
        1.0,
        False,
        lambda f: f["memory"]["used_gb"] / f["memory"]["planned_gb"],
    ),
    Target("Zonos, 1 request, real-time factor", 0.12, False, _worst_zonos("requests_1", "rtf", worst=max)),
    Target(
        "Zonos, 64 requests, audio seconds per second",
        150,
        True,
        _worst_zonos("requests_64", "audio_s_per_s", worst=min),
    ),
    Target(
        "Zonos, growth of memory after the warm-up, MB",
        50,
        False,
        lambda f: max(f[n]["growth_mb"] for n in ("zonos", "zonos-hybrid")),
    ),
)


class Child:
    """A process that runs sections in turn; its lines are printed as they come, with its name before them."""

    def __init__(self, names: Sequence[str], command: Sequence[str], folder: Path) -> None:
        self._names = names
        self._folder = folder
        self._begin = time.monotonic()
        self._process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self._printer = threading.Thread(target=self._print, daemon=True)
        self._printer.start()

    def end(self) -> None:
        """No effect if it has ended."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def wait(self, seconds: float) -> dict[str, dict[str, Any]]:
        """What each section found; "failed" says what went wrong. Ends them after so many seconds from now."""
        failure = "ended early"
        try:
            status = self._process.wait(max(0.0, seconds))
            failure = f"ended by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
        except subprocess.TimeoutExpired:
            self.end()
            failure = f"took longer than the {time.monotonic() - self._begin:.0f} s that it was given"
        self._printer.join(timeout=10)
        return {name: self._read(name, failure) for name in self._names}

    def _read(self, name: str, failure: str) -> dict[str, Any]:
        path = self._folder / f"{name}.json"
        found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        if "seconds" not in found:
            found["failed"] = failure
        if "failed" in found:
            print(f"{name}: failed: {found['failed']}", flush=True)
        return found

    def _print(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                print(line.rstrip() if len(self._names) > 1 else f"{self._names[0]}: {line.rstrip()}", flush=True)


def run_sections(args: argparse.Namespace) -> int:
    """In the child: run sections in turn, and keep what each of them raised."""
    from gpu_run import Run

    sections = {section.name: section for section in SECTIONS}
    for section in map(sections.__getitem__, args.section):
        run = Run(section.name, args.folder, args.quick, tuple(args.batches))
        begin = time.monotonic()
        try:
            getattr(importlib.import_module(section.module), section.function)(run)
        except Exception as error:  # whatever it is, the others' minutes on a lent card must not be lost to it
            traceback.print_exc()
            run.put("failed", f"{type(error).__name__}: {error}")
        run.put("seconds", round(time.monotonic() - begin, 1))
        run.say(f"{section.name}: {run.found['seconds']} s")
    return 0


def run_all(args: argparse.Namespace, options: Sequence[str]) -> dict[str, Any]:
    """Every wanted section: those that are not timed beside one another, then the others one by one; in a rehearsal,
    where nothing is timed and importing takes longest, in one process."""
    deadline = time.monotonic() + 60 * args.minutes
    wanted = [section for section in SECTIONS if not args.only or section.name in (*args.only, "ceilings")]
    together = [[section] for section in wanted if not section.is_timed]
    groups = [together, *([[section]] for section in wanted if section.is_timed)]
    if args.quick:
        groups = [[sorted(wanted, key=lambda section: section.name != "ceilings")]]
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="declaim-gpu-") as folder:
        for group in groups:
            if deadline - time.monotonic() < 5:
                over = f"not run: the {args.minutes:g} minutes were over"
                found |= {section.name: {"failed": over} for sections in group for section in sections}
                continue
            begin = time.monotonic()
            command = [sys.executable, "-u", __file__, "--folder", folder, *options, "--section"]
            names = [[section.name for section in sections] for sections in group]
            children = [Child(some, [*command, *some], Path(folder)) for some in names]
            try:
                for sections, child in zip(group, children, strict=True):
                    until = begin + sum(section.limit_s for section in sections)
                    until = deadline if args.quick else min(deadline, until)
                    found |= child.wait(until - time.monotonic())
            finally:
                for child in children:
                    child.end()
    return {section.name: found[section.name] for section in wanted}


def _card() -> str:
    shown = [
        "nvidia-smi",
        "--query-gpu=name,clocks.sm,power.limit,memory.total,driver_version",
        "--format=csv,noheader",
    ]
    try:
        return subprocess.run(shown, capture_output=True, text=True, check=False, timeout=30).stdout.strip()
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"a card that nvidia-smi does not tell ({error})"


def _arguments() -> argparse.Namespace:
    names = [section.name for section in SECTIONS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=names, help="these sections, and the ceilings")
    parser.add_argument("--quick", action="store_true", help="tiny models and shapes")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16, 64, 128])
    parser.add_argument("--minutes", type=float, default=9.5, help="what does not fit into them is not run")
    parser.add_argument("--out", type=Path, help="write the JSON to a file too")
    parser.add_argument("--section", nargs="+", choices=names, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    args = _arguments()
    if args.section is not None:
        return run_sections(args)
    import torch
    import triton

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no section outlives this process
    is_rehearsal = not torch.cuda.is_available()
    if is_rehearsal and not (args.quick and os.environ.get("TRITON_INTERPRET") == "1"):
        print(f"gpu.py: torch {torch.__version__} sees no CUDA card here, so nothing was measured", file=sys.stderr)
        return 1
    document: dict[str, Any] = {
        "card": "none: a rehearsal in the interpreter, whose numbers mean nothing" if is_rehearsal else _card(),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "triton": triton.__version__,
    }
    print("; ".join(f"{key} {value}" for key, value in document.items()), flush=True)
    options = [*(["--quick"] if args.quick else []), "--batches", *map(str, args.batches)]
    document["sections"] = run_all(args, options)
    document["targets"] = [target.judge(document["sections"]) for target in TARGETS]
    for row in document["targets"]:
        measured = "-" if row["measured"] is None else f"{row['measured']:.3g}"
        print(f"{row['verdict']:8s} {row['target']}: {measured} (target {row['bound']:g})", flush=True)
    if args.out is not None:
        args.out.write_text(json.dumps(document))
    print(json.dumps(document), flush=True)
    return int(any("failed" in found for found in document["sections"].values()))


if __name__ == "__main__":
    sys.exit(main())
