"""WS /v1/audio/speech/stream: text in as it is written, audio out as it is spoken.

Owns the messages of this protocol, which is vLLM-Omni's with a cancel, usage and errors as objects.

A client sends `session.config` first, and again between utterances to change it; `input.text` any number of times;
`input.done` to end an utterance, which flushes it; `input.cancel` to stop at once; `session.close`; `ping`.
It gets `audio.start`, binary audio and `audio.done` for every clause ("sentence"), `session.done` for every utterance,
`audio.cancelled`, `error`, `pong`. With `word_timestamps` the audio comes in `audio.chunk`, base64, beside its words.

Each clause is one file of the response format; pcm clauses put together are one stream without gaps. `stream_audio`
sends audio while it is made, in clauses; without it every sentence or utterance comes as one binary message.
"""

from __future__ import annotations

import asyncio
import base64
import json
import secrets
from collections.abc import Callable, Mapping
from typing import cast

from fastapi import APIRouter, WebSocket

from declaim.api.clauses import Granularity
from declaim.api.errors import NotReady, answer_for, error_body
from declaim.api.live_session import (
    ClauseAudio,
    ClauseBegun,
    ClauseDone,
    LiveConfig,
    LiveEvent,
    LiveServices,
    LiveSession,
    Utterance,
    UtteranceDone,
    UtteranceFailed,
)
from declaim.api.pipeline import check_rate
from declaim.api.reference import decode_reference
from declaim.api.schemas import parse_speech_body
from declaim.api.sockets import (
    CLOSE_GOING_AWAY,
    CLOSE_NORMAL,
    CLOSE_POLICY,
    STOPPING,
    Opening,
    Socket,
    SocketLimits,
    SocketPlaces,
    SocketSession,
    finish_while_open,
    open_socket,
)
from declaim.api.speech import to_request, voice_name
from declaim.api.tenant_errors import RateLimited
from declaim.engine.errors import DeclaimError, InvalidRequest
from declaim.engine.request import EncodedVoice, Word

LIVE_PATH = "/v1/audio/speech/stream"
_DEFAULT_FORMAT = "wav"
_GRANULARITIES = ("none", "sentence", "clause")
_MAX_LABEL_CHARS = 128


def build_live_router(services: LiveServices, places: SocketPlaces) -> APIRouter:
    """The route of the WebSocket. places: shared by all WebSocket routes of a server."""
    router = APIRouter()

    async def prepare(opening: Opening) -> Callable[[Socket], SocketSession]:
        return lambda socket: _LiveSocket(socket, services, places.limits, credential=opening.credential)

    @router.websocket(LIVE_PATH)
    async def speak_live(websocket: WebSocket) -> None:
        await open_socket(websocket, services.serving, services.gate, places, prepare)

    return router


class _LiveSocket:
    """One client's socket and its session."""

    def __init__(self, socket: Socket, services: LiveServices, limits: SocketLimits, *, credential: str | None) -> None:
        self._socket = socket
        self._services = services
        self._limits = limits
        self._credential = credential
        self._session = LiveSession(services, credential=credential, emit=self._emit)
        self._config: LiveConfig | None = None
        self._streams_audio = False
        self._held = bytearray()  # of a clause that is sent whole
        self._held_words: list[Word] = []
        self._num_bytes = 0  # of the clause so far
        self._num_chunks = 0

    @property
    def broken(self) -> asyncio.Future[None]:
        """As `SocketSession`."""
        return self._session.broken

    async def read(self) -> tuple[int, str]:
        """As `SocketSession`."""
        strikes = 0
        while strikes < self._limits.max_strikes:
            limit_s = self._limits.config_timeout_s if self._config is None else self._limits.idle_timeout_s
            try:
                async with asyncio.timeout(limit_s):
                    message = await self._socket.receive()
                if message.get("type") == "session.close":
                    await self.finish()
                    return CLOSE_NORMAL, ""
                await self._handle(message)
                strikes = 0
            except TimeoutError:
                if self._session.is_busy:
                    continue
                awaited = "session.config" if self._config is None else "a message"
                await self._tell(InvalidRequest(f"No {awaited} came in {limit_s:g} s: open another socket"))
                return CLOSE_POLICY, "idle"
            except NotReady as error:  # the server began to stop as this came
                await self._tell(error)
                return CLOSE_GOING_AWAY, STOPPING
            except DeclaimError as error:
                await self._tell(error)
                if self._config is None:
                    return CLOSE_POLICY, "no session.config"
                strikes += 1
        return CLOSE_POLICY, f"{strikes} messages in a row could not be used"

    async def finish(self) -> None:
        """As `SocketSession`. A cancel is still heard."""
        if self._session.is_open and self._config is not None:
            self._session.end_utterance(self._config)
        if await finish_while_open(self._socket, self._session.finish(), cancel="input.cancel"):
            await self._cancel()

    async def end(self) -> None:
        """As `SocketSession`."""
        await self._session.close()

    async def _handle(self, message: Mapping[str, object]) -> None:
        kind = message.get("type")
        if kind == "session.config":
            if self._session.is_open:
                raise InvalidRequest("session.config came inside an utterance: send input.done first", param="type")
            await self._configure(message)
            return
        if kind == "ping":
            await self._socket.send({"type": "pong"})
            return
        if self._config is None:
            raise InvalidRequest(f"The first message is {str(kind)[:60]!r}: send session.config", param="type")
        if kind == "input.text":
            text = message.get("text")
            if not isinstance(text, str):
                raise InvalidRequest("text is not a string: send the next piece of text", param="text")
            self._session.add_text(text, self._config, label=_label(message))
        elif kind == "input.done":
            self._session.end_utterance(self._config, label=_label(message))
        elif kind == "input.cancel":
            await self._cancel()
        else:
            raise InvalidRequest(
                f"type is {str(kind)[:60]!r}: use session.config, input.text, input.done, input.cancel, session.close"
                " or ping",
                param="type",
            )

    async def _configure(self, message: Mapping[str, object]) -> None:
        """Check everything now that can be wrong: an utterance should not fail for its config."""
        engine = self._services.serving.engine()
        fields = {name: value for name, value in message.items() if value is not None and name != "type"}
        fields.setdefault("model", engine.model_name)
        fields.setdefault("response_format", _DEFAULT_FORMAT)
        fields.setdefault("seed", secrets.randbits(62))  # one for the session: one voice for all clauses
        if "speaker" in fields:
            fields.setdefault("voice", fields["speaker"])
        streams_audio = _boolean(fields, "stream_audio")
        granularity = fields.get("split_granularity", "clause" if streams_audio else "none")
        if granularity not in _GRANULARITIES:
            shown = str(granularity)[:40]
            raise InvalidRequest(
                f"split_granularity is '{shown}': use {', '.join(_GRANULARITIES)}", param="split_granularity"
            )
        # In a thread: a recording in it takes milliseconds to parse.
        body = await asyncio.to_thread(lambda: parse_speech_body(json.dumps({**fields, "input": "."}).encode()))
        response_format = body.response_format or _DEFAULT_FORMAT
        check_rate(response_format, body.sample_rate)
        reference = await self._reference(body.ref_audio, body.ref_text)
        caller = await self._services.gate.authenticate(self._credential)
        voice: EncodedVoice | str | None = reference
        if voice is None:
            voice = await self._services.voices.resolve(caller.tenant, voice_name(body))
        to_request(body, engine=engine, caller=caller, tier="default", voice=voice, lexicon={}, request_id="config")
        self._config = LiveConfig(body, response_format, cast(Granularity, granularity), reference)
        self._streams_audio = streams_audio

    async def _reference(self, recording: str | None, transcript: str | None) -> EncodedVoice | None:
        if not recording:
            return None
        data = await asyncio.to_thread(decode_reference, recording, param="ref_audio")
        return await self._services.voices.encode_reference(data, transcript=transcript or "", param="ref_audio")

    async def _cancel(self) -> None:
        index = self._session.next_index
        cancelled, num_others = await self._session.cancel()
        self._held.clear()
        self._held_words.clear()
        about = {"utterance_index": index} if cancelled is None else _about(cancelled)
        await self._socket.send(
            {
                "type": "audio.cancelled",
                **about,
                "audio_seconds": 0.0 if cancelled is None else round(cancelled.delivered_s, 3),
                "dropped_utterances": num_others,
            }
        )

    async def _tell(self, error: DeclaimError, utterance: Utterance | None = None) -> None:
        about = {} if utterance is None else _about(utterance)
        retry_after_s = error.retry_after_s if isinstance(error, RateLimited) else answer_for(error).retry_after_s
        retry = {} if retry_after_s is None else {"retry_after": retry_after_s}
        await self._socket.send({"type": "error", "message": str(error), **error_body(error), **about, **retry})

    async def _emit(self, event: LiveEvent) -> None:
        match event:
            case ClauseBegun(utterance, index, text):
                await self._begin(utterance, index, text)
            case ClauseAudio():
                await self._send_audio(event)
            case ClauseDone():
                await self._end(event)
            case UtteranceFailed(utterance, error):
                await self._tell(error, utterance)
            case UtteranceDone(utterance):
                await self._socket.send(
                    {
                        "type": "session.done",
                        **_about(utterance),
                        "total_sentences": utterance.num_heard,
                        "error": utterance.failure is not None,
                        "characters": utterance.num_charged,
                        "audio_seconds": round(utterance.delivered_s, 3),
                        "usage": {
                            "input_tokens": utterance.num_charged,
                            "output_tokens": utterance.num_frames,
                            "total_tokens": utterance.num_charged + utterance.num_frames,
                        },
                    }
                )

    async def _begin(self, utterance: Utterance, index: int, text: str) -> None:
        config = utterance.config
        self._num_bytes = self._num_chunks = 0
        self._held.clear()
        self._held_words.clear()
        await self._socket.send(
            {
                "type": "audio.start",
                **_about(utterance),
                "sentence_index": index,
                "sentence_text": text,
                "format": config.response_format,
                "sample_rate": check_rate(config.response_format, config.body.sample_rate),
                "channels": 1,
                **({"word_timestamps": True} if config.body.word_timestamps else {}),
            }
        )

    async def _send_audio(self, event: ClauseAudio) -> None:
        if self._streams_audio:
            await self._send_data(event.utterance, event.index, event.part.data, event.part.words)
        else:
            self._held += event.part.data
            self._held_words += event.part.words

    async def _send_data(self, utterance: Utterance, index: int, data: bytes, words: tuple[Word, ...]) -> None:
        self._num_bytes += len(data)
        if not utterance.config.body.word_timestamps:
            if data:
                await self._socket.send(data)
        elif data or words:
            await self._socket.send(
                {
                    "type": "audio.chunk",
                    **_about(utterance),
                    "sentence_index": index,
                    "chunk_id": self._num_chunks,
                    "audio_b64": base64.b64encode(data).decode("ascii"),
                    "timestamps": [
                        {
                            "word": word.text,
                            "start_ms": round(1000 * word.start_s),
                            "end_ms": round(1000 * word.end_s),
                        }
                        for word in words
                    ],
                }
            )
            self._num_chunks += 1

    async def _end(self, event: ClauseDone) -> None:
        if not self._streams_audio and event.finish_reason != "error":
            data, self._held = bytes(self._held), bytearray()
            await self._send_data(event.utterance, event.index, data, tuple(self._held_words))
        await self._socket.send(
            {
                "type": "audio.done",
                **_about(event.utterance),
                "sentence_index": event.index,
                "total_bytes": self._num_bytes,
                "error": event.finish_reason == "error",
                "finish_reason": event.finish_reason,
                "audio_seconds": round(event.audio_s, 3),
            }
        )


def _about(utterance: Utterance) -> dict[str, object]:
    label = {} if utterance.label is None else {"utterance_id": utterance.label}
    return {"utterance_index": utterance.index, "request_id": utterance.request_id, **label}


def _label(message: Mapping[str, object]) -> str | None:
    label = message.get("utterance_id")
    if label is not None and (not isinstance(label, str) or len(label) > _MAX_LABEL_CHARS):
        raise InvalidRequest(
            f"utterance_id is not a string of at most {_MAX_LABEL_CHARS} characters", param="utterance_id"
        )
    return label


def _boolean(fields: Mapping[str, object], name: str) -> bool:
    value = fields.get(name, False)
    if not isinstance(value, bool):
        raise InvalidRequest(f"{name} is {str(value)[:40]!r}: use true or false", param=name)
    return value
