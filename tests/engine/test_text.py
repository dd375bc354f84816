"""Cleaning, checking, English normalisation and segmentation."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from declaim.engine.errors import InvalidRequest, TooLong
from declaim.engine.text import (
    TextOptions,
    check_text,
    clean_text,
    guess_language,
    is_speakable,
    normalize_english,
    segment,
    speak,
)

ANY_TEXT = st.text(alphabet=st.characters(exclude_categories=[]), max_size=200)
# Text that looks like something: rules meet each other only where their characters do.
RULE_TEXT = st.lists(
    st.sampled_from(
        "1 12 1984 2000 007 1,234 .5 3.14 $ £ € % ° °C km m s / - – — : . , ; ! ? ' \" ( ) # @ & + = x e k "
        "a.m. pm st nd th Dr. St. No. e.g. U.S. Jan May Monday May. www. example.com http:// "
        "² ³ ⁴ ½ … 😀 é 中 １ ٣ A I US NASA PDFs the in War II word \n".split(" ")
    ),
    max_size=25,
).flatmap(lambda parts: st.sampled_from(["", " "]).map(lambda glue: glue.join(parts)))


def without_spaces(text: str) -> str:
    return "".join(text.split())


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("  a \t b\n\nc  ", "a b c"),
        ("nul\x00 bell\x07 esc\x1b c1\x9b", "nul bell esc c1"),
        ("zero\u200bwidth\ufeff soft\u00adhyphen", "zerowidth softhyphen"),
        ("bidi \u202eabc\u202c \u2066d\u2069", "bidi abc d"),
        ("lone \ud800 surrogate\udfff", "lone surrogate"),
        ("e\u0301", "é"),
        ("no\u00a0break\u3000wide", "no break wide"),
        ("", ""),
        ("日本語", "日本語"),
    ],
)
def test_clean_text_drops_what_cannot_be_seen(raw: str, clean: str) -> None:
    assert clean_text(raw) == clean


@given(ANY_TEXT)
def test_clean_text_of_clean_text_changes_nothing_and_can_be_encoded(text: str) -> None:
    clean = clean_text(text)
    assert clean_text(clean) == clean
    clean.encode("utf-8")
    assert "  " not in clean and clean == clean.strip() and "\x00" not in clean


@pytest.mark.parametrize(
    ("text", "expected"),
    [("a", True), ("7", True), ("é", True), ("中", True), ("...", False), ("😀 !", False), ("", False)],
)
def test_speakable_means_a_letter_or_digit(text: str, expected: bool) -> None:
    assert is_speakable(text) is expected


@pytest.mark.parametrize("text", ["", "   ", "\n", "...", "?! —", "😀"])
def test_a_text_with_nothing_to_say_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check_text(text, max_chars=100)
    assert caught.value.param == "text"
    assert "send at least one word" in str(caught.value)


def test_a_text_at_the_limit_passes_and_one_character_more_does_not() -> None:
    check_text("a" * 10, max_chars=10)
    with pytest.raises(TooLong) as caught:
        check_text("a" * 11, max_chars=10)
    assert caught.value.param == "text"
    assert "11" in str(caught.value) and "10" in str(caught.value) and "several requests" in str(caught.value)


NORMALIZED = [
    # Plain words stay.
    ("The birch canoe slid on the smooth planks.", "The birch canoe slid on the smooth planks."),
    ("Don't stop; it's \"fine\".", "Don't stop; it's \"fine\"."),
    ("", ""),
    # Cardinals and decimals.
    ("0 1 21 100", "zero one twenty-one one hundred"),
    ("1,234,567 people", "one million two hundred thirty-four thousand five hundred sixty-seven people"),
    ("3.14 and 0.05", "three point one four and zero point zero five"),
    ("-7 and 007", "minus seven and zero zero seven"),
    (
        "12345678901234567",
        "one two three four five six seven eight nine zero one two three four five six seven",
    ),
    ("version 3.11.2", "version three point eleven point two"),
    ("1.5e-3", "one point five times ten to the minus three"),
    # Ordinals, years, decades, ranges, fractions.
    ("the 1st, 2nd, 3rd, 21st and 1,000th", "the first, second, third, twenty-first and one thousandth"),
    (
        "In 1984 and 2000, 1905, 2007, 2026",
        "In nineteen eighty-four and two thousand, nineteen oh five, two thousand seven, twenty twenty-six",
    ),
    ("since 1776", "since seventeen seventy-six"),
    ("2050 items", "two thousand fifty items"),
    ("1776 words", "one thousand seven hundred seventy-six words"),
    (
        "1998-2003 and 1998–99",
        "nineteen ninety-eight to two thousand three and nineteen ninety-eight to ninety-nine",
    ),
    ("the 1990s, the '60s", "the nineteen nineties, the sixties"),
    ("10-12 or 10–12", "ten to twelve or ten to twelve"),
    ("1/2, 3/4, 2 1/2, ½, 1½", "one half, three quarters, two and a half, one half, one and a half"),
    ("24/7 and 50/50", "twenty-four seven and fifty fifty"),
    # Money.
    ("$5.20", "five dollars and twenty cents"),
    ("£3, €7m, ¥100", "three pounds, seven million euros, one hundred yen"),
    ("$1 $1.01 $0.99", "one dollar one dollar and one cent ninety-nine cents"),
    ("$3.5 billion", "three point five billion dollars"),
    ("$1,234.56", "one thousand two hundred thirty-four dollars and fifty-six cents"),
    ("-$5 or $10-$20", "minus five dollars or ten to twenty dollars"),
    # Percentages and units.
    ("5%, 5.5 %, 5-10%", "five percent, five point five percent, five to ten percent"),
    (
        "5 km, 1 kg, 20°C, -40°F",
        "five kilometers, one kilogram, twenty degrees Celsius, minus forty degrees Fahrenheit",
    ),
    ("60 mph and 12.5 km/h", "sixty miles per hour and twelve point five kilometers per hour"),
    ("16GB at 3.2 GHz", "sixteen gigabytes at three point two gigahertz"),
    ("100 m²", "one hundred square meters"),
    ("6 ft, 1 ft, 5'11\"", "six feet, one foot, five feet eleven"),
    ("5 A is", "five A is"),
    # Times and dates.
    ("3:45 pm", "three forty-five P M"),
    ("14:05, 7:00, 18:00", "fourteen oh five, seven o'clock, eighteen hundred"),
    ("At 3 p.m. we left", "At three P M we left"),
    ("2026-11-21", "November twenty-first, twenty twenty-six"),
    ("11/21/2026", "November twenty-first, twenty twenty-six"),
    ("21/11/2026", "November twenty-first, twenty twenty-six"),
    ("Nov 21, 2026", "November twenty-first, twenty twenty-six"),
    ("May 3rd", "May third"),
    ("21 November 2026", "the twenty-first of November, twenty twenty-six"),
    ("March 2024", "March twenty twenty-four"),
    ("we may go, and they march", "we may go, and they march"),
    # Telephone numbers.
    ("555-123-4567", "five five five, one two three, four five six seven"),
    ("(555) 123-4567", "five five five, one two three, four five six seven"),
    ("+1 555 123 4567", "plus one, five five five, one two three, four five six seven"),
    # Abbreviations.
    ("Dr. Smith met Mr. Jones and Mrs. Hall.", "Doctor Smith met Mister Jones and Missus Hall."),
    ("Elm St. in St. Louis", "Elm Street in Saint Louis"),
    ("cats, e.g. lions, i.e. big ones, etc.", "cats, for example, lions, that is, big ones, et cetera."),
    ("Us vs. them, No. 5, p. 7, pp. 5-7", "Us versus them, number five, page seven, pages five to seven"),
    ("He said no. Then he left.", "He said no. Then he left."),
    ("World War II and Henry VIII", "World War two and Henry the eighth"),
    # Symbols.
    ("R&D, a+b=c, #5", "R and D, a plus b equals c, number five"),
    ("this (really) matters", "this, really, matters"),
    ("and/or", "and or"),
    ("C# and C++", "C sharp and C plus plus"),
    # Addresses.
    ("see example.com/path.", "see example dot com slash path."),
    ("https://www.example.org/a?b=1", "W W W dot example dot org slash a question mark b equals one"),
    ("bob.smith@example.com", "bob dot smith at example dot com"),
    ("open model.py", "open model dot py"),
    # Acronyms.
    ("NASA and USB and HTTP", "NASA and U S B and H T T P"),
    ("PDFs", "P D F's"),
    ("the US told us", "the U S told us"),
    ("STOP THE CAR, TELL US WHY", "STOP THE CAR, TELL US WHY"),
    ("the U.S. Army in the U.S. The end", "the U S Army in the U S. The end"),
    ("GPT-4, H2O, mp3, 3D, 4K", "G P T four, H two O, M P three, three D, four K"),
    # Marks and pictures.
    ("“It’s” – ‘so’ … 😀👍🏽", "\"It's\" — 'so'…"),
    ("**bold** _it_ `code`", "bold it code"),
    ("well-known -- yes", "well-known — yes"),
    ("１２ and ٣", "twelve and three"),
    ("x² and 10⁶", "x squared and ten to the power of six"),
]


@pytest.mark.parametrize(("written", "said"), NORMALIZED)
def test_english_is_normalised_to_what_is_said(written: str, said: str) -> None:
    assert normalize_english(written) == said


@settings(max_examples=300, deadline=None)
@given(ANY_TEXT | RULE_TEXT)
def test_normalised_text_has_no_digit_left_and_nothing_raises(text: str) -> None:
    said = normalize_english(text)
    assert not re.search("[0-9]", said)
    assert said == " ".join(said.split())
    assert not re.search("[0-9]", normalize_english(clean_text(text)))


@settings(max_examples=200, deadline=None)
@given(st.integers(min_value=0, max_value=10**15 - 1))
def test_a_number_reads_the_same_with_and_without_thousands_separators(number: int) -> None:
    assert normalize_english(f"about {number:,} x") == normalize_english(f"about {number} x") or 1900 <= number <= 2099


@pytest.mark.parametrize(
    "unit",
    [
        "1",
        "a",
        ".",
        ",",
        " ,",
        "-",
        "1-",
        "1.",
        "A.",
        "$1",
        "http://",
        "a@",
        "@",
        "_",
        "(",
        "' ",
        "1:",
        "1/",
        "#",
    ],
)
def test_no_repeated_mark_makes_normalising_slow(unit: str) -> None:
    text = (unit * 4096)[:4096]
    started = time.process_time()
    segment(normalize_english(text))
    assert time.process_time() - started < 2.0


SEGMENTED = [
    (
        "Hello there, my friend. How are you doing today? I am very well!",
        ["Hello there, my friend.", "How are you doing today?", "I am very well!"],
    ),
    (
        "I saw Dr. Smith at the station. He waved at me.",
        ["I saw Dr. Smith at the station.", "He waved at me."],
    ),
    (
        "It costs 3.5 dollars in total. That is cheap enough.",
        ["It costs 3.5 dollars in total.", "That is cheap enough."],
    ),
    (
        "Big cats, e.g. Lions, live there. They sleep all day.",
        ["Big cats, e.g. Lions, live there.", "They sleep all day."],
    ),
    (
        "He joined the U.S. Army last year. The army was glad.",
        ["He joined the U.S. Army last year.", "The army was glad."],
    ),
    (
        "She moved to the U.S. The weather is better there.",
        ["She moved to the U.S.", "The weather is better there."],
    ),
    (
        "Well... perhaps we should go home. It is very late.",
        ["Well... perhaps we should go home.", "It is very late."],
    ),
    (
        '"Are you coming with us?" he asked. "Of course I am."',
        ['"Are you coming with us?" he asked.', '"Of course I am."'],
    ),
    ("No. Yes. Maybe so.", ["No. Yes. Maybe so."]),
    (
        "J. R. Smith wrote a long book. Nobody has read it.",
        ["J. R. Smith wrote a long book.", "Nobody has read it."],
    ),
    ("", []),
    ("   ", []),
]


@pytest.mark.parametrize(("text", "pieces"), SEGMENTED)
def test_text_is_cut_at_sentence_ends(text: str, pieces: list[str]) -> None:
    assert segment(text) == pieces


def test_a_long_sentence_is_cut_at_clause_punctuation_before_spaces() -> None:
    text = (
        "The first clause of this sentence is rather long indeed, and the second one goes on for quite some "
        "time as well, so it is cut"
    )
    pieces = segment(text, max_chars=80)
    assert pieces[0] == "The first clause of this sentence is rather long indeed,"
    assert all(len(piece) <= 80 for piece in pieces)


def test_numbers_and_words_are_never_cut() -> None:
    text = "one,two 1,234,567.89 3:45 " * 20
    words = set(text.split())
    assert all(word in words for piece in segment(text, max_chars=30) for word in piece.split())


def test_a_tiny_sentence_joins_its_neighbour_only_where_both_fit() -> None:
    assert segment("Yes. This one is quite a bit longer.", max_chars=60) == ["Yes. This one is quite a bit longer."]
    assert segment("Yes. This one is quite a bit longer.", max_chars=32) == [
        "Yes.",
        "This one is quite a bit longer.",
    ]


def test_chinese_is_cut_at_its_own_marks_and_hard_without_any() -> None:
    assert segment("今天天气很好。我们去公园吧！", max_chars=8, min_chars=2) == [
        "今天天气很好。",
        "我们去公园吧！",
    ]
    assert segment("今天天气很好，我们去公园", max_chars=8, min_chars=2) == ["今天天气很好，", "我们去公园"]
    assert [len(piece) for piece in segment("天" * 25, max_chars=10)] == [10, 10, 5]


def test_a_word_longer_than_a_piece_is_cut_hard() -> None:
    assert segment("a" * 25, max_chars=10, min_chars=3) == ["a" * 10, "a" * 10, "a" * 5]


def test_a_piece_holds_at_least_one_character() -> None:
    with pytest.raises(InvalidRequest, match="max_chars is 0"):
        segment("abc", max_chars=0)


@settings(max_examples=300, deadline=None)
@given(ANY_TEXT | RULE_TEXT, st.integers(1, 60), st.integers(0, 30))
def test_segments_keep_every_character_and_the_limit(text: str, max_chars: int, min_chars: int) -> None:
    pieces = segment(text, max_chars=max_chars, min_chars=min_chars)
    assert without_spaces("".join(pieces)) == without_spaces(text)
    assert all(0 < len(piece) <= max_chars and piece == piece.strip() for piece in pieces)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from("cat, dog. 3.5 1,000 Dr. well-known end! so; e.g.".split()), max_size=60))
def test_no_word_is_cut_that_fits(words: list[str]) -> None:
    pieces = segment(" ".join(words), max_chars=30)
    assert [word for piece in pieces for word in piece.split()] == words


# One request's text, as families have it read.


def pieces(text: str, options: TextOptions = TextOptions(), *, language: str | None = "en") -> list[str]:  # noqa: B008
    return [piece.text for piece in speak(text, options, language=language, max_chars=200, max_segment_chars=30)]


def test_normalising_can_be_turned_off_and_is_left_to_the_model_in_other_languages() -> None:
    assert pieces("I have 3.") == ["I have three."]
    assert pieces("I have 3.", TextOptions(normalize=False)) == ["I have 3."]
    assert pieces("J'en ai 3.", language=None) == ["J'en ai 3."]


def test_addresses_are_read_out_whatever_follows_them() -> None:
    assert normalize_english("https://a.com/x\u00b2 or me@b.org") == "a dot com slash x or me at b dot org"


@pytest.mark.parametrize(("text", "language"), [("Hello", "en"), ("你好", "zh"), ("日本語です", "en"), ("", "en")])
def test_languages_are_guessed_from_the_script(text: str, language: str) -> None:
    assert guess_language(text) == language


@pytest.mark.parametrize(
    ("written", "spoken"),
    [
        ("价格是￥13.5，涨了3.5%。", "价格是十三点五元，涨了百分之三点五。"),
        ("2024年1月5日下午3:45，气温-5°C", "二零二四年一月五日下午三点四十五分，气温负五摄氏度"),
        ("全程100km，重5kg", "全程一百公里，重五千克"),
        ("没有数字", "没有数字"),
    ],
)
def test_chinese_numbers_dates_money_and_units_are_written_out(written: str, spoken: str) -> None:
    pytest.importorskip("wetext")
    assert "".join(pieces(written, language="zh")) == spoken


def test_a_script_without_spaces_is_never_cut_inside_a_word_or_number() -> None:
    text = "中文没有空格所以要小心切分12345.678这样的数字和iPhone这样的词还有12：30" * 4
    for max_chars in range(10, 40):
        cut = segment(text, max_chars=max_chars)
        assert "".join(cut) == text
        assert max(map(len, cut)) <= max_chars
        for before, after in zip(cut, cut[1:], strict=False):
            assert not re.search(r"[a-zA-Z0-9]$", before) or not re.match(r"[a-zA-Z0-9]", after)
            assert not re.search(r"[0-9][.：]$", before)
            assert not re.match(r"[.：][0-9]", after)
