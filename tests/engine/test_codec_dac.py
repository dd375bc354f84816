"""The DAC codec against transformers' own model with random weights: samples, windows, broken folders."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import DacConfig, DacModel

from declaim.engine.codec.base import CodecRecipe
from declaim.engine.codec.dac import DacCodec, stage_reaches
from declaim.engine.codec.load import load_codec
from declaim.engine.errors import ModelLoadError

CODEBOOKS, SIZE, HOP = 3, 64, 512


def _random_model(ratios: list[int]) -> DacModel:
    """Weights scaled so that every layer's output keeps about unit size: else context would not matter."""
    config = DacConfig(
        encoder_hidden_size=4,
        decoder_hidden_size=32,
        n_codebooks=CODEBOOKS,
        codebook_size=SIZE,
        codebook_dim=8,
        sampling_rate=44_100,
        downsampling_ratios=ratios,
    )
    torch.manual_seed(0)
    model = DacModel(config).eval().requires_grad_(False)
    for name, parameter in [*model.decoder.named_parameters(), *model.encoder.named_parameters()]:
        if parameter.ndim == 3 and "alpha" not in name:
            fan_in = 2 * parameter.shape[0] if "conv_t1" in name else parameter.shape[1] * parameter.shape[2]
            parameter.normal_(0.0, 0.7 / math.sqrt(fan_in))
        elif "bias" in name:
            parameter.normal_(0.0, 0.05)
        elif "alpha" in name:
            parameter.uniform_(0.5, 1.5)
    for name, parameter in model.quantizer.named_parameters():
        if name.endswith("weight"):
            parameter.normal_(0.0, 1.0 if "codebook" in name else 0.3 if "in_proj" in name else 0.1)
    return model


@pytest.fixture(scope="module")
def reference() -> DacModel:
    return _random_model([2, 4, 8, 8])


@pytest.fixture(scope="module")
def folder(reference: DacModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dac")
    reference.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def codec(folder: Path) -> DacCodec:
    return DacCodec.load(CodecRecipe(kind="dac", folder=str(folder)), with_encoder=True)


@pytest.fixture(scope="module")
def double_codec(reference: DacModel, codec: DacCodec) -> DacCodec:
    model = DacModel(reference.config).eval()
    model.load_state_dict(reference.state_dict())
    return DacCodec(model.double(), spec=codec.spec, strides=(8, 8, 4, 2), has_encoder=True)


def _codes(batch: int, frames: int, *, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, SIZE, (batch, CODEBOOKS, frames), generator=torch.Generator().manual_seed(seed))


def _copy(folder: Path, tmp_path: Path) -> Path:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    return tmp_path


def _load(folder: Path, *, with_encoder: bool = True) -> DacCodec:
    return DacCodec.load(CodecRecipe(kind="dac", folder=str(folder)), with_encoder=with_encoder)


def test_decoding_equals_the_original_model(codec: DacCodec, reference: DacModel) -> None:
    codes = _codes(1, 40)
    samples = codec.decode(codes)
    assert samples.shape == (1, 40 * HOP)
    (expected,) = reference.decode(audio_codes=codes, return_dict=False)
    assert torch.equal(samples, expected)
    assert float(samples.std()) > 0.1, "weights so small that everything decodes alike prove nothing"


@pytest.mark.parametrize("num_samples", [1, HOP - 1, HOP, HOP + 1, 5 * HOP + 7])
def test_encoding_equals_the_original_model_on_padded_audio(
    codec: DacCodec, reference: DacModel, num_samples: int
) -> None:
    audio = torch.randn(num_samples, generator=torch.Generator().manual_seed(1))
    frames = math.ceil(num_samples / HOP)
    padded = torch.zeros(1, 1, frames * HOP)
    padded[0, 0, :num_samples] = audio
    codes = codec.encode(audio)
    assert codes.shape == (CODEBOOKS, frames)
    assert codes.dtype == torch.int64
    assert torch.equal(codes, reference.encode(padded, return_dict=False)[2][0])


def test_encoding_nothing_gives_no_frames(codec: DacCodec) -> None:
    assert codec.encode(torch.zeros(0)).shape == (CODEBOOKS, 0)


def test_every_float32_window_with_its_context_equals_the_whole(codec: DacCodec) -> None:
    _check_windows(codec, dtype=torch.float32, tolerance=1e-4)


def test_every_float64_window_with_ten_frames_of_context_is_exact(double_codec: DacCodec) -> None:
    _check_windows(double_codec, dtype=torch.float64, tolerance=1e-12)


def _check_windows(codec: DacCodec, *, dtype: torch.dtype, tolerance: float) -> None:
    """Every cut, those at the ends with what context there is."""
    total, size, spec = 34, 3, codec.spec
    codes = _codes(1, total)
    whole = codec.decode_exact(codes)[0]
    assert whole.dtype == dtype
    for begin in range(total - size + 1):
        first, last = max(0, begin - spec.left), min(total, begin + size + spec.right)
        skip = begin - first
        window = codec.decode_exact(codes[:, :, first:last])[0, skip * HOP : (skip + size) * HOP]
        trimmed = codec.decode_exact(codes[:, :, first:last], first=skip, last=skip + size)[0]
        for samples in (window, trimmed):
            torch.testing.assert_close(samples, whole[begin * HOP : (begin + size) * HOP], rtol=0.0, atol=tolerance)


@pytest.mark.parametrize("side", ["left", "right"])
def test_nine_frames_of_context_on_a_side_are_not_enough(double_codec: DacCodec, side: str) -> None:
    codes = _codes(1, 34)
    whole = double_codec.decode_exact(codes)[0, 16 * HOP : 17 * HOP]
    left, right = (9, 10) if side == "left" else (10, 9)
    window = double_codec.decode_exact(codes[:, :, 16 - left : 17 + right])[0, left * HOP : (left + 1) * HOP]
    assert float((window - whole).abs().max()) > 1e-9


@pytest.mark.parametrize("ratios", [[2, 4, 8, 8], [2, 2], [4, 2, 6]])
def test_the_context_is_the_reach_of_the_decoders_gradient(ratios: list[int]) -> None:
    decoder = _random_model(ratios).decoder.double()
    hop, context = math.prod(ratios), stage_reaches(ratios[::-1])[0]
    middle = context + 3
    z = torch.randn(1, 4 * 2 ** len(ratios), 2 * middle + 1, dtype=torch.float64, requires_grad=True)
    samples = decoder(z)[0, 0, middle * hop : (middle + 1) * hop]
    reached = []
    for sample in (samples[0], samples[-1]):
        (gradient,) = torch.autograd.grad(sample, z, retain_graph=True)
        frames = gradient.abs().sum((0, 1)).nonzero().flatten() - middle
        reached += [-int(frames.min()), int(frames.max())]
    assert max(reached) == context


def test_the_context_of_dac_44khz_is_ten_frames(codec: DacCodec) -> None:
    assert (codec.spec.left, codec.spec.right) == (10, 10)
    assert (codec.spec.sample_rate_hz, codec.spec.hop) == (44_100, HOP)
    assert (codec.spec.num_codebooks, codec.spec.codebook_size) == (CODEBOOKS, SIZE)


def test_an_items_samples_are_the_same_bits_in_any_batch_and_on_every_call(codec: DacCodec) -> None:
    codes = _codes(4, 23)
    together = codec.decode(codes)
    for item, samples in zip(codes, together, strict=True):
        assert torch.equal(codec.decode(item[None])[0], samples)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 0.1), ("bfloat16", 0.6)])
def test_half_precision_stays_close_and_encodes_the_same_codes(
    folder: Path, codec: DacCodec, dtype: Literal["float16", "bfloat16"], tolerance: float
) -> None:
    recipe = CodecRecipe(kind="dac", folder=str(folder), dtype=dtype)
    half = load_codec(recipe, with_encoder=True)
    codes = _codes(1, 12)
    samples = half.decode(codes)
    assert samples.dtype == torch.float32
    assert 0.0 < float((samples - codec.decode(codes)).abs().max()) < tolerance
    audio = torch.randn(3 * HOP, generator=torch.Generator().manual_seed(2))
    assert torch.equal(half.encode(audio), codec.encode(audio))


def test_a_serving_codec_never_reads_the_encoder(folder: Path, codec: DacCodec, tmp_path: Path) -> None:
    """A checkpoint whose encoder is not there at all still serves, so nothing of it was read or kept."""
    bare = _copy(folder, tmp_path)
    tensors = load_file(bare / "model.safetensors")
    save_file({k: v for k, v in tensors.items() if not k.startswith("encoder.")}, bare / "model.safetensors")
    serving = _load(bare, with_encoder=False)
    codes = _codes(1, 12)
    assert torch.equal(serving.decode(codes), codec.decode(codes))
    with pytest.raises(ModelLoadError, match="with_encoder=True"):
        serving.encode(torch.zeros(HOP))
    with pytest.raises(ModelLoadError, match=r"no tensor 'encoder\."):
        _load(bare)


def test_loading_prints_nothing_and_the_contract_does_not_import_transformers(folder: Path) -> None:
    program = (
        "import sys, declaim.engine.codec.base as base, declaim.engine.codec.load as load\n"
        "assert 'transformers' not in sys.modules\n"
        f"load.load_codec(base.CodecRecipe(kind='dac', folder={str(folder)!r}))\n"
        "assert 'transformers' in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(folder: Path, tmp_path: Path, name: str) -> None:
    (_copy(folder, tmp_path) / name).unlink()
    with pytest.raises(ModelLoadError, match=f"{name} does not exist"):
        _load(tmp_path)


@pytest.mark.parametrize("kept", [0, 7, 500, -1])
def test_weights_cut_short_are_refused(folder: Path, tmp_path: Path, kept: int) -> None:
    weights = _copy(folder, tmp_path) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:kept])
    with pytest.raises(ModelLoadError, match=r"model\.safetensors .*cut short or corrupted"):
        _load(tmp_path)


@pytest.mark.parametrize(
    "key",
    [
        "encoder_hidden_size",
        "decoder_hidden_size",
        "n_codebooks",
        "codebook_size",
        "codebook_dim",
        "sampling_rate",
        "downsampling_ratios",
    ],
)
def test_a_config_key_missing_or_wrong_is_named(folder: Path, tmp_path: Path, key: str) -> None:
    path = _copy(folder, tmp_path) / "config.json"
    config = json.loads(path.read_text())
    for broken in ({k: v for k, v in config.items() if k != key}, config | {key: "many"}, config | {key: 0}):
        path.write_text(json.dumps(broken))
        with pytest.raises(ModelLoadError, match=rf"config\.json.*{key}"):
            _load(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"codebook_size": 63},
        {"decoder_hidden_size": 36},
        {"downsampling_ratios": [2, 3, 8, 8]},
        {"downsampling_ratios": []},
        {"downsampling_ratios": [2, True]},
    ],
)
def test_config_values_that_cannot_work_are_refused(folder: Path, tmp_path: Path, change: dict[str, object]) -> None:
    path = _copy(folder, tmp_path) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ModelLoadError, match=next(iter(change))):
        _load(tmp_path)


def test_weights_of_another_config_are_refused(folder: Path, tmp_path: Path) -> None:
    path = _copy(folder, tmp_path) / "config.json"
    config = json.loads(path.read_text())
    for change, message in (
        ({"decoder_hidden_size": 64}, "its config.json asks for"),
        ({"n_codebooks": CODEBOOKS + 1}, rf"no tensor 'quantizer\.quantizers\.{CODEBOOKS}\."),
        ({"n_codebooks": CODEBOOKS - 1}, "no place for"),
    ):
        path.write_text(json.dumps(config | change))
        with pytest.raises(ModelLoadError, match=message):
            _load(tmp_path)


def test_weights_saved_in_half_precision_are_widened(folder: Path, codec: DacCodec, tmp_path: Path) -> None:
    weights = _copy(folder, tmp_path) / "model.safetensors"
    halved = {name: tensor.half() for name, tensor in load_file(weights).items()}
    save_file(halved, weights)
    widened = _load(tmp_path).decode_exact(_codes(1, 12))
    assert widened.dtype == torch.float32
    assert 0.0 < float((widened - codec.decode_exact(_codes(1, 12))).abs().max()) < 0.05
