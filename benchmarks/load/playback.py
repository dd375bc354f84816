"""What a listener hears of a stream: when the first sound, and where the player runs dry.

Owns the decoding of 16-bit PCM, the search for the first audible sample, and the imagined player.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

AUDIBLE_DBFS = -50.0
AUDIBLE_WINDOW_S = 0.01
MIN_STALL_S = 0.005  # shorter ones are a scheduler's jitter, and no player is that empty
WAV_HEADER_BYTES = 44


@dataclass(slots=True)
class Listener:
    """Takes a response's bytes as they come. Times are seconds on the caller's clock.

    arrivals: (time, seconds of audio received until then), one for each piece that brought samples.
    onset_s: where the first audible window of AUDIBLE_WINDOW_S begins in the audio; None while all is silent.
    """

    sample_rate_hz: int
    header_bytes: int = 0
    arrivals: list[tuple[float, float]] = field(default_factory=list)
    onset_s: float | None = None
    _rest: bytes = b""
    _num_samples: int = 0
    _tail: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))

    def feed(self, data: bytes, now_s: float) -> None:
        """Signed 16-bit little-endian mono, cut anywhere; `header_bytes` of the first are not samples."""
        if self.header_bytes:
            skipped = min(self.header_bytes, len(data))
            self.header_bytes -= skipped
            data = data[skipped:]
        data = self._rest + data
        whole = len(data) - len(data) % 2
        self._rest = data[whole:]
        samples = np.frombuffer(data[:whole], "<i2").astype(np.float32) / 32768.0
        if not len(samples):
            return
        if self.onset_s is None:
            self._find_onset(samples)
        self._num_samples += len(samples)
        self.arrivals.append((now_s, self._num_samples / self.sample_rate_hz))

    @property
    def audio_s(self) -> float:
        return self._num_samples / self.sample_rate_hz

    def first_audible_s(self) -> float | None:
        """When the first sound is heard if playing starts with the first sample: leading silence is waited for."""
        if self.onset_s is None:
            return None
        came_s = next(time_s for time_s, until_s in self.arrivals if until_s > self.onset_s)
        return max(came_s, self.arrivals[0][0] + self.onset_s)

    def gaps_s(self) -> list[float]:
        """Between consecutive pieces."""
        times = [time_s for time_s, _ in self.arrivals]
        return [later - sooner for sooner, later in zip(times, times[1:], strict=False)]

    def _find_onset(self, samples: np.ndarray) -> None:
        window = max(1, round(AUDIBLE_WINDOW_S * self.sample_rate_hz))
        pending = np.concatenate([self._tail, samples])
        begin = self._num_samples - len(self._tail)
        num_windows = len(pending) // window
        levels = np.sqrt(np.square(pending[: num_windows * window]).reshape(num_windows, window).mean(axis=1))
        loud = np.flatnonzero(levels > 10 ** (AUDIBLE_DBFS / 20))
        if len(loud):
            self.onset_s = (begin + int(loud[0]) * window) / self.sample_rate_hz
        self._tail = pending[num_windows * window :]


@dataclass(frozen=True, slots=True)
class Underruns:
    """count: times the player ran dry before the end. stalled_s: how long it was silent for it, in all."""

    count: int
    stalled_s: float


def underruns(arrivals: list[tuple[float, float]], *, buffer_s: float) -> Underruns:
    """Play in real time once `buffer_s` of audio is there (or all of it), and again at once after running dry."""
    if not arrivals:
        return Underruns(0, 0.0)
    start_s = next((time_s for time_s, until_s in arrivals if until_s >= buffer_s), arrivals[-1][0])
    count, stalled_s, received_s = 0, 0.0, 0.0
    for time_s, until_s in arrivals:
        dry_s = start_s + stalled_s + received_s  # when what had come before is played
        if time_s > max(dry_s, start_s) + MIN_STALL_S:
            count += 1
            stalled_s += time_s - max(dry_s, start_s)
        received_s = until_s
    return Underruns(count, stalled_s)
