"""Model samples to the bytes of a response, chunk by chunk.

Owns resampling to the API's rate, rounding to 16 bits, and one encoder for each response format.
Never waits, never knows a request: an encoder is fed float chunks in order and gives bytes for each.
Every cut of the same audio into chunks gives the same samples.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

API_RATE_HZ = 24_000
"""Clients of the OpenAI API take pcm as 24 kHz mono and do not ask."""

_ZERO_CROSSINGS = 48
_KAISER_BETA = 9.0
# With this length and window the transition band ends at the lower Nyquist frequency, 90 dB down.
_ROLLOFF = 0.94
_MAX_MATRIX_ELEMENTS = 4_000_000
_UNKNOWN_SIZE = 0xFFFFFFFF


def to_s16(audio: NDArray[np.float32]) -> NDArray[np.int16]:
    """Clip to full scale 1.0 and round half to even. audio: float [S]. Returns int16 [S], little-endian."""
    samples: NDArray[np.int16] = np.rint(np.clip(audio, -1.0, 1.0) * np.float32(32767.0)).astype("<i2")
    return samples


def wav_header(sample_rate_hz: int, *, data_bytes: int | None = None) -> bytes:
    """The 44 bytes before mono 16-bit samples; `data_bytes` None says that the length is not known yet."""
    data_size = _UNKNOWN_SIZE if data_bytes is None else data_bytes
    riff_size = _UNKNOWN_SIZE if data_bytes is None else data_bytes + 36
    form = struct.pack("<4sI4s", b"RIFF", riff_size, b"WAVE")
    fmt = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 1, sample_rate_hz, sample_rate_hz * 2, 2, 16)
    return form + fmt + struct.pack("<4sI", b"data", data_size)


def design_filter(up: int, down: int) -> NDArray[np.float64]:
    """Low-pass at `up` times the source rate: Kaiser-windowed sinc, odd length, symmetric, sum `up`."""
    widest = max(up, down)
    half = _ZERO_CROSSINGS * widest
    positions = np.arange(-half, half + 1)
    taps: NDArray[np.float64] = np.sinc(positions * _ROLLOFF / widest) * np.kaiser(2 * half + 1, _KAISER_BETA)
    taps *= up / taps.sum()
    return taps


class Resampler:
    """Exact streaming polyphase resampling by the ratio of two rates.

    Every `down` source samples give `up` target samples, each a fixed weighted sum of its neighbours; so a
    chunk is one matrix product over overlapping windows of the source. Sample n of the output lies at source
    time n * down / up (no delay), silence is assumed on both ends, and S samples give ceil(S * up / down).

    Raises: ValueError where the two rates have too little in common.
    """

    def __init__(self, source_rate_hz: int, target_rate_hz: int) -> None:
        if source_rate_hz <= 0 or target_rate_hz <= 0:
            raise ValueError(f"rates must be positive: {source_rate_hz} Hz to {target_rate_hz} Hz")
        common = math.gcd(source_rate_hz, target_rate_hz)
        self._up, self._down = target_rate_hz // common, source_rate_hz // common
        half = _ZERO_CROSSINGS * max(self._up, self._down)
        before = half // self._up
        self._width = before + ((self._up - 1) * self._down + half) // self._up + 1
        if self._up * self._width > _MAX_MATRIX_ELEMENTS:
            raise ValueError(
                f"cannot resample {source_rate_hz} Hz to {target_rate_hz} Hz: "
                f"{self._up}/{self._down} is too uneven; use rates with a large common divisor"
            )
        # weights[i, j]: how much source sample i - before counts in target sample j of the same block
        source, target = np.arange(self._width)[:, None] - before, np.arange(self._up)[None, :]
        tap = target * self._down - source * self._up + half
        inside = (tap >= 0) & (tap <= 2 * half)
        self._weights = np.where(inside, design_filter(self._up, self._down)[np.clip(tap, 0, 2 * half)], 0.0)
        self._source = np.zeros(before)
        self._num_in = 0
        self._num_out = 0

    def push(self, audio: NDArray[np.float32]) -> NDArray[np.float32]:
        """Take the next source samples, float [S]; return the target samples that are now certain."""
        self._num_in += len(audio)
        self._source = np.concatenate([self._source, audio.astype(np.float64)])
        num_blocks = max(0, (len(self._source) - self._width) // self._down + 1)
        return self._advance(num_blocks)

    def finish(self) -> NDArray[np.float32]:
        """The target samples that still lacked source samples, with silence in their place."""
        num_left = -(-self._num_in * self._up // self._down) - self._num_out
        num_blocks = -(-num_left // self._up)
        missing = (num_blocks - 1) * self._down + self._width - len(self._source)
        self._source = np.concatenate([self._source, np.zeros(max(0, missing))])
        return self._advance(num_blocks)[:num_left]

    def _advance(self, num_blocks: int) -> NDArray[np.float32]:
        if num_blocks == 0:
            return np.zeros(0, np.float32)
        windows = np.lib.stride_tricks.sliding_window_view(self._source, self._width)
        target = windows[: num_blocks * self._down : self._down] @ self._weights
        self._source = self._source[num_blocks * self._down :]
        self._num_out += target.size
        return target.reshape(-1).astype(np.float32)


class Encoder(Protocol):
    """Turns the chunks of one response into the bytes of one format; used once."""

    @property
    def media_type(self) -> str: ...

    def encode(self, audio: NDArray[np.float32]) -> bytes:
        """The bytes that the next samples (float32 [S] at the source rate) allow; may be empty."""
        ...

    def finish(self) -> bytes:
        """The bytes that were held back; called once, after the last `encode`."""
        ...


class PcmEncoder:
    """Raw signed 16-bit little-endian mono at API_RATE_HZ."""

    media_type = "audio/pcm"

    def __init__(self, source_rate_hz: int) -> None:
        self._resampler = None if source_rate_hz == API_RATE_HZ else Resampler(source_rate_hz, API_RATE_HZ)

    def encode(self, audio: NDArray[np.float32]) -> bytes:
        return to_s16(audio if self._resampler is None else self._resampler.push(audio)).tobytes()

    def finish(self) -> bytes:
        return b"" if self._resampler is None else to_s16(self._resampler.finish()).tobytes()


class WavEncoder:
    """PcmEncoder's samples behind a header of unknown length, which comes with the first samples."""

    media_type = "audio/wav"

    def __init__(self, source_rate_hz: int) -> None:
        self._pcm = PcmEncoder(source_rate_hz)
        self._header = wav_header(API_RATE_HZ)

    def encode(self, audio: NDArray[np.float32]) -> bytes:
        return self._with_header(self._pcm.encode(audio))

    def finish(self) -> bytes:
        return self._with_header(self._pcm.finish())

    def _with_header(self, data: bytes) -> bytes:
        header, self._header = self._header, b""
        return header + data


ENCODERS: Mapping[str, Callable[[int], Encoder]] = MappingProxyType({"wav": WavEncoder, "pcm": PcmEncoder})
"""response_format -> encoder, made with the source rate in Hz."""
