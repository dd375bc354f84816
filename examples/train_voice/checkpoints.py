"""Checkpoints that a cut-off run goes on from, and the log of its losses."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from pause import wait_while_paused

SAVE_EVERY_S = 60.0


class Run:
    """Where a training run stands: its step, its log, and when it was last saved.

    state: everything with a `state_dict` that the run needs to go on.
    """

    def __init__(self, folder: Path, name: str, state: Mapping[str, torch.nn.Module | torch.optim.Optimizer]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path, self.log_path = folder / f"{name}.pt", folder / f"{name}.jsonl"
        self._state = dict(state)
        self.step, self._trained_s = 0, 0.0
        if self._path.exists():
            stored = torch.load(self._path, map_location="cpu", weights_only=True)
            self.step, self._trained_s = int(stored["step"]), float(stored.get("trained_s", 0.0))
            for part, values in self._state.items():
                values.load_state_dict(stored[part])
        self._saved = self._spoke = self._counted = time.monotonic()
        self._began, self._first = self._saved, self.step

    def progress(self, *, steps: int, minutes: float) -> float:
        """0 at the first step, 1 or more at the end: after so many steps or so long, whichever comes first.

        Time counts over all runs from the first on; that in which training slept or was cut off does not.
        """
        return max(self.step / steps, self._trained_s / (60 * minutes))

    def save(self) -> None:
        """Whole or not at all: written beside the old one, then renamed."""
        partial = self._path.with_suffix(".partial")
        run = {"step": self.step, "trained_s": self._trained_s}
        torch.save(run | {part: values.state_dict() for part, values in self._state.items()}, partial)
        os.replace(partial, self._path)
        self._saved = time.monotonic()

    def finish_step(self, losses: Mapping[str, float], *, steps: int, minutes: float) -> None:
        """Count a step, log it, print a line now and then, save once a minute, and give way where asked to."""
        self.step += 1
        with self.log_path.open("a") as file:
            file.write(json.dumps({"step": self.step, "time": round(time.time(), 1)} | dict(losses)) + "\n")
        now = time.monotonic()
        self._trained_s += now - self._counted
        done = self.progress(steps=steps, minutes=minutes) >= 1
        if now - self._spoke > 10 or done:
            self._spoke = now
            each = (now - self._began) / (self.step - self._first)
            left = min(each * (steps - self.step) / 60, minutes - self._trained_s / 60)
            shown = " ".join(f"{name} {value:.3f}" for name, value in losses.items())
            print(f"step {self.step}/{steps} {each:.2f} s a step, {left:.0f} min left: {shown}", flush=True)
        if now - self._saved > SAVE_EVERY_S or done:
            self.save()
        wait_while_paused()
        self._counted = time.monotonic()
