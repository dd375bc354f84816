"""The engine: requests in, audio chunks out.

`import declaim.engine` loads nothing; each name brings its module when it is first used. The engine itself needs torch,
triton, transformers, numpy and safetensors; all else is imported where it is used.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from declaim.engine.config import EngineConfig
    from declaim.engine.engine import Engine
    from declaim.engine.errors import (
        Cancelled,
        DeclaimError,
        EngineClosed,
        EngineError,
        InvalidConfig,
        InvalidRequest,
        ModelLoadError,
        ModelNotFound,
        OutOfMemory,
        Overloaded,
        RequestError,
        SequenceFailed,
        TooLong,
        VocoderLost,
        VoiceNotFound,
    )
    from declaim.engine.request import (
        AudioChunk,
        EncodedVoice,
        SamplingParams,
        SpeechRequest,
        SpeechResult,
        Voice,
        Word,
    )
    from declaim.engine.stats import EngineStats

__all__ = [
    "AudioChunk",
    "Cancelled",
    "DeclaimError",
    "EncodedVoice",
    "Engine",
    "EngineClosed",
    "EngineConfig",
    "EngineError",
    "EngineStats",
    "InvalidConfig",
    "InvalidRequest",
    "ModelLoadError",
    "ModelNotFound",
    "OutOfMemory",
    "Overloaded",
    "RequestError",
    "SamplingParams",
    "SequenceFailed",
    "SpeechRequest",
    "SpeechResult",
    "TooLong",
    "VocoderLost",
    "Voice",
    "VoiceNotFound",
    "Word",
]

_ELSEWHERE = {"Engine": "engine", "EngineConfig": "config", "EngineStats": "stats"}
_IN_REQUEST = {"AudioChunk", "EncodedVoice", "SamplingParams", "SpeechRequest", "SpeechResult", "Voice", "Word"}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = _ELSEWHERE.get(name) or ("request" if name in _IN_REQUEST else "errors")
    return getattr(import_module(f"{__name__}.{module}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
