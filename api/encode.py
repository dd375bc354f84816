"""16-bit samples to the bytes of a response, chunk by chunk, and the resampler before them.

Owns resampling to a response's rate, rounding to 16 bits, and one encoder for each response format.
Never waits, never knows a request: an encoder is fed samples in order and gives bytes for each.
Every cut of the same audio into chunks gives the same samples, to the last bit.
"""

from __future__ import annotations

import io
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

import av
import lameenc  # type: ignore[import-not-found]
import numpy as np
from av.audio.stream import AudioStream
from numpy.typing import NDArray

API_RATE_HZ = 24_000
"""Clients of the OpenAI API take pcm as 24 kHz mono and do not ask."""

_ZERO_CROSSINGS = 48
_KAISER_BETA = 9.0
# With this length and window the transition band ends at the lower Nyquist frequency, 90 dB down.
_ROLLOFF = 0.94
_MAX_MATRIX_ELEMENTS = 4_000_000
# A product of another shape may round another way, so the shapes follow the position in the audio alone: at first small
# ones, which wait for few samples, later large ones, which are cheap.
_MIN_BLOCK = 64
_NUM_SINGLE_BLOCKS = 32
_BLOCKS_AT_ONCE = 8
_UNKNOWN_SIZE = 0xFFFFFFFF
# Where STREAMINFO, the first block of a flac, holds the number of samples.
_FLAC_COUNT = slice(21, 26)


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
    block is one matrix product over a window of the source. Sample n of the output lies at source
    time n * down / up (no delay), silence is assumed on both ends, and S samples give ceil(S * up / down).

    Raises: ValueError where the two rates have too little in common.
    """

    def __init__(self, source_rate_hz: int, target_rate_hz: int) -> None:
        if source_rate_hz <= 0 or target_rate_hz <= 0:
            raise ValueError(f"rates must be positive: {source_rate_hz} Hz to {target_rate_hz} Hz")
        common = math.gcd(source_rate_hz, target_rate_hz)
        up, down = target_rate_hz // common, source_rate_hz // common
        half = _ZERO_CROSSINGS * max(up, down)
        before = half // up
        repeats = -(-_MIN_BLOCK // up)  # a ratio such as 1/2 takes several of its periods in a block
        self._up, self._down = up * repeats, down * repeats
        self._ratio = up, down
        self._width = before + ((self._up - 1) * down + half) // up + 1
        if self._up * self._width > _MAX_MATRIX_ELEMENTS:
            raise ValueError(
                f"cannot resample {source_rate_hz} Hz to {target_rate_hz} Hz: "
                f"{up}/{down} is too uneven; use rates with a large common divisor"
            )
        # weights[i, j]: how much source sample i - before counts in target sample j of the same block
        source, target = np.arange(self._width)[:, None] - before, np.arange(self._up)[None, :]
        tap = target * down - source * up + half
        inside = (tap >= 0) & (tap <= 2 * half)
        self._weights = np.where(inside, design_filter(up, down)[np.clip(tap, 0, 2 * half)], 0.0)
        self._source = np.zeros(before)
        self._num_in = 0
        self._num_blocks_out = 0

    def push(self, audio: NDArray[np.float32]) -> NDArray[np.float32]:
        """Take the next source samples, float [S]; return the target samples that are now certain."""
        self._num_in += len(audio)
        self._source = np.concatenate([self._source, audio.astype(np.float64)])
        return self._advance()

    def finish(self) -> NDArray[np.float32]:
        """The target samples that still lacked source samples, with silence in their place."""
        up, down = self._ratio
        num_left = -(-self._num_in * up // down) - self._num_blocks_out * self._up
        silence = np.zeros(self._width + (num_left // self._up + _BLOCKS_AT_ONCE + 1) * self._down)
        self._source = np.concatenate([self._source, silence])
        return self._advance()[:num_left]

    def _advance(self) -> NDArray[np.float32]:
        blocks = []
        first = 0
        while True:
            num_blocks = 1 if self._num_blocks_out < _NUM_SINGLE_BLOCKS else _BLOCKS_AT_ONCE
            last = first + (num_blocks - 1) * self._down + self._width
            if last > len(self._source):
                break
            windows = np.lib.stride_tricks.sliding_window_view(self._source[first:last], self._width)[:: self._down]
            blocks.append((np.ascontiguousarray(windows) @ self._weights).reshape(-1))
            first += num_blocks * self._down
            self._num_blocks_out += num_blocks
        self._source = self._source[first:]
        return np.concatenate(blocks).astype(np.float32) if blocks else np.zeros(0, np.float32)


class Encoder(Protocol):
    """Turns the samples of one response into the bytes of one format; used once."""

    def encode(self, samples: NDArray[np.int16]) -> bytes:
        """The bytes that the next samples, int16 [S], allow; may be empty."""
        ...

    def finish(self) -> bytes:
        """The bytes that were held back; called once, after the last `encode`."""
        ...

    def close(self) -> None:
        """Free what the encoder holds, finished or not; idempotent."""
        ...


class PcmEncoder:
    """Raw signed 16-bit little-endian mono."""

    def encode(self, samples: NDArray[np.int16]) -> bytes:
        return samples.tobytes()

    def finish(self) -> bytes:
        return b""

    def close(self) -> None:
        """There is nothing to free."""


class WavEncoder:
    """PcmEncoder's samples behind a header of unknown length, which comes with the first samples."""

    def __init__(self, sample_rate_hz: int) -> None:
        self._header = wav_header(sample_rate_hz)

    def encode(self, samples: NDArray[np.int16]) -> bytes:
        if len(samples) == 0:
            return b""
        header, self._header = self._header, b""
        return header + samples.tobytes()

    def finish(self) -> bytes:
        header, self._header = self._header, b""
        return header

    def close(self) -> None:
        """There is nothing to free."""


class Mp3Encoder:
    """MPEG layer 3 by LAME: frames alone, no tag before them, so the first bytes are a frame's."""

    def __init__(self, sample_rate_hz: int) -> None:
        encoder = lameenc.Encoder()
        encoder.set_in_sample_rate(sample_rate_hz)
        encoder.set_out_sample_rate(sample_rate_hz)
        encoder.set_channels(1)
        encoder.set_bit_rate(64 if sample_rate_hz <= API_RATE_HZ else 96)
        encoder.set_quality(5)
        encoder.silence()
        self._encoder = encoder
        self._is_begun = False

    def encode(self, samples: NDArray[np.int16]) -> bytes:
        self._is_begun = True
        return bytes(self._encoder.encode(samples.tobytes()))

    def finish(self) -> bytes:
        return bytes(self._encoder.flush()) if self._is_begun else b""

    def close(self) -> None:
        """LAME's memory goes with the object."""


class _Sink:
    """A file to write only: FFmpeg, which finds no seek, never goes back to patch a header."""

    def __init__(self) -> None:
        self._data = bytearray()

    def __len__(self) -> int:
        return len(self._data)

    def write(self, data: bytes) -> int:
        self._data += data
        return len(data)

    def take(self) -> bytes:
        data = bytes(self._data)
        self._data.clear()
        return data


@dataclass(frozen=True, slots=True)
class _Container:
    """How FFmpeg is told to write one format so that every packet leaves at once."""

    format: str
    codec: str
    container_options: Mapping[str, str]
    codec_options: Mapping[str, str]
    bit_rate: int | None = None


_CONTAINERS: Mapping[str, _Container] = MappingProxyType(
    {
        "opus": _Container(
            "ogg",
            "libopus",
            # bitexact: a serial number that is not drawn, so the same audio gives the same bytes
            {"page_duration": "20000", "flush_packets": "1", "fflags": "+bitexact"},
            {"application": "audio", "compression_level": "5", "frame_duration": "20"},
            48_000,
        ),
        "aac": _Container("adts", "aac", {"flush_packets": "1"}, {"aac_coder": "fast"}, 64_000),
        "flac": _Container(
            "flac",
            "flac",
            {"flush_packets": "1", "metadata_header_padding": "0"},
            # More than one thread keeps memory of streams that were abandoned.
            {"frame_size": "960", "threads": "1"},
        ),
    }
)


class AvEncoder:
    """Ogg Opus, AAC in ADTS, or FLAC, by FFmpeg."""

    def __init__(self, response_format: str, sample_rate_hz: int) -> None:
        how = _CONTAINERS[response_format]
        self._rate_hz = sample_rate_hz
        self._sink = _Sink()
        self._container = av.open(self._sink, "w", format=how.format, options=dict(how.container_options))
        stream = self._container.add_stream(how.codec, rate=sample_rate_hz, options=dict(how.codec_options))
        if not isinstance(stream, AudioStream):
            raise TypeError(f"{how.codec} is no audio codec")
        stream.layout = "mono"
        if how.bit_rate is not None:
            stream.bit_rate = how.bit_rate
        self._stream = stream
        self._container.start_encoding()
        self._num_header_bytes = len(self._sink)  # sent with the first audio, not before: many clients time it
        self._num_samples = 0
        self._is_closed = False

    def encode(self, samples: NDArray[np.int16]) -> bytes:
        if len(samples) == 0:
            return b""
        frame = av.AudioFrame.from_ndarray(samples.reshape(1, -1), "s16", "mono")
        frame.sample_rate = self._rate_hz
        frame.pts = self._num_samples
        self._num_samples += len(samples)
        for packet in self._stream.encode(frame):
            self._container.mux(packet)
        if len(self._sink) <= self._num_header_bytes:
            return b""
        self._num_header_bytes = 0
        return self._sink.take()

    def finish(self) -> bytes:
        if self._num_samples:
            for packet in self._stream.encode(None):
                self._container.mux(packet)
        self.close()  # Ogg's last page
        return self._sink.take()

    def close(self) -> None:
        if not self._is_closed:
            self._is_closed = True
            self._container.close()


MEDIA_TYPES: Mapping[str, str] = MappingProxyType(
    {
        "mp3": "audio/mpeg",
        "opus": "audio/ogg",
        "aac": "audio/aac",
        "flac": "audio/flac",
        "wav": "audio/wav",
        "pcm": "audio/pcm",
    }
)
"""response_format -> Content-Type, and all the formats there are."""

DEFAULT_FORMAT = "mp3"

_RATES_HZ = (8_000, 12_000, 16_000, 22_050, 24_000, 32_000, 44_100, 48_000)
_OPUS_RATES_HZ = (8_000, 12_000, 16_000, 24_000, 48_000)


def rates_of(response_format: str) -> tuple[int, ...]:
    """The sample rates in Hz that a format can be asked for."""
    return _OPUS_RATES_HZ if response_format == "opus" else _RATES_HZ


def make_encoder(response_format: str, sample_rate_hz: int) -> Encoder:
    """One of MEDIA_TYPES' formats, at one of its rates."""
    match response_format:
        case "pcm":
            return PcmEncoder()
        case "wav":
            return WavEncoder(sample_rate_hz)
        case "mp3":
            return Mp3Encoder(sample_rate_hz)
        case _:
            return AvEncoder(response_format, sample_rate_hz)


def with_exact_length(data: bytes, response_format: str) -> bytes:
    """A whole response, whose header can now tell how long it is; takes CPU time for flac.

    Only wav and flac have such a header. libsndfile takes a flac whose header does not tell for endless.
    """
    if response_format == "wav":
        (rate_hz,) = struct.unpack_from("<I", data, 24)
        return wav_header(rate_hz, data_bytes=len(data) - 44) + data[44:]
    if response_format == "flac" and len(data) > _FLAC_COUNT.stop:
        with av.open(io.BytesIO(data), "r", format="flac") as container:
            num_samples = sum(packet.duration or 0 for packet in container.demux(audio=0))
        # The low 36 bits of five bytes; the high 4 belong to the sample size.
        kept = data[_FLAC_COUNT.start] & 0xF0
        count = ((kept << 32) | num_samples).to_bytes(5, "big")
        return data[: _FLAC_COUNT.start] + count + data[_FLAC_COUNT.stop :]
    return data
