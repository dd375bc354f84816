"""What a language is called, what a text without one is taken for, and what is written of the dials."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from declaim.engine.controls import DIALS
from declaim.engine.models.zonos_conditioning import (
    EMOTIONS,
    INSTRUCTIONS,
    LANGUAGES,
    find_language,
    guess_language,
)


@pytest.mark.parametrize(
    ("name", "spoken"),
    [
        ("en", "en-us"),
        ("en-GB", "en-gb"),
        ("en_gb_x_rp", "en-gb-x-rp"),
        ("pt-br", "pt-br"),
        ("pt-PT", "pt"),
        ("zh", "cmn"),
        ("zh-CN", "cmn"),
        ("fr", "fr-fr"),
        ("fr-be", "fr-be"),
        ("es-419", "es-419"),
        ("no", "nb"),
        ("de-AT", "de"),
        ("yue", "yue"),
        ("tlh", None),
    ],
)
def test_a_tag_is_taken_whole_where_the_model_knows_it_and_else_by_its_language(name: str, spoken: str | None) -> None:
    assert find_language(name) == spoken


def test_every_language_is_found_by_its_own_name() -> None:
    assert [find_language(tag) for tag in LANGUAGES] == list(LANGUAGES)


@pytest.mark.parametrize(
    ("text", "spoken"),
    [
        ("Hello, you 3!", "en-us"),
        ("Ça va?", "en-us"),  # Latin letters do not tell
        ("中文信函", "cmn"),
        ("東京タワーは333メートルです", "ja"),
        ("안녕하세요, 여러분 (OK)", "ko"),
        ("Привет, мир", "ru"),
        ("He said привет and left.", "en-us"),
        ("123", "en-us"),
        ("ð ə θ ɪ ŋ k χ", "en-us"),
    ],
)
def test_a_text_without_a_language_goes_by_its_letters(text: str, spoken: str) -> None:
    assert guess_language(text) == spoken and spoken in LANGUAGES


def test_the_readme_names_every_dial_and_every_word_of_instructions() -> None:
    page = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    about = page[page.index("### Zonos") : page.index("### Models and memory")]
    assert not [name for name in (*DIALS, "language") if f"`{name}`" not in about]
    words = set(re.findall(r"[a-z]+", about))
    assert not set(INSTRUCTIONS) - words
    assert not set(EMOTIONS) - words
