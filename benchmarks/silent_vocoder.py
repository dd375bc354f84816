"""A vocoder that makes silence at once, for benchmarks of the making of codes alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from declaim.engine.vocoder.base import DecodedWindow, Wake, Window


class SilentVocoder:
    """Keeps the vocoder's contract. hop: samples of a frame."""

    def __init__(self, hop: int, *, wake: Wake) -> None:
        self._hop = hop
        self._wake = wake
        self._windows: list[Window] = []

    def submit(self, windows: Sequence[Window]) -> None:
        self._windows += windows
        if windows:
            self._wake()

    def poll(self) -> list[DecodedWindow]:
        windows, self._windows = self._windows, []
        return [
            DecodedWindow(w.sequence_id, w.index, np.zeros(w.num_frames * self._hop, dtype=np.float32)) for w in windows
        ]

    def cancel(self, sequence_id: int) -> None:
        self._windows = [window for window in self._windows if window.sequence_id != sequence_id]

    @property
    def num_pending(self) -> int:
        return len(self._windows)

    def close(self) -> None:
        self._windows.clear()
