"""The bodies that HTTP clients send and get: types and field names, nothing else.

Ranges of values are the engine's to check; here a field has a type, and what is absent or null is None.
Fields that OpenAI's clients never send but compatible clients do are ignored, never refused. A model family's own dials
are the engine's to name (`engine/controls.py`): here they are fields beside those that are declared.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from declaim.api.errors import InvalidBody, MissingParameter
from declaim.engine.controls import DIALS
from declaim.engine.errors import InvalidRequest
from declaim.engine.request import ControlValue
from declaim.engine.spec import ModelSpec


class ModelVoice(BaseModel):
    """A voice of the model's own, as some clients look for it in a model's card."""

    name: str
    language: str


class VoiceId(BaseModel):
    """A voice named by its id."""

    id: str


def _describe_dials(schema: dict[str, Any]) -> None:
    """Dials are documented as if they were declared."""
    numbers = {"type": "array", "items": {"type": "number"}}
    for name, about in DIALS.items():
        kinds = [{"type": "number"}, {"type": "string"}, numbers, {"type": "null"}]
        schema["properties"][name] = {"anyOf": kinds, "title": name, "description": about, "default": None}


class SpeechBody(BaseModel):
    """POST /v1/audio/speech. All after `stream_format` are extensions (`extra_body` in the openai package)."""

    model_config = ConfigDict(extra="allow", json_schema_extra=_describe_dials)

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

    def controls(self) -> dict[str, ControlValue]:
        """The dials that the body sets. Raises: InvalidRequest for what is no number, name or list of numbers."""
        given = {name: value for name, value in (self.model_extra or {}).items() if name in DIALS and value is not None}
        return {name: _control(name, value) for name, value in given.items()}


class ModelControl(BaseModel):
    """A dial of the model's: `length` numbers from low to high, or one of names. default: null is the model's own."""

    description: str
    low: float
    high: float
    default: list[float] | None
    length: int
    names: list[str]


def controls_of(spec: ModelSpec) -> dict[str, ModelControl]:
    """What a model's dials take, by name."""
    return {
        name: ModelControl(
            description=control.description,
            low=control.low,
            high=control.high,
            default=None if control.default is None else list(control.default),
            length=control.length,
            names=list(control.names),
        )
        for name, control in spec.controls.items()
    }


class ModelCard(BaseModel):
    """One entry of GET /v1/models. root: the model that answers to this id. The last group are extensions.

    instructions: the words that it acts on. languages: what it is told apart by; none where it is not.
    """

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    root: str

    task: Literal["text-to-speech"] = "text-to-speech"
    sample_rate: int
    voices: list[ModelVoice]
    controls: dict[str, ModelControl]
    instructions: list[str]
    languages: list[str]


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
        body = SpeechBody.model_validate_json(raw)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    else:
        unknown = next((name for name in body.model_extra or {} if name not in DIALS), None)
        if strict and unknown is not None:
            raise InvalidRequest(
                f"Unknown parameter: '{unknown[:60]}': leave it out, this server is strict", param=unknown[:60]
            )
        return body
    param = str(first["loc"][0]) if first["loc"] else None
    if param is None:
        raise InvalidBody(f"The body cannot be read ({first['msg']}): send one JSON object, UTF-8")
    if first["type"] == "missing" or first["input"] is None:
        raise MissingParameter(f"Missing required parameter: '{param}'", param=param)
    raise InvalidRequest(f"Invalid '{param}': {first['msg']}", param=param)


def _control(name: str, value: object) -> ControlValue:
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return value
    if isinstance(value, list) and all(isinstance(x, int | float) and not isinstance(x, bool) for x in value):
        return tuple(value)
    raise InvalidRequest(f"Invalid '{name}': send a number, a name or a list of numbers", param=name)
