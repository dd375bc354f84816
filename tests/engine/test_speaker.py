"""The speaker encoder against the reference's own run (fixtures/make_zonos.py), in real size with random weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers.audio_utils import mel_filter_bank

from declaim.engine import (
    EncodedVoice,
    Engine,
    EngineConfig,
    InvalidRequest,
    ModelLoadError,
    SamplingParams,
    SpeechRequest,
    Voice,
)
from declaim.engine.speaker import ENCODER_NAME, N_FFT, NUM_MELS, PROJECTION_NAME, RATE_HZ, SpeakerEncoder, mel_filters
from tests.zonos_checkpoints import CONFIGS, FIXTURE, SPEAKER_RATES_HZ, make_speaker, make_zonos, reference_audio

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_speaker(tmp_path_factory.mktemp("speaker"), seed=21)


@pytest.fixture(scope="module")
def encoder(folder: Path) -> SpeakerEncoder:
    return SpeakerEncoder.load(folder, device=CPU)


@pytest.mark.parametrize("rate_hz", SPEAKER_RATES_HZ)
def test_an_embedding_is_the_references_whatever_the_recordings_rate(encoder: SpeakerEncoder, rate_hz: int) -> None:
    """From another rate than its own, the reference resamples by another filter than is used here."""
    with np.load(FIXTURE) as arrays:
        expected = arrays[f"speaker.{rate_hz}"]
    embedding = encoder.encode(Voice("", reference_audio(seed=22, rate_hz=rate_hz), rate_hz))
    assert embedding.dtype == np.float32
    np.testing.assert_allclose(embedding, expected, atol=1e-4 if rate_hz == RATE_HZ else 2e-3)


def test_a_recording_that_is_too_short_is_refused(encoder: SpeakerEncoder) -> None:
    with pytest.raises(InvalidRequest, match="at least 1 s"):
        encoder.encode(Voice("", reference_audio(seed=22, seconds=0.5), 16_000))


def test_mel_bands_are_those_of_transformers() -> None:
    expected = mel_filter_bank(N_FFT // 2 + 1, NUM_MELS, 0.0, 8000.0, 16_000, norm=None, mel_scale="htk")
    np.testing.assert_allclose(mel_filters().numpy(), expected, atol=1e-4)


def test_files_that_are_missing_or_something_else_are_named_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=f"{ENCODER_NAME}.*Zonos-v0.1-speaker-embedding"):
        SpeakerEncoder.load(tmp_path, device=CPU)
    torch.save({"other": torch.zeros(1)}, tmp_path / ENCODER_NAME)
    with pytest.raises(ModelLoadError, match="does not hold what this version reads"):
        SpeakerEncoder.load(tmp_path, device=CPU)
    (tmp_path / ENCODER_NAME).write_bytes(b"not a file of tensors")
    with pytest.raises(ModelLoadError, match="cannot be read"):
        SpeakerEncoder.load(tmp_path, device=CPU)


def test_a_projection_of_another_shape_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / ENCODER_NAME).symlink_to(folder / ENCODER_NAME)
    torch.save({"bias": torch.zeros(3)}, tmp_path / PROJECTION_NAME)
    with pytest.raises(ModelLoadError, match="holds no projection"):
        SpeakerEncoder.load(tmp_path, device=CPU)


def test_a_voice_is_encoded_once_on_the_cpu_and_sets_how_zonos_sounds(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_zonos(tmp_path / "zonos", CONFIGS["transformer"], seed=3)
    (model / "speaker").symlink_to(folder)
    encoders: list[SpeakerEncoder] = []
    encode = SpeakerEncoder.encode

    def counting(self: SpeakerEncoder, voice: Voice) -> NDArray[np.float32]:
        encoders.append(self)
        return encode(self, voice)

    monkeypatch.setattr(SpeakerEncoder, "encode", counting)
    monkeypatch.setattr("declaim.engine.models.zonos.EspeakPhonemizer", lambda punctuation: lambda text, language: text)
    voice = Voice("", reference_audio(seed=22), 16_000)
    sampling = SamplingParams(temperature=0.0, max_seconds=0.2)
    with Engine.from_pretrained(model, EngineConfig(device="cpu", memory_gb=2)) as engine:
        assert not encoders and engine.spec.embeds_voices
        engine.add_voice("ann", voice)
        kept = engine.encode_voice(voice)
        by_name, by_audio, kept_by_a_store, nobody = engine.generate(
            [
                SpeechRequest("oʊ", voice=who, sampling=sampling, normalize=False)
                for who in ("ann", voice, EncodedVoice("", kept.codes, kept.embedding), None)
            ],
            progress=False,
        )
    (encoder,) = encoders
    assert {parameter.device for parameter in encoder._net.parameters()} == {CPU}
    assert kept.embedding is not None and kept.embedding.shape == (128,)
    for other in (by_audio, kept_by_a_store):
        np.testing.assert_array_equal(other.codes, by_name.codes)
    assert not np.array_equal(nobody.codes, by_name.codes)
