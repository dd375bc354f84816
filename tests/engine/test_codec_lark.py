"""The lark codec: its test vector, windows against the whole, its encoder on speech, and broken folders."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from declaim.engine.codec.base import CodecRecipe
from declaim.engine.codec.lark import LarkCodec
from declaim.engine.codec.load import load_codec
from declaim.engine.codec.mel import slaney_mel_filters
from declaim.engine.errors import ModelLoadError

LARK = Path(__file__).parents[2] / "engine" / "assets" / "lark"
FOLDER = LARK / "codec"
RECIPE = CodecRecipe(kind="lark", folder=str(FOLDER))
CONFIG: dict[str, object] = json.loads((FOLDER / "config.json").read_text())


@pytest.fixture(scope="module")
def codec() -> LarkCodec:
    return LarkCodec.load(RECIPE, with_encoder=True)


@pytest.fixture(scope="module")
def vector() -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [1, Q, T] and their samples [S], computed in float64."""
    with np.load(FOLDER / "test_vector.npz") as arrays:
        return torch.from_numpy(arrays["codes"].astype(np.int64))[None], torch.from_numpy(arrays["audio"])


@pytest.fixture(scope="module")
def speech_codes() -> torch.Tensor:
    """Codes [1, Q, T] of a sentence, as the code model draws them."""
    with np.load(LARK / "test_vector.npz") as arrays:
        return torch.from_numpy(arrays["greedy_codes"].astype(np.int64)).t()[None].contiguous()


def _copy(tmp_path: Path) -> Path:
    shutil.copytree(FOLDER, tmp_path / "codec")
    return tmp_path / "codec"


def _load(folder: Path) -> LarkCodec:
    return LarkCodec.load(CodecRecipe(kind="lark", folder=str(folder)), with_encoder=True)


def test_decoding_matches_the_test_vector(codec: LarkCodec, vector: tuple[torch.Tensor, torch.Tensor]) -> None:
    codes, expected = vector
    samples = codec.decode(codes)
    assert samples.dtype == torch.float32
    assert samples.shape == (1, len(expected))
    torch.testing.assert_close(samples[0], expected, rtol=0.0, atol=2e-6)


def test_every_window_with_its_context_equals_the_whole(
    codec: LarkCodec, vector: tuple[torch.Tensor, torch.Tensor]
) -> None:
    codes, _ = vector
    whole, spec, total = codec.decode(codes)[0], codec.spec, codes.shape[2]
    size = 5
    for begin in range(total - size + 1):
        first, last = max(0, begin - spec.left), min(total, begin + size + spec.right)
        skip = begin - first
        window = codec.decode(codes[:, :, first:last])[0, skip * spec.hop : (skip + size) * spec.hop]
        trimmed = codec.decode(codes[:, :, first:last], first=skip, last=skip + size)[0]
        expected = whole[begin * spec.hop : (begin + size) * spec.hop]
        torch.testing.assert_close(window, expected, rtol=0.0, atol=5e-6)
        torch.testing.assert_close(trimmed, expected, rtol=0.0, atol=5e-6)


def test_the_frames_before_give_the_phase_and_four_after_are_all_it_hears(
    codec: LarkCodec, vector: tuple[torch.Tensor, torch.Tensor]
) -> None:
    codes, _ = vector
    hop, at, whole = codec.spec.hop, 34, codec.decode(codes)[0]

    def error(left: int, right: int) -> float:
        window = codec.decode(codes[:, :, at - left : at + 1 + right])[0]
        return float((window[left * hop : (left + 1) * hop] - whole[at * hop : (at + 1) * hop]).abs().max())

    assert error(codec.spec.left, codec.spec.right) < 2e-6
    assert error(2, 4) > 1e-3
    assert error(codec.spec.left, 2) > 1e-5


def test_a_timbre_is_another_voice_that_says_the_same(codec: LarkCodec, speech_codes: torch.Tensor) -> None:
    """Its pitch and its formants are those of config.json, and its envelope over time is the first voice's."""
    assert codec.spec.timbres == ("lark", "rook", "wren")
    lark, rook, wren = (codec.decode(speech_codes, timbre=timbre)[0] for timbre in range(3))
    loud = lark.unfold(0, 1200, 600).square().mean(1)
    lags = [_lags(samples)[loud > 0.2 * loud.max()] for samples in (lark, rook, wren)]
    assert float((lags[0] / lags[1]).median()) == pytest.approx(0.58, rel=0.05)
    assert float((lags[0] / lags[2]).median()) == pytest.approx(1.25, rel=0.05)
    levels = [samples.view(-1, codec.spec.hop).square().mean(1).sqrt() for samples in (lark, rook, wren)]
    for other in levels[1:]:
        assert float(torch.corrcoef(torch.stack([levels[0], other]))[0, 1]) > 0.75


def _lags(samples: torch.Tensor) -> torch.Tensor:
    """Of stretches of 50 ms: the lag in samples, 1/400 to 1/60 s, at which each is most like itself."""
    likeness = torch.fft.irfft(torch.fft.rfft(samples.unfold(0, 1200, 600), 2400).abs() ** 2)[:, 60:400]
    return (60 + likeness.argmax(1)).float()


def test_an_items_samples_are_the_same_bits_in_any_batch_and_on_every_call(codec: LarkCodec) -> None:
    generator = torch.Generator().manual_seed(2)
    codes = torch.randint(0, 1024, (3, codec.spec.num_codebooks, 31), generator=generator)
    together = codec.decode(codes)
    for item, samples in zip(codes, together, strict=True):
        assert torch.equal(codec.decode(item[None])[0], samples)


def test_one_frame_can_be_decoded(codec: LarkCodec) -> None:
    samples = codec.decode(torch.zeros(1, codec.spec.num_codebooks, 1, dtype=torch.int64))
    assert samples.shape == (1, codec.spec.hop)
    assert torch.isfinite(samples).all()


def test_an_id_beyond_its_codebook_raises_instead_of_reading_the_next(codec: LarkCodec) -> None:
    codes = torch.zeros(1, codec.spec.num_codebooks, 4, dtype=torch.int64)
    codes[0, 0, 0] = codec.spec.codebook_size
    with pytest.raises(IndexError):
        codec.decode(codes)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 2e-3), ("bfloat16", 2e-2)])
def test_half_precision_stays_close_and_returns_float32(
    dtype: Literal["float16", "bfloat16"], tolerance: float, vector: tuple[torch.Tensor, torch.Tensor]
) -> None:
    codes, expected = vector
    samples = LarkCodec.load(dataclasses.replace(RECIPE, dtype=dtype)).decode(codes)[0]
    assert samples.dtype == torch.float32
    difference = float((samples - expected).abs().max())
    assert 0.0 < difference < tolerance


def test_encoding_matches_the_test_vector(codec: LarkCodec, vector: tuple[torch.Tensor, torch.Tensor]) -> None:
    """All but a near-tie, after which the residual, and so the codes that follow in its frame, may be others."""
    with np.load(FOLDER / "test_vector.npz") as arrays:
        expected = torch.from_numpy(arrays["encoded"].astype(np.int64))
    codes = codec.encode(vector[1])
    assert torch.equal(codes[0], expected[0])
    assert float((codes == expected).float().mean()) > 0.99


def test_each_further_codebook_brings_the_sound_closer(codec: LarkCodec, speech_codes: torch.Tensor) -> None:
    audio = codec.decode(speech_codes)[0]
    codes = codec.encode(audio)
    noise = torch.randint(0, 1024, codes.shape, generator=torch.Generator().manual_seed(3))

    window, bands = torch.hann_window(1024), slaney_mel_filters(24_000, 1024, num_mels=80, fmin=0.0, fmax=12_000.0)

    def spectrum(samples: torch.Tensor) -> torch.Tensor:
        columns = torch.stft(samples, 1024, 256, window=window, return_complex=True)
        return (columns.abs().mT @ bands.float()).clamp(min=1e-5).log()

    errors = []
    for kept in (1, 2, 4, 8):
        mixed = torch.cat([codes[:kept], noise[kept:]])
        decoded = codec.decode(mixed[None])[0]
        errors.append(float((spectrum(decoded) - spectrum(audio)).abs().mean()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.55 * errors[0]


@pytest.mark.parametrize(("num_samples", "num_frames"), [(0, 0), (1, 1), (959, 1), (960, 1), (961, 2), (4800, 5)])
def test_encoding_rounds_the_number_of_frames_up(codec: LarkCodec, num_samples: int, num_frames: int) -> None:
    audio = 0.1 * torch.randn(num_samples, generator=torch.Generator().manual_seed(4))
    assert codec.encode(audio).shape == (codec.spec.num_codebooks, num_frames)


def test_encoding_pads_with_silence(codec: LarkCodec) -> None:
    audio = 0.1 * torch.randn(5000, generator=torch.Generator().manual_seed(5))
    padded = torch.cat([audio, torch.zeros(6 * codec.spec.hop - 5000)])
    assert torch.equal(codec.encode(audio), codec.encode(padded))


def test_mel_filters_have_unit_area_and_the_scales_known_centres() -> None:
    filters = slaney_mel_filters(24_000, 16_384, num_mels=80, fmin=0.0, fmax=12_000.0)
    assert filters.shape == (8193, 80)
    torch.testing.assert_close(filters.sum(0) * (24_000 / 16_384), torch.ones(80), rtol=5e-3, atol=0.0)
    # 12 kHz is 15 + 27 ln(12) / ln(6.4) mel; the lowest centres lie evenly at 200 / 3 Hz a mel.
    step = (15.0 + 27.0 * np.log(12.0) / np.log(6.4)) / 81.0
    peaks = filters.argmax(0)[:5].double() * (24_000 / 16_384)
    torch.testing.assert_close(peaks, torch.arange(1, 6).double() * step * 200.0 / 3.0, rtol=0.0, atol=1.5)


def test_without_its_encoder_the_codec_decodes_and_says_why_it_cannot_encode(
    codec: LarkCodec, vector: tuple[torch.Tensor, torch.Tensor]
) -> None:
    bare = load_codec(RECIPE)
    assert torch.equal(bare.decode(vector[0]), codec.decode(vector[0]))
    with pytest.raises(ModelLoadError, match="with_encoder=True"):
        bare.encode(torch.zeros(2400))


def test_the_spec_is_what_config_json_says(codec: LarkCodec) -> None:
    config = CONFIG
    spec = codec.spec
    assert (spec.sample_rate_hz, spec.hop) == (config["sampling_rate"], config["hop_length"])
    assert (spec.num_codebooks, spec.codebook_size) == (config["num_codebooks"], config["codebook_size"])
    assert (spec.left, spec.right) == (config["left_context"], config["right_context"]) == (32, 4)
    assert codec.device == torch.device("cpu")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    folder = _copy(tmp_path)
    (folder / name).unlink()
    with pytest.raises(ModelLoadError, match=f"{name} does not exist"):
        _load(folder)


@pytest.mark.parametrize("kept", [0, 4, 100, 20_000, -1])
def test_weights_cut_short_are_refused(tmp_path: Path, kept: int) -> None:
    folder = _copy(tmp_path)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:kept])
    with pytest.raises(ModelLoadError, match=r"model\.safetensors .*cut short or corrupted"):
        _load(folder)


def test_weights_with_a_spoilt_header_are_refused(tmp_path: Path) -> None:
    folder = _copy(tmp_path)
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[8:40] = bytes(range(200, 232))
    weights.write_bytes(content)
    with pytest.raises(ModelLoadError, match="cut short or corrupted"):
        _load(folder)


def test_a_missing_a_surplus_and_a_misshapen_tensor_are_named(tmp_path: Path) -> None:
    folder = _copy(tmp_path)
    weights = folder / "model.safetensors"
    whole = load_file(weights)
    for change, message in (
        ({"decoder.stage3.2.gamma": None}, "no tensor 'decoder.stage3.2.gamma'"),
        ({"decoder.stage3.4.gamma": torch.zeros(256)}, r"no place for, 'decoder\.stage3\.4\.gamma'"),
        ({"decoder.up2.weight": torch.zeros(256, 256, 3)}, r"decoder\.up2\.weight is \[256, 256, 3\].* 4\]"),
    ):
        changed = {name: value for name, value in (whole | change).items() if value is not None}
        save_file(changed, weights)
        with pytest.raises(ModelLoadError, match=message):
            _load(folder)


@pytest.mark.parametrize("key", sorted(CONFIG.keys() - {"model_type", "frame_rate"}))
def test_every_config_key_is_needed_and_named_when_missing_or_wrong(tmp_path: Path, key: str) -> None:
    config = CONFIG
    path = tmp_path / "config.json"
    without = {name: value for name, value in config.items() if name != key}
    wrong = (config | {key: "many"}, config | {key: True})
    for broken in (without, *wrong):
        path.write_text(json.dumps(broken))
        with pytest.raises(ModelLoadError, match=rf"config\.json.*{key}"):
            _load(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"hop_length": 961},
        {"kernel_size": 6},
        {"n_fft": 1023},
        {"n_fft": 256},
        {"mel_fmin": 13_000},
        {"mel_scale": 0},
        {"mel_log_floor": 0},
        {"synthesis_n_fft": 1201},
        {"synthesis_n_fft": 240},
        {"noise_n_fft": 481},
        {"noise_n_fft": 1440},
        {"left_context": 9},
        {"envelope_context": 33},
        {"timbres": []},
        {"timbres": [{"pitch": 1.0, "warp": 1.0, "gain": 1.0}]},
        {"timbres": [{"name": "low", "pitch": 0.1, "warp": 1.0, "gain": 1.0}]},
    ],
)
def test_config_values_that_do_not_fit_are_refused(tmp_path: Path, change: dict[str, object]) -> None:
    config = CONFIG
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ModelLoadError, match=next(iter(change))):
        _load(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xed\xa0\x80", b"[" * 100_000])
def test_a_config_that_is_no_json_object_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ModelLoadError, match=r"config\.json"):
        _load(tmp_path)
