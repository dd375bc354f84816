"""The parts of an answer as an HTTP body: audio bytes as they are, server-sent events, or one document.

Owns the shapes of events and documents, and truthful usage. Never waits, never encodes audio.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from typing import Protocol

from declaim.api.captions import to_webvtt
from declaim.api.encode import MEDIA_TYPES, with_exact_length
from declaim.api.errors import error_body
from declaim.api.rendering import Part
from declaim.engine.errors import DeclaimError, InvalidRequest
from declaim.engine.request import Word

KEEPALIVE = b": keepalive\n\n"
# Some clients read lines of at most 64 KiB. A multiple of 3 needs no padding, one of 2 cuts no sample.
_MAX_DELTA_BYTES = 24_000


class Framing(Protocol):
    """Makes one answer's body from its parts, in order; used once."""

    @property
    def media_type(self) -> str: ...

    @property
    def keepalive(self) -> bytes:
        """What may be sent while there is no audio; empty where nothing may."""
        ...

    def part(self, part: Part) -> bytes: ...

    def failure(self, error: DeclaimError) -> bytes:
        """What is said of a failure in the middle, before the connection is cut."""
        ...


class AudioFraming:
    """The audio's bytes and nothing else."""

    keepalive = b""

    def __init__(self, response_format: str) -> None:
        self.media_type = MEDIA_TYPES[response_format]

    def part(self, part: Part) -> bytes:
        return part.data

    def failure(self, error: DeclaimError) -> bytes:
        return b""


class EventFraming:
    """Server-sent events: the audio, words as they are spoken, and at the end usage and why it ended."""

    media_type = "text/event-stream"
    keepalive = KEEPALIVE

    def __init__(self, *, num_chars: int) -> None:
        self._num_chars = num_chars
        self._num_frames = 0
        self._audio_s = 0.0

    def part(self, part: Part) -> bytes:
        self._num_frames += part.num_frames
        self._audio_s += part.audio_s
        events = [_event({"type": "speech.word", **_word(word)}) for word in part.words]
        for first in range(0, len(part.data), _MAX_DELTA_BYTES):
            audio = _base64(part.data[first : first + _MAX_DELTA_BYTES])
            events.append(_event({"type": "speech.audio.delta", "audio": audio}))
        if part.finish_reason is not None:
            usage = _usage(self._num_chars, self._num_frames, self._audio_s)
            events.append(_event({"type": "speech.audio.done", "usage": usage, "finish_reason": part.finish_reason}))
        return b"".join(events)

    def failure(self, error: DeclaimError) -> bytes:
        return _event({"type": "error", **error_body(error)})


def whole_body(parts: Sequence[Part], response_format: str) -> bytes:
    """All the audio of an answer that was known to its end before the first byte was sent: its length is exact."""
    return with_exact_length(b"".join(part.data for part in parts), response_format)


def json_document(parts: Sequence[Part], *, audio_format: str, num_chars: int, with_words: bool) -> bytes:
    """The audio in base64, when its words are spoken, its length and usage."""
    audio_s = sum(part.audio_s for part in parts)
    document: dict[str, object] = {
        "object": "audio.speech",
        "audio": _base64(whole_body(parts, audio_format)),
        "format": audio_format,
        "duration": round(audio_s, 6),
        "words": [_word(word) for part in parts for word in part.words] if with_words else None,
        "finish_reason": parts[-1].finish_reason,
        "usage": _usage(num_chars, sum(part.num_frames for part in parts), audio_s),
    }
    return json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()


def webvtt_document(parts: Sequence[Part]) -> bytes:
    """The words as captions. Raises: InvalidRequest where the model told of none."""
    words = [word for part in parts for word in part.words]
    if not words and any(part.num_frames for part in parts):
        raise InvalidRequest(
            "response_format is 'vtt', and this model does not tell when words are spoken: use an audio format",
            param="response_format",
        )
    return to_webvtt(words).encode()


def _usage(num_chars: int, num_frames: int, audio_s: float) -> dict[str, object]:
    """OpenAI's three counts, in characters and codec frames, and the seconds that are heard."""
    return {
        "input_tokens": num_chars,
        "output_tokens": num_frames,
        "total_tokens": num_chars + num_frames,
        "audio_seconds": round(audio_s, 6),
    }


def _word(word: Word) -> dict[str, object]:
    return {"word": word.text, "start": round(word.start_s, 3), "end": round(word.end_s, 3)}


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _event(fields: dict[str, object]) -> bytes:
    return b"data: " + json.dumps(fields, separators=(",", ":")).encode() + b"\n\n"
