"""Every error a caller can meet, in one tree.

DeclaimError
├── RequestError            the caller's fault; the same request will fail again
│   ├── InvalidRequest      a field is wrong; `param` names it
│   ├── TooLong             the request can never fit; the message says what would
│   ├── VoiceNotFound
│   └── ModelNotFound
├── InvalidConfig           an engine setting is wrong
├── EngineError             our fault or the machine's
│   ├── Overloaded          the waiting queue is full; try again after `retry_after_s`
│   ├── ModelLoadError      a checkpoint is missing, truncated or does not fit its config
│   ├── OutOfMemory         the memory budget cannot hold the model and one sequence
│   ├── SequenceFailed      one sequence could not go on (its neighbours did)
│   ├── VocoderLost         no vocoder worker could decode a window
│   └── EngineClosed        the engine was closed while the request ran
└── Cancelled               the caller cancelled the request

Messages name the value, the limit and the remedy.
"""

from __future__ import annotations


class DeclaimError(Exception):
    """Base of every error declaim raises on purpose."""


class RequestError(DeclaimError):
    """The request itself cannot be served."""


class InvalidRequest(RequestError):
    """A field of the request is wrong.

    `param` is the field's name as the caller wrote it, None when no single field is to blame.
    """

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class TooLong(InvalidRequest):
    """The request needs more than the model or the memory plan can ever give it."""


class VoiceNotFound(InvalidRequest):
    """No voice of that name."""


class ModelNotFound(RequestError):
    """No model of that name here."""


class InvalidConfig(DeclaimError):
    """A setting of the engine is wrong."""


class EngineError(DeclaimError):
    """The engine could not do what was rightly asked."""


class Overloaded(EngineError):
    """The waiting queue is full."""

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class ModelLoadError(EngineError):
    """A checkpoint folder is missing, incomplete, corrupted or does not fit its own config."""


class OutOfMemory(EngineError):
    """The memory budget cannot hold the model and one sequence."""


class SequenceFailed(EngineError):
    """One sequence could not go on; the others did."""


class VocoderLost(EngineError):
    """No vocoder worker could decode a window."""


class EngineClosed(EngineError):
    """The engine is closed."""


class Cancelled(DeclaimError):
    """The caller cancelled the request."""
