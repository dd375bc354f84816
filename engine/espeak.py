"""Text to IPA by espeak-ng, for families that were trained on its phonemes.

espeak-ng and phonemizer are under the GPL, so neither comes with declaim: who wants them installs them, and they are
imported when the first text needs them. The library itself comes from the system or from the wheel espeakng-loader.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import threading
from typing import Any

from declaim.engine.errors import ModelLoadError

REMEDY = "pip install phonemizer espeakng-loader (both bring GPL code, so declaim does not install them itself)"


class EspeakPhonemizer:
    """IPA with stress and punctuation. Thread-safe: espeak-ng has one global state, so one text at a time."""

    def __init__(self, *, punctuation: str) -> None:
        self._punctuation = punctuation
        self._backends: dict[str, Any] = {}  # by language
        self._lock = threading.Lock()

    def __call__(self, text: str, language: str) -> str:
        """language: as espeak-ng names it, "en-us". Raises: ModelLoadError if espeak-ng is not installed."""
        with self._lock:
            if language not in self._backends:
                self._backends[language] = self._load(language)
            phonemes: str = self._backends[language].phonemize([text], strip=True)[0]
        return phonemes

    def _load(self, language: str) -> Any:
        if importlib.util.find_spec("phonemizer") is None:
            raise ModelLoadError(f"this model reads phonemes of espeak-ng, and phonemizer is not installed: {REMEDY}")
        backend = importlib.import_module("phonemizer.backend")
        if importlib.util.find_spec("espeakng_loader") is not None:
            loader = importlib.import_module("espeakng_loader")
            wrapper = importlib.import_module("phonemizer.backend.espeak.wrapper").EspeakWrapper
            wrapper.set_library(loader.get_library_path())
            wrapper.set_data_path(loader.get_data_path())
        elif not backend.EspeakBackend.is_available():
            raise ModelLoadError(f"this model reads phonemes of espeak-ng, and there is no libespeak-ng here: {REMEDY}")
        # What phonemizer has to say, such as words switching language, is nothing a caller can act on.
        quiet = logging.getLogger("declaim.espeak")
        quiet.setLevel(logging.ERROR)
        return backend.EspeakBackend(
            language,
            preserve_punctuation=True,
            with_stress=True,
            punctuation_marks=self._punctuation,
            logger=quiet,
        )
