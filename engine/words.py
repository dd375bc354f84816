"""From the caller's words to what is said for them, and back: which characters of a segment say which word, and when.

Normalising writes "$5" out as "five dollars"; a listener's captions show "$5". So a text carries, through every rule
that rewrites it, where each of its characters comes from. Torch-free.
"""

from __future__ import annotations

import re
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Items
from dataclasses import dataclass

# Scripts written without spaces: each character is a word of its own.
UNSPACED = "\u3005-\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f"
_WIDE_MARKS = "\u3001-\u3003\u3008-\u301f\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65"
_WORD = re.compile(
    rf"[{UNSPACED}][{_WIDE_MARKS}.,!?;:]*|[^\s{UNSPACED}{_WIDE_MARKS}]+[{_WIDE_MARKS}]*|[{_WIDE_MARKS}]+"
)
_SPACES = re.compile(r"\s+")
_EMPTY_LINE = re.compile(r"\n[^\S\n]*\n")


@dataclass(frozen=True, slots=True)
class WordSpan:
    """A word as the caller wrote it, and the characters of a segment's text that say it: first .. last (exclusive)."""

    text: str
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of text that is spoken as a sequence of its own, and the caller's words in it, in order.

    ends_paragraph: whether the caller left a line empty after it.
    """

    text: str
    words: tuple[WordSpan, ...] = ()
    ends_paragraph: bool = False


@dataclass(frozen=True, slots=True)
class TimedWord:
    """A word of the caller's, and the rows of the text side that say it: ids first .. last (exclusive) of a prompt."""

    text: str
    first: int
    last: int


@dataclass(frozen=True, slots=True, eq=False)
class TracedText:
    """A text, and for each of its characters the index in the caller's text that it comes from."""

    text: str
    origins: array[int]

    @classmethod
    def of(cls, text: str) -> TracedText:
        return cls(text, array("l", range(len(text))))

    def sub(self, pattern: re.Pattern[str], say: Callable[[re.Match[str]], str]) -> TracedText:
        """As `pattern.sub(say, text)`; `replaced` says what becomes of the origins."""
        return self.replaced((*match.span(), say(match)) for match in pattern.finditer(self.text))

    def replaced(self, edits: Iterable[tuple[int, int, str]]) -> TracedText:
        """The text with characters first .. last (exclusive) replaced, for each (first, last, said), in order, none
        over another. What a replacement shares at its ends with what it replaces keeps its origins; what is between
        spreads evenly over what it stands for."""
        pieces: list[str] = []
        origins = array("l")
        end = 0
        for first, last, said in edits:
            if said == self.text[first:last]:
                continue
            pieces += (self.text[end:first], said)
            origins += self.origins[end:first]
            origins.extend(self._origins_of(said, first, last))
            end = last
        if not pieces:
            return self
        pieces.append(self.text[end:])
        origins += self.origins[end:]
        return TracedText("".join(pieces), origins)

    def single_spaced(self) -> TracedText:
        """As `" ".join(text.split())`."""
        return self.sub(_SPACES, lambda _: " ").strip(" ")

    def strip(self, left: str, right: str | None = None) -> TracedText:
        """As `text.lstrip(left).rstrip(right)`; `right` is `left` if it is left out."""
        stripped = self.text.lstrip(left)
        first = len(self.text) - len(stripped)
        stripped = stripped.rstrip(left if right is None else right)
        return TracedText(stripped, self.origins[first : first + len(stripped)])

    def segments(self, pieces: Items[str], caller_text: str) -> list[Segment]:
        """The pieces that the text was cut into, each with the caller's words that it says.

        pieces: together all characters of the text that are no spaces, in order. A word that is cut is told where it
        begins.
        """
        words = [match.span() for match in _WORD.finditer(caller_text)]
        starts = [first for first, _ in words]
        segments: list[Segment] = []
        place, last_word = 0, -1
        for piece in pieces:
            word_of: list[int | None] = []
            for character in piece:
                if character.isspace():
                    word_of.append(None)
                    continue
                while self.text[place].isspace():
                    place += 1
                word = bisect_right(starts, self.origins[place]) - 1
                word_of.append(word if word >= 0 and self.origins[place] < words[word][1] else None)
                place += 1
            told = list(_spans(piece, word_of, after=last_word))
            last_word = told[-1][0] if told else last_word
            spans = (WordSpan(caller_text[slice(*words[word])], first, last) for word, first, last in told)
            segments.append(Segment(piece, tuple(spans), self._is_before_empty_line(place, caller_text)))
        return segments

    def _is_before_empty_line(self, place: int, caller_text: str) -> bool:
        """Whether there is an empty line in the caller's text between what character `place` comes from and the
        character before."""
        rest = self.text[place:]
        following = place + len(rest) - len(rest.lstrip())
        if not 0 < place <= following < len(self.origins):
            return False
        between = caller_text[self.origins[place - 1] : self.origins[following] + 1]
        return _EMPTY_LINE.search(between) is not None

    def _origins_of(self, said: str, first: int, last: int) -> Iterator[int]:
        """Origins of a replacement of characters first .. last."""
        matched = self.text[first:last]
        shared = min(len(said), len(matched))
        head = next((i for i in range(shared) if said[i] != matched[i]), shared)
        tail = next((i for i in range(shared - head) if said[-1 - i] != matched[-1 - i]), shared - head)
        num_inner, width = len(said) - head - tail, last - first - head - tail
        yield from self.origins[first : first + head]
        # An insertion belongs to what follows it.
        ends = len(self.origins) - 1
        yield from (self.origins[min(first + head + i * width // num_inner, ends)] for i in range(num_inner))
        yield from self.origins[last - tail : last]


def _spans(piece: str, word_of: list[int | None], *, after: int) -> Iterator[tuple[int, int, int]]:
    """Words later than `after` that begin in a piece: which of the caller's, and first .. last (exclusive) of what says
    it. word_of: for each character the word it comes from.

    A token of the piece says the word that most of its characters come from; one that says no later word than the token
    before belongs to the same.
    """
    current, first, last = after, 0, 0
    for token in _WORD.finditer(piece):
        if not any(character.isalnum() for character in token.group()):
            continue
        counts = Counter(word for word in word_of[token.start() : token.end()] if word is not None)
        word = max(counts, key=lambda word: counts[word]) if counts else current
        if word > current:
            if current > after:
                yield current, first, last
            current, first = word, token.start()
        last = token.end()
    if current > after:
        yield current, first, last
