"""A sequence: one segment's progress through the engine. Torch-free.

All mutable state of a segment lives here. Quantities that follow from others are properties.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from declaim.engine import frames
from declaim.engine.request import FinishReason, ResolvedSampling, Word
from declaim.engine.spec import FrameRule
from declaim.engine.words import TimedWord


@dataclass(slots=True)
class Playback:
    """What the listener of one request has: shared by the request's sequences, written by its stream.

    paced: somebody listens while the audio is made. Otherwise only the whole matters.
    """

    paced: bool
    first_audio_at: float | None = None
    delivered_s: float = 0.0
    segment: int = 0  # the segment whose audio is delivered next

    def lead_s(self, now: float) -> float:
        """Seconds of audio delivered and not yet played; negative once the listener has run dry."""
        if self.first_audio_at is None:
            return 0.0
        return self.delivered_s - (now - self.first_audio_at)


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """One segment, ready to be queued: plain data, no tensor.

    prefix_len: positions before row 0, the same for every branch. cross_len: encoder positions of branch 0.
    prompt_frames: int32 [P, Q], the voice prompt. max_frames: the most new frames the segment may make.
    words: those whose times are asked for. timbre: what the codec speaks it in.
    """

    text_ids: tuple[int, ...]
    prefix_len: int
    cross_len: int
    prompt_frames: NDArray[np.int32]
    max_frames: int
    num_branches: int
    speed: float
    words: tuple[TimedWord, ...] = field(default=(), kw_only=True)
    timbre: int = field(default=0, kw_only=True)


@dataclass(frozen=True, slots=True, eq=False)
class SequenceInput:
    """What a sequence is made from, and never changes. segment: its place in the request.

    tenant, weight, tier: who asks, and how the scheduler shares frames out between those who do (scheduler.py).
    """

    sequence_id: int
    request_id: str
    segment: int
    sampling: ResolvedSampling
    prompt: Prompt
    arrived_at: float
    tenant: str = ""
    weight: float = 1.0
    tier: Literal["priority", "default", "flex"] = "default"


@dataclass(slots=True, eq=False)
class Sequence:
    """One segment in the engine."""

    given: SequenceInput
    rule: FrameRule
    playback: Playback

    # set by the scheduler
    block_tables: list[list[int]] = field(default_factory=list)  # one a branch
    cross_blocks: list[int] = field(default_factory=list)
    num_cached: int = 0  # positions whose K and V are in the cache, of every branch
    is_admitted: bool = False
    num_preemptions: int = 0

    # set by the scheduler and `append`
    rows: list[NDArray[np.int32]] = field(init=False)  # those known so far, [Q] each
    num_planned: int = field(init=False)  # they, and rows being drawn: what can be planned with

    # set by `append`
    end_row: int | None = None
    finish_reason: FinishReason | None = None

    # set by `time_words`
    words: tuple[Word, ...] = ()  # seconds from the segment's start

    # set by its stream
    num_rows_wanted: int = 0  # with fewer known there is nothing new to decode, unless the audio has ended

    # set once below
    forced: NDArray[np.int32] = field(init=False)
    last_end_row: int = field(init=False)  # where the audio ends if nothing ends it before

    def __post_init__(self) -> None:
        num_prompt = len(self.prompt.prompt_frames)
        self.forced = frames.forced_rows(self.rule, self.prompt.prompt_frames)
        self.last_end_row = num_prompt + self.prompt.max_frames + 1
        self.rows = list(self.forced[: num_prompt + 1])
        self.num_planned = len(self.rows)

    @property
    def sequence_id(self) -> int:
        return self.given.sequence_id

    @property
    def prompt(self) -> Prompt:
        return self.given.prompt

    @property
    def num_branches(self) -> int:
        return self.given.prompt.num_branches

    @property
    def max_rows(self) -> int:
        """Rows of the finished grid, at most."""
        return self.last_end_row + self.rule.num_drain_rows

    @property
    def max_positions(self) -> int:
        """Positions that are ever computed, at most: the last row is drawn and never fed back."""
        return self.prompt.prefix_len + self.last_end_row + max(1, self.rule.num_drain_rows) - 1

    @property
    def num_rows(self) -> int:
        return len(self.rows)

    @property
    def num_in_flight(self) -> int:
        """Rows being drawn: their codes are not known yet."""
        return self.num_planned - len(self.rows)

    @property
    def num_positions(self) -> int:
        """Positions known so far, those of rows in flight included."""
        return self.prompt.prefix_len + self.num_planned

    @property
    def num_pending(self) -> int:
        """Positions known and not in the cache: 1 while decoding, more before the first draw or after a preemption."""
        return self.num_positions - self.num_cached

    @property
    def is_done(self) -> bool:
        return self.end_row is not None and self.num_rows >= self.end_row + self.rule.num_drain_rows

    @property
    def can_step(self) -> bool:
        """Whether there is a step to plan. Rows in flight may be the last ones; and only a step that runs right after
        the one that draws them finds their codes where it needs them."""
        num_closing = self.rule.num_drain_rows
        if self.end_row is None:  # that it ends there has to be drawn, even if that row is not part of it
            num_closing = max(1, num_closing)
        if self.num_planned >= self.last_row + num_closing:
            return False
        return self.num_in_flight == 0 or self.num_pending == 1

    @property
    def last_row(self) -> int:
        """Where the audio ends, or where it does if nothing ends it before."""
        return self.last_end_row if self.end_row is None else self.end_row

    @property
    def num_prompt_frames(self) -> int:
        return len(self.prompt.prompt_frames)

    def num_blocked(self, scan_block: int) -> int:
        """How many positions are whole blocks of the prompt, which is what is known before anything is drawn."""
        num_known = self.prompt.prefix_len + self.num_prompt_frames + 1
        return num_known - num_known % scan_block

    @property
    def num_ready_frames(self) -> int:
        return frames.num_ready_frames(
            self.rule, self.num_rows, num_prompt_frames=self.num_prompt_frames, end_row=self.end_row
        )

    def set_num_frames(self, num_frames: int) -> None:
        """Fix the length before the first draw, where the family knows it; it is cut to what the request allows."""
        self.last_end_row = self.num_prompt_frames + min(num_frames, self.prompt.max_frames) + 1
        self.end_row = self.last_end_row
        self.finish_reason = "stop" if num_frames <= self.prompt.max_frames else "length"

    def time_words(self, durations_s: NDArray[np.float32]) -> None:
        """Tell when the prompt's words are heard, of how long each of its ids is. durations_s: [len(text_ids)]."""
        ends = np.concatenate([[0.0], np.cumsum(durations_s, dtype=np.float64)])
        self.words = tuple(
            Word(word.text, float(ends[word.first]), float(ends[word.last])) for word in self.prompt.words
        )

    def append(self, drawn: NDArray[np.int32]) -> None:
        """Add the row that was in flight. drawn: [Q]."""
        row = self.num_rows
        if self.end_row is None:
            if frames.draws_end(self.rule, drawn):
                self.end_row, self.finish_reason = row, "stop"
            elif row == self.last_end_row:
                self.end_row, self.finish_reason = row, "length"
        if self.is_done:  # a rule without drain rows: the row that ends the audio is not part of it
            self.num_planned -= 1
            return
        end_row = self.end_row if self.end_row is not None and row >= self.end_row else None
        self.rows.append(frames.next_row(self.rule, drawn, row, end_row=end_row, forced=self.forced))

    def grid(self, first: int, last: int) -> NDArray[np.int32]:
        """Rows first .. last (exclusive), as far as they are known. [rows, Q]."""
        return np.array(self.rows[first:last], dtype=np.int32).reshape(-1, self.rule.num_codebooks)

    def codes(self, first: int, last: int) -> NDArray[np.int32]:
        """New frames first .. last (exclusive), delay undone. [last - first, Q]."""
        begin = self.num_prompt_frames + 1 + first
        return frames.undelay(self.rule, self.grid(begin, begin + last - first + self.rule.max_delay))
