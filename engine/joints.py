"""Where two segments meet: the silence that a model leaves at a segment's ends, cut to a pause as a speaker makes it.

A segment ends with a rest and the next one begins with another, together most of a second. Of the silence after a
segment's last sound so much is kept, of that before its first sound so much, and what is more is taken out. What is
taken out depends on the segment's own samples alone, however they are cut into windows, and nothing that was given out
is ever changed: silence that may turn out to be the segment's end is held back, and given out late if speech goes on.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

# Full scale is 1: what a model leaves between sentences is below a third of this, the softest consonant above.
_SILENT = 0.01
_HEAD_S = 0.1
_TAIL_S = 0.25
# After the last sentence of a paragraph.
_PARAGRAPH_TAIL_S = 0.5


class Joint:
    """One segment's samples on their way out. has_begun: whether it is known how much is taken off its beginning."""

    def __init__(self, rate_hz: int, *, is_first: bool, is_last: bool, ends_paragraph: bool = False) -> None:
        """is_first, is_last: of the request's segments, whose outer ends are left as they are."""
        self.has_begun = is_first
        self._rate_hz = rate_hz
        self._max_head = round(_HEAD_S * rate_hz)
        self._max_tail = None if is_last else round((_PARAGRAPH_TAIL_S if ends_paragraph else _TAIL_S) * rate_hz)
        self._held: NDArray[np.float32] = np.zeros(0, dtype=np.float32)
        self._num_cut = 0  # samples taken off the beginning
        self._num_rest: int | None = None  # samples given since the last sound; None before the first

    def feed(self, samples: NDArray[np.float32], *, is_end: bool) -> NDArray[np.float32]:
        """The next samples of the segment, float32 [S]; what of them, and of those held before, is given out now."""
        samples = np.concatenate((self._held, samples))
        sounds = np.flatnonzero(np.abs(samples) > _SILENT)
        if not self.has_begun:
            first = int(sounds[0]) if len(sounds) else len(samples)
            num_cut = max(0, first - self._max_head)
            self._num_cut += num_cut
            samples, sounds = samples[num_cut:], sounds - num_cut
            self.has_begun = is_end or len(sounds) > 0
        num_given = self._num_giveable(samples, sounds) if self.has_begun else 0
        given, self._held = samples[:num_given], samples[num_given:]
        if len(sounds):
            self._num_rest = num_given - int(sounds[-1]) - 1
        elif self._num_rest is not None:
            self._num_rest += num_given
        return given

    def _num_giveable(self, samples: NDArray[np.float32], sounds: NDArray[np.intp]) -> int:
        """How many samples cannot belong to a rest at the segment's end that is too long."""
        if self._max_tail is None or (self._num_rest is None and not len(sounds)):
            return len(samples)
        end_of_sound = int(sounds[-1]) + 1 if len(sounds) else -(self._num_rest or 0)
        return min(len(samples), end_of_sound + self._max_tail)

    def heard_s(self, at_s: float) -> float:
        """When a time of the segment as the model made it is heard, in seconds from its beginning as it is given out;
        only once `has_begun`."""
        return max(0.0, at_s - self._num_cut / self._rate_hz)
