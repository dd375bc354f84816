"""Speech that runs away or stays out is noticed, tried once more where nobody has heard it, and told."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from declaim.engine import Engine, EngineConfig, SamplingParams, SpeechRequest, SpeechResult
from declaim.engine.guard import Guard, num_letters, with_another_seed
from tests.fakes import FAKE_CODEC, FakeCodec, FakeModel, ShuffledVocoder

CONFIG = EngineConfig(device="cpu", dtype="float32", num_blocks=4096, block_size=4, first_chunk_s=0.2)
# Ten frames a second: a text of ten letters may have 3 to 30 frames, and the guard's slack of 30.
SECONDS_PER_CHAR = (0.03, 0.3)
TEXT = "abcdeabcde"


def make_engine(*, eos_bias: float, is_guarded: bool = True) -> Engine:
    model = FakeModel(eos_bias=eos_bias)
    if is_guarded:
        model.spec = replace(model.spec, seconds_per_char=SECONDS_PER_CHAR)
    return Engine(
        model,
        CONFIG,
        make_vocoder=lambda wake: ShuffledVocoder(seed=0, wake=wake),
        model_name="fake",
        load_encoder=FakeCodec,
    )


def request(text: str = TEXT, *, seed: int = 1, **sampling: float) -> SpeechRequest:
    return SpeechRequest(text, sampling=SamplingParams(**{"seed": seed, "max_seconds": 20.0, **sampling}))  # type: ignore[arg-type]


def spoken(engine: Engine, asked: SpeechRequest) -> SpeechResult:
    (result,) = engine.generate([asked], progress=False)
    assert result.error is None
    assert len(result.audio) == len(result.codes) * FAKE_CODEC.hop
    return result


@pytest.mark.parametrize(
    ("text", "count"),
    [("abc", 3), ("[S1] Hello, [S2] you!", 8), ("1999", 20), ("中文a", 9), ("été", 3), ("— ...", 0)],
)
def test_letters_are_counted_by_how_long_they_take(text: str, count: int) -> None:
    assert num_letters(text) == count


def test_a_family_that_knows_its_length_has_no_guard_and_speed_moves_the_bounds() -> None:
    spec = FakeModel().spec
    assert Guard.of(TEXT, spec, speed=1.0) is None
    guarded = replace(spec, seconds_per_char=SECONDS_PER_CHAR)
    assert Guard.of(TEXT, guarded, speed=1.0) == Guard(3, 60)
    assert Guard.of(TEXT, guarded, speed=0.5) == Guard(6, 120)


def test_babble_is_cut_where_it_must_be_wrong_tried_again_and_told() -> None:
    with make_engine(eos_bias=-100.0) as engine:
        result = spoken(engine, request())
        assert engine.stats().retries == 1
        assert engine.stats().blocks_used == 0
    assert result.finish_reason == "runaway"
    assert len(result.codes) == 60


def test_an_end_at_once_is_tried_again_and_told() -> None:
    with make_engine(eos_bias=100.0) as engine:
        result = spoken(engine, request())
        assert engine.stats().retries == 1
    assert result.finish_reason == "missing"
    assert len(result.codes) < 3


def test_the_second_try_is_what_its_seed_gives_and_always_the_same() -> None:
    """The first seed's end comes too early, its successor's does not."""
    with make_engine(eos_bias=0.0, is_guarded=False) as plain, make_engine(eos_bias=0.0) as engine:
        resolved = request().sampling.resolve(plain.spec.sampling.defaults)
        for seed in range(400):
            second = with_another_seed(replace(resolved, seed=seed)).seed
            unguarded, again = (spoken(plain, request(seed=each)) for each in (seed, second))
            if len(unguarded.codes) < 3 <= len(again.codes) < 60:
                break
        else:
            raise AssertionError("no seed ends too early")
        results = [spoken(engine, request(seed=seed)) for _ in range(2)]
        assert engine.stats().retries == 2
    for result in results:
        assert result.finish_reason == "stop"
        np.testing.assert_array_equal(result.codes, again.codes)
        np.testing.assert_array_equal(result.audio, again.audio)


def test_what_was_heard_is_not_taken_back() -> None:
    with make_engine(eos_bias=-100.0) as engine:
        chunks = list(engine.stream(request()))
        assert engine.stats().retries == 0
    assert chunks[-1].finish_reason == "runaway"
    assert sum(chunk.num_frames for chunk in chunks) == 60


def test_a_later_segment_is_tried_again_while_the_first_is_heard() -> None:
    with make_engine(eos_bias=-100.0) as engine:
        chunks = list(engine.stream(request(f"{TEXT}|{TEXT}")))
        assert engine.stats().retries <= 1
    assert chunks[-1].finish_reason == "runaway"
    assert sum(chunk.num_frames for chunk in chunks) == 120
    assert [chunk.is_last for chunk in chunks] == [False] * (len(chunks) - 1) + [True]


def test_greedy_speech_is_not_tried_again_since_no_seed_changes_it() -> None:
    with make_engine(eos_bias=100.0) as engine:
        assert spoken(engine, request(temperature=0.0)).finish_reason == "missing"
        assert engine.stats().retries == 0


def test_the_callers_own_limit_is_no_runaway() -> None:
    with make_engine(eos_bias=-100.0) as engine:
        result = spoken(engine, request(max_seconds=2.0))
        assert engine.stats().retries == 0
    assert result.finish_reason == "length"
    assert len(result.codes) == 20
