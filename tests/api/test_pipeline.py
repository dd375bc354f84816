"""Samples to bytes in all formats: the right length, the same sound, the same bytes for every cut, and no leak."""

from __future__ import annotations

import asyncio
import io
import threading
import wave
from concurrent.futures import ThreadPoolExecutor

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from declaim.api.encode import MEDIA_TYPES
from declaim.api.pipeline import AudioPipeline, in_worker
from declaim.engine.errors import InvalidRequest


def melody(seconds: float, rate_hz: int = 24_000) -> np.ndarray:
    """Three gliding harmonics under a syllable-like envelope, and a little noise: float32 [S]."""
    times = np.arange(round(seconds * rate_hz)) / rate_hz
    phase = 2 * np.pi * (160 * times + 15 * np.sin(2 * np.pi * 0.7 * times))
    tones = np.sin(phase) + 0.5 * np.sin(2 * phase) + 0.25 * np.sin(5 * phase)
    envelope = 0.15 * (1.1 + np.sin(2 * np.pi * 3 * times))
    noise = np.random.default_rng(0).normal(0, 0.002, len(times))
    return (envelope * tones + noise).astype(np.float32)


def encoded(audio: np.ndarray, response_format: str, *, step: int = 960, **options: float) -> bytes:
    settings_ = {"source_rate_hz": 24_000, **options}
    pipeline = AudioPipeline(response_format, **settings_)  # type: ignore[arg-type]
    data = b"".join(pipeline.feed(audio[first : first + step]) for first in range(0, len(audio), step))
    return data + pipeline.finish()


def decoded(data: bytes, response_format: str, *, rate_hz: int = 24_000) -> np.ndarray:
    """float32 [S] at rate_hz, by FFmpeg."""
    if response_format == "pcm":
        return np.frombuffer(data, "<i2").astype(np.float32) / 32767
    resampler = av.AudioResampler("flt", "mono", rate_hz)
    with av.open(io.BytesIO(data)) as container:
        frames = [out for frame in container.decode(audio=0) for out in resampler.resample(frame)]
    frames += resampler.resample(None)
    return np.concatenate([frame.to_ndarray().reshape(-1) for frame in frames])


def spectral_distance_db(first: np.ndarray, second: np.ndarray) -> float:
    """Root mean square of the difference of log spectra, where either is above -60 dB of the loudest."""
    size = min(len(first), len(second)) // 512 * 512
    spectra = [np.abs(np.fft.rfft(part[:size].reshape(-1, 512) * np.hanning(512), axis=1)) for part in (first, second)]
    floor = 1e-3 * max(float(spectrum.max()) for spectrum in spectra)
    logs = [20 * np.log10(np.maximum(spectrum, floor)) for spectrum in spectra]
    return float(np.sqrt(np.mean((logs[0] - logs[1]) ** 2)))


def best_aligned(audio: np.ndarray, reference: np.ndarray, *, max_lag: int = 3000) -> np.ndarray:
    """`audio` moved to where it fits `reference` best: codecs delay."""
    size = 1 << (len(audio) + len(reference)).bit_length()
    cross = np.fft.irfft(np.fft.rfft(audio, size) * np.conj(np.fft.rfft(reference, size)))
    return audio[int(np.argmax(cross[:max_lag])) :]


@pytest.mark.parametrize("response_format", ["pcm", "wav", "flac"])
def test_lossless_formats_hold_every_sample(response_format: str) -> None:
    audio = melody(10.0)
    heard = decoded(encoded(audio, response_format), response_format)
    assert len(heard) == len(audio)
    assert np.abs(heard - audio).max() < 2 / 32767
    assert np.corrcoef(heard, audio)[0, 1] > 0.9999


@pytest.mark.parametrize(("response_format", "delay_s"), [("mp3", 0.08), ("aac", 0.08), ("opus", 0.0)])
def test_lossy_formats_last_as_long_and_sound_alike(response_format: str, delay_s: float) -> None:
    audio = melody(10.0)
    heard = decoded(encoded(audio, response_format), response_format)
    assert 10.0 - 0.001 <= len(heard) / 24_000 <= 10.0 + delay_s + 0.001
    aligned = best_aligned(heard, audio)
    assert spectral_distance_db(aligned, audio) < 2.0
    assert spectral_distance_db(aligned[::-1], audio) > 2.5  # the measure can tell


@pytest.mark.parametrize("response_format", MEDIA_TYPES)
@pytest.mark.parametrize("source_rate_hz", [24_000, 44_100])
def test_the_first_chunk_gives_audio_bytes_and_no_gap_follows(response_format: str, source_rate_hz: int) -> None:
    pipeline = AudioPipeline(response_format, source_rate_hz=source_rate_hz)
    audio = melody(2.0, source_rate_hz)
    step = round(0.16 * source_rate_hz)
    sizes = [len(pipeline.feed(audio[first : first + step])) for first in range(0, len(audio), step)]
    pipeline.finish()
    assert all(size > 130 for size in sizes)


@pytest.mark.parametrize("response_format", MEDIA_TYPES)
def test_no_header_leaves_before_the_first_audio(response_format: str) -> None:
    for speed in (1.0, 1.5):
        pipeline = AudioPipeline(response_format, source_rate_hz=24_000, speed=speed)
        parts = [pipeline.feed(part) for part in np.split(melody(1.0), 100)]
        assert len(next(part for part in parts if part)) > 130
        pipeline.close()


@settings(max_examples=60, deadline=None)
@given(
    source_rate_hz=st.sampled_from([24_000, 44_100, 16_000, 48_000]),
    speed=st.sampled_from([1.0, 0.25, 0.5, 0.9, 1.5, 4.0]),
    num_samples=st.integers(0, 30_000),
    cuts=st.lists(st.integers(0, 30_000), max_size=15),
)
def test_every_cut_of_the_audio_gives_the_same_bytes_and_the_exact_length(
    source_rate_hz: int, speed: float, num_samples: int, cuts: list[int]
) -> None:
    audio = melody(2.0, 24_000)[:num_samples]
    whole = encoded(audio, "pcm", step=len(audio) or 1, source_rate_hz=source_rate_hz, speed=speed)
    pipeline = AudioPipeline("pcm", source_rate_hz=source_rate_hz, speed=speed)
    parts = [pipeline.feed(part) for part in np.split(audio, sorted(min(cut, num_samples) for cut in cuts))]
    parts.append(pipeline.finish())
    assert b"".join(parts) == whole
    assert all(len(part) % 2 == 0 for part in parts)
    num_resampled = -(-num_samples * 24_000 // source_rate_hz)
    assert len(whole) == 2 * round(num_resampled / speed)


@pytest.mark.parametrize("response_format", MEDIA_TYPES)
def test_compressed_bytes_do_not_depend_on_the_cut_either(response_format: str) -> None:
    audio = melody(1.0)
    assert len({encoded(audio, response_format, step=step) for step in (24_000, 960, 997)}) == 1


@pytest.mark.parametrize("response_format", MEDIA_TYPES)
def test_silence_of_no_length_is_still_a_file(response_format: str) -> None:
    data = encoded(np.zeros(0, np.float32), response_format)
    if response_format == "wav":
        assert len(data) == 44 and data[:4] == b"RIFF"
    if response_format == "pcm":
        assert data == b""


@pytest.mark.parametrize("speed", [0.25, 0.5, 0.75, 1.25, 2.0, 3.0, 4.0])
def test_speed_changes_the_length_and_keeps_the_pitch(speed: float) -> None:
    times = np.arange(6 * 24_000) / 24_000
    audio = (0.3 * np.sin(2 * np.pi * 150.0 * times)).astype(np.float32)
    heard = decoded(encoded(audio, "pcm", speed=speed), "pcm")
    assert len(heard) == round(len(audio) / speed)
    middle = heard[len(heard) // 4 : 3 * len(heard) // 4]
    spectrum = np.abs(np.fft.rfft(middle * np.hanning(len(middle)), 1 << 18))
    assert abs(np.argmax(spectrum) * 24_000 / (1 << 18) - 150.0) < 1.5


@pytest.mark.parametrize(
    ("response_format", "rate_hz"),
    [("wav", 8_000), ("pcm", 48_000), ("mp3", 16_000), ("opus", 48_000), ("flac", 44_100)],
)
def test_another_sample_rate_is_made_when_asked_for(response_format: str, rate_hz: int) -> None:
    audio = melody(1.0)
    data = encoded(audio, response_format, sample_rate_hz=rate_hz)
    if response_format == "wav":
        with wave.open(io.BytesIO(data)) as reader:
            assert reader.getframerate() == rate_hz
    heard = decoded(data, response_format, rate_hz=rate_hz)
    assert rate_hz <= len(heard) < 1.11 * rate_hz


@pytest.mark.parametrize(
    ("response_format", "rate_hz", "words"),
    [("opus", 22_050, "8000, 12000, 16000, 24000, 48000"), ("pcm", 11_111, "44100"), ("ogg", None, "mp3, opus")],
)
def test_what_is_not_made_is_refused_with_what_is(response_format: str, rate_hz: int | None, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        AudioPipeline(response_format, source_rate_hz=24_000, sample_rate_hz=rate_hz)


def test_small_pieces_are_encoded_together() -> None:
    pipeline = AudioPipeline("pcm", source_rate_hz=24_000)
    sizes = [len(pipeline.feed(np.zeros(480, np.float32))) // 2 for _ in range(9)]
    assert sizes == [480, 0, 0, 0, 1920, 0, 0, 0, 1920]
    assert len(pipeline.finish()) == 0


def test_a_call_cut_short_waits_for_its_thread() -> None:
    begun, may_end, ended = threading.Event(), threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        may_end.wait(30)
        ended.set()

    async def go() -> bool:
        with ThreadPoolExecutor(1) as workers:
            task = asyncio.create_task(in_worker(workers, work))
            assert await asyncio.to_thread(begun.wait, 30)
            task.cancel()
            await asyncio.sleep(0.01)
            assert not task.done()
            may_end.set()
            await asyncio.wait({task})
            return task.cancelled() and ended.is_set()

    assert asyncio.run(go())
