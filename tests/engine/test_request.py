"""Requests check themselves: each bad field is named as the caller wrote it."""

from __future__ import annotations

import dataclasses
import math
import re

import numpy as np
import pytest

from declaim.engine import InvalidRequest, SamplingParams, SpeechRequest, SpeechResult
from declaim.engine.request import MAX_SEED, ResolvedSampling
from declaim.engine.spec import SamplingDefaults

LIMITS = {
    "temperature": (0.0, 10.0),
    "top_k": (0, 1_000_000),
    "top_p": (1e-6, 1.0),
    "min_p": (0.0, 0.999),
    "repetition_penalty": (1.0, 100.0),
    "guidance_scale": (1.0, 20.0),
    "seed": (0, MAX_SEED),
    "max_seconds": (0.01, 36_000.0),
}
INTEGERS = ("top_k", "seed")
DEFAULTS = SamplingDefaults(
    temperature=1.2,
    top_k=45,
    top_p=0.95,
    min_p=0.1,
    repetition_penalty=1.5,
    guidance_scale=3.0,
    max_seconds=12.0,
)


def params(name: str, value: object) -> SamplingParams:
    return SamplingParams(**{name: value})  # type: ignore[arg-type]


def test_every_field_has_its_limits_here() -> None:
    assert set(LIMITS) == {field.name for field in dataclasses.fields(SamplingParams)}


@pytest.mark.parametrize("name", LIMITS)
def test_the_limits_themselves_are_allowed(name: str) -> None:
    for value in LIMITS[name]:
        assert getattr(params(name, value), name) == value


@pytest.mark.parametrize("name", LIMITS)
def test_beyond_the_limits_the_field_its_value_and_both_limits_are_named(name: str) -> None:
    low, high = LIMITS[name]
    outside = [low - 1, math.nextafter(high, math.inf), math.inf, -math.inf]
    if name in INTEGERS:
        outside = [low - 1, high + 1]
    for value in outside:
        with pytest.raises(InvalidRequest, match=re.escape(f"{name} is {value}: it must lie between")) as error:
            params(name, value)
        assert error.value.param == name


@pytest.mark.parametrize("name", LIMITS)
@pytest.mark.parametrize("value", ["1", True, [1], math.nan])
def test_what_is_no_number_is_refused(name: str, value: object) -> None:
    with pytest.raises(InvalidRequest, match=f"^{name} is ") as error:
        params(name, value)
    assert error.value.param == name


@pytest.mark.parametrize("name", INTEGERS)
def test_a_fraction_is_no_integer(name: str) -> None:
    with pytest.raises(InvalidRequest, match="it must be an integer"):
        params(name, 1.0)


def test_what_is_left_open_takes_the_familys_defaults() -> None:
    resolved = SamplingParams().resolve(DEFAULTS)
    for field in dataclasses.fields(SamplingDefaults):
        assert getattr(resolved, field.name) == getattr(DEFAULTS, field.name)
    assert resolved.seed == 0


def test_what_is_given_overrides_the_defaults_zero_included() -> None:
    given = SamplingParams(
        temperature=0,
        top_k=0,
        top_p=1,
        min_p=0,
        repetition_penalty=1,
        guidance_scale=1,
        seed=7,
        max_seconds=2,
    )
    assert given.resolve(DEFAULTS) == ResolvedSampling(0.0, 0, 1.0, 0.0, 1.0, 1.0, 7, 2.0)
    assert given.resolve(DEFAULTS).greedy
    assert not SamplingParams(temperature=0.01).resolve(DEFAULTS).greedy


@pytest.mark.parametrize("speed", [0.25, 1, 4.0])
def test_a_speed_within_limits_is_taken(speed: float) -> None:
    assert SpeechRequest("a", speed=speed).speed == speed


@pytest.mark.parametrize("speed", [0.2, 4.1, math.nan, "fast"])
def test_a_speed_beyond_them_is_refused(speed: float) -> None:
    with pytest.raises(InvalidRequest, match="^speed is") as error:
        SpeechRequest("a", speed=speed)
    assert error.value.param == "speed"


@pytest.mark.parametrize("text", [None, b"bytes", 3])
def test_a_text_that_is_no_string_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest, match=f"text is a {type(text).__name__}") as error:
        SpeechRequest(text)
    assert error.value.param == "text"


def test_a_result_knows_how_long_it_lasts() -> None:
    result = SpeechResult("r", np.zeros((0, 3), np.int32), np.zeros(12_000, np.float32), 24_000, "stop")
    assert result.duration_s == 0.5
