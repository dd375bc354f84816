"""Text to IPA by espeak-ng, for families that were trained on its phonemes.

espeak-ng and phonemizer are under the GPL, so neither comes with declaim: who wants them installs them, and they are
imported when the first text needs them. The library itself comes from the system or from the wheel espeakng-loader.
espeak-ng reads no kanji: a Japanese text goes to it in katakana, which SudachiPy's dictionary knows.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import re
import threading
import unicodedata
from typing import Any

from declaim.engine.errors import InvalidRequest, ModelLoadError

REMEDY = "pip install phonemizer espeakng-loader (both bring GPL code, so declaim does not install them itself)"
_JAPANESE_PACKAGES = ("sudachipy", "sudachidict_core", "kanjize")
_SYMBOLS = ("補助記号", "記号", "空白")  # parts of speech that have no reading but "symbol"
_MAX_DIGITS = 16  # of a number that is read as one


class EspeakPhonemizer:
    """IPA with stress and punctuation. Thread-safe: espeak-ng has one global state, so one text at a time."""

    def __init__(self, *, punctuation: str) -> None:
        self._punctuation = punctuation
        self._backends: dict[str, Any] = {}  # by language
        self._japanese: JapaneseReader | None = None
        self._lock = threading.Lock()

    def __call__(self, text: str, language: str) -> str:
        """language: as espeak-ng names it, "en-us". What says nothing has no phonemes.

        Raises: ModelLoadError if espeak-ng is not installed; InvalidRequest for Japanese without a dictionary.
        """
        with self._lock:
            if language == "ja":
                if self._japanese is None:
                    self._japanese = JapaneseReader()
                text = self._japanese(text)
            if not text.strip():
                return ""
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


class JapaneseReader:
    """Japanese to katakana, as Zonos' text was made: in NFKC, numbers in kanji, words in SudachiPy's shortest units and
    apart. Not thread-safe. Source: Zonos-v0.1 `normalize_jp_text`, but that spaces are not read aloud as symbols."""

    def __init__(self) -> None:
        """Load the dictionary. Raises: InvalidRequest where a package is missing."""
        missing = [name for name in _JAPANESE_PACKAGES if importlib.util.find_spec(name) is None]
        if missing:
            raise InvalidRequest(
                f"language is 'ja': the readings of its characters come from {', '.join(missing)}, which this server"
                " does not have: pip install 'declaim[zonos-ja]' there, or send another language",
                param="language",
            )
        sudachi = importlib.import_module("sudachipy")
        self._tokenizer: Any = sudachi.Dictionary(dict="core").tokenizer(sudachi.SplitMode.A)
        self._number_to_kanji: Any = importlib.import_module("kanjize").number2kanji

    def __call__(self, text: str) -> str:
        text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", unicodedata.normalize("NFKC", text))
        text = re.sub(rf"\d{{1,{_MAX_DIGITS}}}", lambda number: self._number_to_kanji(int(number[0])), text)
        return " ".join(filter(None, map(self._reading, self._tokenizer.tokenize(text))))

    def _reading(self, word: Any) -> str:
        reading: str = word.surface().strip() if word.part_of_speech()[0] in _SYMBOLS else word.reading_form()
        return reading
