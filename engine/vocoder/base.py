"""The vocoder contract: a window carries its own context, so any worker can decode it and none holds state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray

from declaim.engine.codec.base import Codec
from declaim.engine.errors import DeclaimError


@dataclass(frozen=True, slots=True, eq=False)
class Window:
    """Frames to decode with their context.

    codes: int16 [num_codebooks, T]. Samples are wanted for frames `skip .. skip + num_frames` of the T.
    timbre: what they are spoken in. sequence_id and index name the window; every (sequence_id, index) is submitted
    once. tenant, weight: whose it is, and that tenant's share where several have windows waiting.
    """

    sequence_id: int
    index: int
    codes: NDArray[np.int16]
    skip: int
    num_frames: int
    timbre: int = 0
    tenant: str = ""
    weight: float = 1.0


@dataclass(frozen=True, slots=True, eq=False)
class DecodedWindow:
    """A window's samples, float32 [num_frames * hop], or the error that kept it from being decoded."""

    sequence_id: int
    index: int
    samples: NDArray[np.float32] | None
    error: DeclaimError | None = None


class Vocoder(Protocol):
    """A pool of workers that decode windows. All methods are called from the engine thread."""

    def submit(self, windows: Sequence[Window]) -> None:
        """Queue windows; never blocks on decoding by another process."""
        ...

    def poll(self) -> list[DecodedWindow]:
        """What has been decoded since the last call, in any order; each submitted window comes back once,
        unless its sequence was cancelled."""
        ...

    def cancel(self, sequence_id: int) -> None:
        """Forget a sequence's windows: those not yet begun are not decoded, none comes back."""
        ...

    @property
    def num_pending(self) -> int:
        """Windows submitted and neither returned by `poll` nor cancelled."""
        ...

    def close(self) -> None:
        """Stop the workers; idempotent."""
        ...


@runtime_checkable
class WorkerPool(Protocol):
    """A vocoder whose workers come and go."""

    @property
    def num_workers(self) -> int:
        """Those ready to decode."""
        ...

    @property
    def num_restarts(self) -> int:
        """Workers lost and replaced so far."""
        ...

    @property
    def failure(self) -> str | None:
        """Why nothing will be decoded any more; None while it may be."""
        ...


Wake = Callable[[], None]
"""Called from any thread when `poll` has something new, so that the engine thread need not spin."""


def decode_window(codec: Codec, window: Window) -> NDArray[np.float32]:
    """Decode one window and cut off its context.

    One window a call on the CPU: a batch there gains nothing (it is bound by arithmetic) and would let a window's
    last bits depend on its neighbours.
    Returns float32 [num_frames * hop].
    """
    codes = torch.from_numpy(window.codes.astype(np.int64))[None].to(codec.device)
    samples = codec.decode(codes, first=window.skip, last=window.skip + window.num_frames, timbre=window.timbre)[0]
    return samples.to("cpu", torch.float32).numpy()
