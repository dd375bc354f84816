"""Where the engine's step time goes: wall time by phase, Python functions, and torch operators, each from its own pass.

Owns the probes, which sit on the engine's own functions while a pass runs and are gone after it. The phases' clocks
cost about a microsecond each; cProfile and the torch profiler slow a step, so their tables show shares and not speed.
"""

from __future__ import annotations

import contextlib
import cProfile
import functools
import pstats
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import machine
import torch

from declaim.engine import Engine, SpeechRequest, sampler
from declaim.engine.models.dia import DiaModel
from declaim.engine.models.lark import LarkModel
from declaim.engine.runner import Runner
from declaim.engine.scheduler import Scheduler
from declaim.engine.stream import RequestStream
from declaim.engine.vocoder.inline import InlineVocoder

Place = tuple[type | ModuleType, str]

STEP: tuple[Place, ...] = ((Engine, "_step"), (Engine, "_deliver"))
# None of these calls another, so their times and what is left of the step add up to it.
PHASES: dict[str, tuple[Place, ...]] = {
    "schedule": ((Scheduler, "schedule"),),
    "text side (once a sequence)": ((Runner, "begin"), (Runner, "_write_cross")),
    "context": ((Runner, "_context"),),
    "embed": ((Runner, "_embed"),),
    "forward": ((DiaModel, "forward"), (LarkModel, "forward")),
    "logits": ((DiaModel, "logits"), (LarkModel, "logits")),
    "sampling": ((Runner, "_history"), (sampler, "draw")),
    "commit": ((Scheduler, "commit"),),
    "cut windows": ((RequestStream, "windows_ready"),),
    "vocoder (inline)": ((InlineVocoder, "poll"),),
    "deliver": ((RequestStream, "deliver"),),
}


def profile_engine(engine: Engine, requests: Sequence[SpeechRequest]) -> dict[str, Any]:
    """Three passes over the requests, a table from each. Returns the phases' times as plain data."""
    engine.warm_up()
    phases = _phase_pass(engine, requests)
    _python_pass(engine, requests)
    _torch_pass(engine, requests)
    return phases


def _phase_pass(engine: Engine, requests: Sequence[SpeechRequest]) -> dict[str, Any]:
    clock = _Clock()
    steps_before = engine.stats().steps
    with contextlib.ExitStack() as stack:
        for name, places in {"step": STEP, **PHASES}.items():
            for place in places:
                stack.enter_context(_around(place, functools.partial(clock.measure, name)))
        engine.generate(requests, progress=False)
    num_steps = engine.stats().steps - steps_before
    total = clock.seconds["step"]
    rows = [(name, clock.seconds.get(name, 0.0)) for name in PHASES]
    rows.append(("everything else", total - sum(seconds for _, seconds in rows)))
    machine.print_table(
        f"wall time by phase: {num_steps} steps of {total / num_steps * 1e3:.2f} ms",
        ("phase", "ms a step", "% of step"),
        [(name, seconds / num_steps * 1e3, 100 * seconds / total) for name, seconds in rows],
    )
    return {"num_steps": num_steps, "step_ms": total / num_steps * 1e3} | {
        "phase_ms": {name: seconds / num_steps * 1e3 for name, seconds in rows}
    }


def _python_pass(engine: Engine, requests: Sequence[SpeechRequest]) -> None:
    profile = cProfile.Profile()

    @contextlib.contextmanager
    def watch() -> Iterator[None]:
        profile.enable()
        try:
            yield
        finally:
            profile.disable()

    with contextlib.ExitStack() as stack:
        for place in STEP:
            stack.enter_context(_around(place, watch))
        engine.generate(requests, progress=False)
    entries: dict[tuple[str, int, str], tuple[int, int, float, float, object]] = pstats.Stats(profile).stats  # type: ignore[attr-defined]
    total = sum(entry[2] for entry in entries.values())
    for title, column in (("own time", 2), ("time with callees", 3)):
        ranked = sorted(entries.items(), key=lambda item: -float(item[1][column]))[:16]  # type: ignore[arg-type]
        machine.print_table(
            f"Python functions by {title} (cProfile)",
            ("function", "calls", "own %", "with callees %"),
            [
                (_short_name(*where), calls, 100 * own / total, 100 * cumulative / total)
                for where, (_, calls, own, cumulative, _) in ranked
            ],
        )


def _torch_pass(engine: Engine, requests: Sequence[SpeechRequest], *, skip: int = 20, count: int = 20) -> None:
    """Operators of `count` steps. The torch profiler sees the thread that starts it, so it is started there."""
    profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
    num_steps = 0

    @contextlib.contextmanager
    def watch() -> Iterator[None]:
        nonlocal num_steps
        if num_steps == skip:
            profile.start()
        yield
        num_steps += 1
        if num_steps == skip + count:
            profile.stop()

    with _around((Engine, "_step"), watch):
        engine.generate(requests, progress=False)
    if num_steps < skip + count:
        raise RuntimeError(f"the requests took {num_steps} steps, the profile needs {skip + count}: make them longer")
    averages = profile.key_averages()
    total = sum(event.self_cpu_time_total for event in averages)
    ranked = sorted(averages, key=lambda event: -event.self_cpu_time_total)[:16]
    machine.print_table(
        f"torch operators over {count} steps, from step {skip} on",
        ("operator", "calls a step", "own us a call", "own %"),
        [
            (e.key, e.count / count, e.self_cpu_time_total / e.count, 100 * e.self_cpu_time_total / total)
            for e in ranked
        ],
    )


class _Clock:
    """Sums wall time by name. The engine's thread alone runs what it measures."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def measure(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin


def _around(
    place: Place, watch: Callable[[], contextlib.AbstractContextManager[None]]
) -> contextlib.AbstractContextManager[object]:
    """Run every call of a function within `watch()`, until the returned context ends."""
    owner, name = place
    original = getattr(owner, name)

    def watched(*args: Any) -> Any:
        with watch():
            return original(*args)

    return mock.patch.object(owner, name, watched)


def _short_name(file: str, line: int, function: str) -> str:
    path = Path(file)
    short = str(path.relative_to(machine.ROOT)) if path.is_relative_to(machine.ROOT) else "/".join(path.parts[-2:])
    return function if file == "~" else f"{short}:{line} {function}"
