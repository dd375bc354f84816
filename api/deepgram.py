"""WS /v1/speak: Deepgram's protocol over the same sessions, so that its clients' stock plugins stream text in.

Owns Deepgram's messages (Speak, Flush, Clear, Close; Metadata, Flushed, Cleared, Warning, Error), its query
parameters, and G.711. Its voices' names mean the model's own voice.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from fastapi import APIRouter, WebSocket
from numpy.typing import NDArray
from starlette.datastructures import QueryParams

from declaim.api.errors import InvalidBody, error_body
from declaim.api.live_session import (
    ClauseAudio,
    LiveConfig,
    LiveEvent,
    LiveServices,
    LiveSession,
    UtteranceDone,
    UtteranceFailed,
)
from declaim.api.schemas import parse_speech_body
from declaim.api.sockets import (
    CLOSE_NORMAL,
    CLOSE_POLICY,
    Opening,
    Socket,
    SocketLimits,
    SocketPlaces,
    SocketSession,
    finish_while_open,
    open_socket,
)
from declaim.api.speech import MODEL_ALIASES
from declaim.engine.errors import DeclaimError, InvalidRequest

DEEPGRAM_PATH = "/v1/speak"
# Their plugins keep a socket for an hour.
_IDLE_TIMEOUT_S = 3660.0
_OWN_VOICE_PREFIX = "aura-"
_RATES_HZ: Mapping[str, tuple[int, ...]] = {
    "linear16": (8_000, 16_000, 24_000, 32_000, 48_000),
    "mulaw": (8_000, 16_000),
    "alaw": (8_000, 16_000),
}
_MULAW_BIAS = 33
_MULAW_CLIP = 8158


@dataclass(frozen=True, slots=True)
class _Query:
    """What the handshake's query asks for."""

    config: LiveConfig
    encoding: str
    voice: str | None


def build_deepgram_router(services: LiveServices, places: SocketPlaces) -> APIRouter:
    """The route of the WebSocket. places: shared by all WebSocket routes of a server."""
    router = APIRouter()

    @router.websocket(DEEPGRAM_PATH)
    async def speak(websocket: WebSocket) -> None:
        request_id = str(uuid.uuid4())

        async def prepare(opening: Opening) -> Callable[[Socket], SocketSession]:
            query = _read_query(websocket.query_params, model_name=opening.engine.model_name)
            await services.voices.resolve(opening.caller.tenant, query.voice)
            return lambda socket: _DeepgramSocket(socket, services, places.limits, query, opening, request_id)

        headers = {"dg-request-id": request_id}
        await open_socket(websocket, services.serving, services.gate, places, prepare, headers=headers)

    return router


def _read_query(query: QueryParams, *, model_name: str) -> _Query:
    """Raises: InvalidRequest for what is not served."""
    encoding = query.get("encoding", "linear16")
    if encoding not in _RATES_HZ:
        raise InvalidRequest(f"encoding is '{encoding[:40]}': use {', '.join(_RATES_HZ)}", param="encoding")
    if query.get("container", "none") != "none":
        raise InvalidRequest("container is not 'none': a WebSocket carries bare audio; leave it out", param="container")
    rates = _RATES_HZ[encoding]
    rate = query.get("sample_rate", str(24_000 if 24_000 in rates else rates[0]))
    if rate not in map(str, rates):
        raise InvalidRequest(
            f"sample_rate is '{rate[:20]}': {encoding} is made at {', '.join(map(str, rates))} Hz", param="sample_rate"
        )
    voice = query.get("model")
    if voice in (*MODEL_ALIASES, "") or (voice is not None and voice.startswith(_OWN_VOICE_PREFIX)):
        voice = None
    fields = {
        "model": model_name,
        "input": ".",
        "voice": voice,
        "response_format": "pcm",
        "sample_rate": int(rate),
        "seed": secrets.randbits(62),
        "speed": query.get("speed"),
        "language": query.get("language"),
    }
    body = parse_speech_body(json.dumps(fields).encode())
    if body.speed is not None and not 0.25 <= body.speed <= 4.0:
        raise InvalidRequest(f"speed is {body.speed:g}: it must lie between 0.25 and 4", param="speed")
    return _Query(LiveConfig(body, "pcm", "clause"), encoding, voice)


class _DeepgramSocket:
    """One client's socket and its session."""

    def __init__(
        self,
        socket: Socket,
        services: LiveServices,
        limits: SocketLimits,
        query: _Query,
        opening: Opening,
        request_id: str,
    ) -> None:
        self._socket = socket
        self._limits = limits
        self._query = query
        self._model_name = opening.engine.model_name
        self._request_id = request_id
        self._session = LiveSession(services, credential=opening.credential, emit=self._emit)
        self._num_flushed = 0
        self._num_cleared = 0

    @property
    def broken(self) -> asyncio.Future[None]:
        """As `SocketSession`."""
        return self._session.broken

    async def read(self) -> tuple[int, str]:
        """As `SocketSession`."""
        await self._greet()
        strikes = 0
        while strikes < self._limits.max_strikes:
            try:
                async with asyncio.timeout(_IDLE_TIMEOUT_S):
                    message = await self._socket.receive()
                if message.get("type") == "Close":
                    await self.finish()
                    return CLOSE_NORMAL, ""
                await self._handle(message)
                strikes = 0
            except TimeoutError:
                if not self._session.is_busy:
                    return CLOSE_NORMAL, "idle"
            except DeclaimError as error:
                await self._warn(error)
                strikes += 1
        return CLOSE_POLICY, f"{strikes} messages in a row could not be used"

    async def finish(self) -> None:
        """As `SocketSession`. A Clear is still heard."""
        if self._session.is_open:
            self._session.end_utterance(self._query.config)
        if await finish_while_open(self._socket, self._session.finish(), cancel="Clear"):
            await self._clear()

    async def end(self) -> None:
        """As `SocketSession`."""
        await self._session.close()

    async def _greet(self) -> None:
        await self._socket.send(
            {
                "type": "Metadata",
                "request_id": self._request_id,
                "model_name": self._model_name,
                "model_version": "1",
                "model_uuid": str(uuid.uuid5(uuid.NAMESPACE_URL, self._model_name)),
            }
        )

    async def _handle(self, message: Mapping[str, object]) -> None:
        kind = message.get("type")
        if kind == "Speak":
            text = message.get("text")
            if not isinstance(text, str):
                raise InvalidRequest("text is not a string: send the next piece of text", param="text")
            self._session.add_text(text, self._query.config)
        elif kind == "Flush":
            self._session.end_utterance(self._query.config)
        elif kind == "Clear":
            await self._clear()
        elif kind != "KeepAlive":
            raise InvalidRequest(f"type is {str(kind)[:60]!r}: use Speak, Flush, Clear or Close", param="type")

    async def _clear(self) -> None:
        await self._session.cancel()
        await self._socket.send({"type": "Cleared", "sequence_id": self._num_cleared})
        self._num_cleared += 1

    async def _warn(self, error: DeclaimError) -> None:
        code = "DATA-0000" if isinstance(error, InvalidBody) else "DATA-0001"
        told = {"description": str(error), "warn_msg": str(error), "code": code, "warn_code": code}
        await self._socket.send({"type": "Warning", **told})

    async def _emit(self, event: LiveEvent) -> None:
        match event:
            case ClauseAudio():
                if event.part.data:
                    await self._socket.send(_encoded(event.part.data, self._query.encoding))
            case UtteranceFailed(_, error):
                told = {"description": str(error), "err_msg": str(error), **error_body(error)}
                await self._socket.send({"type": "Error", **told})
            case UtteranceDone():
                await self._socket.send({"type": "Flushed", "sequence_id": self._num_flushed})
                self._num_flushed += 1


def _encoded(pcm: bytes, encoding: str) -> bytes:
    if encoding == "linear16":
        return pcm
    samples = np.frombuffer(pcm, "<i2")
    return (mulaw if encoding == "mulaw" else alaw)(samples).tobytes()


def mulaw(samples: NDArray[np.int16]) -> NDArray[np.uint8]:
    """G.711 mu-law, uint8 [S] of int16 [S]. Source: ITU-T G.711, table 2a."""
    signed = samples.astype(np.int32) >> 2
    magnitude = np.minimum(np.abs(signed), _MULAW_CLIP) + _MULAW_BIAS
    exponent = np.floor(np.log2(magnitude)).astype(np.int32) - 5
    mantissa = (magnitude >> (exponent + 1)) & 0x0F
    code: NDArray[np.int32] = (np.where(signed < 0, 0x80, 0) | (exponent << 4) | mantissa) ^ 0xFF
    return code.astype(np.uint8)


def alaw(samples: NDArray[np.int16]) -> NDArray[np.uint8]:
    """G.711 A-law, uint8 [S] of int16 [S]. Source: ITU-T G.711, table 1a."""
    signed = samples.astype(np.int32) >> 3
    magnitude = np.where(signed >= 0, signed, -signed - 1)
    exponent = np.maximum(np.floor(np.log2(np.maximum(magnitude, 1))).astype(np.int32) - 4, 0)
    mantissa = np.where(exponent == 0, magnitude >> 1, magnitude >> exponent) & 0x0F
    code: NDArray[np.int32] = ((exponent << 4) | mantissa) ^ np.where(signed >= 0, 0xD5, 0x55)
    return code.astype(np.uint8)
