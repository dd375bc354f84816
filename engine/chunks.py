"""Which frames are decoded together, and when. Integers only.

The cuts depend on nothing but the frame's index: small windows first, for an early first sound, then larger ones, for
less context decoded twice. So a request's audio has the same bits whenever and wherever its windows are decoded, whole
or streamed, first or again after a worker died.
"""

from __future__ import annotations

from dataclasses import dataclass

from declaim.engine.spec import CodecSpec


@dataclass(frozen=True, slots=True)
class ChunkPolicy:
    """Two windows hold `first_frames` frames each, the next two twice as many, and so on up to `max_frames`.

    Windows that doubled each time would run dry unless a stream is made twice as fast as it plays: what plays while a
    window is made is all that came before. In pairs, 1.5 times as fast is enough.
    """

    first_frames: int
    max_frames: int

    @classmethod
    def from_seconds(cls, codec: CodecSpec, *, first_s: float, max_s: float) -> ChunkPolicy:
        first = max(1, round(first_s * codec.frame_rate_hz))
        return cls(first, max(first, round(max_s * codec.frame_rate_hz)))

    def length(self, index: int) -> int:
        """Frames of the window of that index."""
        return min(self.first_frames << min(index // 2, 20), self.max_frames)


@dataclass(frozen=True, slots=True)
class Cut:
    """Frames first .. last (exclusive) of a sequence, decoded from context_first .. context_last."""

    index: int
    first: int
    last: int
    context_first: int
    context_last: int
    is_last: bool


class ChunkPlanner:
    """Cuts one sequence into windows as its frames become ready."""

    def __init__(self, policy: ChunkPolicy, codec: CodecSpec) -> None:
        self._policy = policy
        self._codec = codec
        self._index = 0
        self._first = 0
        self.is_finished = False

    def ready(self, num_ready: int, *, is_done: bool) -> list[Cut]:
        """The windows that can be decoded now. num_ready: whole frames; is_done: there will be no more.

        A window waits for its right context, and the last one for the end, so that each is cut once and for all.
        A sequence without a frame gives one empty last cut.
        """
        cuts: list[Cut] = []
        while not self.is_finished:
            last = self._first + self._policy.length(self._index)
            if is_done and last >= num_ready:
                cuts.append(self._cut(num_ready, num_ready=num_ready, is_last=True))
            elif is_done or self.num_wanted <= num_ready:
                cuts.append(self._cut(last, num_ready=num_ready, is_last=False))
            else:
                break
        return cuts

    @property
    def num_wanted(self) -> int:
        """With fewer whole frames there is no new window, unless there will be no more frames."""
        return self._first + self._policy.length(self._index) + max(1, self._codec.right)

    def _cut(self, last: int, *, num_ready: int, is_last: bool) -> Cut:
        cut = Cut(
            index=self._index,
            first=self._first,
            last=last,
            context_first=max(0, self._first - self._codec.left),
            context_last=min(num_ready, last + self._codec.right),
            is_last=is_last,
        )
        self._index += 1
        self._first = last
        self.is_finished = is_last
        return cut
