"""Speech that runs away or stays out: a segment's length against what its text can take.

For families that draw their own end. One that babbles on is cut off at the longest its text can take; that, or an end
before the shortest, is tried once more with another seed where nobody has heard it yet.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Literal

from declaim.engine.request import ResolvedSampling
from declaim.engine.sequence import Prompt, Sequence
from declaim.engine.spec import ModelSpec
from declaim.engine.words import UNSPACED

Verdict = Literal["runaway", "missing"]

SLACK_S = 3.0  # silence, laughter, a slow start: beyond what the characters take
RETRY_STRIDE = 0x2545F4914F6CDD1D

_TAG = re.compile(r"\[[^\[\]]{1,20}\]")  # speakers and the like are not said
# How many letters' time a character takes: "7" may be read as "seventy", and a Chinese character is a syllable.
_DIGIT, _SYLLABLE, _LETTER = re.compile(r"\d"), re.compile(f"[{UNSPACED}]"), re.compile(rf"[^\W\d_{UNSPACED}]")
_LETTERS_PER_DIGIT, _LETTERS_PER_SYLLABLE = 5, 4


@dataclass(frozen=True, slots=True)
class Guard:
    """The frames that a segment can plausibly have, both bounds included."""

    least_frames: int
    most_frames: int

    @classmethod
    def of(cls, text: str, spec: ModelSpec, *, speed: float) -> Guard | None:
        """Bounds for a segment's text; None for a family that knows the length."""
        if spec.seconds_per_char is None:
            return None
        num_chars = num_letters(text)
        least, most = (num_chars * seconds / speed * spec.codec.frame_rate_hz for seconds in spec.seconds_per_char)
        return cls(max(1, int(least)), int(most + SLACK_S / speed * spec.codec.frame_rate_hz))

    def limit(self, prompt: Prompt) -> Prompt:
        """The prompt, cut off where speech would run away."""
        return dataclasses.replace(prompt, max_frames=min(prompt.max_frames, self.most_frames))

    def verdict(self, sequence: Sequence) -> Verdict | None:
        """What is wrong with a sequence that has ended."""
        num_frames = sequence.num_ready_frames
        if sequence.finish_reason == "length" and num_frames >= self.most_frames:
            return "runaway"
        if sequence.finish_reason == "stop" and num_frames < self.least_frames:
            return "missing"
        return None


def num_letters(text: str) -> int:
    """How many letters take as long to say as the text does, roughly."""
    said = _TAG.sub("", text)
    digits, syllables = len(_DIGIT.findall(said)), len(_SYLLABLE.findall(said))
    return len(_LETTER.findall(said)) + _LETTERS_PER_DIGIT * digits + _LETTERS_PER_SYLLABLE * syllables


def with_another_seed(sampling: ResolvedSampling) -> ResolvedSampling:
    """The same for the same seed, so that a request is spoken alike each time it is retried."""
    return dataclasses.replace(sampling, seed=(sampling.seed + RETRY_STRIDE) % 2**63)
