"""Reference audio: the resampler against ideal tones and scipy, bad input, files, and encoding a voice; how the speaker
encoder computes, and what else a text in a voice needs."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import signal

from declaim.engine import Engine, EngineConfig, SamplingParams, SpeechRequest
from declaim.engine.codec.base import CodecRecipe
from declaim.engine.codec.load import load_codec
from declaim.engine.errors import InvalidRequest, ModelLoadError
from declaim.engine.espeak import EspeakPhonemizer
from declaim.engine.request import Voice
from declaim.engine.speaker import EMBEDDING_SIZE, NUM_MELS, SpeakerEncoder, SpeakerNet, _fold_norms
from declaim.engine.tiled_conv import TiledConv
from declaim.engine.vocoder.inline import InlineVocoder
from declaim.engine.voices import encode_voice, prepare_reference, read_audio_bytes, resample
from tests.fakes import FakeCodec, FakeModel

RATE = 24_000
ASSETS = Path(__file__).parents[2] / "engine" / "assets"
LARK = CodecRecipe(kind="lark", folder=str(ASSETS / "lark" / "codec"))


def _tone(hz: float, rate_hz: int, *, seconds: float = 1.5) -> NDArray[np.float64]:
    return 0.5 * np.sin(2.0 * np.pi * hz * np.arange(round(seconds * rate_hz)) / rate_hz)


def _noise(num_samples: int, *, seed: int = 0) -> NDArray[np.float32]:
    return (0.1 * np.random.default_rng(seed).standard_normal(num_samples)).astype(np.float32)


def _file(audio: NDArray[np.floating], rate_hz: int, *, kind: str = "WAV", subtype: str | None = None) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, audio, rate_hz, format=kind, subtype=subtype)
    return buffer.getvalue()


@pytest.mark.parametrize("source", [8_000, 11_025, 16_000, 22_050, 24_000, 44_100, 48_000, 192_000])
@pytest.mark.parametrize("target", [24_000, 44_100])
@pytest.mark.parametrize("share", [0.01, 0.4, 0.85])
def test_a_tone_below_both_nyquists_comes_out_ideal(source: int, target: int, share: float) -> None:
    hz = share * min(source, target) / 2.0
    output = resample(_tone(hz, source), source, target_rate_hz=target)
    expected = _tone(hz, target, seconds=len(output) / target)
    edge = target // 20
    assert np.abs(output - expected)[edge:-edge].max() < 1e-4


@pytest.mark.parametrize(
    ("source", "hz"), [(48_000, 12_100.0), (48_000, 20_000.0), (44_100, 15_000.0), (192_000, 50_000.0)]
)
def test_a_tone_above_the_new_nyquist_is_gone(source: int, hz: float) -> None:
    output = resample(_tone(hz, source), source, target_rate_hz=RATE)
    edge = RATE // 20
    assert np.abs(output[edge:-edge]).max() < 0.5 * 10.0 ** (-80.0 / 20.0)


@pytest.mark.parametrize(("source", "target"), [(44_100, 24_000), (16_000, 24_000), (48_000, 44_100), (8_000, 44_100)])
def test_resampling_agrees_with_scipy_below_the_transition(source: int, target: int) -> None:
    common = np.gcd(source, target)
    limit = 0.8 * min(source, target) / source
    band = limit * np.sinc(np.arange(-200, 201) * limit) * np.kaiser(401, 10.0)
    audio = np.convolve(np.random.default_rng(1).standard_normal(source), band, mode="same")
    up, down = target // common, source // common
    longer = max(up, down)
    window = np.kaiser(128 * longer + 1, 10.0)
    taps = np.sinc(np.arange(-64 * longer, 64 * longer + 1) * 0.94 / longer) * window
    taps /= taps.sum()
    expected = signal.resample_poly(audio, up, down, window=taps)
    output = resample(audio, source, target_rate_hz=target)
    assert output.shape == expected.shape
    edge = target // 20
    assert np.abs(output - expected)[edge:-edge].max() < 1e-3 * np.abs(expected).max()


def test_a_rate_that_shares_no_factor_is_as_exact() -> None:
    output = resample(_tone(1000.0, 47_999), 47_999, target_rate_hz=RATE)
    expected = _tone(1000.0, RATE, seconds=len(output) / RATE)
    assert np.abs(output - expected)[1200:-1200].max() < 1e-4


@settings(max_examples=30, deadline=None)
@given(
    source=st.integers(8_000, 48_000),
    target=st.sampled_from([24_000, 44_100]),
    num_samples=st.integers(1, 600),
)
def test_the_resampled_length_is_the_ratio_rounded_up(source: int, target: int, num_samples: int) -> None:
    output = resample(np.ones(num_samples), source, target_rate_hz=target)
    assert len(output) == -(-num_samples * target // source)
    assert np.isfinite(output).all()


def test_resampling_keeps_a_constant_constant() -> None:
    output = resample(np.full(16_000, 0.25), 16_000, target_rate_hz=44_100)
    np.testing.assert_allclose(output[2000:-2000], 0.25, rtol=0.0, atol=1e-9)


def test_channels_are_averaged_and_the_input_is_left_alone() -> None:
    left, right = _noise(RATE * 2, seed=1), _noise(RATE * 2, seed=2)
    stereo = np.stack([left, right], axis=1)
    before = stereo.copy()
    mono = prepare_reference(stereo, RATE, target_rate_hz=RATE)
    assert mono.dtype == np.float32
    assert mono.shape == (RATE * 2,)
    np.testing.assert_allclose(mono, (left.astype(np.float64) + right) / 2.0, rtol=0.0, atol=1e-7)
    np.testing.assert_array_equal(stereo, before)


def test_mono_at_the_right_rate_passes_unchanged_in_a_copy() -> None:
    audio = _noise(RATE)
    output = prepare_reference(audio, RATE, target_rate_hz=RATE)
    np.testing.assert_array_equal(output, audio)
    assert not np.shares_memory(output, audio)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_every_float_type_is_taken(dtype: type[np.floating]) -> None:
    rate: int = np.int64(RATE)  # type: ignore[assignment]
    output = prepare_reference(_noise(RATE).astype(dtype), rate, target_rate_hz=44_100)
    assert output.dtype == np.float32
    assert output.shape == (44_100,)


@pytest.mark.parametrize(("seconds", "accepted"), [(0.99, False), (1.0, True), (30.0, True), (30.01, False)])
def test_length_limits_are_inclusive(seconds: float, accepted: bool) -> None:
    audio = _noise(round(seconds * 8000))
    if accepted:
        assert len(prepare_reference(audio, 8000, target_rate_hz=8000)) == len(audio)
        return
    with pytest.raises(InvalidRequest, match="s long"):
        prepare_reference(audio, 8000, target_rate_hz=8000)


def _spoilt(value: float) -> NDArray[np.float32]:
    audio = _noise(RATE)
    audio[RATE // 2] = value
    return audio


@pytest.mark.parametrize(
    ("audio", "rate", "message"),
    [
        (_spoilt(np.nan), RATE, "NaN"),
        (_spoilt(np.inf), RATE, "infinity"),
        (_spoilt(-np.inf), RATE, "infinity"),
        (_spoilt(-12_000.0), RATE, "peaks at 12000.*32768"),
        (np.zeros(0, np.float32), RATE, "empty"),
        (np.zeros((0, 2), np.float32), RATE, "empty"),
        (np.zeros((RATE, 0), np.float32), RATE, "empty"),
        (np.zeros(RATE, np.float32), RATE, "digital silence"),
        (np.full(RATE, 0.0009, np.float32), RATE, "silent .*-61 dBFS"),
        (np.stack([_noise(RATE), -_noise(RATE)], axis=1), RATE, "silent"),
        (_noise(RATE - 1), RATE, "at least 1 s"),
        (_noise(30 * 8000 + 1), 8000, "at most 30 s"),
        (_noise(RATE), 7_999, "sample rate of 7999"),
        (_noise(RATE), 192_001, "sample rate of 192001"),
        (_noise(RATE), 0, "sample rate"),
        (_noise(RATE), -RATE, "sample rate"),
        (_noise(RATE), True, "sample rate"),
        (_noise(RATE), 24_000.0, "sample rate"),
        (_noise(RATE), None, "sample rate"),
        (np.array(0.5, np.float32), RATE, "0 dimensions"),
        (_noise(RATE).reshape(1, 1, RATE), RATE, "3 dimensions"),
        (_noise(2 * RATE).reshape(2, RATE), RATE, "24000 channels"),
        (np.ones(RATE, np.int16), RATE, "int16"),
        (np.ones(RATE, np.complex64), RATE, "complex64"),
        (np.ones(RATE, bool), RATE, "bool"),
        ([0.1] * RATE, RATE, "list"),
        (None, RATE, "NoneType"),
    ],
)
def test_bad_reference_audio_is_refused_naming_the_voice(audio: object, rate: object, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message) as caught:
        prepare_reference(audio, rate, target_rate_hz=RATE)  # type: ignore[arg-type]
    assert caught.value.param == "voice"


def test_the_quietest_accepted_peak_is_minus_sixty_decibels() -> None:
    audio = np.full(RATE, 0.00101)
    assert len(prepare_reference(audio, RATE, target_rate_hz=RATE)) == RATE


@pytest.mark.parametrize(
    ("kind", "subtype", "tolerance"),
    [
        ("WAV", "PCM_16", 1e-4),
        ("WAV", "FLOAT", 0.0),
        ("FLAC", "PCM_24", 1e-6),
        ("OGG", "VORBIS", None),
        ("MP3", None, None),
    ],
)
def test_files_decode_to_their_samples_and_rate(kind: str, subtype: str | None, tolerance: float | None) -> None:
    audio = _tone(440.0, RATE).astype(np.float32)
    decoded, rate = read_audio_bytes(_file(audio, RATE, kind=kind, subtype=subtype))
    assert rate == RATE
    assert decoded.dtype == np.float32
    if tolerance is not None:
        np.testing.assert_allclose(decoded, audio, rtol=0.0, atol=tolerance)
        return
    spectrum = np.abs(np.fft.rfft(decoded[:RATE]))
    assert abs(int(spectrum.argmax()) - 440) <= 1


def test_a_stereo_file_keeps_its_channels() -> None:
    audio = np.stack([_noise(RATE, seed=1), _noise(RATE, seed=2)], axis=1)
    decoded, _ = read_audio_bytes(_file(audio, RATE, subtype="FLOAT"))
    np.testing.assert_array_equal(decoded, audio)


WAV = _file(_noise(RATE), RATE)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"RIFF",
        b"not audio at all" * 100,
        b"\x00" * 4096,
        WAV[:20],
        _file(_noise(RATE), RATE, kind="FLAC")[:40],
    ],
)
def test_bytes_that_are_no_audio_are_refused_naming_the_voice(data: bytes) -> None:
    with pytest.raises(InvalidRequest, match="reference audio") as caught:
        audio, rate = read_audio_bytes(data)
        prepare_reference(audio, rate, target_rate_hz=RATE)
    assert caught.value.param == "voice"


@settings(max_examples=60, deadline=None)
@given(position=st.integers(0, 43), value=st.integers(0, 255))
def test_a_spoilt_header_is_decoded_or_refused_never_anything_else(position: int, value: int) -> None:
    data = bytearray(WAV)
    data[position] = value
    try:
        audio, rate = read_audio_bytes(bytes(data))
        prepared = prepare_reference(audio, rate, target_rate_hz=rate)
    except InvalidRequest as error:
        assert error.param == "voice"
    else:
        assert np.isfinite(prepared).all()


def test_a_long_file_is_refused_before_it_is_decoded_whole() -> None:
    data = _file(np.zeros(600 * 8000, np.float32), 8000, kind="FLAC", subtype="PCM_16")
    with pytest.raises(InvalidRequest, match="at most 30 s"):
        read_audio_bytes(data)


def test_a_file_of_too_many_channels_or_a_strange_rate_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="9 channels"):
        read_audio_bytes(_file(np.zeros((8000, 9), np.float32), 8000))
    with pytest.raises(InvalidRequest, match="4000"):
        read_audio_bytes(_file(np.zeros(8000, np.float32), 4000))


def test_encoding_a_voice_resamples_and_puts_frames_first() -> None:
    codec = load_codec(LARK, with_encoder=True)
    audio = (_tone(220.0, 44_100) + _noise(66_150)).astype(np.float32)
    codes = encode_voice(codec, Voice(transcript="hm", audio=audio, sample_rate_hz=44_100))
    assert codes.dtype == np.int32
    assert codes.flags.c_contiguous
    assert codes.shape == (38, codec.spec.num_codebooks)
    resampled = prepare_reference(audio, 44_100, target_rate_hz=RATE)
    np.testing.assert_array_equal(codes, codec.encode(torch.from_numpy(resampled)).t().numpy())


def test_encoding_a_voice_needs_the_encoder_and_good_audio() -> None:
    voice = Voice(transcript="hm", audio=_noise(2 * RATE), sample_rate_hz=RATE)
    with pytest.raises(ModelLoadError, match="with_encoder=True"):
        encode_voice(load_codec(LARK), voice)
    short = Voice(transcript="hm", audio=_noise(RATE // 2), sample_rate_hz=RATE)
    with pytest.raises(InvalidRequest, match="at least 1 s"):
        encode_voice(load_codec(LARK, with_encoder=True), short)


def test_the_checks_import_no_torch_themselves_and_no_soundfile_or_scipy_at_all() -> None:
    program = (
        "import sys, numpy as np, declaim.engine.voices as voices\n"
        "voices.prepare_reference(np.ones(24000), 24000, target_rate_hz=24000)\n"
        "print(sorted({'soundfile', 'scipy'} & set(sys.modules)), 'torch' in vars(voices))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.stdout.strip(), done.stderr) == ("[] False", "")


# The speaker encoder.


@pytest.mark.parametrize("is_tiled", [True, False], ids=["cpu", "gpu"])
def test_folding_the_norms_and_working_in_place_changes_no_embedding(is_tiled: bool) -> None:
    torch.manual_seed(1)
    net = SpeakerNet((2, 2, 1, 1), channels=16).requires_grad_(False)
    mel = torch.randn(1, NUM_MELS, 203)
    for _ in range(3):
        net.train()(mel)  # the norms' statistics are those of something
    mel, expected = mel * 0.8, net.eval()(mel * 0.8)
    _fold_norms(net, is_tiled=is_tiled)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in net.modules())
    assert any(isinstance(module, TiledConv) for module in net.modules()) == is_tiled
    with torch.inference_mode():
        torch.testing.assert_close(net(mel), expected, rtol=0, atol=2e-5 * float(expected.abs().max()))


def test_a_gpu_rounds_nothing_to_ten_bits_while_a_voice_is_encoded() -> None:
    net = SpeakerNet((1, 1, 1, 1), channels=8).eval()
    seen: list[bool] = []
    net.register_forward_hook(lambda *_: seen.append(torch.backends.cudnn.allow_tf32))
    before = torch.backends.cudnn.allow_tf32
    SpeakerEncoder(net, torch.nn.Linear(EMBEDDING_SIZE, 128)).encode(Voice("", _noise(RATE), RATE))
    assert seen == [False] and torch.backends.cudnn.allow_tf32 == before


def test_a_voice_known_by_its_embedding_alone_is_not_encoded_to_frames() -> None:
    net = SpeakerNet((1, 1, 1, 1), channels=8).eval()
    loaded: list[FakeCodec] = []

    def load_encoder() -> FakeCodec:
        loaded.append(FakeCodec())
        return loaded[-1]

    with Engine(
        FakeModel(),
        EngineConfig(device="cpu", num_blocks=64).resolve(),
        make_vocoder=lambda wake: InlineVocoder(FakeCodec(), wake=wake),
        model_name="fake",
        load_encoder=load_encoder,
        load_speaker=lambda: SpeakerEncoder(net, torch.nn.Linear(EMBEDDING_SIZE, 128)),
    ) as engine:
        audio = _noise(2 * RATE)
        alone = engine.encode_voice(Voice("", audio, RATE))
        assert not loaded and alone.codes.shape == (0, 3) and alone.embedding is not None
        told = engine.encode_voice(Voice("hm", audio, RATE))
        assert len(loaded) == 1 and len(told.codes) == 20 and told.embedding is not None
        np.testing.assert_array_equal(told.embedding, alone.embedding)
        (result,) = engine.generate(
            [SpeechRequest("a", voice=alone, sampling=SamplingParams(max_seconds=0.5))], progress=False
        )
        assert result.error is None


@pytest.mark.parametrize("text", ["", " ", "\n"])
@pytest.mark.parametrize("language", ["en-us", "ja"])
def test_no_text_has_no_phonemes(text: str, language: str) -> None:
    for package in ("phonemizer", "espeakng_loader", "sudachipy", "kanjize"):
        pytest.importorskip(package)
    assert EspeakPhonemizer(punctuation=".")(text, language) == ""
