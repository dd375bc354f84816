"""The caller's own words: kept through every rule that rewrites a text, and timed in the audio."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from declaim.engine import AudioChunk, Engine, EngineConfig, SamplingParams, SpeechRequest, Word
from declaim.engine.text import TextOptions, clean_text, normalize_english, speak
from declaim.engine.words import Segment, TracedText


def said(text: str, *, language: str | None = "en", max_segment_chars: int | None = 120) -> list[Segment]:
    return speak(text, TextOptions(), language=language, max_chars=20_000, max_segment_chars=max_segment_chars)


def pairs(text: str, *, language: str | None = "en") -> list[tuple[str, str]]:
    """Each of the caller's words, and what is said for it."""
    return [
        (word.text, segment.text[word.first : word.last])
        for segment in said(text, language=language)
        for word in segment.words
    ]


def test_what_is_written_out_is_one_word_of_the_callers() -> None:
    assert pairs("It cost $5, or 3kg of 10% as Dr. Smith!") == [
        ("It", "It"),
        ("cost", "cost"),
        ("$5,", "five dollars,"),
        ("or", "or"),
        ("3kg", "three kilograms"),
        ("of", "of"),
        ("10%", "ten percent"),
        ("as", "as"),
        ("Dr.", "Doctor"),
        ("Smith!", "Smith!"),
    ]


def test_a_match_over_several_words_is_shared_between_them_in_order() -> None:
    assert pairs("on Jan 5, 2024 we paid $5 million") == [
        ("on", "on"),
        ("Jan", "January"),
        ("5,", "fifth,"),
        ("2024", "twenty twenty-four"),
        ("we", "we"),
        ("paid", "paid"),
        ("$5", "five"),
        ("million", "million dollars"),
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("one  two\n three", ["one", "two", "three"]),
        ("yes 😀 … no", ["yes", "no"]),
        ("ﬁne, “quoted” na\u00efve", ["ﬁne,", "“quoted”", "na\u00efve"]),
        ("a \u200bb\u00ad c", ["a", "\u200bb\u00ad", "c"]),
        ("https://a.b.com/x?y=1 ok", ["https://a.b.com/x?y=1", "ok"]),
    ],
)
def test_words_are_as_the_caller_wrote_them(text: str, words: list[str]) -> None:
    assert [word for word, _ in pairs(text)] == words


def test_each_character_of_an_unspaced_script_is_a_word() -> None:
    assert [word for word, _ in pairs("中文，用AI了。", language=None)] == ["中", "文，", "用", "AI", "了。"]


pieces = st.sampled_from([*"ab .,!?$%&@5719\n—", "Dr. ", "3kg", "é", "日", "。", "½", "😀"])
texts = st.lists(pieces, max_size=60).map("".join)


@settings(deadline=None, max_examples=200, derandomize=True)
@given(text=texts)
def test_spans_are_in_order_inside_their_segment_and_words_in_the_callers_text(text: str) -> None:
    if not any(character.isalnum() for character in clean_text(text)):
        return
    words = []
    for segment in said(text, max_segment_chars=30):
        last = 0
        for word in segment.words:
            assert last <= word.first < word.last <= len(segment.text)
            last = word.last
            words.append(word.text)
    place = 0
    for word in words:
        place = text.index(word, place) + len(word)


@settings(deadline=None, max_examples=200, derandomize=True)
@given(text=texts)
def test_tracing_changes_no_text_and_origins_never_leave_the_callers(text: str) -> None:
    traced = TracedText.of(text).sub(re.compile("[5a]+"), lambda match: f"<{match.group()[::-1]}>").single_spaced()
    assert traced.text == " ".join(re.sub("[5a]+", lambda match: f"<{match.group()[::-1]}>", text).split())
    assert len(traced.origins) == len(traced.text)
    assert all(0 <= origin < len(text) for origin in traced.origins)
    assert list(traced.origins) == sorted(traced.origins)
    if any(character.isalnum() for character in clean_text(text)):
        (segment,) = said(text, max_segment_chars=None)
        assert segment.text == normalize_english(clean_text(text))


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine.from_pretrained() as engine:
        yield engine


def speak_words(engine: Engine, text: str, *, speed: float = 1.0, max_seconds: float | None = None) -> list[AudioChunk]:
    sampling = SamplingParams(seed=1, max_seconds=max_seconds)
    return list(engine.stream(SpeechRequest(text, sampling=sampling, speed=speed, word_timestamps=True)))


@pytest.mark.parametrize("gap", ["\n\n", "\r\n\r\n", " \n \t\n\n"])
def test_a_segment_knows_the_empty_line_after_it(gap: str) -> None:
    text = f"One is 1.\nTwo is two.{gap}Three is $3, they say. Four{gap}"
    ends = [(segment.text, segment.ends_paragraph) for segment in said(text, max_segment_chars=24)]
    assert ends[0] == ("One is one. Two is two.", True) and len(ends) > 2
    assert not any(ends_paragraph for _, ends_paragraph in ends[1:])


def words_of(chunks: list[AudioChunk]) -> list[Word]:
    return [word for chunk in chunks for word in chunk.words]


def test_times_are_in_order_inside_the_audio_and_in_the_chunk_where_they_begin(engine: Engine) -> None:
    text = "The birch canoe slid on the smooth planks, and it cost $5. Dr. Smith said: was it a state-of-the-art one?"
    chunks = speak_words(engine, text)
    words = words_of(chunks)
    assert [word.text for word in words] == text.split()
    begin = 0.0
    for chunk in chunks:
        end = begin + len(chunk.audio) / chunk.sample_rate_hz
        assert all(begin <= word.start_s < end for word in chunk.words)
        begin = end
    times = [time for word in words for time in (word.start_s, word.end_s)]
    assert times == sorted(times)
    assert times[-1] <= begin


def test_a_word_is_as_long_whichever_pieces_its_audio_comes_in(engine: Engine) -> None:
    text = "Extraordinarily uncharacteristic misunderstandings."
    in_small_pieces = words_of(speak_words(engine, text))
    with Engine.from_pretrained(config=EngineConfig(first_chunk_s=8.0, max_chunk_s=8.0)) as whole:
        in_one_piece = words_of(speak_words(whole, text))
    assert in_small_pieces == in_one_piece


def test_speech_is_where_the_words_are_and_silence_where_none_is(engine: Engine) -> None:
    chunks = speak_words(engine, "We went home and they went on without us.")
    audio = np.concatenate([chunk.audio for chunk in chunks])
    rate = chunks[0].sample_rate_hz
    is_word = np.zeros(len(audio), dtype=bool)
    for word in words_of(chunks):
        is_word[int(word.start_s * rate) : int(word.end_s * rate)] = True

    def level(part: np.ndarray) -> float:
        return float(np.sqrt(np.mean(part**2)))

    assert level(audio[is_word]) > 10 * level(audio[~is_word])


def test_times_follow_the_speed(engine: Engine) -> None:
    text = "One two three, four."
    plain, fast = (words_of(speak_words(engine, text, speed=speed)) for speed in (1.0, 2.0))
    for one, other in zip(plain, fast, strict=True):
        assert other.start_s == pytest.approx(one.start_s / 2, abs=1e-5)


def test_later_segments_are_timed_where_they_are_heard_after_a_pause(engine: Engine) -> None:
    sentences = [
        f"This is sentence number {name} of a text that is long enough to be cut." for name in "one two six".split()
    ]
    chunks = speak_words(engine, " ".join(sentences))
    audio, rate_hz = np.concatenate([chunk.audio for chunk in chunks]), chunks[0].sample_rate_hz
    words = words_of(chunks)
    assert [word.text for word in words] == " ".join(sentences).split()
    sounds_s = np.flatnonzero(np.abs(audio) > 0.01) / rate_hz
    firsts = [word for word in words if word.text == "This"]
    assert len(firsts) == 3
    for sentence, first in zip(sentences, firsts, strict=True):
        alone = words_of(speak_words(engine, sentence))
        here = words[words.index(first) :][: len(alone)]
        for word, other in zip(here, alone, strict=True):
            assert word.start_s - first.start_s == pytest.approx(other.start_s - alone[0].start_s, abs=0.12)
        for word, other in zip(here[1:], alone[1:], strict=True):
            assert word.start_s - here[1].start_s == pytest.approx(other.start_s - alone[1].start_s, abs=1e-5)
    for first in firsts[1:]:
        near = sounds_s[np.abs(sounds_s - first.start_s) < 0.6]
        rest = int(np.argmax(np.diff(near)))
        # 0.25 s after a sentence's last sound and up to 0.05 s before the next one's first, which its first word begins
        # with.
        assert 0.25 <= near[rest + 1] - near[rest] <= 0.31
        assert abs(near[rest + 1] - first.start_s) < 0.12
    times = [time for word in words for time in (word.start_s, word.end_s)]
    assert times == sorted(times) and times[-1] <= len(audio) / rate_hz


def test_frames_and_codes_are_whole_where_silence_is_taken_out(engine: Engine) -> None:
    request = SpeechRequest("Wait there. Come here. Sit down.", sampling=SamplingParams(seed=5))
    chunks = list(engine.stream(request))
    (whole,) = engine.generate([request], progress=False)
    assert [chunk.first_frame for chunk in chunks] == list(
        np.cumsum([0, *(chunk.num_frames for chunk in chunks)])[: len(chunks)]
    )
    assert sum(chunk.num_frames for chunk in chunks) == len(whole.codes)
    assert all(len(chunk.audio) for chunk in chunks)
    np.testing.assert_array_equal(np.concatenate([chunk.audio for chunk in chunks]), whole.audio)


def test_words_that_are_cut_off_are_not_told(engine: Engine) -> None:
    chunks = speak_words(engine, "One two three four five six seven eight nine ten.", max_seconds=1.0)
    words = words_of(chunks)
    assert chunks[-1].finish_reason == "length"
    assert words
    assert len(words) < 10
    assert words[-1].end_s <= 1.0


def test_nobody_is_told_words_who_did_not_ask(engine: Engine) -> None:
    assert all(chunk.words == () for chunk in engine.stream(SpeechRequest("One two.", sampling=SamplingParams(seed=1))))
