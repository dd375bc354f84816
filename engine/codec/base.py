"""The codec contract, and how a codec is named so that another process can load it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from declaim.engine.spec import CodecSpec


class Codec(Protocol):
    """Frames of codes to samples, and (where the encoder was loaded) back."""

    @property
    def spec(self) -> CodecSpec: ...

    @property
    def device(self) -> torch.device: ...

    def decode(self, codes: torch.Tensor, *, first: int = 0, last: int | None = None, timbre: int = 0) -> torch.Tensor:
        """Decode windows of equal length, and return the samples of frames first .. last (exclusive; None: the end).

        codes: int64 [B, Q, T], every id below `spec.codebook_size`, T >= 1.
        Returns float32 [B, (last - first) * hop] on the codec's device. Samples of frame t depend on frames
        t - left .. t + right only; both ends of the window see zero padding at every layer. Frames that are not
        returned are context: a codec computes them no further than those that are returned need. timbre: which of
        `spec.timbres` the codes are spoken in; a codec without any has 0 alone.
        """
        ...

    def encode(self, audio: torch.Tensor) -> torch.Tensor:
        """Encode a mono waveform.

        audio: float32 [S] at `spec.sample_rate_hz`. Returns int64 [Q, ceil(S / hop)].
        Raises: ModelLoadError if the codec was loaded without its encoder.
        """
        ...


@dataclass(frozen=True, slots=True)
class CodecRecipe:
    """Where a codec lies and how to load it: plain data, so that a vocoder worker in another process can.

    folder: holds config.json and model.safetensors. dtype: the decoder's arithmetic. device: a torch device string.
    """

    kind: Literal["dac", "lark"]
    folder: str
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    device: str = "cpu"
