"""A caller's own pronunciations: what is said instead of a word as it is written.

Owns the checks on its entries and the one pass that applies them. Torch-free.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache

from declaim.engine.errors import InvalidRequest
from declaim.engine.words import UNSPACED, TracedText

MAX_ENTRIES = 1000
MAX_WRITTEN_CHARS = 100
MAX_SAID_CHARS = 400

_IS_UNSPACED = re.compile(f"[{UNSPACED}]")
_IN_WORD = re.compile(rf"[^\W{UNSPACED}]")
# Control characters and lone surrogates: no text has them once it is cleaned, no database keeps them.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Lexicon:
    """Written forms and what is said for them; immutable, made by `Lexicon.of`.

    said: by `term_of` the written form. lengths: how long the terms are that begin with a character, longest first.
    """

    said: Mapping[str, str] = field(default_factory=dict)
    lengths: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @classmethod
    def of(cls, entries: Mapping[str, str]) -> Lexicon:
        """Check a request's entries. Raises: InvalidRequest (param "lexicon")."""
        if len(entries) > MAX_ENTRIES:
            raise _invalid(f"has {len(entries)} entries, the limit is {MAX_ENTRIES}: send those that the text uses")
        for written, said in entries.items():
            _check(written, said)
        return _made(tuple(entries.items()))

    def apply(self, text: TracedText) -> TracedText:
        """The text with every written form replaced where it stands as a whole word, the longest first, in one pass:
        what was put in is not looked at again."""
        return text.replaced(self._found(text.text)) if self.said else text

    def _found(self, text: str) -> Iterator[tuple[int, int, str]]:
        folded = term_of(text)
        first = 0
        while first < len(folded):
            last = self._end_of_term(folded, first)
            if last is None:
                first += 1
                continue
            yield first, last, self.said[folded[first:last]]
            first = last

    def _end_of_term(self, folded: str, first: int) -> int | None:
        """Where the longest term ends that begins at a character, None if none does."""
        lengths = self.lengths.get(folded[first])
        if lengths is None or (first and _is_joined(folded[first], folded[first - 1])):
            return None
        for last in (first + length for length in lengths):
            if folded[first:last] in self.said and not _is_joined(folded[last - 1], folded[last : last + 1]):
                return last
        return None


def term_of(written: str) -> str:
    """What tells one entry from another: case makes no difference. As many characters as `written` has."""
    return "".join(lower if len(lower := character.lower()) == 1 else character for character in written)


def _is_joined(edge: str, beside: str) -> bool:
    """Whether the character beside a term's first or last one goes on with its word; a script without spaces has none,
    and "" is none."""
    return _IN_WORD.match(beside) is not None and _IS_UNSPACED.match(edge) is None


def _check(written: object, said: object) -> None:
    if not isinstance(written, str) or not isinstance(said, str):
        raise _invalid(f"has an entry {written!r}: {said!r}; both sides must be strings")
    if not any(character.isalnum() for character in written) or written != " ".join(written.split()):
        raise _invalid(f"has an entry for {written!r}: it must be a word or words, single-spaced")
    if _UNPRINTABLE.search(written + said):
        raise _invalid(f"has control characters in its entry for {written!r}: send plain text on one line")
    if not said.strip():
        raise _invalid(f"says nothing for {written!r}: give what is said instead, or leave the entry out")
    for name, value, limit in (("word", written, MAX_WRITTEN_CHARS), ("pronunciation", said, MAX_SAID_CHARS)):
        if len(value) > limit:
            raise _invalid(f"has a {name} of {len(value)} characters ({value[:20]!r}…), the limit is {limit}")


@lru_cache(maxsize=256)  # a tenant's lexicon comes with each of its requests
def _made(entries: tuple[tuple[str, str], ...]) -> Lexicon:
    said: dict[str, str] = {}
    lengths: dict[str, set[int]] = {}
    for written, pronunciation in entries:
        term = term_of(written)
        if said.setdefault(term, pronunciation) != pronunciation:
            raise _invalid(f"says two things for {written!r}: case makes no difference, keep one")
        lengths.setdefault(term[0], set()).add(len(term))
    return Lexicon(said, {first: tuple(sorted(found, reverse=True)) for first, found in lengths.items()})


def _invalid(message: str) -> InvalidRequest:
    return InvalidRequest(f"lexicon {message}", param="lexicon")
