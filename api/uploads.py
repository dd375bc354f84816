"""Recordings that clients send: read within limits, known by their content, checked, converted once.

Owns the multipart body, the choice of a decoder and the level checks. Trusts neither a file name nor a content type,
and writes nothing to disk.
"""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncGenerator, Mapping
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
from fastapi import Request
from numpy.typing import NDArray
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect

from declaim.api.body import drop_body
from declaim.api.errors import ApiError, BodyTooLarge, ClientGone, InvalidBody, UnsupportedMediaType
from declaim.engine.errors import InvalidRequest
from declaim.engine.voices import MAX_REFERENCE_S, prepare_reference, read_audio_bytes

MAX_RECORDING_BYTES = 10 << 20
MAX_FIELD_BYTES = 16 << 10
MAX_FIELDS = 16
# The parts' headers and the fields, beside the recording itself.
_MAX_BODY_BYTES = MAX_RECORDING_BYTES + (1 << 20)
# Read and dropped of a body that is too large, so that the client sees the answer and not a reset connection.
_MAX_DRAIN_BYTES = 64 << 20
_READ_TIMEOUT_S = 60.0
_STORED_RATE_HZ = 48_000
_FULL_SCALE = 0.999
_CLIPPED_RUN = 3
_MAX_CLIPPED_SHARE = 0.01
# Containers that only FFmpeg reads, by FFmpeg's names; the others are libsndfile's.
_FFMPEG_FORMATS: Mapping[str, str] = {"mp4": "mp4", "webm": "matroska", "aac": "aac"}


@dataclass(frozen=True, slots=True)
class Form:
    """A multipart body: its text fields by name, and its files' content by name."""

    fields: Mapping[str, str]
    files: Mapping[str, bytes]


@dataclass(frozen=True, slots=True, eq=False)
class Recording:
    """A recording that passed every check. audio: float32 [S], mono, at most 48 kHz."""

    audio: NDArray[np.float32]
    sample_rate_hz: int

    def to_flac(self) -> bytes:
        """24-bit FLAC."""
        import soundfile

        buffer = io.BytesIO()
        audio = np.clip(self.audio, -1.0, 1.0)
        soundfile.write(buffer, audio, self.sample_rate_hz, format="FLAC", subtype="PCM_24")
        return buffer.getvalue()


def from_flac(data: bytes) -> Recording:
    """What `Recording.to_flac` made."""
    audio, rate = read_audio_bytes(data)
    return Recording(audio, rate)


async def read_form(request: Request) -> Form:
    """Read a multipart body of one file and a few short fields, none of it larger than the limits.

    Raises: UnsupportedMediaType, BodyTooLarge, InvalidBody, ClientGone, ApiError (408) for a body that takes too long.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "multipart/form-data":
        with suppress(BodyTooLarge):
            await drop_body(request)
        raise UnsupportedMediaType(f"The content type '{media_type}' is not taken: send multipart/form-data")
    parser = MultiPartParser(
        request.headers, _limited(request), max_files=1, max_fields=MAX_FIELDS, max_part_size=MAX_FIELD_BYTES
    )
    parser.spool_max_size = _MAX_BODY_BYTES + 1  # never on disk
    try:
        async with asyncio.timeout(_READ_TIMEOUT_S):
            form = await parser.parse()
    except TimeoutError:
        message = f"The body took longer than {_READ_TIMEOUT_S:g} s: send a smaller recording"
        raise ApiError(message, status=408, type="invalid_request_error", code="timeout") from None
    except (MultiPartException, UnicodeError, LookupError) as error:
        # LookupError: the client named a character set that does not exist.
        raise InvalidBody(f"The body cannot be read ({error}): send multipart/form-data") from None
    except ClientDisconnect:
        raise ClientGone("the client hung up while it sent its request") from None
    try:
        files = {key: await value.read() for key, value in form.multi_items() if isinstance(value, UploadFile)}
        return Form({key: value for key, value in form.multi_items() if isinstance(value, str)}, files)
    finally:
        await form.close()


async def _limited(request: Request) -> AsyncGenerator[bytes, None]:
    num_bytes = 0
    async for part in request.stream():
        num_bytes += len(part)
        if num_bytes <= _MAX_BODY_BYTES:
            yield part
        elif num_bytes > _MAX_DRAIN_BYTES:
            break
    if num_bytes > _MAX_BODY_BYTES:
        raise BodyTooLarge(
            f"The body is larger than {_MAX_BODY_BYTES} bytes: a recording may have {MAX_RECORDING_BYTES}"
        )


def read_recording(data: bytes, *, param: str) -> Recording:
    """Decode, check and convert a recording; for a worker thread. param: the field it came in, named in errors.

    Raises: InvalidRequest for what is no audio, is shorter than 1 s or longer than 30 s, silent, clipped or out of
    scale; BodyTooLarge.
    """
    if len(data) > MAX_RECORDING_BYTES:
        raise BodyTooLarge(f"The recording has {len(data)} bytes, at most {MAX_RECORDING_BYTES} are taken: cut it")
    container = container_of(data)
    if container is None:
        raise InvalidRequest(
            f"the recording ({len(data)} bytes) is no audio file that is known here: "
            "send WAV, FLAC, MP3, Ogg, AAC, MP4 (M4A) or WebM",
            param=param,
        )
    try:
        if container in _FFMPEG_FORMATS:
            audio, rate = _read_with_ffmpeg(data, _FFMPEG_FORMATS[container])
        else:
            audio, rate = read_audio_bytes(data)
        target = min(rate, _STORED_RATE_HZ)
        mono = prepare_reference(audio, rate, target_rate_hz=target)
        _check_clipping(audio)
    except InvalidRequest as error:
        raise InvalidRequest(str(error), param=param) from error
    return Recording(mono, target)


def container_of(data: bytes) -> str | None:
    """What a file is, from its first bytes: wav, flac, ogg, mp3, aac, mp4 or webm; None for anything else."""
    head = data[:12]
    if head[:4] in (b"RIFF", b"RF64") and head[8:12] == b"WAVE":
        return "wav"
    if head[4:8] == b"ftyp":
        return "mp4"
    for magic, name in ((b"fLaC", "flac"), (b"OggS", "ogg"), (b"ID3", "mp3"), (b"\x1a\x45\xdf\xa3", "webm")):
        if head.startswith(magic):
            return name
    if len(head) >= 2 and head[0] == 0xFF and head[1] & 0xE0 == 0xE0:
        # Layer 0 of an MPEG header is ADTS.
        return "aac" if head[1] & 0x06 == 0 else "mp3"
    return None


def _read_with_ffmpeg(data: bytes, format: str) -> tuple[NDArray[np.float32], int]:
    """The first audio stream, mono. The format is given and not probed: a playlist would make FFmpeg open URLs."""
    import av
    import av.error

    pieces: list[NDArray[np.float32]] = []
    num_samples = 0
    try:
        with av.open(io.BytesIO(data), mode="r", format=format) as container:
            stream = next(iter(container.streams.audio), None)
            if stream is None:
                raise InvalidRequest("the recording has no audio track: send one that has")
            rate = min(stream.rate or _STORED_RATE_HZ, _STORED_RATE_HZ)
            resampler = av.AudioResampler(format="flt", layout="mono", rate=rate)
            for frame in container.decode(stream):
                for converted in resampler.resample(frame):
                    pieces.append(converted.to_ndarray().reshape(-1).astype(np.float32))
                    num_samples += len(pieces[-1])
                # Beyond the limit already: the rest is not decoded, whatever its size.
                if num_samples > (MAX_REFERENCE_S + 1.0) * rate:
                    break
    except (av.error.FFmpegError, ValueError) as error:
        raise InvalidRequest(f"the recording ({len(data)} bytes) cannot be decoded: {error}") from error
    return (np.concatenate(pieces) if pieces else np.zeros(0, np.float32)), rate


def _check_clipping(audio: NDArray[np.float32]) -> None:
    """audio: [S] or [S, num_channels]. Raises: InvalidRequest."""
    full = np.abs(audio.reshape(len(audio), -1)) >= _FULL_SCALE
    runs = np.lib.stride_tricks.sliding_window_view(full, _CLIPPED_RUN, axis=0).all(axis=-1)
    share = float(runs.mean(axis=0).max())
    if share > _MAX_CLIPPED_SHARE:
        raise InvalidRequest(
            f"the recording is clipped: {100 * share:.0f} % of it lies at full scale, at most "
            f"{100 * _MAX_CLIPPED_SHARE:.0f} % is taken: record it with less gain"
        )
