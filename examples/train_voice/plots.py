"""What a run looks like: loss curves, and spectrograms of the voice beside its teacher, as PNG."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import matplotlib
import numpy as np
from numpy.typing import NDArray

matplotlib.use("Agg")

from matplotlib import pyplot

SMOOTHED_OVER = 50  # steps


def plot_losses(log: Path, target: Path) -> None:
    """Every loss of a log of JSON lines, as it was and smoothed."""
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    names = [name for name in rows[-1] if name not in ("step", "time")]
    figure, axes = pyplot.subplots(len(names), 1, figsize=(9, 2.2 * len(names)), sharex=True, squeeze=False)
    for axis, name in zip(axes[:, 0], names, strict=True):
        points = [(row["step"], row[name]) for row in rows if name in row]
        steps, values = np.array(points).T
        axis.plot(steps, values, linewidth=0.4, alpha=0.5)
        width = min(SMOOTHED_OVER, len(values))
        axis.plot(steps[width - 1 :], np.convolve(values, np.ones(width) / width, "valid"), linewidth=1.5)
        axis.set_ylabel(name)
    axes[-1, 0].set_xlabel("step")
    _save(figure, target)


def plot_spectrograms(audios: Mapping[str, NDArray[np.float32]], target: Path, *, sample_rate_hz: int) -> None:
    """One row a name, to 8 kHz, in decibels."""
    figure, axes = pyplot.subplots(len(audios), 1, figsize=(10, 2.4 * len(audios)), squeeze=False)
    for axis, (name, audio) in zip(axes[:, 0], audios.items(), strict=True):
        padded = np.pad(audio, (0, max(0, 1024 - len(audio)))) + 1e-7 * np.random.default_rng(0).standard_normal(
            max(1024, len(audio))
        )
        axis.specgram(padded, NFFT=1024, noverlap=768, Fs=sample_rate_hz, vmin=-140, vmax=-40)
        axis.set_ylim(0, 8000)
        axis.set_ylabel(name)
    axes[-1, 0].set_xlabel("seconds")
    _save(figure, target)


def _save(figure: pyplot.Figure, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(target, dpi=80)
    pyplot.close(figure)
