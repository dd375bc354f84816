"""The public surface, name by name, and the error classes that docstrings promise."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

from declaim import engine
from declaim.engine import errors

ENGINE = Path(engine.__file__).parent
PUBLIC = [
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
ERRORS = {name: cls for name, cls in vars(errors).items() if inspect.isclass(cls) and issubclass(cls, Exception)}


def test_the_engine_exports_exactly_this() -> None:
    assert sorted(engine.__all__) == PUBLIC
    for name in PUBLIC:
        assert not inspect.ismodule(getattr(engine, name))


def test_every_error_is_public_and_in_the_tree_that_its_module_draws() -> None:
    assert set(ERRORS) <= set(PUBLIC)
    drawn = re.findall(r"^[│├└─ ]*([A-Z][A-Za-z]+)", errors.__doc__ or "", re.MULTILINE)
    assert set(ERRORS) <= set(drawn)
    for cls in ERRORS.values():
        assert issubclass(cls, errors.DeclaimError)


@pytest.mark.parametrize("path", sorted(ENGINE.rglob("*.py")), ids=lambda path: str(path.relative_to(ENGINE)))
def test_every_error_that_a_docstring_names_exists(path: Path) -> None:
    builtin = {"RuntimeError", "ValueError", "KeyError", "IndexError", "OSError"}
    for sentence in re.findall(r"Raises: ((?:[A-Z]\w+(?:, )?)+)", path.read_text(encoding="utf-8")):
        for name in sentence.rstrip(", ").split(", "):
            assert name in ERRORS or name in builtin, f"{path} promises {name}"
