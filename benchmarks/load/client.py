"""Asks a server for one speech, by HTTP, SSE or WebSocket, and notes when each piece of audio came.

Owns the wire formats of the three. Never retries, never raises for what a server does: an Outcome says it.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Literal

import aiohttp

from declaim.load.playback import WAV_HEADER_BYTES, Listener
from declaim.load.workload import Job

Protocol = Literal["http", "sse", "ws"]
PROTOCOLS: tuple[Protocol, ...] = ("http", "sse", "ws")
MAX_MESSAGE_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class Target:
    """The server and what is asked of it.

    url: up to and with `/v1`. response_format: pcm or wav, so that sound can be told from silence as it comes.
    words_per_s: how fast text is fed to a WebSocket. extra: further fields of the body.
    """

    url: str
    model: str
    voice: str
    protocol: Protocol = "http"
    response_format: Literal["pcm", "wav"] = "pcm"
    sample_rate_hz: int = 24_000
    words_per_s: float = 20.0
    timeout_s: float = 120.0
    extra: dict[str, object] = field(default_factory=dict)


@dataclass(slots=True)
class Outcome:
    """What became of one job. Times are seconds from the start of the run.

    error: None, or what went wrong, short: "http 429 rate_limit_exceeded", "cut", "timeout", "refused", "silent".
    retry_after_s: the server's advice with an error.
    """

    job: Job
    sent_s: float
    ended_s: float = 0.0
    headers_s: float | None = None
    error: str | None = None
    retry_after_s: float | None = None
    listener: Listener = field(default_factory=lambda: Listener(24_000))

    @property
    def first_byte_s(self) -> float | None:
        """From sending to the first sample, audible or not."""
        return self.listener.arrivals[0][0] - self.sent_s if self.listener.arrivals else None

    @property
    def first_audio_s(self) -> float | None:
        """From sending to the first audible sound."""
        heard_s = self.listener.first_audible_s()
        return None if heard_s is None else heard_s - self.sent_s

    @property
    def wall_s(self) -> float:
        return self.ended_s - self.sent_s

    @property
    def rtf(self) -> float | None:
        """Wall time over audio time; below 1 is faster than speech."""
        return self.wall_s / self.listener.audio_s if self.listener.audio_s else None


class Refused(Exception):
    """The server answered with an error; the message is the Outcome's."""

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


async def ask(session: aiohttp.ClientSession, target: Target, job: Job, *, origin_s: float) -> Outcome:
    """Send one job now and follow it to its end. origin_s: the start of the run on time.perf_counter's clock."""
    header_bytes = WAV_HEADER_BYTES if target.response_format == "wav" else 0
    sent_s = time.perf_counter() - origin_s
    outcome = Outcome(job, sent_s, listener=Listener(target.sample_rate_hz, header_bytes))
    pieces = {"http": _http, "sse": _sse, "ws": _websocket}[target.protocol](session, target, outcome, origin_s)
    try:
        async with asyncio.timeout(target.timeout_s):
            async for data in pieces:
                outcome.listener.feed(data, time.perf_counter() - origin_s)
    except TimeoutError:
        outcome.error = "timeout"
    except Refused as error:
        outcome.error, outcome.retry_after_s = str(error), error.retry_after_s
    except aiohttp.ClientConnectorError:
        outcome.error = "refused"
    except aiohttp.ClientError as error:
        outcome.error = "cut" if outcome.listener.arrivals else f"connection: {type(error).__name__}"
    outcome.ended_s = time.perf_counter() - origin_s
    if outcome.error is None and outcome.first_audio_s is None:
        outcome.error = "silent"
    return outcome


def _headers(job: Job) -> dict[str, str]:
    return {"Authorization": f"Bearer {job.tenant.key}"} if job.tenant.key else {}


def _body(target: Target, job: Job) -> dict[str, object]:
    body: dict[str, object] = {
        "model": target.model,
        "voice": target.voice,
        "input": job.text,
        "response_format": target.response_format,
    }
    if target.protocol == "sse":
        body["stream_format"] = "sse"
    return body | target.extra


async def _post(
    session: aiohttp.ClientSession, target: Target, outcome: Outcome, origin_s: float
) -> AsyncIterator[bytes]:
    url = f"{target.url}/audio/speech"
    async with session.post(url, json=_body(target, outcome.job), headers=_headers(outcome.job)) as response:
        outcome.headers_s = time.perf_counter() - origin_s
        if response.status != 200:
            raise Refused(
                f"http {response.status} {_error_code(await response.content.read(65536))}".strip(),
                _seconds(response.headers.get("retry-after")),
            )
        async for data in response.content.iter_any():
            yield data


async def _http(
    session: aiohttp.ClientSession, target: Target, outcome: Outcome, origin_s: float
) -> AsyncIterator[bytes]:
    async for data in _post(session, target, outcome, origin_s):
        yield data


async def _sse(
    session: aiohttp.ClientSession, target: Target, outcome: Outcome, origin_s: float
) -> AsyncIterator[bytes]:
    pending = b""
    is_done = False
    async for data in _post(session, target, outcome, origin_s):
        *events, pending = (pending + data).split(b"\n\n")
        for event in _events(events):
            if event.get("type") == "error":
                raise Refused(f"event {_code_of(event)}".strip())
            is_done = is_done or event.get("type") == "speech.audio.done"
            audio = event.get("audio") or event.get("delta")
            if isinstance(audio, str):
                yield _decoded(audio)
    if not is_done:
        raise Refused("cut")


def _events(blocks: list[bytes]) -> Iterator[dict[str, object]]:
    for block in blocks:
        for line in block.splitlines():
            if line.startswith(b"data: ") and line != b"data: [DONE]":
                yield _object(line[6:])


async def _websocket(
    session: aiohttp.ClientSession, target: Target, outcome: Outcome, origin_s: float
) -> AsyncIterator[bytes]:
    """declaim's and vLLM-Omni's messages, the text fed word by word."""
    url = f"{target.url}/audio/speech/stream"
    config = {
        "type": "session.config",
        "model": target.model,
        "voice": target.voice,
        "response_format": "pcm",
        "stream_audio": True,
    }
    try:
        socket = await session.ws_connect(url, headers=_headers(outcome.job), max_msg_size=MAX_MESSAGE_BYTES)
    except aiohttp.WSServerHandshakeError as error:
        raise Refused(f"http {error.status}") from None
    async with socket:
        outcome.headers_s = time.perf_counter() - origin_s
        await socket.send_json(config | target.extra)
        feeding = asyncio.ensure_future(_feed_words(socket, outcome.job.text, words_per_s=target.words_per_s))
        try:
            async for message in socket:
                if message.type is aiohttp.WSMsgType.BINARY:
                    yield message.data
                elif message.type is aiohttp.WSMsgType.TEXT:
                    event = _object(message.data.encode())
                    if event.get("type") == "error":
                        raise Refused(f"event {_code_of(event)}".strip())
                    if event.get("type") == "session.done":
                        return
            raise Refused("cut")
        finally:
            feeding.cancel()
            await asyncio.wait({feeding})


async def _feed_words(socket: aiohttp.ClientWebSocketResponse, text: str, *, words_per_s: float) -> None:
    for i, word in enumerate(text.split()):
        if i:
            await asyncio.sleep(1 / words_per_s)
        await socket.send_json({"type": "input.text", "text": word if i == 0 else f" {word}"})
    await socket.send_json({"type": "input.done"})


def _object(raw: bytes) -> dict[str, object]:
    try:
        value = json.loads(raw)
    except ValueError:
        raise Refused("not JSON") from None
    return value if isinstance(value, dict) else {}


def _decoded(audio: str) -> bytes:
    try:
        return base64.b64decode(audio, validate=True)
    except binascii.Error:
        raise Refused("not base64") from None


def _error_code(raw: bytes) -> str:
    try:
        return _code_of(_object(raw))
    except Refused:
        return ""


def _code_of(body: dict[str, object]) -> str:
    error = body.get("error")
    return str(error.get("code") or error.get("type") or "") if isinstance(error, dict) else ""


def _seconds(value: str | None) -> float | None:
    try:
        return None if value is None else float(value)
    except ValueError:
        return None
