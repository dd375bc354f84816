"""Dials and instructions, by a table of this file's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from declaim.engine.controls import DIALS, read_instructions, resolve_controls
from declaim.engine.errors import InvalidRequest
from declaim.engine.models.zonos_conditioning import PrefixConfig
from declaim.engine.spec import ControlSpec
from tests.zonos_checkpoints import CONFIGS

TABLE = {
    "mood": ControlSpec("weights of two", 0.0, 1.0, (0.5, 0.5), length=2, names={"glad": (1.0, 0.0)}),
    "parts": ControlSpec("each third", 0.0, 1.0, None, length=3),
    "rate": ControlSpec("a second", 1.0, 40.0, None),
}
WORDS = {"gladly": {"mood": (1.0, 0.0)}, "slowly": {"rate": (10.0,)}, "fast": {"rate": (30.0,)}}


def test_a_name_numbers_and_one_number_for_all_are_resolved_and_defaults_stay() -> None:
    assert resolve_controls({}, TABLE) == {"mood": (0.5, 0.5)}
    given = resolve_controls({"mood": "GLAD", "parts": 0.25, "rate": 12}, TABLE)
    assert given == {"mood": (1.0, 0.0), "parts": (0.25,) * 3, "rate": (12.0,)}
    assert resolve_controls({"mood": (0.0, 1.0)}, TABLE)["mood"] == (0.0, 1.0)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"mood": 0.5}, "mood holds 1 numbers: it must be 2 numbers from 0 to 1"),
        ({"mood": "sad"}, "'sad': it must be one of glad, or 2 numbers"),
        ({"parts": (0.1, 0.2)}, "holds 2 numbers: it must be 3"),
        ({"rate": 41}, "rate is 41: it must be a number from 1 to 40"),
        ({"pace": 1}, "no control 'pace': it has mood, parts, rate"),
    ],
)
def test_what_a_dial_does_not_take_is_refused_with_what_it_takes(given: dict[str, object], words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        resolve_controls(given, TABLE)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("said", "sets"),
    [
        ("Gladly; SLOWLY.", {"mood": (1.0, 0.0), "rate": (10.0,)}),
        ("slowly-gladly", {"mood": (1.0, 0.0), "rate": (10.0,)}),
        ("fast, no: slowly", {"rate": (30.0,)}),
        ("slowly, then fast", {"rate": (30.0,)}),
        ("gladly but not fast", {"mood": (1.0, 0.0)}),
        ("don’t speak; don't fast... slowly", {"rate": (10.0,)}),
    ],
)
def test_words_set_dials_unless_they_are_denied(said: str, sets: dict[str, tuple[float, ...]]) -> None:
    assert read_instructions(said, WORDS) == sets


@pytest.mark.parametrize("said", ["pirate", "not gladly"])
def test_instructions_that_set_nothing_are_told_the_words(said: str) -> None:
    with pytest.raises(InvalidRequest, match="it knows gladly, slowly, fast"):
        read_instructions(said, WORDS)


@pytest.mark.parametrize("family", CONFIGS)
def test_every_dial_of_a_family_has_a_name_that_requests_are_read_for(family: str) -> None:
    """Another field of a body is ignored: its dial could not be turned."""
    prefix = PrefixConfig.read(CONFIGS[family]["prefix_conditioner"], source=Path("config.json"))
    assert prefix.controls and set(prefix.controls) <= set(DIALS)
    assert {name for words in prefix.instructions.values() for name in words} <= set(prefix.controls)
