"""POST /v1/audio/speech: a checked body becomes one SpeechRequest, and its parts become the response.

Owns the order of things: who asks, what is asked, whether it is let in, the first audio before the status line, the end
of the engine's work when the client hangs up, and the one report of what it cost. Never encodes a sample, never maps an
error to a status. A stream that fails after it began is cut: the connection closes without the last HTTP chunk, so that
no client takes it for whole.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import re
import time
from collections.abc import Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

from fastapi import APIRouter, Request, Response

from declaim.api.access import SPEECH_PATH, RequestRecord, record_of
from declaim.api.body import drop_body, read_json_body
from declaim.api.cache import cache_key
from declaim.api.delivery import Account, Listening, NoResponse, StreamedSpeech, WholeSpeech
from declaim.api.encode import DEFAULT_FORMAT, MEDIA_TYPES, with_exact_length
from declaim.api.errors import BodyTooLarge, ClientGone, MissingParameter
from declaim.api.framing import AudioFraming, EventFraming, Framing, json_document, webvtt_document, whole_body
from declaim.api.gate import Caller, Gate
from declaim.api.keys import caller_of
from declaim.api.metrics import ServerMetrics
from declaim.api.pipeline import check_rate, in_worker
from declaim.api.reference import decode_reference
from declaim.api.rendering import Part, Rendering, Renders, render
from declaim.api.schemas import SpeechBody, parse_speech_body
from declaim.api.serving import Serving, SpeechEngine
from declaim.api.settings import ApiSettings
from declaim.engine.controls import read_instructions
from declaim.engine.errors import DeclaimError, EngineError, InvalidRequest, ModelNotFound, TooLong
from declaim.engine.request import ControlValue, EncodedVoice, SamplingParams, SpeechRequest, Tier
from declaim.engine.spec import ModelSpec

MODEL_ALIASES = ("tts-1", "tts-1-hd", "gpt-4o-mini-tts", "gpt-4o-mini-tts-2025-12-15")
# Formats that are no audio: documents that are sent whole.
DOCUMENT_TYPES: Mapping[str, str] = MappingProxyType({"json": "application/json", "vtt": "text/vtt; charset=utf-8"})
_DOCUMENT_AUDIO = "wav"
_LANGUAGE_NAMES: Mapping[str, str] = MappingProxyType(
    {
        "chinese": "zh",
        "english": "en",
        "french": "fr",
        "german": "de",
        "italian": "it",
        "japanese": "ja",
        "korean": "ko",
        "portuguese": "pt",
        "russian": "ru",
        "spanish": "es",
    }
)
_LANGUAGE_TAG = re.compile(r"[a-z]{2,3}(-[a-z0-9]{1,8})*")  # RFC 5646, as far as it goes here
_MAX_TAG_CHARS = 35
# A body larger than this is parsed in a thread: it would hold the event loop up for milliseconds.
_MAX_INLINE_BYTES = 64 << 10


class Voices(Protocol):
    """Knows voices by name."""

    async def resolve(self, tenant: str, name: str | None) -> EncodedVoice | str | None:
        """What `SpeechRequest.voice` takes for a name that a client sent. Raises: VoiceNotFound."""
        ...

    async def encode_reference(self, data: bytes, *, transcript: str, param: str) -> EncodedVoice:
        """Encode a recording that came with a request. Raises: InvalidRequest that names `param`, MissingParameter
        where the model must know what is said in it."""
        ...


class Lexicons(Protocol):
    """Knows tenants' pronunciations."""

    async def entries(self, tenant: str) -> Mapping[str, str]:
        """What `SpeechRequest.lexicon` takes: written form to what is said. Raises: StoreUnavailable."""
        ...


def check_model(name: str, *, model_name: str) -> None:
    """Raises: ModelNotFound unless `name` is the served model or an alias of it."""
    if name != model_name and name not in MODEL_ALIASES:
        served = ", ".join((model_name, *MODEL_ALIASES))
        raise ModelNotFound(f"The model '{name}' does not exist here: use one of {served}")


def voice_name(body: SpeechBody) -> str | None:
    """The voice that a body names."""
    return body.voice if isinstance(body.voice, str | None) else body.voice.id


def to_request(
    body: SpeechBody,
    *,
    engine: SpeechEngine,
    caller: Caller,
    tier: Tier,
    voice: EncodedVoice | str | None,
    lexicon: Mapping[str, str],
    request_id: str,
) -> SpeechRequest:
    """Turn a body into what the engine takes. voice: what the body's voice was resolved to. lexicon: the caller's.

    Raises: InvalidRequest, ModelNotFound.
    """
    check_model(body.model, model_name=engine.model_name)
    if not body.input:
        raise InvalidRequest("input is empty: send the text to speak", param="input")
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
    request = SpeechRequest(
        text=body.input,
        voice=voice,
        sampling=sampling,
        speed=1.0 if body.speed is None else body.speed,
        request_id=request_id,
        language=_language(body.language),
        normalize=body.normalize is not False,
        lexicon=lexicon,
        controls=_controls(body, engine.spec),
        word_timestamps=bool(body.word_timestamps) or body.response_format == "vtt",
        tenant=caller.tenant,
        weight=caller.weight,
        tier=tier,
    )
    return request if engine.spec.supports_speed else dataclasses.replace(request, speed=1.0)


def tempo_of(body: SpeechBody, spec: ModelSpec) -> float:
    """How much faster the audio is played: the body's speed, or 1.0 where the model paces itself."""
    return 1.0 if spec.supports_speed or body.speed is None else body.speed


def _language(value: str | None) -> str | None:
    """The tag, in lower case, of "de", "de_AT" or "German"; None leaves it to the text."""
    if value is None or value.strip().lower() in ("", "auto"):
        return None
    name = value.strip().lower()
    tag = _LANGUAGE_NAMES.get(name, name.replace("_", "-"))
    if len(tag) > _MAX_TAG_CHARS or not _LANGUAGE_TAG.fullmatch(tag):
        raise InvalidRequest(f"language is '{value[:40]}': send a code such as en or zh-CN", param="language")
    return tag


def _controls(body: SpeechBody, spec: ModelSpec) -> dict[str, ControlValue]:
    """The dials that a body sets: by its instructions where the family knows their words, then by name."""
    controls: dict[str, ControlValue] = {}
    if body.instructions and spec.instructions:
        # Most clients send a prompt for another model here, or the word None: what has no meaning is ignored.
        with contextlib.suppress(InvalidRequest):
            controls.update(read_instructions(body.instructions, spec.instructions))
    return controls | body.controls()


@dataclass(frozen=True, slots=True)
class _Form:
    """How an answer is sent. document: "json" or "vtt", None for audio; audio_format: of the audio in it."""

    audio_format: str
    sample_rate_hz: int | None
    document: str | None
    has_events: bool
    is_whole: bool

    @property
    def name(self) -> str:
        return self.document or self.audio_format


def _form_of(body: SpeechBody) -> _Form:
    """Raises: InvalidRequest for what is not served."""
    if body.stream_format not in (None, "audio", "sse"):
        message = f"stream_format is '{body.stream_format}': use 'audio' or 'sse'"
        raise InvalidRequest(message, param="stream_format")
    name = DEFAULT_FORMAT if body.response_format is None else body.response_format
    document = name if name in DOCUMENT_TYPES else None
    if document is not None and body.stream_format == "sse":
        message = f"stream_format is 'sse', and response_format '{name}' is sent whole: leave stream_format out"
        raise InvalidRequest(message, param="stream_format")
    if document is None and name not in MEDIA_TYPES:
        served = ", ".join((*MEDIA_TYPES, *DOCUMENT_TYPES))
        message = f"response_format '{name}' is not served: use one of {served}"
        raise InvalidRequest(message, param="response_format")
    audio_format = name if document is None else body.audio_format or _DOCUMENT_AUDIO
    if audio_format not in MEDIA_TYPES:
        message = f"audio_format '{audio_format}' is not served: use one of {', '.join(MEDIA_TYPES)}"
        raise InvalidRequest(message, param="audio_format")
    check_rate(audio_format, body.sample_rate)
    has_events = body.stream_format == "sse"
    is_whole = document is not None or (body.stream is False and not has_events)
    return _Form(audio_format, body.sample_rate, document, has_events, is_whole)


class _Speech:
    """The route's work, with all that it needs of the server."""

    def __init__(
        self,
        serving: Serving,
        metrics: ServerMetrics,
        *,
        gate: Gate,
        voices: Voices,
        lexicons: Lexicons,
        renders: Renders,
        workers: Executor,
        settings: ApiSettings,
    ) -> None:
        self._serving = serving
        self._metrics = metrics
        self._gate = gate
        self._voices = voices
        self._lexicons = lexicons
        self._renders = renders
        self._workers = workers
        self._settings = settings

    async def answer(self, request: Request, record: RequestRecord) -> Response:
        """One request from its key to its response."""
        caller = await self._authenticate(request)
        raw = await read_json_body(request)
        if len(raw) <= _MAX_INLINE_BYTES:
            body, reference = self._parse(raw)
        else:
            body, reference = await asyncio.to_thread(self._parse, raw)
        record.chars = len(body.input)
        engine = self._serving.engine()
        form = _form_of(body)
        voice = None if reference is not None else await self._voices.resolve(caller.tenant, voice_name(body))
        speech = to_request(
            body,
            engine=engine,
            caller=caller,
            tier="default",
            voice=voice,
            lexicon=await self._lexicons.entries(caller.tenant),
            request_id=record.request_id,
        )
        admission = await self._gate.admit(
            caller, request_id=record.request_id, chars=len(body.input), service_tier=body.service_tier
        )
        account = Account(
            admission,
            record,
            self._metrics,
            model=engine.model_name,
            voice="ref_audio" if reference is not None else voice_name(body) or "default",
            response_format=form.name,
            chars=len(body.input),
        )
        record.headers.update({"x-service-tier": admission.tier, **admission.headers})
        try:
            speech = dataclasses.replace(speech, tier=admission.tier)
            if reference is not None:
                speech = dataclasses.replace(speech, voice=await self._encode(reference, body))
            return await self._speak(request, record, account, body=body, engine=engine, speech=speech, form=form)
        except BaseException as error:
            account.ended_by(error)
            raise

    async def _authenticate(self, request: Request) -> Caller:
        try:
            return await caller_of(self._gate, request)
        except DeclaimError:
            with contextlib.suppress(BodyTooLarge):
                await drop_body(request)
            raise

    def _parse(self, raw: bytes) -> tuple[SpeechBody, bytes | None]:
        """A body within the server's limits, and the recording in it."""
        body = parse_speech_body(raw, strict=self._settings.strict)
        most = self._settings.max_input_chars
        if len(body.input) > most:
            raise TooLong(
                f"input has {len(body.input)} characters, at most {most} are taken: send it in parts", param="input"
            )
        if not body.ref_audio:
            if body.ref_text:
                raise MissingParameter(
                    "Missing required parameter: 'ref_audio': ref_text says what is said in it", param="ref_audio"
                )
            return body, None
        return body, decode_reference(body.ref_audio, param="ref_audio")

    async def _encode(self, reference: bytes, body: SpeechBody) -> EncodedVoice:
        return await self._voices.encode_reference(reference, transcript=body.ref_text or "", param="ref_audio")

    async def _speak(
        self,
        request: Request,
        record: RequestRecord,
        account: Account,
        *,
        body: SpeechBody,
        engine: SpeechEngine,
        speech: SpeechRequest,
        form: _Form,
    ) -> Response:
        how = Rendering(form.audio_format, form.sample_rate_hz, tempo_of(body, engine.spec))
        parts, account.is_cached = await self._renders.open(
            lambda: cache_key(
                speech,
                model_name=engine.model_name,
                fingerprint=engine.fingerprint,
                spec=engine.spec,
                rendering=how,
            ),
            lambda: render(engine, speech, how, self._workers),
        )
        listening = Listening(parts, request)
        async with contextlib.AsyncExitStack() as stack:
            stack.push_async_callback(listening.close)
            first = await self._first_audio(listening, account, record)
            if not form.is_whole and (first.finish_reason is None or form.has_events):
                if first.finish_reason is not None:
                    first = dataclasses.replace(first, data=with_exact_length(first.data, form.audio_format))
                framing: Framing = AudioFraming(form.audio_format)
                if form.has_events:
                    framing = EventFraming(num_chars=len(body.input))
                stack.pop_all()
                return StreamedSpeech(
                    first,
                    listening,
                    framing=framing,
                    account=account,
                    record=record,
                    keepalive_s=self._settings.keepalive_s,
                )
            whole = [first]
            while whole[-1].finish_reason is None:
                whole.append(await listening.next())
                account.made(whole[-1])
        media_type = MEDIA_TYPES[form.audio_format] if form.document is None else DOCUMENT_TYPES[form.document]
        if form.document is None:
            content = await in_worker(self._workers, whole_body, whole, form.audio_format)
        elif form.document == "vtt":
            content = webvtt_document(whole)
        else:
            content = json_document(
                whole, audio_format=form.audio_format, num_chars=len(body.input), with_words=speech.word_timestamps
            )
        return WholeSpeech(content, whole, media_type=media_type, account=account, record=record)

    async def _first_audio(self, listening: Listening, account: Account, record: RequestRecord) -> Part:
        """All parts up to the first that has bytes, as one. Raises: EngineError if there is no audio at all."""
        part = await listening.next()
        account.made(part)
        while not part.data and part.finish_reason is None:
            more = await listening.next()
            account.made(more)
            part = part.joined(more)
        if part.audio_s == 0.0:
            raise EngineError("the engine ended the request without audio")
        record.ttfa_s = time.perf_counter() - record.began_s
        if account.is_cached:
            self._metrics.cached.inc()
        else:
            self._metrics.ttfa_s.observe(record.ttfa_s)
        return part


def build_speech_router(
    serving: Serving,
    metrics: ServerMetrics,
    *,
    gate: Gate,
    voices: Voices,
    lexicons: Lexicons,
    renders: Renders,
    workers: Executor,
    settings: ApiSettings,
) -> APIRouter:
    """The route of POST /v1/audio/speech."""
    router = APIRouter()
    speech = _Speech(
        serving,
        metrics,
        gate=gate,
        voices=voices,
        lexicons=lexicons,
        renders=renders,
        workers=workers,
        settings=settings,
    )

    # The body is read by hand (size before content, our envelope): this schema is for /openapi.json only.
    schema = {"requestBody": {"required": True, "content": {"application/json": {"schema": _body_schema()}}}}

    @router.post(SPEECH_PATH, openapi_extra=schema, response_class=Response)
    async def create_speech(request: Request) -> Response:
        """Speak a text."""
        record = record_of(request)
        try:
            return await speech.answer(request, record)
        except ClientGone:
            record.status, record.outcome = 499, "client_gone"
            return NoResponse()
        except DeclaimError as error:
            record.error = str(error)
            raise

    return router


def _body_schema() -> dict[str, object]:
    """SpeechBody's JSON schema with nothing left to look up, so that it can stand anywhere in a document."""
    schema = SpeechBody.model_json_schema()
    definitions = schema.pop("$defs")
    voice = schema["properties"]["voice"]
    voice["anyOf"] = [definitions["VoiceId"] if "$ref" in choice else choice for choice in voice["anyOf"]]
    return schema
