"""The vocoder in this process, on the engine's own thread: no workers to start, none to lose.

Owns a queue of windows; `decode_windows` is also what a Ray worker runs.
Never holds up the step loop for more than a few windows, and never lets one bad window harm another.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import numpy as np
import torch

from declaim.engine.codec.base import Codec
from declaim.engine.errors import SequenceFailed
from declaim.engine.vocoder.base import DecodedWindow, Wake, Window, decode_window
from declaim.engine.vocoder.queue import WindowQueue

# What torch raises for a window that cannot be decoded: a wrong shape, an id beyond its codebook, no memory.
_WINDOW_ERRORS = (RuntimeError, ValueError, IndexError)


class InlineVocoder:
    """Decodes queued windows inside `poll`.

    codec: used on the calling thread only. wake: called where a further `poll` would return something.
    max_windows_per_poll: bounds how long one `poll` holds up the engine's step loop.
    Raises: ValueError if max_windows_per_poll < 1.
    """

    def __init__(self, codec: Codec, *, wake: Wake, max_windows_per_poll: int = 4) -> None:
        if max_windows_per_poll < 1:
            raise ValueError(f"max_windows_per_poll is {max_windows_per_poll}; it must be at least 1")
        self._codec = codec
        self._wake = wake
        # On a GPU, beside the steps and not behind them; what loaded the weights must be done first.
        self._stream: torch.cuda.Stream | None = None
        if codec.device.type == "cuda":
            self._stream = torch.cuda.Stream(codec.device)  # type: ignore[no-untyped-call]
            self._stream.wait_stream(torch.cuda.current_stream(codec.device))
        self._max_windows_per_poll = max_windows_per_poll
        self._queue: WindowQueue[Window] = WindowQueue(window_of=lambda window: window)

    def submit(self, windows: Sequence[Window]) -> None:
        """Queue windows; nothing is decoded before `poll`."""
        for window in windows:
            self._queue.push(window)
        if windows:
            self._wake()

    def poll(self) -> list[DecodedWindow]:
        """Decode and return the next windows, at most `max_windows_per_poll`."""
        count = min(self.num_pending, self._max_windows_per_poll)
        windows = [self._queue.pop() for _ in range(count)]
        try:
            with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
                decoded = decode_windows(self._codec, windows)
        except torch.AcceleratorError as error:
            decoded = [_failed(window, error) for window in windows]
        if self.num_pending:
            self._wake()
        return decoded

    def cancel(self, sequence_id: int) -> None:
        """Forget a sequence's queued windows."""
        self._queue.cancel(sequence_id)

    @property
    def num_pending(self) -> int:
        return len(self._queue)

    def close(self) -> None:
        """Drop what is queued; idempotent."""
        self._queue.clear()


def decode_windows(codec: Codec, windows: Sequence[Window]) -> list[DecodedWindow]:
    """Decode windows in their order; one that cannot be decoded gets an error and the others their samples.

    On a CUDA device windows of equal length share a call; on the CPU each has its own (see `decode_window`).
    Raises: torch.AcceleratorError, after which the device context of this process is of no more use.
    """
    if codec.device.type != "cuda":
        return [_decode_one(codec, window) for window in windows]
    places_of: dict[tuple[int, ...], list[int]] = {}
    for place, window in enumerate(windows):
        places_of.setdefault((*window.codes.shape, window.skip, window.num_frames, window.timbre), []).append(place)
    decoded: dict[int, DecodedWindow] = {}
    for places in places_of.values():
        batch = _decode_batch(codec, [windows[place] for place in places])
        decoded.update(zip(places, batch, strict=True))
    return [decoded[place] for place in range(len(windows))]


def _decode_one(codec: Codec, window: Window) -> DecodedWindow:
    try:
        samples = decode_window(codec, window)
    except torch.AcceleratorError:
        raise
    except _WINDOW_ERRORS as error:
        return _failed(window, error)
    return DecodedWindow(window.sequence_id, window.index, samples)


def _failed(window: Window, error: Exception) -> DecodedWindow:
    failure = SequenceFailed(
        f"window {window.index} of sequence {window.sequence_id} (codes {list(window.codes.shape)}) "
        f"could not be decoded: {error}"
    )
    return DecodedWindow(window.sequence_id, window.index, None, failure)


def _decode_batch(codec: Codec, windows: list[Window]) -> list[DecodedWindow]:
    """Windows cut alike in one call; if that fails, one by one, so that only the bad one gets an error."""
    if len(windows) == 1:
        return [_decode_one(codec, windows[0])]
    codes = torch.from_numpy(np.stack([window.codes for window in windows]).astype(np.int64)).to(codec.device)
    first, last = windows[0].skip, windows[0].skip + windows[0].num_frames
    try:
        samples = codec.decode(codes, first=first, last=last, timbre=windows[0].timbre).to("cpu", torch.float32).numpy()
    except torch.AcceleratorError:
        raise
    except _WINDOW_ERRORS:
        return [_decode_one(codec, window) for window in windows]
    return [DecodedWindow(w.sequence_id, w.index, row) for w, row in zip(windows, samples, strict=True)]
