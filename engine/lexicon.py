"""A caller's own pronunciations: what is said instead of a word as it is written.

Owns the checks on its entries and the one pass that applies them. Torch-free.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache

from declaim.engine.errors import InvalidRequest
from declaim.engine.words import UNSPACED, TracedText

MAX_ENTRIES = 1000
MAX_WRITTEN_CHARS = 100
MAX_SAID_CHARS = 400

_IS_UNSPACED = re.compile(f"[{UNSPACED}]")


@dataclass(frozen=True, slots=True)
class Lexicon:
    """Written forms and what is said for them; immutable, made by `Lexicon.of`.

    said: by written form, its case folded. pattern: any written form as a whole word, the longest first; None matches
    nothing.
    """

    said: Mapping[str, str] = field(default_factory=dict)
    pattern: re.Pattern[str] | None = None

    @classmethod
    def of(cls, entries: Mapping[str, str]) -> Lexicon:
        """Check a request's entries. Raises: InvalidRequest (param "lexicon")."""
        if len(entries) > MAX_ENTRIES:
            raise _invalid(f"has {len(entries)} entries, the limit is {MAX_ENTRIES}: send those that the text uses")
        for written, said in entries.items():
            _check(written, said)
        return _made(tuple(entries.items()))

    def apply(self, text: TracedText) -> TracedText:
        """The text with every written form replaced, in one pass: what was put in is not looked at again."""
        if self.pattern is None:
            return text
        return text.sub(self.pattern, lambda match: self.said.get(match.group().casefold(), match.group()))


def _check(written: object, said: object) -> None:
    if not isinstance(written, str) or not isinstance(said, str):
        raise _invalid(f"has an entry {written!r}: {said!r}; both sides must be strings")
    if not any(character.isalnum() for character in written) or written != " ".join(written.split()):
        raise _invalid(f"has an entry for {written!r}: it must be a word or words, single-spaced")
    if not said.strip():
        raise _invalid(f"says nothing for {written!r}: give what is said instead, or leave the entry out")
    for name, value, limit in (("word", written, MAX_WRITTEN_CHARS), ("pronunciation", said, MAX_SAID_CHARS)):
        if len(value) > limit:
            raise _invalid(f"has a {name} of {len(value)} characters ({value[:20]!r}…), the limit is {limit}")


@lru_cache(maxsize=256)  # a tenant's lexicon comes with each of its requests
def _made(entries: tuple[tuple[str, str], ...]) -> Lexicon:
    said: dict[str, str] = {}
    for written, pronunciation in entries:
        if said.setdefault(written.casefold(), pronunciation) != pronunciation:
            raise _invalid(f"says two things for {written!r}: case makes no difference, keep one")
    if not said:
        return Lexicon()
    longest_first = sorted((written for written, _ in entries), key=len, reverse=True)
    return Lexicon(said, re.compile("|".join(map(_whole_word, longest_first)), re.IGNORECASE))


def _whole_word(written: str) -> str:
    """A pattern; beside a character of a script without spaces, anything may stand."""
    before = "" if _IS_UNSPACED.match(written[0]) else rf"(?<![^\W{UNSPACED}])"
    after = "" if _IS_UNSPACED.match(written[-1]) else rf"(?![^\W{UNSPACED}])"
    return before + re.escape(written) + after


def _invalid(message: str) -> InvalidRequest:
    return InvalidRequest(f"lexicon {message}", param="lexicon")
