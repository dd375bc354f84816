"""The bodies that HTTP clients send and get: types and field names, nothing else.

Ranges of values are the engine's to check; here a field has a type, and what is absent or null is None.
Fields that OpenAI's clients never send but compatible clients do are ignored, never refused.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from declaim.api.errors import InvalidBody, MissingParameter
from declaim.engine.errors import InvalidRequest


class ModelVoice(BaseModel):
    """A voice of the model's own, as some clients look for it in a model's card."""

    name: str
    language: str


class VoiceId(BaseModel):
    """A voice named by its id."""

    id: str


class SpeechBody(BaseModel):
    """POST /v1/audio/speech. All after `stream_format` are extensions (`extra_body` in the openai package)."""

    model_config = ConfigDict(extra="ignore")

    model: str
    input: str
    voice: str | VoiceId | None = None
    instructions: str | None = None
    response_format: str | None = None
    speed: float | None = None
    stream_format: str | None = None

    # How the answer is sent. stream false: whole, with its length; audio_format: of the audio inside a JSON answer.
    stream: bool | None = None
    sample_rate: int | None = None
    audio_format: str | None = None
    word_timestamps: bool | None = None
    service_tier: str | None = None

    # What is said, and by whom. ref_audio: base64, or a data: URL.
    language: str | None = None
    normalize: bool | None = None
    ref_audio: str | None = None
    ref_text: str | None = None

    # How codes are drawn.
    seed: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    guidance_scale: float | None = None
    repetition_penalty: float | None = None
    max_seconds: float | None = None

    # Dials of families that have them.
    emotion: str | float | list[float] | None = None
    speaking_rate: float | None = None
    pitch_std: float | None = None
    fmax: float | None = None
    quality: str | float | list[float] | None = None


class StrictSpeechBody(SpeechBody):
    """The same, and nothing else."""

    model_config = ConfigDict(extra="forbid")


class ModelCard(BaseModel):
    """One entry of GET /v1/models. root: the model that answers to this id. The last group are extensions."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    root: str

    task: Literal["text-to-speech"] = "text-to-speech"
    sample_rate: int
    voices: list[ModelVoice]


class ModelList(BaseModel):
    """GET /v1/models."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class AudioModelList(BaseModel):
    """GET /v1/audio/models, which several clients ask for in place of GET /v1/models."""

    object: Literal["list"] = "list"
    models: list[ModelCard]


class Greeting(BaseModel):
    """GET / and GET /v1: clients call them to open a connection, or to see whether there is a server."""

    name: Literal["declaim"] = "declaim"
    status: str
    documentation: Literal["/docs"] = "/docs"


class Readiness(BaseModel):
    """GET /ready. status: the server's state; stage: what is being done (download, read, capture, ...)."""

    status: str
    stage: str
    percent: int
    error: str | None = None


def parse_speech_body(raw: bytes, *, strict: bool = False) -> SpeechBody:
    """Parse a body. strict: refuse fields that are not known.

    Raises: InvalidBody where it is not a JSON object, MissingParameter, InvalidRequest naming the first wrong
    field.
    """
    try:
        return (StrictSpeechBody if strict else SpeechBody).model_validate_json(raw)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    param = str(first["loc"][0]) if first["loc"] else None
    if param is None:
        raise InvalidBody(f"The body cannot be read ({first['msg']}): send one JSON object, UTF-8")
    if first["type"] == "extra_forbidden":
        raise InvalidRequest(f"Unknown parameter: '{param}': leave it out, this server is strict", param=param)
    if first["type"] == "missing" or first["input"] is None:
        raise MissingParameter(f"Missing required parameter: '{param}'", param=param)
    raise InvalidRequest(f"Invalid '{param}': {first['msg']}", param=param)
