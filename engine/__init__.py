"""The engine: requests in, audio chunks out.

`import declaim.engine` needs torch, triton, transformers, numpy and safetensors; all else is imported where it is used.
"""

from declaim.engine.config import EngineConfig
from declaim.engine.engine import Engine, EngineStats
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
from declaim.engine.request import AudioChunk, EncodedVoice, SamplingParams, SpeechRequest, SpeechResult, Voice, Word

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
    "Voice",
    "VocoderLost",
    "VoiceNotFound",
    "Word",
]
