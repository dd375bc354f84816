"""The embedded voice: its test vectors, its pace, its length, and that a newcomer hears speech."""

from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from declaim.engine import Engine, EngineConfig, InvalidRequest, SamplingParams, SpeechRequest, TooLong, Voice
from declaim.engine.loader import EMBEDDED_FOLDER
from declaim.engine.models.lark import LarkModel

SENTENCE = json.loads((EMBEDDED_FOLDER / "test_vector.json").read_text())["text"]


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine.from_pretrained() as engine:
        yield engine


def test_bytes_durations_and_greedy_codes_equal_the_test_vector(engine: Engine) -> None:
    vector = np.load(EMBEDDED_FOLDER / "test_vector.npz")
    model = engine._model
    assert isinstance(model, LarkModel)
    prompt = model.tokenize(
        SENTENCE,
        voice_text="",
        voice_codes=np.zeros((0, 8), np.int32),
        sampling=SamplingParams().resolve(engine.spec.sampling.defaults),
        speed=1.0,
    )
    assert list(prompt.text_ids) == vector["text_bytes"].tolist()
    np.testing.assert_allclose(model.durations_s(prompt).numpy(), vector["durations_s"], atol=1e-3)
    (result,) = engine.generate([SpeechRequest(SENTENCE, sampling=SamplingParams(temperature=0.0))], progress=False)
    assert result.finish_reason == "stop"
    np.testing.assert_array_equal(result.codes, vector["greedy_codes"])


def test_the_audio_is_speech_in_level_and_bandwidth(engine: Engine) -> None:
    (result,) = engine.generate([SpeechRequest(SENTENCE, sampling=SamplingParams(seed=1))], progress=False)
    assert result.sample_rate_hz == 24000
    assert 2.0 < result.duration_s < 4.0
    spoken = result.audio[8000:-4000]
    assert 0.02 < np.sqrt(np.mean(spoken**2)) < 0.3
    assert np.abs(result.audio).max() <= 1.0
    power = np.abs(np.fft.rfft(spoken * np.hanning(len(spoken)))) ** 2
    hertz = np.fft.rfftfreq(len(spoken), 1 / 24000)
    voiced = power[(hertz > 80) & (hertz < 4000)].sum() / power.sum()
    assert voiced > 0.8


def test_speed_scales_the_length(engine: Engine) -> None:
    results = engine.generate(
        [SpeechRequest(SENTENCE, speed=speed, sampling=SamplingParams(seed=1)) for speed in (0.5, 1.0, 2.0)],
        progress=False,
    )
    slow, plain, fast = (result.duration_s for result in results)
    assert slow == pytest.approx(2 * plain, abs=0.1)
    assert fast == pytest.approx(plain / 2, abs=0.1)


def test_streamed_equals_whole_and_first_audio_comes_in_a_small_chunk(engine: Engine) -> None:
    request = SpeechRequest(f"{SENTENCE} {SENTENCE} And a third one, at last.", sampling=SamplingParams(seed=2))
    (whole,) = engine.generate([request], progress=False)
    chunks = list(engine.stream(request))
    np.testing.assert_array_equal(np.concatenate([chunk.audio for chunk in chunks]), whole.audio)
    assert len(chunks[0].audio) == 0.16 * 24000
    assert len(chunks) > 5


def test_a_long_text_is_spoken_in_segments_in_order(engine: Engine) -> None:
    text = " ".join(f"This is sentence number {i}." for i in range(12))
    (result,) = engine.generate([SpeechRequest(text, sampling=SamplingParams(seed=3))], progress=False)
    assert result.error is None
    assert 15 < result.duration_s < 40
    assert len(result.codes) * 960 == len(result.audio)


def test_max_seconds_cuts_the_whole_request(engine: Engine) -> None:
    text = " ".join([SENTENCE] * 4)
    (result,) = engine.generate([SpeechRequest(text, sampling=SamplingParams(seed=1, max_seconds=4.0))], progress=False)
    assert result.finish_reason == "length"
    assert result.duration_s == pytest.approx(4.0)
    assert len(result.codes) == 100


def test_codes_of_a_seed_are_the_same_alone_and_among_others(engine: Engine) -> None:
    requests = [
        SpeechRequest(f"{SENTENCE[: 10 + 2 * i]} and so on.", sampling=SamplingParams(seed=i)) for i in range(9)
    ]
    together = engine.generate(requests, progress=False)
    for request, result in zip(requests, together, strict=True):
        (alone,) = engine.generate([request], progress=False)
        np.testing.assert_array_equal(result.codes, alone.codes)


@pytest.mark.parametrize("text", ["1984", "$5.20 at 3:45 pm!", "naïve café", "日本語 ok", "a", "USB-C 😀", "x" * 300])
def test_odd_texts_make_a_sound(engine: Engine, text: str) -> None:
    (result,) = engine.generate([SpeechRequest(text, sampling=SamplingParams(seed=1, max_seconds=6.0))], progress=False)
    assert result.error is None
    assert result.duration_s > 0.1


def test_what_it_cannot_do_it_refuses_with_a_reason(engine: Engine) -> None:
    voice = Voice("words", np.zeros(24000, np.float32), 24000)
    for request, error, words in (
        (SpeechRequest("", sampling=SamplingParams()), InvalidRequest, "empty"),
        (SpeechRequest("?!"), InvalidRequest, "letter"),
        (SpeechRequest("word " * 20_000), TooLong, "20000|20,000"),
        (SpeechRequest("Hi.", voice=voice), InvalidRequest, "one voice"),
        (SpeechRequest("Hi.", voice="nobody"), InvalidRequest, "nobody"),
        (SpeechRequest("Hi.", sampling=SamplingParams(guidance_scale=3.0)), InvalidRequest, "guidance"),
        (SpeechRequest("Hi.", sampling=SamplingParams(max_seconds=0.02)), TooLong, "max_seconds"),
    ):
        with pytest.raises(error, match=words):
            engine.generate([request], progress=False)
    engine.warm_up()


def test_bfloat16_speaks_too() -> None:
    with Engine.from_pretrained(config=EngineConfig(dtype="bfloat16")) as engine:
        (result,) = engine.generate([SpeechRequest("Good morning.", sampling=SamplingParams(seed=1))], progress=False)
    assert result.error is None
    assert torch.isfinite(torch.from_numpy(result.audio)).all()
    assert result.duration_s > 0.5
