"""What a caller asks for and what it gets back. Immutable, checked when made; no torch, no threads."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from declaim.engine.errors import DeclaimError, InvalidRequest
from declaim.engine.spec import SamplingDefaults

FinishReason = Literal["stop", "length", "runaway", "missing", "cancelled", "error"]
"""stop: all was said. length: cut at the longest audio allowed. runaway, missing: far more or less audio than the text
can take, and a second seed did no better."""

Tier = Literal["priority", "default", "flex"]
"""Who goes first: priority before default, flex where nobody else needs the place."""

ControlValue = float | str | tuple[float, ...]
"""A family's own dial, such as an emotion's weights or a speaking rate."""

MAX_SEED = 2**63 - 1


def _check_number(name: str, value: object, low: float, high: float, remedy: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidRequest(f"{name} is {value!r}: it must be a number; {remedy}", param=name)
    if math.isnan(value) or not low <= value <= high:
        raise InvalidRequest(f"{name} is {value}: it must lie between {low:g} and {high:g}; {remedy}", param=name)


def _check_integer(name: str, value: object, low: int, high: int, remedy: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidRequest(f"{name} is {value!r}: it must be an integer; {remedy}", param=name)
    _check_number(name, value, low, high, remedy)


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How codes are drawn. None means the model's own default.

    temperature: 0 draws the most likely code; at most 10. top_k: 0 is off. top_p in (0, 1]. min_p in [0, 1).
    repetition_penalty in [1, 100]. guidance_scale in [1, 20], 1 is off. seed: the same seed gives the same codes,
    whatever else runs. max_seconds: the longest audio this request may make.

    Raises: InvalidRequest.
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    guidance_scale: float | None = None
    seed: int | None = None
    max_seconds: float | None = None

    def __post_init__(self) -> None:
        if self.temperature is not None:
            _check_number("temperature", self.temperature, 0.0, 10.0, "0 draws the most likely code")
        if self.top_k is not None:
            _check_integer("top_k", self.top_k, 0, 1_000_000, "0 turns it off")
        if self.top_p is not None:
            _check_number("top_p", self.top_p, 1e-6, 1.0, "1 turns it off")
        if self.min_p is not None:
            _check_number("min_p", self.min_p, 0.0, 0.999, "0 turns it off")
        if self.repetition_penalty is not None:
            _check_number("repetition_penalty", self.repetition_penalty, 1.0, 100.0, "1 turns it off")
        if self.guidance_scale is not None:
            _check_number("guidance_scale", self.guidance_scale, 1.0, 20.0, "1 turns guidance off")
        if self.seed is not None:
            _check_integer("seed", self.seed, 0, MAX_SEED, "leave it out for a random one")
        if self.max_seconds is not None:
            _check_number("max_seconds", self.max_seconds, 0.01, 36_000.0, "it is the longest audio to make")

    def resolve(self, defaults: SamplingDefaults) -> ResolvedSampling:
        """Fill what the caller left open; an absent seed becomes 0, so draw one first where chance is wanted."""
        return ResolvedSampling(
            temperature=defaults.temperature if self.temperature is None else float(self.temperature),
            top_k=defaults.top_k if self.top_k is None else self.top_k,
            top_p=defaults.top_p if self.top_p is None else float(self.top_p),
            min_p=defaults.min_p if self.min_p is None else float(self.min_p),
            repetition_penalty=(
                defaults.repetition_penalty if self.repetition_penalty is None else float(self.repetition_penalty)
            ),
            guidance_scale=defaults.guidance_scale if self.guidance_scale is None else float(self.guidance_scale),
            seed=self.seed or 0,
            max_seconds=defaults.max_seconds if self.max_seconds is None else float(self.max_seconds),
        )


@dataclass(frozen=True, slots=True)
class ResolvedSampling:
    """SamplingParams with nothing left open."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    guidance_scale: float
    seed: int
    max_seconds: float

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0


@dataclass(frozen=True, slots=True, eq=False)
class Voice:
    """A voice to imitate: reference audio and what is said in it.

    audio: float [num_samples] or [num_samples, num_channels], full scale at 1.0, at `sample_rate_hz`.
    The engine checks and encodes it once and keeps the codes.
    """

    transcript: str
    audio: NDArray[np.float32]
    sample_rate_hz: int


@dataclass(frozen=True, slots=True, eq=False)
class EncodedVoice:
    """A voice as `Engine.encode_voice` made it: plain data that can be stored and sent with any later request.

    codes: int32 [P, Q], the frames of the reference audio; P is 0 where the family keeps an embedding alone.
    embedding: float32 [E], what a speaker encoder made of it; None where the family has none.
    """

    transcript: str
    codes: NDArray[np.int32]
    embedding: NDArray[np.float32] | None = None

    @classmethod
    def none(cls, num_codebooks: int) -> EncodedVoice:
        """The model's own voice: no frames, no words."""
        return cls("", np.zeros((0, num_codebooks), dtype=np.int32))


@dataclass(frozen=True, slots=True)
class SpeechRequest:
    """One text to speak.

    voice: a Voice, an EncodedVoice, the name of a saved voice, or None for the model's own.
    speed: 1.0 is the model's pace; only families that can pace themselves take another.
    request_id: names the request in logs and for `Engine.cancel`; None draws one.
    language: an ISO 639-1 code or a tag such as "en-gb", for families that speak several; None leaves it to the text.
    normalize: whether numbers, dates, units and the like are written out before the model sees them.
    lexicon: written form to what is said instead, matched as whole words, case-insensitively.
    controls: the family's own dials by name (`ModelSpec.controls`).
    word_timestamps: whether chunks tell when each word is spoken.
    tenant, weight, tier: who asks; under load tenants of a tier share the engine in proportion to their weights.
    continues: whether its listener is hearing another request of theirs, which this one goes on from: it is not
    refused because the engine has become slow (`EngineConfig.shed`).

    Raises: InvalidRequest.
    """

    text: str
    voice: Voice | EncodedVoice | str | None = None
    sampling: SamplingParams = field(default_factory=SamplingParams)
    speed: float = 1.0
    request_id: str | None = None
    language: str | None = None
    normalize: bool = True
    lexicon: Mapping[str, str] = field(default_factory=dict)
    controls: Mapping[str, ControlValue] = field(default_factory=dict)
    word_timestamps: bool = False
    tenant: str = ""
    weight: float = 1.0
    tier: Tier = "default"
    continues: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.text, str):
            raise InvalidRequest(f"text is a {type(self.text).__name__}: it must be a string", param="text")
        _check_number("speed", self.speed, 0.25, 4.0, "1 is the model's own pace")
        _check_number("weight", self.weight, 0.01, 1000.0, "1 is one tenant's share")
        if self.tier not in ("priority", "default", "flex"):
            raise InvalidRequest(f"tier is {self.tier!r}: use priority, default or flex", param="service_tier")


@dataclass(frozen=True, slots=True)
class Word:
    """A word of the caller's own text, and when it is heard: seconds from the start of the request's audio."""

    text: str
    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True, eq=False)
class AudioChunk:
    """Consecutive frames of one request, decoded. Chunks of a request arrive in order, none missing, none twice.

    audio: float32 [num_samples] at `sample_rate_hz`. first_frame: index of its first frame in the whole request.
    finish_reason is set on the last chunk only. words: those that begin in this chunk, if the request asked for them.
    """

    request_id: str
    audio: NDArray[np.float32]
    first_frame: int
    num_frames: int
    sample_rate_hz: int
    is_last: bool
    finish_reason: FinishReason | None = None
    words: tuple[Word, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class SpeechResult:
    """A whole request.

    codes: int32 [num_frames, num_codebooks], delay undone, voice prompt excluded.
    audio: float32 [num_samples] at `sample_rate_hz`.
    error: set exactly when finish_reason is "error".
    """

    request_id: str
    codes: NDArray[np.int32]
    audio: NDArray[np.float32]
    sample_rate_hz: int
    finish_reason: FinishReason
    error: DeclaimError | None = None

    @property
    def duration_s(self) -> float:
        return len(self.audio) / self.sample_rate_hz
