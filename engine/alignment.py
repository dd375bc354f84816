"""When words are heard, from where a decoder looks in its text: a monotone path through cross-attention, found online.

A row's query draws the first code of the row's frame, so where it looks is what that frame says. Heads differ: some
follow the speech, some always look at one place, some everywhere. So a head counts for as much as its places tell of
the time so far (their mutual information), and of a row what is above the head's average. The path of most evidence
that never turns back and never runs faster than anybody speaks is taken, each place decided once `lag` more rows are
known. With the frame rule's longest delay as the lag, a frame's place is known when the frame is whole: words never
hold audio back.

Torch-free. Source: Viterbi 1967, with a fixed lag (Forney 1973).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence as Items

import numpy as np
from numpy.typing import NDArray

from declaim.engine.request import Word
from declaim.engine.words import TimedWord

PRIOR_ROWS = 10  # rows of nothing in a head's average, so that its first rows count
SILENCE = 1e-4  # nats squared: evidence of all heads together that is as good as none
CHANCE = 0.1  # of a row's evidence, how much is noise: what a place costs where nobody looks
SKIP_COST = 0.5  # nats, for an id that is passed over; no more than one is in a row
MARKS = 2  # ids before the first word that may be looked at: its speaker's mark, and a space
_STEPS = np.array([1, 0, 2])


class Aligner:
    """The words of one sequence, as far as they are spoken."""

    def __init__(self, words: Items[TimedWord], num_ids: int, *, lag: int) -> None:
        """words: in order, of a text of `num_ids` ids; one at least. What is before them (a voice prompt's text) is
        never spoken. lag: rows that a row waits for, until its place is decided."""
        self._words = tuple(words)
        self._lag = lag
        self._begin = max(0, words[0].first - MARKS)
        places = np.arange(num_ids - self._begin)
        self._scores = np.where(places <= words[0].first - self._begin, -SKIP_COST * places, -np.inf)
        self._came_from: deque[NDArray[np.intp]] = deque(maxlen=lag)  # of the newest rows, each place's best origin
        self._looked = np.zeros((1, num_ids))  # [heads, num_ids], the sum over rows
        self._uncertainty = np.zeros(1)  # [heads], the sum of the rows' entropies, in nats
        self._path: list[int] = []  # ids, of the rows that are decided
        self.num_rows = 0  # observed so far

    def observe(self, weights: NDArray[np.float64]) -> None:
        """Take in the next row's attention, a distribution for each head. weights: [heads, num_ids]."""
        news = np.maximum(weights - self._looked / (self.num_rows + PRIOR_ROWS), 0.0)
        self._looked = self._looked + weights
        self._uncertainty = self._uncertainty + _entropy(weights)
        self.num_rows += 1
        told = np.maximum(_entropy(self._looked / self.num_rows) - self._uncertainty / self.num_rows, 0.0)
        # Squared, so that the few heads that follow the speech outweigh the many that tell a little.
        evidence = (told[:, None] ** 2 * news).mean(0)
        self._advance(evidence / (evidence.sum() + SILENCE))
        if self.num_rows > self._lag:
            place = int(self._scores.argmax())
            for came_from in reversed(self._came_from):
                place = int(came_from[place])
            self._path.append(max(self._begin + place, self._path[-1] if self._path else 0))

    def words(self, frame_rate_hz: float) -> tuple[Word, ...]:
        """The words that have begun, in seconds from the first row's frame. One that has not ended yet ends, for now,
        with the last frame that is decided."""
        begins = np.searchsorted(self._path, [word.first for word in self._words])
        ends = np.searchsorted(self._path, [word.last for word in self._words])
        return tuple(
            Word(word.text, _seconds(int(begin), frame_rate_hz), _seconds(int(end), frame_rate_hz))
            for word, begin, end in zip(self._words, begins, ends, strict=True)
            if begin < len(self._path)
        )

    def _advance(self, evidence: NDArray[np.float64]) -> None:
        """One step of the search. evidence: [num_ids], a distribution, or less."""
        # To each place from the one before, itself, and over the one before; of equals the first: who waits moves late.
        steps = np.full((3, len(self._scores)), -np.inf)
        steps[0, 1:] = self._scores[:-1]
        steps[1] = self._scores
        steps[2, 2:] = self._scores[:-2] - SKIP_COST
        best = steps.argmax(0)
        places = np.arange(len(best))
        scores = steps[best, places] + np.log((1 - CHANCE) * evidence[self._begin :] + CHANCE / len(evidence))
        self._scores = scores - scores.max()
        self._came_from.append(places - _STEPS[best])


def _entropy(weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """In nats. weights: [heads, num_ids], distributions -> [heads]."""
    entropy: NDArray[np.float64] = -(weights * np.log(np.maximum(weights, 1e-9))).sum(-1)
    return entropy


def _seconds(frame: int, frame_rate_hz: float) -> float:
    """When a frame begins, never rounded into the frame before."""
    time = frame / frame_rate_hz
    return time if time * frame_rate_hz >= frame else math.nextafter(time, math.inf)
