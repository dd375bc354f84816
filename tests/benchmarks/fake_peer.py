"""A speech server with delays that it keeps and notes: what a load tester must find out by itself."""

from __future__ import annotations

import asyncio
import base64
import json
import threading
import time
from dataclasses import dataclass, field
from types import TracebackType

import numpy as np
from aiohttp import web

RATE_HZ = 24_000
CHUNK_S = 0.1


@dataclass(slots=True)
class FakePeer:
    """Sends `num_chunks` of CHUNK_S, the first after first_s, others every_s apart, chunk `stall_at` stall_s later.

    The first `silent_chunks` are silence. refuse: the status of every refuse_each-th answer instead. most_streams: more
    at a time are refused with 503. cut_after: chunks after which the connection breaks. sent: for each stream, when
    each chunk was handed to the socket (time.perf_counter).
    """

    first_s: float = 0.03
    every_s: float = 0.02
    num_chunks: int = 10
    silent_chunks: int = 1
    stall_at: int | None = None
    stall_s: float = 0.0
    refuse: int | None = None
    refuse_each: int = 1
    most_streams: int | None = None
    cut_after: int | None = None
    arrived: list[float] = field(default_factory=list)
    sent: list[list[float]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    url: str = ""
    _loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.new_event_loop)
    _thread: threading.Thread | None = None
    _runner: web.AppRunner | None = None
    _num_streams: int = 0

    def __enter__(self) -> FakePeer:
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(10)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        assert self._runner is not None and self._thread is not None
        asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    async def _start(self) -> None:
        app = web.Application()
        app.router.add_post("/v1/audio/speech", self._speech)
        app.router.add_get("/v1/audio/speech/stream", self._socket)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}/v1"

    def _chunk(self, i: int) -> bytes:
        times = np.arange(int(CHUNK_S * RATE_HZ)) / RATE_HZ
        level = 0.0 if i < self.silent_chunks else 8000.0
        samples: bytes = np.rint(level * np.sin(2 * np.pi * 440 * times)).astype("<i2").tobytes()
        return samples

    async def _wait(self, i: int) -> None:
        await asyncio.sleep(self.first_s if i == 0 else self.every_s + (self.stall_s if i == self.stall_at else 0.0))

    async def _speech(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        number = len(self.arrived)
        self.arrived.append(time.perf_counter())
        self.keys.append(request.headers.get("authorization"))
        self.texts.append(body["input"])
        if self.refuse is not None and number % self.refuse_each == 0:
            return _refusal(self.refuse, "rate_limit_exceeded")
        if self.most_streams is not None and self._num_streams >= self.most_streams:
            return _refusal(503, "server_is_overloaded")
        self._num_streams += 1
        try:
            return await self._speak(request, is_sse=body.get("stream_format") == "sse")
        finally:
            self._num_streams -= 1

    async def _speak(self, request: web.Request, *, is_sse: bool) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream" if is_sse else "audio/pcm"})
        sent: list[float] = []
        self.sent.append(sent)
        for i in range(self.num_chunks):
            await self._wait(i)
            if not response.prepared:
                await response.prepare(request)
            if i == self.cut_after:
                assert request.transport is not None
                request.transport.abort()
                return response
            data = self._chunk(i)
            if is_sse:
                event = {"type": "speech.audio.delta", "audio": base64.b64encode(data).decode()}
                data = f"data: {json.dumps(event)}\n\n".encode()
            sent.append(time.perf_counter())
            await response.write(data)
        if is_sse:
            await response.write(b'data: {"type":"speech.audio.done","usage":{}}\n\n')
        return response

    async def _socket(self, request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        self.arrived.append(time.perf_counter())
        text = ""
        async for message in socket:
            event = json.loads(message.data)
            if event["type"] == "input.text":
                text += event["text"]
            elif event["type"] == "input.done":
                self.texts.append(text)
                sent: list[float] = []
                self.sent.append(sent)
                for i in range(self.num_chunks):
                    await self._wait(i)
                    sent.append(time.perf_counter())
                    await socket.send_bytes(self._chunk(i))
                await socket.send_json({"type": "session.done"})
        return socket


def _refusal(status: int, code: str) -> web.Response:
    error = {"message": "no", "type": "requests", "param": None, "code": code}
    return web.json_response({"error": error}, status=status, headers={"retry-after": "0.05"})
