"""How many listeners can be served as fast as they listen, judged by how long steps have taken lately. Torch-free.

A step gives each sequence in it one frame, so a stream keeps up while steps are shorter than a frame lasts. How long a
step takes grows with the sequences in it, all but linearly; what else goes on between steps (prefill, the text side,
decoding in this process) is part of the time, and so are other programs on the machine.
"""

from __future__ import annotations

import math

# Of a frame's duration, what steps may take. Windows grow by half from one to the next (chunks.py), so a stream that is
# made less than 1.5 times as fast as it plays runs dry between them; the rest is for what a line does not say, such as
# a window decoded or a text prepared between two steps: with 0.6 half the players with 100 ms in hand ran dry (LOG.md).
HEADROOM = 0.45
MEMORY_STEPS = 400  # older steps count for less than 1/e
MIN_STEPS = 50
MIN_VARIANCE = 0.5  # of the number of sequences: below it the line's slope is noise
MIN_CROWD = 4  # a line through smaller steps does not reach far enough
CROWD_STEPS = 4000  # how long the largest crowd is remembered
MAX_WAIT_S = 0.5  # for a place, on average: what a listener notices least
# Of those who came lately, how many may have found all places taken. Waiting evens out chance; where more come than can
# be served, who waits is late and helps nobody.
MAX_CROWDED = 0.25
MEMORY_ARRIVALS = 10
MEMORY_LISTENERS = 20


class Capacity:
    """A line through (sequences in a step, seconds it took), and where it crosses the duration of a frame.

    Owned by the engine thread; its two numbers may be read by any, and arrivals are recorded by one at a time.
    """

    def __init__(self, *, frame_s: float, max_batch: int) -> None:
        self._frame_s = HEADROOM * frame_s
        self._max_batch = max_batch
        self._num_steps = 0
        self._weight = self._count = self._time = self._count_count = self._count_time = 0.0
        self._crowd = 0.0
        self._line = (0.0, 0.0)
        self._listening_s = 0.0  # how long listeners hold a place, on average; 0 before the first has left
        self._crowded = 0.0
        self.num_listeners: int | None = None  # None while too little is known, or where not even one can keep up

    def record(self, num_sequences: int, took_s: float) -> None:
        """One step, with all the engine did until the next."""
        kept = 1 - 1 / MEMORY_STEPS
        self._weight = kept * self._weight + 1
        self._count = kept * self._count + num_sequences
        self._time = kept * self._time + took_s
        self._count_count = kept * self._count_count + num_sequences**2
        self._count_time = kept * self._count_time + num_sequences * took_s
        self._crowd = max(float(num_sequences), self._crowd * (1 - 1 / CROWD_STEPS))
        self._num_steps += 1
        self.num_listeners = self._judge() if self._num_steps >= MIN_STEPS else None

    def record_listener(self, lasted_s: float) -> None:
        """Somebody who listened has left, so long after being let in."""
        share = 1 / MEMORY_LISTENERS if self._listening_s else 1.0
        self._listening_s += share * (lasted_s - self._listening_s)

    def record_arrival(self, *, is_full: bool) -> None:
        """Somebody came who wants to listen, and found places or none."""
        self._crowded += (is_full - self._crowded) / MEMORY_ARRIVALS

    @property
    def num_waiters(self) -> int:
        """How many may wait for a place: whose turn is likely to come soon, where chance brings so many at a time."""
        most = self.num_listeners
        if most is None or not self._listening_s or self._crowded > MAX_CROWDED:
            return 0
        return math.floor(MAX_WAIT_S * most / self._listening_s)

    def _judge(self) -> int | None:
        base, slope = self._fit()
        if not 0 < base + slope <= self._frame_s:
            return None
        fastest = base + slope * self._max_batch
        if fastest <= self._frame_s:  # a full batch keeps up with more streams than it holds, in turns
            return max(self._max_batch, math.floor(self._max_batch * self._frame_s / fastest))
        return math.floor((self._frame_s - base) / slope)

    def _fit(self) -> tuple[float, float]:
        """The line: seconds of a step, and of each sequence in it; both 0 while nothing is known.

        A flood holds the crowd where it is: then the last line is kept, as much higher or lower as the steps now are.
        """
        count, time = self._count / self._weight, self._time / self._weight
        variance = self._count_count / self._weight - count**2
        base, slope = self._line
        if variance < MIN_VARIANCE or math.ceil(self._crowd) < MIN_CROWD:
            scale = time / (base + slope * count) if base + slope else 0.0
            return scale * base, scale * slope
        slope = max(0.0, (self._count_time / self._weight - count * time) / variance)
        base = time - slope * count
        self._line = (base, slope) if base >= 0 else (0.0, time / count)
        return self._line
