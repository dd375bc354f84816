"""A caller's own pronunciations: whole words, whatever their case, the longest first; and what is refused."""

from __future__ import annotations

import time

import pytest

from declaim.engine import InvalidRequest
from declaim.engine.lexicon import MAX_ENTRIES, MAX_SAID_CHARS, Lexicon
from declaim.engine.text import TextOptions, speak
from declaim.engine.words import TracedText


def applied(text: str, entries: dict[str, str]) -> str:
    return Lexicon.of(entries).apply(TracedText.of(text)).text


@pytest.mark.parametrize(
    ("text", "entries", "expected"),
    [
        ("The SQL of sql, not mysql.", {"SQL": "sequel"}, "The sequel of sequel, not mysql."),
        ("New York and York", {"York": "yark", "New York": "nyoo yark"}, "nyoo yark and yark"),
        ("a b", {"a": "b", "b": "c"}, "b c"),  # what was put in is not looked at again
        ("C++ and c++", {"C++": "see plus plus"}, "see plus plus and see plus plus"),
        ("用AI了，said", {"AI": "人工智能"}, "用人工智能了，said"),
        ("重庆很大", {"重庆": "虫庆"}, "虫庆很大"),
        ("Straße STRASSE", {"straße": "street"}, "street STRASSE"),
        ("nothing", {}, "nothing"),
        ("ASP.NET, .NET and .NETs", {".NET": "dot net"}, "ASP.NET, dot net and .NETs"),
        ("ΟΔΟΣ οδος", {"οδοσ": "odos"}, "odos οδος"),
        ("İstanbul", {"İstanbul": "istanbool"}, "istanbool"),
    ],
)
def test_words_are_replaced(text: str, entries: dict[str, str], expected: str) -> None:
    assert applied(text, entries) == expected


def test_the_word_told_is_the_callers_and_what_is_said_is_normalised() -> None:
    options = TextOptions(lexicon=Lexicon.of({"k8s": "kubernetes 2"}))
    (segment,) = speak("Our K8s, now.", options, language="en", max_chars=100, max_segment_chars=120)
    assert segment.text == "Our kubernetes two, now."
    assert [(word.text, segment.text[word.first : word.last]) for word in segment.words] == [
        ("Our", "Our"),
        ("K8s,", "kubernetes two,"),
        ("now.", "now."),
    ]


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"": "x"}, "''"),
        ({"...": "x"}, "'...'"),
        ({" a": "x"}, "single-spaced"),
        ({"a": " "}, "says nothing for 'a'"),
        ({"a": "x" * (MAX_SAID_CHARS + 1)}, f"{MAX_SAID_CHARS + 1} characters.*limit is {MAX_SAID_CHARS}"),
        ({f"w{i}": "x" for i in range(MAX_ENTRIES + 1)}, f"{MAX_ENTRIES + 1} entries, the limit is {MAX_ENTRIES}"),
        ({"A": "x", "a": "y"}, "two things for 'a'"),
        ({"a": 5}, "strings"),
        ({"a": "b\nc"}, "control characters.*'a'"),
        ({"a\x00b": "c"}, "control characters"),
        ({"a": "\ud800"}, "control characters"),
    ],
)
def test_bad_entries_are_refused_by_name(entries: dict[str, str], words: str) -> None:
    with pytest.raises(InvalidRequest, match=words) as refused:
        Lexicon.of(entries)
    assert refused.value.param == "lexicon"


def test_a_lexicon_cannot_make_a_book_of_a_line() -> None:
    options = TextOptions(lexicon=Lexicon.of({"a": "word " * 70}))
    with pytest.raises(InvalidRequest, match="limit is 2000"):
        speak("a " * 50, options, language="en", max_chars=100, max_segment_chars=120)


def test_as_many_entries_as_there_may_be_cost_a_long_text_little() -> None:
    words = [f"{chr(97 + i % 26)}{i} {'x' * (i % 90)}".strip() for i in range(MAX_ENTRIES)]
    began_s = time.process_time()
    lexicon = Lexicon.of({word: "said" for word in words})
    text = TracedText.of(" ".join(words)[:4096])
    assert lexicon.apply(text).text.count("said") > 70
    assert time.process_time() - began_s < 0.5  # a pattern of so many words took seconds
