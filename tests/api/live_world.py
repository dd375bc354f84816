"""A server of live text with an engine that speaks every text as a tone of its own, and clients to talk to it."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from fastapi import FastAPI
from numpy.typing import NDArray
from websockets.sync.client import ClientConnection, connect

from declaim.api.app import NoLexicons
from declaim.api.deepgram import build_deepgram_router
from declaim.api.errors import ApiError
from declaim.api.gate import Admission, Caller, OpenGate, Usage
from declaim.api.live import build_live_router
from declaim.api.live_session import LiveServices
from declaim.api.serving import Serving, SpeechEngine
from declaim.api.sockets import SocketLimits, SocketPlaces
from declaim.api.store.database import Database
from declaim.api.tenant_errors import RateLimited
from declaim.api.voices import VoiceStore
from declaim.engine.errors import DeclaimError
from declaim.engine.request import AudioChunk, SpeechRequest, Word
from declaim.engine.spec import ModelSpec
from tests.api.asgi_server import served
from tests.api.fake_engine import FakeEngine, eventually, make_spec

RATE_HZ = 24_000
HOP = RATE_HZ // 25


def tone(text: str) -> NDArray[np.float32]:
    """What the engine makes of a text: a frame for each character, the pitch after the text."""
    times = np.arange(len(text) * HOP) / RATE_HZ
    pitch = 200.0 + sum(map(ord, text)) % 500
    return (0.5 * np.sin(2 * np.pi * pitch * times)).astype(np.float32)


@dataclass(slots=True)
class TextEngine(FakeEngine):
    """Chunks of five frames, `pace_s` apart; a text with "BOOM" in it fails after its first chunk."""

    pace_s: float = 0.0
    failure: DeclaimError | None = None
    num_chunks: int = 0
    num_cancelled: int = 0
    began: dict[str, float] = field(default_factory=dict)
    ended: dict[str, float] = field(default_factory=dict)

    @property
    def spec(self) -> ModelSpec:
        return replace(make_spec(RATE_HZ), supports_speed=True)

    async def astream(self, request: SpeechRequest) -> AsyncGenerator[AudioChunk, None]:
        self.requests.append(request)
        self.began[request.text] = time.perf_counter()
        audio = tone(request.text)
        is_whole = False
        try:
            for first in range(0, len(request.text), 5):
                await asyncio.sleep(self.pace_s)
                if first and "BOOM" in request.text and self.failure is not None:
                    raise self.failure
                last = min(first + 5, len(request.text))
                self.num_chunks += 1
                yield AudioChunk(
                    request_id=request.request_id or "",
                    audio=audio[first * HOP : last * HOP],
                    first_frame=first,
                    num_frames=last - first,
                    sample_rate_hz=RATE_HZ,
                    is_last=last == len(request.text),
                    finish_reason="stop" if last == len(request.text) else None,
                    words=(Word(request.text[first:last], first / 25, last / 25),) if request.word_timestamps else (),
                )
            is_whole = True
            self.finished.append(request.text)
        finally:
            self.ended[request.text] = time.perf_counter()
            if not is_whole:
                self.num_cancelled += 1
                self.cancelled[request.text] = time.perf_counter()


@dataclass(slots=True)
class _Entry:
    """An admission that writes down its usage."""

    gate: NamedGate
    headers: Mapping[str, str] = field(default_factory=dict)
    tier: str = "default"

    async def charge(self, chars: int) -> None:
        self.gate.charged.append(chars)
        await asyncio.sleep(self.gate.charging_s)
        if sum(self.gate.charged) > self.gate.max_charged:
            raise RateLimited("too much text: wait", retry_after_s=3.0)

    def close(self, usage: Usage) -> None:
        self.gate.usages.append(usage)


class NamedGate(OpenGate):
    """A key is its tenant's name; "wrong" is nobody's, and "poor" has spent its quota."""

    def __init__(self) -> None:
        self.admitted: list[tuple[str, int]] = []
        self.charged: list[int] = []  # after an utterance was let in
        self.max_charged = 10**9
        self.charging_s = 0.0
        self.usages: list[Usage] = []

    async def authenticate(self, credential: str | None) -> Caller:
        if credential == "wrong":
            raise ApiError("no such key", status=401, type="invalid_request_error", code="invalid_api_key")
        return Caller(tenant=credential or "")

    async def admit(self, caller: Caller, *, request_id: str, chars: int, service_tier: str | None) -> Admission:
        if caller.tenant == "poor":
            raise ApiError("spent", status=429, type="insufficient_quota", code="insufficient_quota")
        self.admitted.append((request_id, chars))
        return _Entry(self)  # type: ignore[return-value]


@dataclass(slots=True)
class World:
    """A running server, and what its engine and its gate have seen."""

    address: str
    engine: TextEngine
    gate: NamedGate

    def forget(self) -> World:
        """As if it had just started."""
        for seen in (
            self.engine.requests,
            self.engine.finished,
            self.gate.admitted,
            self.gate.charged,
            self.gate.usages,
        ):
            seen.clear()
        self.engine.cancelled.clear()
        self.gate.max_charged, self.gate.charging_s = 10**9, 0.0
        return self

    @contextmanager
    def live(self, path: str = "/v1/audio/speech/stream", **config: object) -> Iterator[LiveClient]:
        with connect(f"ws://{self.address}{path}", max_size=None) as socket:
            client = LiveClient(socket)
            client.send(type="session.config", **{"response_format": "pcm", "stream_audio": True, **config})
            yield client

    @contextmanager
    def deepgram(self, query: str = "", key: str = "acme") -> Iterator[LiveClient]:
        headers = {"Authorization": f"Token {key}"}
        with connect(f"ws://{self.address}/v1/speak{query}", additional_headers=headers, max_size=None) as socket:
            yield LiveClient(socket)


@dataclass(slots=True)
class LiveClient:
    """Sends messages, and reads them with a deadline."""

    socket: ClientConnection

    def send(self, **message: object) -> None:
        self.socket.send(json.dumps(message))

    def say(self, text: str, *, done: bool = True) -> None:
        for word in text.split(" "):
            self.send(type="input.text", text=word + " ")
        if done:
            self.send(type="input.done")

    def next(self, timeout: float = 30.0) -> dict[str, object] | bytes:
        message = self.socket.recv(timeout)
        return message if isinstance(message, bytes) else json.loads(message)

    def until(self, kind: str) -> list[dict[str, object] | bytes]:
        """All messages up to the first of a type, which is the last of them."""
        messages = [self.next()]
        while isinstance(messages[-1], bytes) or messages[-1]["type"] != kind:
            messages.append(self.next())
        return messages


def audio_of(messages: list[dict[str, object] | bytes]) -> bytes:
    return b"".join(message for message in messages if isinstance(message, bytes))


def events_of(messages: list[dict[str, object] | bytes]) -> list[dict[str, object]]:
    return [message for message in messages if isinstance(message, dict)]


def pcm(text: str) -> bytes:
    return bytes(np.rint(tone(text) * np.float32(32767.0)).astype("<i2").tobytes())


@contextmanager
def live_world(folder: Path, engine: SpeechEngine, **limits: object) -> Iterator[World]:
    serving = Serving(lambda: engine)
    serving.start()
    database = Database(f"sqlite:///{folder}/declaim.db")
    database.migrate()
    voices = VoiceStore(serving.engine_for_accepted, database)
    gate = NamedGate()
    socket_limits = replace(SocketLimits(), **limits)  # type: ignore[arg-type]
    with ThreadPoolExecutor(2) as workers:
        services = LiveServices(serving, gate, voices, NoLexicons(), workers)
        places = SocketPlaces(socket_limits)
        app = FastAPI()
        app.include_router(build_live_router(services, places))
        app.include_router(build_deepgram_router(services, places))
        try:
            assert eventually(lambda: serving.stage == "ready", within_s=60)
            with served(app) as address:
                yield World(address, engine, gate)  # type: ignore[arg-type]
        finally:
            voices.close()
            database.close()
            serving.close()
