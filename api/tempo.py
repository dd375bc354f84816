"""Faster or slower speech at the same pitch, while it streams.

Owns the time stretch of what a model without a pace of its own has made. Source: FFmpeg's atempo filter (WSOLA).
"""

from __future__ import annotations

from fractions import Fraction

import av
import av.error
import numpy as np
from av.filter import Graph
from numpy.typing import NDArray

# One filter leaves samples out above 2 and takes nothing below 0.5: beyond, several in a row.
_MAX_STEP = 2.0
# What atempo gives can depend on how its input is cut, so it is always cut the same way.
_FRAME_S = 0.04


def _steps(speed: float) -> list[float]:
    """Factors between 0.5 and 2 whose product is `speed`."""
    steps = []
    while speed > _MAX_STEP:
        steps.append(_MAX_STEP)
        speed /= _MAX_STEP
    while speed < 1.0 / _MAX_STEP:
        steps.append(1.0 / _MAX_STEP)
        speed *= _MAX_STEP
    return [*steps, speed]


class Tempo:
    """Stretches one stream by a fixed factor: S samples become round(S / speed), whatever the chunks."""

    def __init__(self, speed: float, *, sample_rate_hz: int) -> None:
        """speed: 0.25 to 4; 2 is twice as fast."""
        self._speed = speed
        self._rate_hz = sample_rate_hz
        self._frame = round(_FRAME_S * sample_rate_hz)
        self._held: NDArray[np.float32] = np.zeros(0, np.float32)
        self._num_in = 0
        self._num_out = 0
        graph = Graph()
        self._source = graph.add_abuffer(
            sample_rate=sample_rate_hz, format="flt", layout="mono", time_base=Fraction(1, sample_rate_hz)
        )
        filters = [graph.add("atempo", f"{step:.9f}") for step in _steps(speed)]
        self._sink = graph.add("abuffersink")
        chain = [self._source, *filters, self._sink]
        for first, second in zip(chain[:-1], chain[1:], strict=True):
            first.link_to(second)
        graph.configure()
        self._graph = graph  # the contexts live no longer than their graph

    def push(self, audio: NDArray[np.float32]) -> NDArray[np.float32]:
        """Take float32 [S]; return what of the stretched audio is ready."""
        held = np.concatenate([self._held, audio])
        num_whole = len(held) // self._frame * self._frame
        self._held = held[num_whole:]
        pieces = [self._through(held[first : first + self._frame]) for first in range(0, num_whole, self._frame)]
        return np.concatenate(pieces) if pieces else np.zeros(0, np.float32)

    def finish(self) -> NDArray[np.float32]:
        """The rest, cut or filled with silence to the exact length."""
        held, self._held = self._held, np.zeros(0, np.float32)
        num_sent = self._num_out
        pieces = [self._through(held)] if len(held) else []
        self._source.push(None)
        rest = np.concatenate([*pieces, self._drain()])
        num_left = max(0, round(self._num_in / self._speed) - num_sent)
        return np.pad(rest[:num_left], (0, max(0, num_left - len(rest))))

    def _through(self, audio: NDArray[np.float32]) -> NDArray[np.float32]:
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(audio).reshape(1, -1), "flt", "mono")
        frame.sample_rate = self._rate_hz
        frame.pts = self._num_in
        self._num_in += len(audio)
        self._source.push(frame)
        ready = self._drain()
        self._num_out += len(ready)
        return ready

    def _drain(self) -> NDArray[np.float32]:
        pieces = []
        while True:
            try:
                frame = self._sink.pull()
            except (av.error.BlockingIOError, av.error.EOFError):
                break
            if isinstance(frame, av.AudioFrame):
                pieces.append(frame.to_ndarray().reshape(-1).astype(np.float32, copy=True))
        return np.concatenate(pieces) if pieces else np.zeros(0, np.float32)
