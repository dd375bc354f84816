"""Where segments meet: pauses as a speaker makes them, whatever the windows, and nothing else changed."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from declaim.engine.joints import Joint

RATE_HZ = 1000  # a sample a millisecond
Spans = list[tuple[float, int]]  # level and samples


def wave(spans: Spans) -> NDArray[np.float32]:
    return np.concatenate([np.zeros(0, np.float32), *(np.full(count, level, np.float32) for level, count in spans)])


def given_of(samples: NDArray[np.float32], cuts: list[int], **ends: bool) -> list[NDArray[np.float32]]:
    """What comes of each window when a segment is cut there."""
    joint = Joint(RATE_HZ, **{"is_first": False, "is_last": False, **ends})
    bounds = [0, *sorted(cut for cut in cuts if cut <= len(samples)), len(samples)]
    return [joint.feed(samples[a:b], is_end=index == len(bounds) - 2) for index, (a, b) in enumerate(pairwise(bounds))]


def joined(samples: NDArray[np.float32], cuts: list[int], **ends: bool) -> NDArray[np.float32]:
    return np.concatenate(given_of(samples, cuts, **ends))


SPEECH: Spans = [(0.0, 320), (0.5, 800), (0.001, 400), (-0.5, 300), (0.0, 520)]


@pytest.mark.parametrize(
    ("ends", "head", "tail"),
    [
        ({}, 100, 250),
        ({"is_first": True}, 320, 250),
        ({"is_last": True}, 100, 520),
        ({"is_first": True, "is_last": True}, 320, 520),
        ({"ends_paragraph": True}, 100, 500),
    ],
)
def test_a_rest_at_a_joint_is_a_pause_and_all_else_stays(ends: dict[str, bool], head: int, tail: int) -> None:
    expected = wave([(0.0, head), *SPEECH[1:4], (0.0, tail)])
    np.testing.assert_array_equal(joined(wave(SPEECH), [], **ends), expected)


def test_pauses_that_are_short_already_are_left_alone() -> None:
    samples = wave([(0.0, 60), (0.5, 100), (0.0, 150)])
    np.testing.assert_array_equal(joined(samples, [30, 70, 200]), samples)


SILENCE = st.tuples(st.sampled_from([0.0, 0.009, -0.009]), st.integers(0, 700))
SOUND = st.tuples(st.sampled_from([0.011, -0.3]), st.integers(0, 300))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    spans=st.lists(st.one_of(SILENCE, SOUND), max_size=8),
    cuts=st.lists(st.integers(0, 3000), max_size=20),
    is_first=st.booleans(),
    is_last=st.booleans(),
)
def test_any_windows_give_the_same_samples(spans: Spans, cuts: list[int], is_first: bool, is_last: bool) -> None:
    samples = wave(spans)
    whole = joined(samples, [], is_first=is_first, is_last=is_last)
    np.testing.assert_array_equal(joined(samples, cuts, is_first=is_first, is_last=is_last), whole)
    sounds = np.flatnonzero(np.abs(samples) > 0.01)
    if is_first and is_last:
        np.testing.assert_array_equal(whole, samples)
    elif len(sounds):
        first = 0 if is_first else max(0, sounds[0] - 100)
        last = len(samples) if is_last else min(len(samples), sounds[-1] + 1 + 250)
        np.testing.assert_array_equal(whole, samples[first:last])


def test_speech_is_never_held_and_a_first_segment_is_given_from_its_first_sample_on() -> None:
    windows = given_of(wave(SPEECH), [100, 700, 1300, 1520, 1900], is_first=True)
    # The pause inside holds its end back until speech goes on.
    assert [len(window) for window in windows] == [100, 600, 600, 70, 530, 170]


def test_a_segment_of_silence_is_a_short_one() -> None:
    assert len(joined(wave([(0.0, 900)]), [300, 600])) == 100
    assert len(joined(wave([(0.0, 900)]), [300], is_first=True)) == 900


def test_times_follow_what_was_taken_off_the_beginning() -> None:
    joint = Joint(RATE_HZ, is_first=False, is_last=False)
    samples = wave(SPEECH)
    joint.feed(samples[:300], is_end=False)
    assert not joint.has_begun
    joint.feed(samples[300:], is_end=True)
    assert joint.has_begun and joint.heard_s(0.32) == pytest.approx(0.1) and joint.heard_s(0.05) == 0.0
