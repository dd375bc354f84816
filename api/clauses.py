"""Text that arrives in pieces, cut into clauses as soon as each is certainly whole.

Owns the decision where to cut, and nothing else. The cuts depend on the text alone, never on how it was cut into
pieces on its way here: a mark is judged once enough of what follows it is known, and a verdict never changes.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from typing import Literal

Granularity = Literal["none", "sentence", "clause"]
"""none: all at the flush. sentence: at ends of sentences. clause: at commas and the like too."""

MAX_CLAUSE_CHARS = 240
# What has no space for so long is no word any more, and is cut anywhere.
MAX_WORD_CHARS = 1000
MAX_WHOLE_CHARS = 4000

# How far behind a mark its verdict may look.
_LOOKAHEAD = 48
_CLOSERS = "\"'”’»)\\]」』）】"
_OPENERS = " \t\r\n\"'“‘«([「『（【*_#-"
_MARK = re.compile(
    rf"(?P<sentence>[.!?…]+[{_CLOSERS}]*)|(?P<wide_sentence>[。！？｡]+[{_CLOSERS}]*)|(?P<paragraph>\n[ \t\r]*\n\s*)"
    rf"|(?P<clause>[,;:—–][{_CLOSERS}]*)|(?P<wide_clause>[，；：、､][{_CLOSERS}]*)"
)
_LAST_WORD = re.compile(r"[^\s(\[\"'“‘]*\Z")
_INITIALS = re.compile(r"[A-Za-z](\.[A-Za-z])*")
_NEXT_WORD = re.compile(r"([^\s,.;:!?'’]+)[\s,.;:!?'’]")
_ENUMERATION = re.compile(r"(?:\A|[\n:])\s*\d{1,2}\Z")
# A name, a number or a unit follows.
_NEVER_LAST = frozenset(
    "dr mr mrs ms prof st gen col capt sgt lt maj rev gov sen rep hon mt ft pres e.g i.e vs no nos vol fig figs pp p "
    "cf ca approx art sec ch op jan feb mar apr jun jul aug sep sept oct nov dec".split()
)
# Last only where a word follows that begins sentences.
_SELDOM_LAST = frozenset("etc inc ltd co corp jr sr ph.d dept ave blvd rd al bros est".split())
_STARTERS = frozenset(
    "The A An It He She They We I You This That These Those There Here In On At But And So If When While What Why How "
    "Who Where Then For From After Before As My Our Your His Her Its Their No Yes Not One Some Most All Please Now "
    "Let Do Did Is Are Was Can Could Will Would Thanks Okay OK Well Also".split()
)


@dataclass(frozen=True, slots=True)
class _Minima:
    """The fewest characters of a clause that ends at a sentence's end, and of one that ends at another mark."""

    sentence: int
    clause: int


# The first clause is what the listener waits for; the later ones are spoken while others play, and longer is better.
_FIRST = _Minima(sentence=10, clause=20)
_LATER = _Minima(sentence=25, clause=60)


class ClauseSplitter:
    """The text of one utterance; `flush` ends it and begins the next."""

    def __init__(self, granularity: Granularity) -> None:
        self._granularity: Granularity = granularity
        self._text = ""
        self._half = ""  # the first half of a surrogate pair whose second has not come
        self._num_cut = 0

    @property
    def num_held_chars(self) -> int:
        """What was fed and not yet cut off."""
        return len(self._text)

    def feed(self, text: str) -> list[str]:
        """Take the next piece of text; return the clauses that are now whole."""
        text = self._half + text
        self._half = text[-1] if text and "\ud800" <= text[-1] <= "\udbff" else ""
        self._text += _mended(text[: len(text) - len(self._half)])
        return self._cut(is_whole=False)

    def flush(self) -> list[str]:
        """No more text comes: return what is left, cut where `feed` would have cut it."""
        clauses = self._cut(is_whole=True)
        rest = self._text.strip()
        if rest and (_is_speakable(rest) or not (self._num_cut or clauses)):
            clauses.append(rest)
        self._text, self._half, self._num_cut = "", "", 0
        return clauses

    def _cut(self, *, is_whole: bool) -> list[str]:
        clauses: list[str] = []
        while (end := self._next_end(is_whole=is_whole)) is not None:
            clauses.append(self._text[:end].strip())
            self._text = self._text[end:]
            self._num_cut += 1
        return clauses

    def _next_end(self, *, is_whole: bool) -> int | None:
        text = self._text
        if self._granularity == "none":
            return _forced_end(text, max_chars=MAX_WHOLE_CHARS, is_whole=is_whole)
        minima = _LATER if self._num_cut else _FIRST
        for mark in _MARK.finditer(text):
            if mark.end() > MAX_CLAUSE_CHARS:
                break
            is_end_of_sentence = mark.lastgroup in ("sentence", "wide_sentence", "paragraph")
            if not is_end_of_sentence and self._granularity == "sentence":
                continue
            verdict = _ends_here(text, mark, is_whole=is_whole)
            if verdict is None:
                return None
            shortest = minima.sentence if is_end_of_sentence else minima.clause
            if verdict and _width(text[: mark.end()].strip()) >= shortest and _is_speakable(text[: mark.end()]):
                return mark.end()
        return _forced_end(text, max_chars=MAX_CLAUSE_CHARS, is_whole=is_whole)


def _ends_here(text: str, mark: re.Match[str], *, is_whole: bool) -> bool | None:
    """Whether a clause ends at a mark; None while that depends on text that has not come."""
    end = mark.end()
    rest = text[end : end + _LOOKAHEAD]
    knows_enough = is_whole or len(rest) == _LOOKAHEAD
    if not rest:
        return False if is_whole else None  # what is left is the last clause anyway
    if mark.lastgroup == "paragraph":
        return True
    before, after = text[mark.start() - 1 : mark.start()], rest[0]
    if before.isdigit() and rest.lstrip()[:1].isdigit():
        return False
    if mark.lastgroup in ("wide_sentence", "wide_clause"):
        return True
    if not after.isspace():
        return mark.group()[0] in "—–" and before.isalpha() and after.isalpha()
    following = rest.lstrip(_OPENERS)
    if not following:
        return False if knows_enough else None
    if following[0].isdigit() and before.isdigit():
        return False
    if mark.lastgroup == "clause":
        return True
    return _ends_sentence(text, mark, following, knows_enough=knows_enough)


def _ends_sentence(text: str, mark: re.Match[str], following: str, *, knows_enough: bool) -> bool | None:
    if following[0].islower():
        # "Really?" he said. Well ... perhaps.
        return False
    if mark.group()[0] != "." or mark.group().startswith(".."):
        return True
    found = _LAST_WORD.search(text, max(0, mark.start() - 24), mark.start())
    word = found.group() if found else ""
    if word.lower() in _NEVER_LAST:
        return word.lower() == "no" and not following[0].isdigit()
    if _ENUMERATION.search(text, 0, mark.start()):
        return False
    if word.lower() not in _SELDOM_LAST and (not _INITIALS.fullmatch(word) or word == "I"):
        return True
    next_word = _NEXT_WORD.match(following)
    if next_word is None:
        return following in _STARTERS if knows_enough else None
    return next_word.group(1) in _STARTERS


def _forced_end(text: str, *, max_chars: int, is_whole: bool) -> int | None:
    """Where to cut text that has gone on for too long; None while it has not."""
    if len(text) <= max_chars + (0 if is_whole else _LOOKAHEAD):
        return None
    spaces = [index for index in range(max_chars, 0, -1) if text[index].isspace() and text[:index].strip()]
    # 10 000 and 5 kg are one thing each.
    between_words = [
        index for index in spaces if not (text[index - 1].isdigit() or text[index + 1 : index + 2].isdigit())
    ]
    if spaces:
        return (between_words or spaces)[0]
    wide = [index for index in range(max_chars, 0, -1) if _is_wide(text[index - 1]) and _is_wide(text[index])]
    if wide:
        return wide[0]
    if len(text) <= MAX_WORD_CHARS + _LOOKAHEAD:
        return None
    cut = MAX_WORD_CHARS
    # An accent stays with its letter.
    while cut > 1 and unicodedata.combining(text[cut]):
        cut -= 1
    return cut if cut > 1 else MAX_WORD_CHARS


def _is_wide(character: str) -> bool:
    """Of a script that is written without spaces."""
    return unicodedata.east_asian_width(character) in "WF"


def _width(text: str) -> int:
    """Characters as long as Latin ones: a Chinese character is spoken about as long as three letters."""
    return len(text) + 2 * sum(map(_is_wide, text))


def _is_speakable(text: str) -> bool:
    return any(character.isalnum() for character in text)


def _mended(text: str) -> str:
    """Surrogate pairs that JSON brought in two pieces become characters; lone halves become U+FFFD."""
    if not any("\ud800" <= character <= "\udfff" for character in text):
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
