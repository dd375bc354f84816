"""The bodies of the voice endpoints: types and field names, nothing else."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel


class Voice(BaseModel):
    """One voice. id and name for Open WebUI and Kokoro's clients, voice_id for others; language of built-in ones."""

    id: str
    voice_id: str
    name: str
    object: Literal["audio.voice"] = "audio.voice"
    created_at: int
    type: Literal["builtin", "audio_sample"]
    language: str | None = None


class VoiceList(BaseModel):
    """GET /v1/audio/voices: `voices` for clients of compatible servers, `data` for OpenAI's way of listing."""

    object: Literal["list"] = "list"
    voices: list[Voice]
    data: list[Voice]
    has_more: Literal[False] = False


class DeletedVoice(BaseModel):
    """DELETE /v1/audio/voices/{id}."""

    id: str
    object: Literal["audio.voice.deleted"] = "audio.voice.deleted"
    deleted: Literal[True] = True


class Consent(BaseModel):
    """A speaker's recorded consent to be imitated."""

    id: str
    object: Literal["audio.voice_consent"] = "audio.voice_consent"
    name: str
    language: str
    created_at: int


class ConsentList(BaseModel):
    """GET /v1/audio/voice_consents, newest first."""

    object: Literal["list"] = "list"
    data: list[Consent]
    first_id: str | None
    last_id: str | None
    has_more: bool


class DeletedConsent(BaseModel):
    """DELETE /v1/audio/voice_consents/{id}."""

    id: str
    object: Literal["audio.voice_consent"] = "audio.voice_consent"
    deleted: Literal[True] = True


class RenamedConsent(BaseModel):
    """The body of POST /v1/audio/voice_consents/{id}."""

    name: str
