"""The bodies that HTTP clients send and get: types and field names, nothing else.

Ranges of values are the engine's to check; here a field has a type, and what is absent or null is None.
Fields that OpenAI's clients never send but compatible clients do are ignored, never refused.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from declaim.api.errors import InvalidBody, MissingParameter
from declaim.engine.errors import InvalidRequest


class VoiceId(BaseModel):
    """A voice named by its id."""

    id: str


class SpeechBody(BaseModel):
    """POST /v1/audio/speech. The second group are extensions (`extra_body` in the openai package)."""

    model_config = ConfigDict(extra="ignore")

    model: str
    input: str
    voice: str | VoiceId | None = None
    instructions: str | None = None
    response_format: str | None = None
    speed: float | None = None
    stream_format: str | None = None

    seed: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    guidance_scale: float | None = None
    repetition_penalty: float | None = None
    max_seconds: float | None = None


class ModelCard(BaseModel):
    """One entry of GET /v1/models. root: the model that answers to this id."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    root: str


class ModelList(BaseModel):
    """GET /v1/models."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class Readiness(BaseModel):
    """GET /ready. status: the server's state; stage: what is being done (download, read, capture, ...)."""

    status: str
    stage: str
    percent: int
    error: str | None = None


def parse_speech_body(raw: bytes) -> SpeechBody:
    """Parse a body.

    Raises: InvalidBody where it is not a JSON object, MissingParameter, InvalidRequest naming the first wrong
    field.
    """
    try:
        return SpeechBody.model_validate_json(raw)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    param = str(first["loc"][0]) if first["loc"] else None
    if param is None:
        raise InvalidBody(f"The body cannot be read ({first['msg']}): send one JSON object, UTF-8")
    if first["type"] == "missing" or first["input"] is None:
        raise MissingParameter(f"Missing required parameter: '{param}'", param=param)
    raise InvalidRequest(f"Invalid '{param}': {first['msg']}", param=param)
