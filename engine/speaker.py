"""The speaker encoder of Zonos: reference audio to one vector of 128 numbers, once for each voice.

A ResNet of 293 layers over a log-mel spectrogram at 16 kHz, its blocks weighted by SimAM; attentive statistics pooling
to 256 numbers; a linear discriminant projection to 128. All in float32. On the CPU, where nine tenths of the time are
convolutions at the speed of the processor's products, those of stride 1 are computed with a quarter of the products.
Source: Zyphra/Zonos-v0.1-speaker-embedding, two files of torch tensors; Yang et al. 2021 (SimAM), Okabe et al. 2018.
"""

from __future__ import annotations

import math
import pickle
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from declaim.engine.errors import ModelLoadError
from declaim.engine.request import Voice
from declaim.engine.safetensors_io import freed_at_once
from declaim.engine.tiled_conv import TiledConv
from declaim.engine.voices import prepare_reference

REPO_ID = "Zyphra/Zonos-v0.1-speaker-embedding"
ENCODER_NAME, PROJECTION_NAME = "ResNet293_SimAM_ASP_base.pt", "ResNet293_SimAM_ASP_base_LDA-128.pt"
RATE_HZ, N_FFT, WINDOW, HOP, NUM_MELS = 16_000, 512, 400, 160, 80
NUM_BLOCKS, CHANNELS, EMBEDDING_SIZE = (10, 20, 64, 3), 64, 256
_SIMAM_LAMBDA = 1e-4
_PART_ELEMENTS = 1 << 18  # of what is computed at once on the CPU: 1 MB, which a core's cache holds


def mel_filters() -> torch.Tensor:
    """Triangles on the HTK mel scale from 0 to 8 kHz, not normalised: float32 [N_FFT / 2 + 1, NUM_MELS]."""
    top = 2595.0 * math.log10(1.0 + RATE_HZ / 2 / 700.0)
    mels = torch.linspace(0.0, top, NUM_MELS + 2)
    edges = 700.0 * (10.0 ** (mels / 2595.0) - 1.0)
    frequencies = torch.linspace(0.0, RATE_HZ // 2, N_FFT // 2 + 1)
    slopes = edges[None] - frequencies[:, None]
    rising = -slopes[:, :-2] / (edges[1:-1] - edges[:-2])
    falling = slopes[:, 2:] / (edges[2:] - edges[1:-1])
    return torch.minimum(rising, falling).clamp(min=0.0)


def log_mel(audio: torch.Tensor) -> torch.Tensor:
    """Log power of each mel band around its mean over time. float32 [S] at RATE_HZ -> [NUM_MELS, 1 + S // HOP]."""
    window = torch.hann_window(WINDOW, device=audio.device)
    spectrum = torch.stft(audio, N_FFT, HOP, WINDOW, window, center=True, pad_mode="reflect", return_complex=True)
    bands = mel_filters().to(audio.device).t() @ spectrum.abs().pow(2)
    levels = torch.log(bands + 1e-6)
    return levels - levels.mean(dim=1, keepdim=True)


class _Block(nn.Module):
    """Two convolutions, weighted by how much each place stands out of its channel, over a shortcut."""

    def __init__(self, num_in: int, num_out: int, stride: int) -> None:
        super().__init__()
        self.conv1: nn.Module = nn.Conv2d(num_in, num_out, 3, stride, 1, bias=False)
        self.bn1: nn.Module = nn.BatchNorm2d(num_out)
        self.conv2: nn.Module = nn.Conv2d(num_out, num_out, 3, 1, 1, bias=False)
        self.bn2: nn.Module = nn.BatchNorm2d(num_out)
        self.downsample = nn.Sequential()
        if stride != 1 or num_in != num_out:
            self.downsample = nn.Sequential(nn.Conv2d(num_in, num_out, 1, stride, bias=False), nn.BatchNorm2d(num_out))

    def forward(self, x: torch.Tensor, spare: torch.Tensor | None = None) -> torch.Tensor:
        """spare: a tensor of the result's shape that may become the result."""
        y: torch.Tensor = self.bn1(_convolve(self.conv1, x, into=spare)).relu_()
        y = self.bn2(_convolve(self.conv2, y, into=y))
        _add_simam(_places(y), _places(self.downsample(x)))
        return y


def _places(x: torch.Tensor) -> torch.Tensor:
    """[1, C, H, W], channels last, as [H * W, C]."""
    return x[0].permute(1, 2, 0).flatten(0, 1)


def _add_simam(y: torch.Tensor, shortcut: torch.Tensor) -> None:
    """relu(simam(y) + shortcut) in the place of `y` [P, C]. On the CPU in parts that its caches hold."""
    num_places = len(y)
    step = max(1, _PART_ELEMENTS // y.shape[1]) if y.device.type == "cpu" else num_places
    mean = y.mean(dim=0)
    squares = torch.stack([(part - mean).square_().sum(dim=0) for part in torch.split(y, step)]).sum(dim=0)
    scale = 0.25 / (squares / (num_places - 1) + _SIMAM_LAMBDA)
    for part, beside in zip(torch.split(y, step), torch.split(shortcut, step), strict=True):
        weights = (part - mean).square_().mul_(scale).add_(0.5).sigmoid_()
        part.mul_(weights).add_(beside).relu_()


def _convolve(conv: nn.Module, x: torch.Tensor, *, into: torch.Tensor | None) -> torch.Tensor:
    """Channels last. into: may be overwritten by the result."""
    y: torch.Tensor = conv(x, into) if isinstance(conv, TiledConv) else conv(x)
    return y.contiguous(memory_format=torch.channels_last)


class _Front(nn.Module):
    def __init__(self, num_blocks: tuple[int, ...], channels: int) -> None:
        super().__init__()
        self.conv1: nn.Module = nn.Conv2d(1, channels, 3, 1, 1, bias=False)
        self.bn1: nn.Module = nn.BatchNorm2d(channels)
        for name, blocks in self._stages(num_blocks, channels):
            self.add_module(name, blocks)
        self._names = [f"layer{i + 1}" for i in range(len(num_blocks))]

    @staticmethod
    def _stages(num_blocks: tuple[int, ...], channels: int) -> Iterator[tuple[str, nn.Sequential]]:
        width = channels
        for i, count in enumerate(num_blocks):
            wider = channels * 2**i
            blocks = [_Block(width if j == 0 else wider, wider, 2 if i and j == 0 else 1) for j in range(count)]
            width = wider
            yield f"layer{i + 1}", nn.Sequential(*blocks)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.bn1(_convolve(self.conv1, x, into=None)).relu_()
        for name in self._names:
            spare: torch.Tensor | None = None
            for block in self.get_submodule(name).children():
                y = block(x, spare)
                x, spare = y, x if x.shape == y.shape else None
        return x


class _Pooling(nn.Module):
    """Mean and deviation over time, each place weighted by attention."""

    def __init__(self, num_in: int) -> None:
        super().__init__()
        self.attention = nn.Sequential(
            nn.Conv1d(num_in, 128, 1), nn.ReLU(), nn.BatchNorm1d(128), nn.Conv1d(128, num_in, 1), nn.Softmax(dim=2)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.flatten(1, 2)
        weights = self.attention(x)
        mean = (x * weights).sum(2)
        deviation = ((x.pow(2) * weights).sum(2) - mean.pow(2)).clamp(min=1e-5).sqrt()
        return torch.cat([mean, deviation], dim=1)


class SpeakerNet(nn.Module):
    """Log-mel [1, NUM_MELS, T] -> [1, EMBEDDING_SIZE]. Parameters are named as in the published file."""

    def __init__(self, num_blocks: tuple[int, ...] = NUM_BLOCKS, channels: int = CHANNELS) -> None:
        super().__init__()
        self.front = _Front(num_blocks, channels)
        pooled = channels * 8 * (NUM_MELS // 8)
        self.pooling = _Pooling(pooled)
        self.bottleneck = nn.Linear(2 * pooled, EMBEDDING_SIZE)

    def forward(self, mel: torch.Tensor) -> torch.Tensor:
        embedding: torch.Tensor = self.bottleneck(self.pooling(self.front(mel[:, None])))
        return embedding


def _fold_norms(net: SpeakerNet, *, is_tiled: bool) -> None:
    """Put each norm of two dimensions into the convolution before it. is_tiled: compute in tiles what can be."""
    # Without the convolutions, so that each is freed as it is replaced.
    for module in [module for module in net.modules() if not isinstance(module, nn.Conv2d)]:
        for name, norm_name in (("conv1", "bn1"), ("conv2", "bn2"), ("0", "1")):
            conv, norm = getattr(module, name, None), getattr(module, norm_name, None)
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                folded = fuse_conv_bn_eval(conv, norm)
                may_tile = folded.kernel_size == (3, 3) and folded.stride == (1, 1) and folded.in_channels > 1
                setattr(module, name, TiledConv(folded) if is_tiled and may_tile else _with_channels_last(folded))
                setattr(module, norm_name, nn.Identity())


def _with_channels_last(conv: nn.Conv2d) -> nn.Conv2d:
    weight = conv.weight.contiguous(memory_format=torch.channels_last)
    conv.weight = nn.Parameter(weight, requires_grad=False)
    return conv


class SpeakerEncoder:
    """A loaded speaker encoder."""

    def __init__(self, net: SpeakerNet, projection: nn.Linear) -> None:
        self._net, self._projection = net, projection

    @classmethod
    def load(cls, folder: Path, *, device: torch.device) -> SpeakerEncoder:
        """Load the two files as Zyphra publishes them. Raises: ModelLoadError."""
        with freed_at_once():
            net, projection = _read_modules(folder, "cpu")
            _fold_norms(net, is_tiled=device.type == "cpu")
            return cls(net.to(device), projection.to(device))

    @staticmethod
    def check(folder: Path) -> None:
        """Read what the two files hold, but not the weights themselves. Raises: ModelLoadError."""
        _read_modules(folder, "meta")

    @torch.inference_mode()
    def encode(self, voice: Voice) -> NDArray[np.float32]:
        """What a voice sounds like: float32 [128]. Raises: InvalidRequest for audio that cannot be used."""
        audio = prepare_reference(voice.audio, voice.sample_rate_hz, target_rate_hz=RATE_HZ)
        return self.encode_audio(torch.from_numpy(audio).to(self._projection.weight.device)).cpu().numpy()

    @torch.inference_mode()
    def encode_audio(self, audio: torch.Tensor) -> torch.Tensor:
        """float32 [S] at RATE_HZ -> [128]."""
        # Through 293 layers, a GPU's rounding of products to 10 bits would be heard.
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            embedding: torch.Tensor = self._projection(self._net(log_mel(audio)[None]))
        return embedding[0]


def fetch_command(folder: Path) -> str:
    """What brings the two files into a folder."""
    return f"hf download {REPO_ID} {ENCODER_NAME} {PROJECTION_NAME} --local-dir {shlex.quote(str(folder))}"


def _read_modules(folder: Path, device: Literal["cpu", "meta"]) -> tuple[SpeakerNet, nn.Linear]:
    """The network and its projection, in float32, as they are in the files; with "meta" their shapes alone.

    Raises: ModelLoadError.
    """
    with torch.device("meta"):
        net = SpeakerNet()
    _fill(net, _read(folder / ENCODER_NAME, device), folder / ENCODER_NAME)
    weights = _read(folder / PROJECTION_NAME, device)
    shape = tuple(weights["weight"].shape) if "weight" in weights else ()
    if len(shape) != 2:
        raise ModelLoadError(f"{folder / PROJECTION_NAME} holds no projection: copy it again")
    with torch.device("meta"):
        projection = nn.Linear(shape[1], shape[0])
    _fill(projection, weights, folder / PROJECTION_NAME)
    return net.eval().requires_grad_(False), projection.eval().requires_grad_(False)


def _read(path: Path, device: Literal["cpu", "meta"]) -> dict[str, torch.Tensor]:
    try:
        weights = torch.load(path, weights_only=True, map_location=device)
    except FileNotFoundError:
        raise ModelLoadError(
            f"{path} does not exist: {ENCODER_NAME} and {PROJECTION_NAME} of {REPO_ID} are needed to clone voices; get"
            f" them with: {fetch_command(path.parent)}"
        ) from None
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ModelLoadError(f"{path} cannot be read ({error}): copy it again") from error
    if not isinstance(weights, dict):
        raise ModelLoadError(f"{path} holds a {type(weights).__name__}, not tensors by name: copy it again")
    return weights


def _fill(module: nn.Module, weights: Mapping[str, torch.Tensor], path: Path) -> None:
    """Put a file's tensors into a module without memory, in float32."""
    state = {name: value.float() if value.is_floating_point() else value for name, value in weights.items()}
    try:
        module.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise ModelLoadError(f"{path} does not hold what this version reads ({error}): copy it again") from error
