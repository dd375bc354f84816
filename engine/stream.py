"""One request's way out: from its sequences' frames to windows, and from decoded windows to chunks in order.

Owned by the engine thread. It decides what is decoded next and what is delivered next, and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from declaim.engine.chunks import ChunkPlanner, ChunkPolicy, Cut
from declaim.engine.errors import DeclaimError
from declaim.engine.frames import num_rows_for
from declaim.engine.guard import Guard, Verdict
from declaim.engine.joints import Joint
from declaim.engine.request import AudioChunk, FinishReason, Word
from declaim.engine.sequence import Playback, Sequence
from declaim.engine.spec import CodecSpec
from declaim.engine.vocoder.base import DecodedWindow, Window


@dataclass(frozen=True, slots=True, eq=False)
class Finished:
    """The last event of a request. codes: int32 [num_frames, Q] of what was delivered; error with reason "error"."""

    finish_reason: FinishReason
    codes: NDArray[np.int32]
    error: DeclaimError | None


Event = AudioChunk | Finished


class Sink(Protocol):
    """Where a request's events go. `deliver` is called from the engine thread and must not block."""

    @property
    def is_abandoned(self) -> bool:
        """True once nobody will read the events: the request is then cancelled."""
        ...

    def deliver(self, event: Event) -> None: ...


class RequestStream:
    """The sequences of one request, in the order in which they are heard."""

    def __init__(
        self,
        request_id: str,
        sequences: Items[Sequence],
        *,
        playback: Playback,
        sink: Sink,
        codec: CodecSpec,
        policy: ChunkPolicy,
        max_frames: int | None,
        guards: Items[Guard | None],
        ends_paragraph: Items[bool] = (),
    ) -> None:
        """max_frames: the most frames of all sequences together; None where each has its own limit only. guards: what
        each sequence's length may be, where the family does not know it. ends_paragraph: after which segments the pause
        is a paragraph's; none where it is left out."""
        self.request_id = request_id
        self.sequences = tuple(sequences)
        self.sink = sink
        self.playback = playback
        self._codec = codec
        self._max_frames = max_frames
        self._policy = policy
        self._guards = tuple(guards)
        self._restarted: set[int] = set()  # segments that are at their second seed
        self._planners = [ChunkPlanner(policy, codec) for _ in sequences]
        self._cuts: list[dict[int, Cut]] = [{} for _ in sequences]
        self._decoded: list[dict[int, NDArray[np.float32]]] = [{} for _ in sequences]
        self._next_index = 0  # of the window delivered next, within sequence `playback.segment`
        self._num_delivered = 0
        self._segment_first = 0  # frames delivered before the segment that is delivered next
        self._ends_paragraph = tuple(ends_paragraph) or (False,) * len(self.sequences)
        self._joint = self._joint_of(0)  # of the segment that is delivered next
        self._segment_begin_s = 0.0  # when that segment is heard
        self._words_begin_s = 0.0  # none of its words is told to begin before this: the words before it end here
        self._words_end_s = 0.0  # where all words end that were told, or wait to be
        self._num_untold = 0  # frames of chunks that gave no samples
        self._untold_words: list[Word] = []
        self._word_frame = 0  # of the segment: words that begin before it were told, or wait to be
        self._delivered_codes: list[NDArray[np.int32]] = []
        self.finish_reason: FinishReason | None = None
        self.num_underruns = 0  # times that the listener had heard all there was

    def verdict(self, sequence: Sequence) -> Verdict | None:
        """What is wrong with the length of a sequence that has ended."""
        guard = self._guards[sequence.given.segment]
        return None if guard is None else guard.verdict(sequence)

    def may_restart(self, segment: int) -> bool:
        """Whether a segment can be spoken anew: once, and if nobody has heard any of it."""
        is_heard = segment < self.playback.segment or (segment == self.playback.segment and self._next_index > 0)
        return not is_heard and segment not in self._restarted

    def restart(self, sequence: Sequence) -> None:
        """Forget what a segment's sequence has made, and take this one in its place."""
        segment = sequence.given.segment
        self._restarted.add(segment)
        self.sequences = (*self.sequences[:segment], sequence, *self.sequences[segment + 1 :])
        self._planners[segment] = ChunkPlanner(self._policy, self._codec)
        self._cuts[segment], self._decoded[segment] = {}, {}

    def windows_ready(self, sequence: Sequence) -> list[Window]:
        """Windows of a sequence that can be decoded since the last call."""
        segment = sequence.given.segment
        windows: list[Window] = []
        cuts = self._planners[segment].ready(sequence.num_ready_frames, is_done=sequence.is_done)
        for cut in cuts:
            self._cuts[segment][cut.index] = cut
            if cut.first == cut.last:
                self._decoded[segment][cut.index] = np.zeros(0, dtype=np.float32)
                continue
            codes = sequence.codes(cut.context_first, cut.context_last)
            windows.append(
                Window(
                    sequence_id=sequence.sequence_id,
                    index=cut.index,
                    codes=np.ascontiguousarray(codes.T.astype(np.int16)),
                    skip=cut.first - cut.context_first,
                    num_frames=cut.last - cut.first,
                    timbre=sequence.given.prompt.timbre,
                    tenant=sequence.given.tenant,
                    weight=sequence.given.weight,
                )
            )
        sequence.num_rows_wanted = num_rows_for(
            sequence.rule, self._planners[segment].num_wanted, num_prompt_frames=sequence.num_prompt_frames
        )
        return windows

    def accept(self, decoded: DecodedWindow) -> None:
        """Take a decoded window, in any order."""
        segment = next(i for i, other in enumerate(self.sequences) if other.sequence_id == decoded.sequence_id)
        if decoded.samples is not None:
            self._decoded[segment][decoded.index] = decoded.samples

    def deliver(self, now: float) -> None:
        """Send every chunk whose turn has come; `finish_reason` is set once the last one has been sent."""
        while self.finish_reason is None:
            segment = self.playback.segment
            # Where nobody listens yet, a segment is kept until it is known to be sound.
            if self._guards[segment] is not None and not self.playback.paced and not self.sequences[segment].is_done:
                return
            samples = self._decoded[segment].pop(self._next_index, None)
            if samples is None:
                return
            cut = self._cuts[segment].pop(self._next_index)
            self._send(self.sequences[segment], cut, samples, now)
            self._next_index += 1
            if cut.is_last:
                self.playback.segment += 1
                self._next_index = 0
                self._segment_first = self._num_delivered
                self._segment_begin_s = self.playback.delivered_s
                self._words_begin_s = self._words_end_s
                self._word_frame = 0
                if self.playback.segment < len(self.sequences):
                    self._joint = self._joint_of(self.playback.segment)

    def codes(self) -> NDArray[np.int32]:
        """The codes of every chunk sent so far, [num_frames, Q]."""
        if not self._delivered_codes:
            return np.zeros((0, self._codec.num_codebooks), dtype=np.int32)
        return np.concatenate(self._delivered_codes)

    def _send(self, sequence: Sequence, cut: Cut, samples: NDArray[np.float32], now: float) -> None:
        num_frames = cut.last - cut.first
        room = num_frames if self._max_frames is None else self._max_frames - self._num_delivered
        is_cut_short = room < num_frames
        num_frames = min(num_frames, room)
        is_last = is_cut_short or (cut.is_last and sequence is self.sequences[-1])
        reason: FinishReason | None = None
        if is_last:
            reason = self._reason(is_cut_short=is_cut_short)
        self._num_delivered += num_frames
        self._delivered_codes.append(sequence.codes(cut.first, cut.first + num_frames))
        ends_segment = is_last or cut.is_last
        samples = self._joint.feed(samples[: num_frames * self._codec.hop], is_end=ends_segment)
        if self._joint.has_begun:
            self._untold_words += self._words(sequence, self._word_frame, cut.first + num_frames)
            self._word_frame = cut.first + num_frames
            self._words_end_s = max((word.end_s for word in self._untold_words), default=self._words_end_s)
        if len(samples) and self.playback.first_audio_at is None:
            self.playback.first_audio_at = now
        elif len(samples) and self.playback.paced and self.playback.lead_s(now) < 0.0:
            self.num_underruns += 1
        self.playback.delivered_s += len(samples) / self._codec.sample_rate_hz
        self._num_untold += num_frames
        if len(samples) or is_last:
            # A word may begin in silence that is held back.
            told = [word for word in self._untold_words if is_last or word.start_s < self.playback.delivered_s]
            self.sink.deliver(
                AudioChunk(
                    request_id=self.request_id,
                    audio=samples,
                    first_frame=self._num_delivered - self._num_untold,
                    num_frames=self._num_untold,
                    sample_rate_hz=self._codec.sample_rate_hz,
                    is_last=is_last,
                    finish_reason=reason,
                    words=tuple(told),
                )
            )
            self._num_untold = 0
            self._untold_words = self._untold_words[len(told) :]
        self.finish_reason = reason

    def _joint_of(self, segment: int) -> Joint:
        return Joint(
            self._codec.sample_rate_hz,
            is_first=segment == 0,
            is_last=segment == len(self.sequences) - 1,
            ends_paragraph=self._ends_paragraph[segment],
        )

    def _reason(self, *, is_cut_short: bool) -> FinishReason:
        """Of the whole request: the worst of its segments', as far as they are heard."""
        heard = self.sequences[: self.playback.segment + 1]
        # One that the request's limit cuts off has not ended on its own account.
        verdicts = {self.verdict(other) for other in (heard[:-1] if is_cut_short else heard)}
        if "runaway" in verdicts:
            return "runaway"
        if "missing" in verdicts:
            return "missing"
        is_long = is_cut_short or any(other.finish_reason == "length" for other in heard)
        return "length" if is_long else "stop"

    def _words(self, sequence: Sequence, first: int, last: int) -> tuple[Word, ...]:
        """The words that begin in frames first .. last (exclusive) of a sequence; none is heard after it ends."""
        rate_hz = self._codec.frame_rate_hz
        most = sequence.max_rows if self._max_frames is None else self._max_frames - self._segment_first
        if sequence.end_row is not None:
            most = min(most, sequence.end_row - 1 - sequence.num_prompt_frames)

        def heard_s(at_s: float) -> float:
            return max(self._words_begin_s, self._segment_begin_s + self._joint.heard_s(at_s))

        return tuple(
            Word(word.text, heard_s(word.start_s), heard_s(min(word.end_s, most / rate_hz)))
            for word in sequence.words
            if first <= word.start_s * rate_hz < last
        )
