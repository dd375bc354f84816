"""A codec small enough to check by hand, for tests of what stands around a codec."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from declaim.engine.spec import CodecSpec
from declaim.engine.vocoder.base import Window


class FakeCodec:
    """Sample s of frame t is 100 * (sum of the frame's codes) + s; remembers the shape of every call."""

    def __init__(self, *, device: str = "cpu") -> None:
        self.spec = CodecSpec(sample_rate_hz=100, hop=4, left=1, right=1, num_codebooks=2, codebook_size=16)
        self.device = torch.device(device)
        self.calls: list[tuple[int, ...]] = []

    def decode(self, codes: torch.Tensor, *, first: int = 0, last: int | None = None, timbre: int = 0) -> torch.Tensor:
        self.calls.append(tuple(codes.shape))
        if int(codes.max()) >= self.spec.codebook_size:
            raise ValueError(f"code {int(codes.max())} is beyond the codebook ({self.spec.codebook_size})")
        frames = codes.sum(dim=1).to(torch.float32)  # [B, T]
        offsets = torch.arange(self.spec.hop, device=codes.device)
        return (frames[:, first:last, None] * 100 + offsets).flatten(1)

    def encode(self, audio: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError("no test encodes with this codec")


def make_window(sequence_id: int, index: int, *, num_frames: int = 2, code: int = 1) -> Window:
    """`num_frames` frames with one frame of context each side; frame t has codes (code + t, code)."""
    length = num_frames + 2
    codes = np.full((2, length), code, dtype=np.int16)
    codes[0] += np.arange(length, dtype=np.int16)
    return Window(sequence_id, index, codes, skip=1, num_frames=num_frames)


def expected_samples(window: Window) -> NDArray[np.float32]:
    frames = window.codes.sum(axis=0)[window.skip : window.skip + window.num_frames]
    return (frames[:, None] * 100 + np.arange(4)).astype(np.float32).ravel()
