"""Words to the embedded voice's phonemes and bytes."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import declaim.engine.phonemes
from declaim.engine.errors import ModelLoadError
from declaim.engine.phonemes import LetterToSound, Phonemizer, stressed
from declaim.engine.text import clean_text, normalize_english, segment

VOICE = Path(declaim.engine.phonemes.__file__).parent / "assets" / "lark"


@pytest.fixture(scope="module")
def phonemizer() -> Phonemizer:
    return Phonemizer.load(VOICE)


def test_the_voices_test_vector_is_reproduced(phonemizer: Phonemizer) -> None:
    vector = json.loads((VOICE / "test_vector.json").read_text(encoding="utf-8"))
    assert phonemizer.phonemes(vector["text"]) == vector["phonemes"]
    with np.load(VOICE / "test_vector.npz") as stored:
        assert phonemizer.encode(vector["text"]) == stored["text_bytes"].tolist()


@pytest.mark.parametrize(
    ("text", "symbols"),
    [
        ("a", "ɐ"),
        ("Hello, world!", "həlˈO, wˈɜɹld!"),
        ("THE the The", "ðə ðə ðə"),
        ("don’t", "dˈOnt"),
        ("'hello'", "həlˈO"),
        ("well-known", "wˈɛl nˈOn"),
        ('"Yes," (no).', "jˈɛs, nˈO."),
        ("yes – no — yes", "jˈɛs — nˈO — jˈɛs"),
        ("what?! no... yes!!!", "wˈʌt? nˈO. jˈɛs!"),
        ("café", "kəfˈA"),
        ("A B C", "ˈA bˈi sˈi"),
        ("Plan A.", "plˈæn ˈA."),
        ("A plan", "ɐ plˈæn"),
        ("", ""),
        ("中文 42", ""),
    ],
)
def test_words_become_symbols_and_marks_stay(phonemizer: Phonemizer, text: str, symbols: str) -> None:
    assert phonemizer.phonemes(text).replace(" —", "—") == symbols.replace(" —", "—")


@pytest.mark.parametrize(
    ("text", "word", "symbols"),
    [
        ("I will read", -1, "ɹˈid"),
        ("I have read", -1, "ɹˈɛd"),
        ("they lead", -1, "lˈid"),
        ("full of lead", -1, "lˈɛd"),
        ("we live", -1, "lˈɪv"),
        ("it is live", -1, "lˈIv"),
        ("the wind", -1, "wˈɪnd"),
        ("to wind", -1, "wˈInd"),
        ("to tear", -1, "tˈɛɹ"),
        ("a tear", -1, "tˈɪɹ"),
        ("close it", 0, "klˈOz"),
        ("very close", -1, "klˈOs"),
        ("to use", -1, "jˈuz"),
        ("the use", -1, "jˈus"),
        ("a present", -1, "pɹˈɛzənt"),
        ("to present", -1, "pɹizˈɛnt"),
        ("the record", -1, "ɹˈɛkəɹd"),
        ("to record", -1, "ɹəkˈɔɹd"),
        ("an object", -1, "ˈɑbʤɛkt"),
        ("I object", -1, "əbʤˈɛkt"),
    ],
)
def test_a_word_said_in_two_ways_heeds_the_word_before(
    phonemizer: Phonemizer, text: str, word: int, symbols: str
) -> None:
    assert phonemizer.phonemes(text).split()[word] == symbols


@pytest.mark.parametrize(
    ("word", "phones"),
    [
        ("Kangaroo's", "K AE2 NG G ER0 UW1 Z"),
        ("blackboards'", "B L AE1 K B AO2 R D Z"),
        ("penguin's", "P EH1 NG G W AH0 N Z"),
        ("HTTP", "EY2 CH T IY2 T IY2 P IY1"),
        ("XQZ", "EH1 K S K Y UW1 Z IY1"),
        ("ChatGPT", "CH AE1 T JH IY1 P IY1 T IY1"),
        ("GPU", "JH IY1 P IY1 Y UW1"),
        ("GPUs", "JH IY1 P IY1 Y UW1 Z"),
        ("NASA", "N AE1 S AH0"),
        ("kubernetes", "K UW2 B ER0 N EH1 T IY0 Z"),
        ("Kyiv's", "K IY1 V Z"),
        ("should've", "SH UH1 D AH0 V"),
        ("banana'd", "B AH0 N AE1 N AH0 D"),
        ("table'll", "T EY1 B AH0 L AH0 L"),
        ("unfriended", None),
        ("xylophonist", None),
    ],
)
def test_words_outside_the_dictionary_are_built_from_words_in_it(
    phonemizer: Phonemizer, word: str, phones: str | None
) -> None:
    said = phonemizer.pronounce(word)
    assert " ".join(said) == phones if phones else sum(phone.endswith("1") for phone in said) == 1


@pytest.mark.parametrize(
    ("text", "symbols"),
    [
        ("it is at the door.", "ɪt ɪz æt ðə dˈɔɹ."),
        ("what are you looking at?", "wˈʌt ɑɹ ju lˈʊkɪŋ ˈæt?"),
        ("as it is, and was", "æz ɪt ˈɪz, ənd wˈɑz"),
        ("door at", "dˈɔɹ ˈæt"),
    ],
)
def test_weak_words_lose_their_stress_unless_a_pause_follows(phonemizer: Phonemizer, text: str, symbols: str) -> None:
    weak = frozenset("it is at are you as and was".split())
    assert dataclasses.replace(phonemizer, weak_words=weak).phonemes(text) == symbols


@pytest.mark.parametrize(
    ("word", "phones"),
    [
        ("blick", "B L IH1 K"),
        ("stromp", "S T R AA1 M P"),
        ("vashing", "V AE1 SH IH0 NG"),
        ("tokenizer", "T OW1 K AH0 N AY2 Z ER0"),
        ("zight", "Z AY1 T"),
        ("frobnication", "F R AA2 B N AH0 K EY1 SH AH0 N"),
    ],
)
def test_the_letter_to_sound_guess_is_what_an_english_reader_would_say(
    phonemizer: Phonemizer, word: str, phones: str
) -> None:
    assert " ".join(phonemizer.letter_to_sound.guess(word)) == phones


@settings(max_examples=100, deadline=None)
@given(word=st.from_regex(r"[a-z]{1,30}", fullmatch=True))
def test_every_guess_with_vowels_has_one_main_stress(phonemizer: Phonemizer, word: str) -> None:
    phones = phonemizer.letter_to_sound.guess(word)
    vowels = [phone for phone in phones if phone[-1].isdigit()]
    assert sum(phone.endswith("1") for phone in vowels) == min(1, len(vowels))
    assert all(phone in phonemizer.symbol_of_phone for phone in phones)


def test_a_missing_main_stress_is_put_on_the_secondary_or_first_vowel() -> None:
    assert stressed(["B", "AH0", "N", "AE2", "N"]) == ["B", "AH0", "N", "AE1", "N"]
    assert stressed(["B", "AH0", "N", "IH0"]) == ["B", "AH1", "N", "IH0"]
    assert stressed(["AH0", "AE1"]) == ["AH0", "AE1"]
    assert stressed(["S", "T"]) == ["S", "T"]


@settings(max_examples=200, deadline=None)
@given(text=st.text(alphabet=st.characters(exclude_categories=[]), max_size=80) | st.text("aB'é-. A\n", max_size=80))
def test_any_text_gives_bytes_between_1_and_255(phonemizer: Phonemizer, text: str) -> None:
    encoded = phonemizer.encode(text)
    assert encoded[0] == 1 and encoded[-1] == 3
    assert all(1 <= value <= 255 for value in encoded)
    bytes(encoded)


@pytest.mark.parametrize("text", ["n't" * 2000, "'" * 5000, "aA" * 2000, "x" * 5000, "A'" * 2000, "b" * 39 + "s'"])
def test_a_monstrous_word_is_said_without_an_error(phonemizer: Phonemizer, text: str) -> None:
    assert all(1 <= value <= 255 for value in phonemizer.encode(text))


def test_loading_is_quick() -> None:
    started = time.process_time()
    Phonemizer.load(VOICE)
    # 0.1 s measured; the package's own parser alone takes 1 s.
    assert time.process_time() - started < 0.8


def test_4096_characters_are_normalised_and_phonemised_in_less_than_a_second(phonemizer: Phonemizer) -> None:
    sentence = "On Nov 21, 2026, Dr. Smith paid $5.20 for 3 km of the smooth planks, and the birch canoe slid away. "
    text = (sentence * 50)[:4096]
    times = []
    for _ in range(5):
        started = time.process_time()
        for piece in segment(normalize_english(clean_text(text))):
            phonemizer.encode(piece)
        times.append(time.process_time() - started)
    # Of this process: 0.08 measured.
    assert min(times) < 0.8


def test_a_folder_without_a_front_end_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="frontend.json"):
        Phonemizer.load(tmp_path)
    with pytest.raises(ModelLoadError, match="train_letter_to_sound"):
        LetterToSound.load(tmp_path / "none.npz")
    (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04 not a zip")
    with pytest.raises(ModelLoadError, match="broken.npz"):
        LetterToSound.load(tmp_path / "broken.npz")
