"""The resampler is exact for every cut of the audio; rounding; the wav header."""

from __future__ import annotations

import io
import wave

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.signal import resample_poly

from declaim.api.encode import Resampler, design_filter, to_s16, wav_header, with_exact_length
from declaim.api.pipeline import AudioPipeline

RATES_HZ = [44_100, 16_000, 22_050, 48_000, 32_000]


def resampled(audio: np.ndarray, source_rate_hz: int, *, cuts: list[int]) -> np.ndarray:
    resampler = Resampler(source_rate_hz, 24_000)
    parts = [resampler.push(part) for part in np.split(audio, sorted(cuts))]
    return np.concatenate([*parts, resampler.finish()])


@settings(max_examples=60, deadline=None)
@given(
    rate_hz=st.sampled_from(RATES_HZ),
    num_samples=st.integers(0, 3000),
    cuts=st.lists(st.integers(0, 3000), max_size=12),
    seed=st.integers(0, 100),
)
def test_any_cut_of_the_audio_resamples_to_the_same_samples(
    rate_hz: int, num_samples: int, cuts: list[int], seed: int
) -> None:
    audio = np.random.default_rng(seed).uniform(-1, 1, num_samples).astype(np.float32)
    whole = resampled(audio, rate_hz, cuts=[])
    chunked = resampled(audio, rate_hz, cuts=[min(cut, num_samples) for cut in cuts])
    assert len(whole) == len(chunked) == -(-num_samples * 24_000 // rate_hz)
    np.testing.assert_array_equal(chunked, whole)


@pytest.mark.parametrize("rate_hz", [44_100, 16_000, 22_050, 48_000])
def test_the_resampler_is_scipys_polyphase_filter(rate_hz: int) -> None:
    audio = np.random.default_rng(0).uniform(-1, 1, 5000).astype(np.float32)
    common = np.gcd(rate_hz, 24_000)
    up, down = 24_000 // common, rate_hz // common
    expected = resample_poly(audio.astype(np.float64), up, down, window=design_filter(up, down) / up)
    np.testing.assert_allclose(resampled(audio, rate_hz, cuts=[777]), expected, rtol=0, atol=1e-6)


def test_a_tone_below_10_khz_keeps_its_level_and_one_above_12_khz_is_gone() -> None:
    source_times = np.arange(44_100) / 44_100
    target_times = np.arange(24_000) / 24_000
    inner = slice(500, -500)
    for tone_hz in (100, 1_000, 6_000, 10_000):
        audio = np.sin(2 * np.pi * tone_hz * source_times).astype(np.float32)
        error = resampled(audio, 44_100, cuts=[]) - np.sin(2 * np.pi * tone_hz * target_times)
        assert np.abs(error[inner]).max() < 2e-4, tone_hz
    for tone_hz in (12_100, 14_000, 18_000, 21_000):
        audio = np.sin(2 * np.pi * tone_hz * source_times).astype(np.float32)
        assert np.abs(resampled(audio, 44_100, cuts=[])[inner]).max() < 2e-4, tone_hz


def test_the_first_20_ms_give_audio_less_than_5_ms_short() -> None:
    resampler = Resampler(44_100, 24_000)
    assert len(resampler.push(np.zeros(882, np.float32))) >= 0.015 * 24_000


def test_rates_that_share_too_little_are_refused() -> None:
    with pytest.raises(ValueError, match="24000/44099"):
        Resampler(44_099, 24_000)
    with pytest.raises(ValueError, match="positive"):
        Resampler(0, 24_000)


def test_samples_are_clipped_and_rounded_half_to_even() -> None:
    step = 1 / 32767
    audio = np.array([0.0, 1.0, -1.0, 7.0, -7.0, 0.5 * step, 1.5 * step, 2.5 * step, -1.5 * step], np.float32)
    assert to_s16(audio).tolist() == [0, 32767, -32767, 32767, -32767, 0, 2, 2, -2]
    assert to_s16(audio).dtype == np.dtype("<i2")


def test_a_header_with_a_known_length_holds_exact_sizes() -> None:
    with wave.open(io.BytesIO(wav_header(24_000, data_bytes=200) + bytes(200))) as reader:
        assert reader.getnframes() == 100


def test_a_whole_wav_says_how_long_it_is_and_keeps_its_rate() -> None:
    whole = with_exact_length(wav_header(16_000) + bytes(400), "wav")
    with wave.open(io.BytesIO(whole)) as reader:
        assert (reader.getnframes(), reader.getframerate()) == (200, 16_000)
    assert with_exact_length(b"other", "mp3") == b"other"


@pytest.mark.parametrize("num_samples", [1, 959, 960, 25_000])
def test_a_whole_flac_says_how_long_it_is(num_samples: int) -> None:
    audio = np.random.default_rng(0).uniform(-0.5, 0.5, num_samples).astype(np.float32)
    pipeline = AudioPipeline("flac", source_rate_hz=24_000)
    streamed = pipeline.feed(audio) + pipeline.finish()
    samples, rate_hz = soundfile.read(io.BytesIO(with_exact_length(streamed, "flac")), dtype="int16")
    assert rate_hz == 24_000
    np.testing.assert_array_equal(samples, to_s16(audio))
