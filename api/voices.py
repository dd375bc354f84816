"""Voices: those the model has, those a tenant uploaded, and the endpoints that make, list and delete them.

Owns names and ids, the work of encoding (one recording at a time, off the event loop), and what is kept in memory of
codes. What one tenant made is unknown to every other. Never touches the file system.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections import Counter, OrderedDict
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Protocol, TypeVar

from fastapi import APIRouter, Query, Request
from pydantic import ValidationError

from declaim.api.body import drop_body
from declaim.api.errors import ApiError, BodyTooLarge, InvalidBody, MissingParameter
from declaim.api.gate import Caller, Gate, credential_of
from declaim.api.keys import caller_of
from declaim.api.store.database import Database
from declaim.api.store.voices import LimitReached, StoredConsent, StoredVoice, VoiceTables
from declaim.api.uploads import Form, Recording, from_flac, read_form, read_recording
from declaim.api.voice_schemas import (
    Consent,
    ConsentList,
    DeletedConsent,
    DeletedVoice,
    RenamedConsent,
    Voice,
    VoiceList,
)
from declaim.engine.errors import DeclaimError, InvalidRequest, Overloaded, VoiceNotFound
from declaim.engine.request import EncodedVoice
from declaim.engine.request import Voice as ReferenceVoice
from declaim.engine.spec import ModelSpec

_T = TypeVar("_T")

# Clients check these names themselves and send no other; the order is the table that maps them to a model's own, round
# and round. Of the embedded voice's three the second is a low one: ash, echo, onyx and cedar, which are heard as men's.
OPENAI_VOICES = tuple("alloy ash sage coral echo fable nova onyx ballad shimmer cedar marin verse".split())

MAX_NAME_CHARS = 64
MAX_TRANSCRIPT_CHARS = 2000
MAX_CACHED_VOICES = 64
_NUM_VOICES_NAMED = 20
_VOICE_ID = re.compile(r"voice_[0-9a-f]{24}")
_CONSENT_ID = re.compile(r"cons_[0-9a-f]{24}")
_LANGUAGE = re.compile(r"[A-Za-z]{2,8}(-[A-Za-z0-9]{1,8}){0,3}")


class VoiceEngine(Protocol):
    """The part of an engine that voices need."""

    @property
    def model_name(self) -> str: ...

    @property
    def spec(self) -> ModelSpec: ...

    def encode_voice(self, voice: ReferenceVoice) -> EncodedVoice: ...


@dataclass(frozen=True, slots=True)
class VoiceLimits:
    """max_voices, max_consents: of one tenant. max_uploads: at work at once, of all tenants and of one.

    requires_consent: whether a voice is made only under a recorded consent, as OpenAI does it.
    """

    max_voices: int = 100
    max_consents: int = 100
    max_uploads: int = 8
    max_uploads_per_tenant: int = 2
    requires_consent: bool = True


def own_voice(name: str | None, *, model_name: str, spec: ModelSpec) -> str | None:
    """The model's own voice that `name` means: None for its only or default one.

    None, "default", the model's name and OpenAI's names always mean one. Raises: VoiceNotFound for any other name.
    """
    if name in spec.voices:
        return name
    if name in OPENAI_VOICES:
        return spec.voices[OPENAI_VOICES.index(name) % len(spec.voices)] if spec.voices else None
    if name is None or name in ("default", model_name):
        return None
    raise VoiceNotFound(f"There is no voice '{name}' here", param="voice")


class VoiceStore:
    """Every voice that can be asked for. One for each server process; any number may share a database."""

    def __init__(
        self, engine: Callable[[], VoiceEngine], database: Database, *, limits: VoiceLimits | None = None
    ) -> None:
        """engine: gives the engine, or raises NotReady."""
        self.limits = limits or VoiceLimits()
        self._engine = engine
        self._tables = VoiceTables(database)
        # One worker: decoding and encoding never take more than a core from the streams that run.
        self._workers = ThreadPoolExecutor(1, "declaim-voices")
        self._uploads: Counter[str] = Counter()  # at work, by tenant
        self._cache: OrderedDict[tuple[str, str], EncodedVoice] = OrderedDict()

    async def resolve(self, tenant: str, name: str | None) -> EncodedVoice | str | None:
        """What `SpeechRequest.voice` takes for a name that a client sent: one of the model's own or this tenant's.

        A voice that was encoded for another model is encoded again, from its stored sample.
        Raises: VoiceNotFound naming the voices there are; InvalidRequest where the model imitates no voices.
        """
        engine = self._engine()
        try:
            return own_voice(name, model_name=engine.model_name, spec=engine.spec)
        except VoiceNotFound:
            voice = await self._find(tenant, name)
        if voice is None:
            raise VoiceNotFound(await self._not_found(tenant, name or "", engine), param="voice")
        return await self._encoded(voice, engine)

    async def encode_reference(self, data: bytes, *, transcript: str, param: str) -> EncodedVoice:
        """Encode a recording that came with a request and is not kept. param: its field, named in errors.

        Raises: as `read_recording`; InvalidRequest where the model imitates no voices; MissingParameter where it must
        know what is said in them.
        """
        engine = self._engine()
        check_reference(engine, transcript, param="ref_text", recording=param)

        def encode() -> EncodedVoice:
            return _encode(engine, read_recording(data, param=param), transcript)

        return await self._run(encode)

    def own_voices(self) -> list[Voice]:
        """Those of the model, which every tenant has."""
        names = dict.fromkeys(("default", *self._engine().spec.voices, *OPENAI_VOICES))
        return [Voice(id=name, voice_id=name, name=name, created_at=0, type="builtin", language="en") for name in names]

    async def voices(self, tenant: str) -> list[Voice]:
        """Those that this tenant made, newest first."""
        return [_voice(voice) for voice in await asyncio.to_thread(self._tables.voices, tenant)]

    async def voice(self, tenant: str, voice_id: str) -> Voice:
        """One of them. Raises: ApiError (404), the same for another tenant's and for none."""
        voice = await self._find(tenant, voice_id) if _VOICE_ID.fullmatch(voice_id) else None
        if voice is None or voice.id != voice_id:
            raise _no_voice(voice_id)
        return _voice(voice)

    async def create_voice(
        self, tenant: str, *, name: str, sample: bytes, transcript: str = "", consent_id: str | None = None
    ) -> Voice:
        """Check, encode and keep a voice.

        Raises: InvalidRequest, MissingParameter, BodyTooLarge, ApiError (403) at the tenant's limit, Overloaded.
        """
        engine = self._engine()
        transcript = _check_text("transcript", transcript, max_chars=MAX_TRANSCRIPT_CHARS)
        check_reference(engine, transcript, param="transcript", recording="audio_sample")
        name = _check_name(name)
        if name in (*OPENAI_VOICES, *engine.spec.voices, "default", engine.model_name) or _VOICE_ID.fullmatch(name):
            raise InvalidRequest(f"name is '{name}', which means a voice of the model: choose another", param="name")
        await self._check_consent(tenant, consent_id)
        max_voices = self.limits.max_voices
        if await asyncio.to_thread(self._tables.count_voices, tenant) >= max_voices:
            raise _limit_reached("voices", max_voices)

        def make() -> StoredVoice:
            recording = read_recording(sample, param="audio_sample")
            encoded = _encode(engine, recording, transcript)
            return self._tables.add_voice(
                tenant,
                name=name,
                transcript=transcript,
                consent_id=consent_id,
                audio=recording.to_flac(),
                encoded=encoded,
                model_key=model_key(engine),
                max_voices=max_voices,
            )

        try:
            return _voice(await self._run(make))
        except LimitReached as error:
            raise _limit_reached("voices", error.limit) from None

    async def delete_voice(self, tenant: str, voice_id: str) -> None:
        """Delete a voice, its sample and its codes. Raises: ApiError (404)."""
        is_id = _VOICE_ID.fullmatch(voice_id) is not None
        if not is_id or not await asyncio.to_thread(self._tables.delete_voice, tenant, voice_id):
            raise _no_voice(voice_id)
        for key in [key for key in self._cache if key[0] == voice_id]:
            del self._cache[key]

    async def create_consent(self, tenant: str, *, name: str, language: str, recording: bytes) -> Consent:
        """Check and keep a consent. Raises: InvalidRequest, BodyTooLarge, ApiError (403) at the tenant's limit."""
        name = _check_name(name)
        if not _LANGUAGE.fullmatch(language):
            shown = language[:40]
            raise InvalidRequest(f"language is '{shown}': send a BCP 47 tag such as en-US", param="language")
        max_consents = self.limits.max_consents

        def make() -> StoredConsent:
            flac = read_recording(recording, param="recording").to_flac()
            return self._tables.add_consent(
                tenant, name=name, language=language, recording=flac, max_consents=max_consents
            )

        try:
            return _consent(await self._run(make))
        except LimitReached as error:
            raise _limit_reached("consents", error.limit) from None

    async def consents(self, tenant: str, *, after: str | None, limit: int) -> ConsentList:
        """A page of this tenant's consents, newest first."""
        if after is not None and not _CONSENT_ID.fullmatch(after):
            raise InvalidRequest(f"after is '{after[:60]}': send the id of a consent", param="after")
        rows = await asyncio.to_thread(self._tables.consents, tenant, after=after, limit=limit + 1)
        data = [_consent(row) for row in rows[:limit]]
        return ConsentList(
            data=data,
            first_id=data[0].id if data else None,
            last_id=data[-1].id if data else None,
            has_more=len(rows) > limit,
        )

    async def consent(self, tenant: str, consent_id: str) -> Consent:
        """Raises: ApiError (404)."""
        row = None
        if _CONSENT_ID.fullmatch(consent_id):
            row = await asyncio.to_thread(self._tables.consent, tenant, consent_id)
        if row is None:
            raise _no_consent(consent_id)
        return _consent(row)

    async def rename_consent(self, tenant: str, consent_id: str, *, name: str) -> Consent:
        """Raises: ApiError (404), InvalidRequest."""
        name = _check_name(name)
        row = None
        if _CONSENT_ID.fullmatch(consent_id):
            row = await asyncio.to_thread(self._tables.rename_consent, tenant, consent_id, name=name)
        if row is None:
            raise _no_consent(consent_id)
        return _consent(row)

    async def delete_consent(self, tenant: str, consent_id: str) -> None:
        """Delete a consent and its recording; voices made under it stay. Raises: ApiError (404)."""
        is_id = _CONSENT_ID.fullmatch(consent_id) is not None
        if not is_id or not await asyncio.to_thread(self._tables.delete_consent, tenant, consent_id):
            raise _no_consent(consent_id)

    @asynccontextmanager
    async def upload_slot(self, tenant: str) -> AsyncGenerator[None, None]:
        """One of the few uploads that are read and worked on at once. Raises: Overloaded."""
        limits = self.limits
        if self._uploads.total() >= limits.max_uploads:
            raise Overloaded(
                f"{limits.max_uploads} uploads are at work, the most at once: try again in 5 seconds", retry_after_s=5.0
            )
        if self._uploads[tenant] >= limits.max_uploads_per_tenant:
            raise Overloaded(
                f"{limits.max_uploads_per_tenant} of your uploads are at work, the most at once: wait for one to end",
                retry_after_s=2.0,
            )
        self._uploads[tenant] += 1
        try:
            yield
        finally:
            self._uploads[tenant] -= 1
            self._uploads += Counter()  # drops tenants at zero

    def close(self) -> None:
        """Start no more work; what is being encoded is finished and then dropped."""
        self._workers.shutdown(wait=False, cancel_futures=True)

    async def _find(self, tenant: str, name: str | None) -> StoredVoice | None:
        if not name or len(name) > MAX_NAME_CHARS or not name.isprintable():
            return None
        return await asyncio.to_thread(self._tables.find_voice, tenant, name)

    async def _not_found(self, tenant: str, name: str, engine: VoiceEngine) -> str:
        known = [voice.name for voice in await asyncio.to_thread(self._tables.voices, tenant)]
        named = ", ".join(dict.fromkeys(("default", *engine.spec.voices, "alloy", *known[:_NUM_VOICES_NAMED])))
        more = ", ..." if len(known) > _NUM_VOICES_NAMED else ""
        return f"There is no voice '{name[:MAX_NAME_CHARS]}': use one of {named}{more}"

    async def _encoded(self, voice: StoredVoice, engine: VoiceEngine) -> EncodedVoice:
        key = (voice.id, model_key(engine))
        if key not in self._cache:
            encoded = await asyncio.to_thread(self._tables.codes, voice, model_key=key[1])
            if encoded is None or _lacks_embedding(encoded, engine):
                _check_imitates(engine)
                encoded = await self._run(lambda: self._encode_again(voice, engine))
            self._cache[key] = encoded
        self._cache.move_to_end(key)
        encoded = self._cache[key]
        while len(self._cache) > MAX_CACHED_VOICES:
            self._cache.popitem(last=False)
        return encoded

    def _encode_again(self, voice: StoredVoice, engine: VoiceEngine) -> EncodedVoice:
        key = model_key(engine)
        # Requests that waited for this one's work find it done.
        encoded = self._tables.codes(voice, model_key=key)
        if encoded is not None and not _lacks_embedding(encoded, engine):
            return encoded
        flac = self._tables.audio(voice)
        if flac is None:
            raise VoiceNotFound(f"The voice '{voice.name}' was deleted: use another", param="voice")
        encoded = _encode(engine, from_flac(flac), voice.transcript)
        self._tables.keep_codes(voice, model_key=key, encoded=encoded)
        return encoded

    async def _check_consent(self, tenant: str, consent_id: str | None) -> None:
        if consent_id:
            await self.consent(tenant, consent_id)
        elif self.limits.requires_consent:
            raise MissingParameter(
                "Missing required parameter: 'consent': record the speaker's consent at POST /v1/audio/voice_consents"
                " and send its id",
                param="consent",
            )

    async def _run(self, work: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._workers, work)


def model_key(engine: VoiceEngine) -> str:
    """What codes are bound to: the model's name, its family, and the shape of its codes."""
    spec = engine.spec
    return hashlib.sha256(repr((engine.model_name, spec.family, spec.hidden_size, spec.codec)).encode()).hexdigest()


def _lacks_embedding(encoded: EncodedVoice, engine: VoiceEngine) -> bool:
    """Whether a stored voice was encoded before this model's speaker encoder was installed."""
    return encoded.embedding is None and engine.spec.embeds_voices


def _check_imitates(engine: VoiceEngine) -> None:
    if not engine.spec.supports_voice_prompt:
        raise InvalidRequest(
            f"the model {engine.model_name} has its own voices and cannot imitate another: "
            f"use one of {', '.join(engine.spec.voices) or 'default'}",
            param="voice",
        )


def check_reference(engine: VoiceEngine, transcript: str, *, param: str, recording: str) -> None:
    """Before seconds of encoding: whether the model can imitate a recording with this transcript. Without a speaker
    encoder it knows a voice only by going on from it, and from what it says. param: the transcript's field.

    Raises: InvalidRequest, MissingParameter.
    """
    _check_imitates(engine)
    if not transcript and not engine.spec.embeds_voices:
        raise MissingParameter(
            f"Missing required parameter: '{param}': this model must know what is said in {recording}", param=param
        )


def _encode(engine: VoiceEngine, recording: Recording, transcript: str) -> EncodedVoice:
    return engine.encode_voice(ReferenceVoice(transcript, recording.audio, recording.sample_rate_hz))


def _check_text(field: str, text: str, *, max_chars: int) -> str:
    text = text.strip()
    if len(text) > max_chars:
        raise InvalidRequest(f"{field} has {len(text)} characters, at most {max_chars} are taken", param=field)
    if not all(character.isprintable() or character in "\n\t" for character in text):
        raise InvalidRequest(f"{field} has control or invisible characters: send plain text", param=field)
    return text


def _check_name(name: str) -> str:
    name = _check_text("name", name, max_chars=MAX_NAME_CHARS)
    if not name or not name.isprintable():
        raise InvalidRequest(f"name is {name!r}: send 1 to {MAX_NAME_CHARS} characters on one line", param="name")
    return name


def _limit_reached(things: str, limit: int) -> ApiError:
    message = f"You have {limit} {things}, the most that are kept: delete one first"
    return ApiError(message, status=403, type="invalid_request_error", code="limit_reached")


def _no_voice(voice_id: str) -> ApiError:
    message = f"No such voice: '{voice_id[:60]}'"
    return ApiError(message, status=404, type="invalid_request_error", code="voice_not_found")


def _no_consent(consent_id: str) -> ApiError:
    message = f"No such consent: '{consent_id[:60]}'"
    return ApiError(message, status=404, type="invalid_request_error", code="consent_not_found")


def _voice(row: StoredVoice) -> Voice:
    return Voice(id=row.id, voice_id=row.id, name=row.name, created_at=int(row.created_at), type="audio_sample")


def _consent(row: StoredConsent) -> Consent:
    return Consent(id=row.id, name=row.name, language=row.language, created_at=int(row.created_at))


def _field(form: Form, name: str) -> str:
    if not form.fields.get(name, "").strip():
        raise MissingParameter(f"Missing required parameter: '{name}'", param=name)
    return form.fields[name]


def _file(form: Form, name: str) -> bytes:
    if name not in form.files:
        raise MissingParameter(f"Missing required parameter: '{name}': send it as a file", param=name)
    return form.files[name]


def build_voices_router(
    store: VoiceStore, gate: Gate, *, check_open: Callable[[], object], lists_publicly: bool = False
) -> APIRouter:
    """GET, POST and DELETE of voices and consents.

    check_open: raises NotReady where no new work is taken, a server that is told to stop among them.
    lists_publicly: GET /v1/audio/voices without a key lists the model's own voices, since Open WebUI sends none.
    """
    router = APIRouter()

    @asynccontextmanager
    async def uploading(request: Request) -> AsyncGenerator[Caller, None]:
        async with AsyncExitStack() as stack:
            try:
                caller = await caller_of(gate, request)
                check_open()
                await stack.enter_async_context(store.upload_slot(caller.tenant))
            except DeclaimError:
                # Read to its end: a client that is still sending would meet a reset, not this answer.
                with suppress(BodyTooLarge):
                    await drop_body(request)
                raise
            yield caller

    @router.get("/v1/audio/voices")
    async def list_voices(request: Request) -> VoiceList:
        """Every voice that the caller may name."""
        voices = store.own_voices()
        if not (lists_publicly and credential_of(request.headers, request.query_params) is None):
            caller = await caller_of(gate, request)
            voices += await store.voices(caller.tenant)
        return VoiceList(voices=voices, data=voices)

    @router.post("/v1/audio/voices", openapi_extra=_form_schema("audio_sample", "name", "consent", "transcript"))
    async def create_voice(request: Request) -> Voice:
        """Make a voice from a recording of 1 to 30 s. `transcript`, an extension, is what is said in it."""
        async with uploading(request) as caller:
            form = await read_form(request)
            kind = form.fields.get("type", "audio_sample")
            if kind != "audio_sample":
                raise InvalidRequest(f"type is '{kind[:40]}': only audio_sample is served", param="type")
            return await store.create_voice(
                caller.tenant,
                name=_field(form, "name"),
                sample=_file(form, "audio_sample"),
                transcript=form.fields.get("transcript", ""),
                consent_id=form.fields.get("consent"),
            )

    @router.get("/v1/audio/voices/{voice_id}")
    async def get_voice(request: Request, voice_id: str) -> Voice:
        """One of the caller's own voices."""
        caller = await caller_of(gate, request)
        return await store.voice(caller.tenant, voice_id)

    @router.delete("/v1/audio/voices/{voice_id}")
    async def delete_voice(request: Request, voice_id: str) -> DeletedVoice:
        """Delete a voice and all that was kept of it."""
        caller = await caller_of(gate, request)
        await store.delete_voice(caller.tenant, voice_id)
        return DeletedVoice(id=voice_id)

    @router.post("/v1/audio/voice_consents", openapi_extra=_form_schema("recording", "name", "language"))
    async def create_consent(request: Request) -> Consent:
        """Keep a recording in which a speaker consents to be imitated."""
        async with uploading(request) as caller:
            form = await read_form(request)
            return await store.create_consent(
                caller.tenant,
                name=_field(form, "name"),
                language=_field(form, "language"),
                recording=_file(form, "recording"),
            )

    @router.get("/v1/audio/voice_consents")
    async def list_consents(
        request: Request, after: str | None = None, limit: int = Query(default=20, ge=1, le=100)
    ) -> ConsentList:
        """The caller's consents, newest first."""
        caller = await caller_of(gate, request)
        return await store.consents(caller.tenant, after=after, limit=limit)

    @router.get("/v1/audio/voice_consents/{consent_id}")
    async def get_consent(request: Request, consent_id: str) -> Consent:
        """One consent."""
        caller = await caller_of(gate, request)
        return await store.consent(caller.tenant, consent_id)

    rename_schema = {"requestBody": {"required": True, "content": {"application/json": {"schema": _RENAME_SCHEMA}}}}

    @router.post("/v1/audio/voice_consents/{consent_id}", openapi_extra=rename_schema)
    async def rename_consent(request: Request, consent_id: str) -> Consent:
        """Give a consent another name."""
        caller = await caller_of(gate, request)
        name = await _renamed(request)
        return await store.rename_consent(caller.tenant, consent_id, name=name)

    @router.delete("/v1/audio/voice_consents/{consent_id}")
    async def delete_consent(request: Request, consent_id: str) -> DeletedConsent:
        """Delete a consent and its recording."""
        caller = await caller_of(gate, request)
        await store.delete_consent(caller.tenant, consent_id)
        return DeletedConsent(id=consent_id)

    return router


async def _renamed(request: Request) -> str:
    raw = bytearray()
    async for part in request.stream():
        raw += part
        if len(raw) > 64 << 10:
            raise InvalidBody('The body is larger than 65536 bytes: send {"name": "..."}')
    try:
        return RenamedConsent.model_validate_json(bytes(raw)).name
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    if first["loc"] and first["type"] == "missing":
        raise MissingParameter("Missing required parameter: 'name'", param="name")
    raise InvalidBody(f'The body cannot be read ({first["msg"]}): send {{"name": "..."}}')


_RENAME_SCHEMA = RenamedConsent.model_json_schema()


def _form_schema(file: str, *fields: str) -> dict[str, object]:
    """The OpenAPI description of a multipart body that is read by hand."""
    properties: dict[str, object] = {name: {"type": "string"} for name in fields}
    properties[file] = {"type": "string", "format": "binary"}
    schema = {"type": "object", "properties": properties, "required": [file, "name"]}
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}
