"""POST /v1/audio/speech: a checked body becomes one SpeechRequest, and its chunks become the response.

Owns the choice of model, voice and format by OpenAI's names, the first chunk before the status line, and the
end of the engine's work when the client hangs up. Never encodes a sample, never maps an error to a status.
A stream that fails after it began is cut: the connection closes without the last HTTP chunk, so that no
client takes it for whole.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import time
from collections.abc import AsyncGenerator

from fastapi import APIRouter, Request, Response
from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive, Scope, Send

from declaim.api.access import SPEECH_PATH, RequestRecord, record_of
from declaim.api.encode import DEFAULT_FORMAT
from declaim.api.errors import BodyTooLarge, ClientGone, UnsupportedMediaType, error_body
from declaim.api.metrics import ServerMetrics
from declaim.api.pipeline import AudioPipeline, check_rate
from declaim.api.schemas import SpeechBody, parse_speech_body
from declaim.api.serving import Serving
from declaim.engine.errors import (
    DeclaimError,
    EngineError,
    InvalidRequest,
    ModelNotFound,
    TooLong,
    VoiceNotFound,
)
from declaim.engine.request import AudioChunk, SamplingParams, SpeechRequest

MAX_BODY_BYTES = 1 << 20
# What is read and dropped of a body that is too large: closing on unread bytes would reset the connection and
# the client would never see the 413.
_MAX_DRAIN_BYTES = 16 << 20
MAX_INPUT_CHARS = 4096

MODEL_ALIASES = ("tts-1", "tts-1-hd", "gpt-4o-mini-tts")
# Clients check these names themselves and send no other.
_OPENAI_VOICES = frozenset("alloy ash ballad coral echo fable onyx nova sage shimmer verse marin cedar".split())
_STREAM_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}


def is_own_voice(name: str | None, *, model_name: str) -> bool:
    """Whether `name` means the model's own voice: None, one of OpenAI's, "default", or the model's name."""
    return name is None or name in _OPENAI_VOICES or name in ("default", model_name)


def check_model(name: str, *, model_name: str) -> None:
    """Raises: ModelNotFound unless `name` is the served model or an alias of it."""
    if name != model_name and name not in MODEL_ALIASES:
        served = ", ".join((model_name, *MODEL_ALIASES))
        raise ModelNotFound(f"The model '{name}' does not exist here: use one of {served}")


def to_request(body: SpeechBody, *, model_name: str, request_id: str) -> SpeechRequest:
    """Turn a body into what the engine takes.

    Raises: InvalidRequest, TooLong, VoiceNotFound, ModelNotFound.
    """
    check_model(body.model, model_name=model_name)
    if not body.input:
        raise InvalidRequest("input is empty: send the text to speak", param="input")
    if len(body.input) > MAX_INPUT_CHARS:
        raise TooLong(
            f"input has {len(body.input)} characters, at most {MAX_INPUT_CHARS} are taken: send it in parts",
            param="input",
        )
    voice = body.voice if isinstance(body.voice, str | None) else body.voice.id
    if not is_own_voice(voice, model_name=model_name):
        raise VoiceNotFound(f"There is no voice '{voice}': use 'default'", param="voice")
    sampling = SamplingParams(
        temperature=body.temperature,
        top_k=body.top_k,
        top_p=body.top_p,
        min_p=body.min_p,
        repetition_penalty=body.repetition_penalty,
        guidance_scale=body.guidance_scale,
        seed=body.seed,
        max_seconds=body.max_seconds,
    )
    speed = 1.0 if body.speed is None else body.speed
    return SpeechRequest(text=body.input, sampling=sampling, speed=speed, request_id=request_id)


def check_format(body: SpeechBody) -> str:
    """The response format to encode. Raises: InvalidRequest for one that is not served."""
    if body.stream_format not in (None, "audio", "sse"):
        message = f"stream_format is '{body.stream_format}': use 'audio' or 'sse'"
        raise InvalidRequest(message, param="stream_format")
    response_format = DEFAULT_FORMAT if body.response_format is None else body.response_format
    check_rate(response_format, None)
    return response_format


async def read_json_body(request: Request) -> bytes:
    """Read a JSON body of at most MAX_BODY_BYTES, sent with a length or chunked.

    Raises: UnsupportedMediaType, BodyTooLarge, ClientGone.
    """
    body = bytearray()
    num_bytes = 0
    try:
        async for part in request.stream():
            num_bytes += len(part)
            if num_bytes > _MAX_DRAIN_BYTES:
                break
            if num_bytes <= MAX_BODY_BYTES:
                body += part
    except ClientDisconnect:
        raise ClientGone("the client hung up while it sent its request") from None
    if num_bytes > MAX_BODY_BYTES:
        raise BodyTooLarge(f"The body is larger than {MAX_BODY_BYTES} bytes: send less text at once")
    media_type = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if media_type != "application/json" and not media_type.endswith("+json"):
        raise UnsupportedMediaType(f"The content type '{media_type}' is not taken: send application/json")
    return bytes(body)


class _ChunkStream:
    """The chunks of one request, each awaited together with the client's hanging up.

    The body has been read before, so all that `request.receive` can still give is the disconnect.
    """

    def __init__(self, chunks: AsyncGenerator[AudioChunk, None], request: Request) -> None:
        self._chunks = chunks
        self._gone: asyncio.Task[Message] = asyncio.ensure_future(_receive(request))

    async def next(self) -> AudioChunk | None:
        """The next chunk, None after the last. Raises: ClientGone, and what the engine raises."""
        pending = asyncio.ensure_future(self._pull())
        try:
            await asyncio.wait({pending, self._gone}, return_when=asyncio.FIRST_COMPLETED)
            if self._gone.done():
                raise ClientGone("the client hung up")
            return pending.result()
        finally:
            if not pending.done():
                pending.cancel()
            await asyncio.wait({pending})
            if not pending.cancelled():
                pending.exception()  # seen: where the client is gone, nobody else will look

    async def close(self) -> None:
        """End the engine's work, finished or not; idempotent."""
        self._gone.cancel()
        await self._chunks.aclose()

    async def _pull(self) -> AudioChunk | None:
        return await anext(self._chunks, None)


async def _receive(request: Request) -> Message:
    return await request.receive()


class _AudioFraming:
    """The encoder's bytes as they are."""

    def __init__(self, encoder: AudioPipeline) -> None:
        self._encoder = encoder
        self.media_type = encoder.media_type

    def chunk(self, chunk: AudioChunk) -> bytes:
        return self._encoder.feed(chunk.audio)

    def finish(self) -> bytes:
        return self._encoder.finish()

    def failure(self, error: DeclaimError) -> bytes:
        return b""


class _EventFraming:
    """The encoder's bytes as server-sent events; usage counts characters in and codec frames out."""

    media_type = "text/event-stream"

    def __init__(self, encoder: AudioPipeline, *, num_chars: int) -> None:
        self._encoder = encoder
        self._num_chars = num_chars
        self._num_frames = 0

    def chunk(self, chunk: AudioChunk) -> bytes:
        self._num_frames += chunk.num_frames
        return self._delta(self._encoder.feed(chunk.audio))

    def finish(self) -> bytes:
        usage = {
            "input_tokens": self._num_chars,
            "output_tokens": self._num_frames,
            "total_tokens": self._num_chars + self._num_frames,
        }
        return self._delta(self._encoder.finish()) + _event({"type": "speech.audio.done", "usage": usage})

    def failure(self, error: DeclaimError) -> bytes:
        return _event({"type": "error", **error_body(error)})

    @staticmethod
    def _delta(data: bytes) -> bytes:
        if not data:
            return b""
        return _event({"type": "speech.audio.delta", "audio": base64.b64encode(data).decode("ascii")})


def _event(fields: dict[str, object]) -> bytes:
    return b"data: " + json.dumps(fields, separators=(",", ":")).encode() + b"\n\n"


class _SpeechResponse(Response):
    """Sends the chunks as they come; returns without the last body message where the stream failed."""

    def __init__(
        self,
        first: AudioChunk,
        stream: _ChunkStream,
        *,
        framing: _AudioFraming | _EventFraming,
        record: RequestRecord,
        metrics: ServerMetrics,
    ) -> None:
        super().__init__(media_type=framing.media_type, headers=_STREAM_HEADERS)
        del self.headers["content-length"]
        self._first = first
        self._stream = stream
        self._framing = framing
        self._record = record
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            chunk: AudioChunk | None = self._first
            while chunk is not None:
                await _send_part(send, self._framing.chunk(chunk))
                self._count(chunk)
                chunk = await self._stream.next()
            await _send_part(send, self._framing.finish())
            await send({"type": "http.response.body", "body": b"", "more_body": False})
            self._record.outcome = "complete"
        except ClientGone:
            self._record.outcome = "client_gone"
        except DeclaimError as error:
            self._record.outcome, self._record.error = "cut", str(error)
            await _send_part(send, self._framing.failure(error))
        finally:
            await self._stream.close()

    def _count(self, chunk: AudioChunk) -> None:
        seconds = len(chunk.audio) / chunk.sample_rate_hz
        self._record.audio_s += seconds
        self._metrics.audio_s.inc(seconds)


async def _send_part(send: Send, data: bytes) -> None:
    if data:
        await send({"type": "http.response.body", "body": data, "more_body": True})


class _NoResponse(Response):
    """What is sent to a client that hung up: nothing."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        return None


def build_speech_router(serving: Serving, metrics: ServerMetrics) -> APIRouter:
    """The route of POST /v1/audio/speech."""
    router = APIRouter()

    async def answer(request: Request, record: RequestRecord) -> Response:
        body = parse_speech_body(await read_json_body(request))
        record.chars = len(body.input)
        engine = serving.engine()
        speech = to_request(body, model_name=engine.model_name, request_id=record.request_id)
        response_format = check_format(body)
        async with contextlib.AsyncExitStack() as stack:
            stream = _ChunkStream(engine.astream(speech), request)
            stack.push_async_callback(stream.close)
            first = await stream.next()
            if first is None:
                raise EngineError("the engine ended the request without audio")
            record.ttfa_s = time.perf_counter() - record.began_s
            metrics.ttfa_s.observe(record.ttfa_s)
            encoder = AudioPipeline(response_format, source_rate_hz=first.sample_rate_hz)
            framing: _AudioFraming | _EventFraming = _AudioFraming(encoder)
            if body.stream_format == "sse":
                framing = _EventFraming(encoder, num_chars=len(body.input))
            stack.pop_all()
        return _SpeechResponse(first, stream, framing=framing, record=record, metrics=metrics)

    # The body is read by hand (size before content, our envelope): this schema is for /openapi.json only.
    schema = {"requestBody": {"required": True, "content": {"application/json": {"schema": _BODY_SCHEMA}}}}

    @router.post(SPEECH_PATH, openapi_extra=schema, response_class=Response)
    async def create_speech(request: Request) -> Response:
        """Speak a text."""
        record = record_of(request)
        try:
            return await answer(request, record)
        except ClientGone:
            record.status, record.outcome = 499, "client_gone"
            return _NoResponse()
        except DeclaimError as error:
            record.error = str(error)
            raise

    return router


_BODY_SCHEMA = SpeechBody.model_json_schema()
