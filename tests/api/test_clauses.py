"""Where text that arrives word by word is cut."""

from __future__ import annotations

import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from declaim.api.clauses import MAX_CLAUSE_CHARS, MAX_WORD_CHARS, ClauseSplitter, Granularity

PASSAGE = (
    "Sure, I can help with that. Dr. Smith of the U.S. Army lives at 12 St. James Rd. in London, and pays $1,250.75 a "
    "month! See https://example.com/a,b?c=d. or write to anna.lee@mail.example.org; she answers by 5 p.m. The flat "
    'has 1,000 sq. ft. and No. 7 on its door. "Really?" he asked. On May 3, 2020 it was sold for 3.5 million... '
    "Then: nothing.\n\nThere were three steps:\n1. Find it. 2. Buy it. 3. Sell it, e.g. online. J. R. R. Tolkien wrote "
    "that. 你好，世界。今天天气很好！我们走吧。 The end — or so it seemed"
)
# Never to be found across a cut.
WHOLE = (
    "Dr. Smith", "U.S. Army", "St. James", "$1,250.75", "https://example.com/a,b?c=d", "anna.lee@mail.example.org",
    "1,000", "No. 7", "May 3, 2020", "3.5 million", "1. Find", "e.g. online", "J. R. R. Tolkien",
)  # fmt: skip


def split(text: str, granularity: Granularity = "clause", *, pieces: list[str] | None = None) -> list[str]:
    splitter = ClauseSplitter(granularity)
    clauses = [clause for piece in pieces or [text] for clause in splitter.feed(piece)]
    return clauses + splitter.flush()


def squeezed(text: str) -> str:
    return re.sub(r"\s", "", text)


@pytest.mark.parametrize("granularity", ["none", "sentence", "clause"])
def test_nothing_is_lost_and_nothing_is_cut_that_belongs_together(granularity: Granularity) -> None:
    clauses = split(PASSAGE, granularity)
    assert squeezed("".join(clauses)) == squeezed(PASSAGE)
    assert all(any(thing in clause for clause in clauses) for thing in WHOLE), clauses
    assert len(clauses) == 1 if granularity == "none" else len(clauses) > 6


def test_sentences_are_the_cuts_of_sentence_granularity() -> None:
    assert split("Hello there, dear friend. How are you today? I am fine, thank you very much. Bye.", "sentence") == [
        "Hello there, dear friend.",
        "How are you today? I am fine, thank you very much.",
        "Bye.",
    ]


def test_a_clause_is_spoken_while_the_rest_has_not_come() -> None:
    splitter = ClauseSplitter("clause")
    heard: list[tuple[int, str]] = []
    words = "Well, let me think about that for a moment, because it is not simple. You see, it depends.".split(" ")
    for position, word in enumerate(words):
        heard += [(position, clause) for clause in splitter.feed(word + " ")]
    assert heard[0] == (9, "Well, let me think about that for a moment,")
    assert heard[1] == (14, "because it is not simple.")
    assert splitter.flush() == ["You see, it depends."]


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("granularity", ["sentence", "clause"])
def test_the_cuts_do_not_depend_on_how_the_text_arrives(size: int, granularity: Granularity) -> None:
    pieces = [PASSAGE[first : first + size] for first in range(0, len(PASSAGE), size)]
    assert split(PASSAGE, granularity, pieces=pieces) == split(PASSAGE, granularity)


ALPHABET = st.sampled_from(
    [*"ab AB .,!?;:…—'\")( \n12", "Dr. ", "e.g. ", "3.14", "你", "。", "，", "word ", "The ", "etc. "]
)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(ALPHABET, max_size=400).map("".join),
    st.sampled_from(["none", "sentence", "clause"]),
    st.randoms(use_true_random=False),
)
def test_any_text_in_any_pieces_gives_the_same_clauses(
    text: str, granularity: Granularity, chance: random.Random
) -> None:
    cuts = sorted(chance.randrange(len(text) + 1) for _ in range(12))
    pieces = [text[first:last] for first, last in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    clauses = split(text, granularity)
    assert split(text, granularity, pieces=pieces) == clauses
    assert split(text, granularity, pieces=list(text)) == clauses
    assert squeezed(text).startswith(squeezed("".join(clauses)))
    # All that can be left unsaid is what cannot be said.
    assert not any(character.isalnum() for character in squeezed(text)[len(squeezed("".join(clauses))) :])


def test_a_run_on_is_cut_between_words_and_never_in_a_number() -> None:
    clauses = split("one two three 10 000 four five six seven eight nine 5 kg " * 30)
    assert len(clauses) > 5
    assert all(len(clause) <= MAX_CLAUSE_CHARS for clause in clauses)
    assert not any(clause.endswith((" 10", " 5")) or clause.startswith(("000", "kg")) for clause in clauses)


def test_memory_is_bounded_for_text_without_a_space() -> None:
    splitter = ClauseSplitter("clause")
    clauses = [clause for _ in range(200) for clause in splitter.feed("x" * 100)]
    assert len(clauses) == 19 and {len(clause) for clause in clauses} == {MAX_WORD_CHARS}
    assert all(len(clause) <= MAX_CLAUSE_CHARS for clause in split("语" * 5000))


def test_a_url_longer_than_a_clause_stays_whole() -> None:
    url = "https://example.com/" + "a/b.c,d?e=f&" * 30
    assert any(url in clause for clause in split(f"Look at {url} now. It is long."))


def test_an_emoji_whose_halves_arrive_apart_is_one() -> None:
    assert split("", pieces=["Hi \ud83d", "\ude42 there"]) == ["Hi 🙂 there"]
    assert split("", pieces=["Hi \ud83d"]) == ["Hi"]


def test_bare_punctuation_is_kept_only_where_it_is_all_there_is() -> None:
    assert split("...") == ["..."]
    assert split("Hello, my friend. ...") == ["Hello, my friend."]
    assert split("  \n ") == []
