"""The speaker encoder of Zonos: reference audio to one vector of 128 numbers, once for each voice.

A ResNet of 293 layers over a log-mel spectrogram at 16 kHz, its blocks weighted by SimAM; attentive statistics pooling
to 256 numbers; a linear discriminant projection to 128. Runs in float32 on the CPU unless it is told otherwise.
Source: Zyphra/Zonos-v0.1-speaker-embedding, two files of torch tensors; Yang et al. 2021 (SimAM), Okabe et al. 2018.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import nn

from declaim.engine.errors import ModelLoadError
from declaim.engine.request import Voice
from declaim.engine.voices import prepare_reference

ENCODER_NAME, PROJECTION_NAME = "ResNet293_SimAM_ASP_base.pt", "ResNet293_SimAM_ASP_base_LDA-128.pt"
RATE_HZ, N_FFT, WINDOW, HOP, NUM_MELS = 16_000, 512, 400, 160, 80
NUM_BLOCKS, CHANNELS, EMBEDDING_SIZE = (10, 20, 64, 3), 64, 256
_SIMAM_LAMBDA = 1e-4


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
        self.conv1 = nn.Conv2d(num_in, num_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(num_out)
        self.conv2 = nn.Conv2d(num_out, num_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(num_out)
        self.downsample = nn.Sequential()
        if stride != 1 or num_in != num_out:
            self.downsample = nn.Sequential(nn.Conv2d(num_in, num_out, 1, stride, bias=False), nn.BatchNorm2d(num_out))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(_simam(y) + self.downsample(x))


def _simam(x: torch.Tensor) -> torch.Tensor:
    distance = (x - x.mean(dim=(2, 3), keepdim=True)).pow(2)
    variance = distance.sum(dim=(2, 3), keepdim=True) / (x.shape[2] * x.shape[3] - 1)
    return x * torch.sigmoid(distance / (4 * (variance + _SIMAM_LAMBDA)) + 0.5)


class _Front(nn.Module):
    def __init__(self, num_blocks: tuple[int, ...], channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, channels, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
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
        x = F.relu(self.bn1(self.conv1(x)))
        for name in self._names:
            x = self.get_submodule(name)(x)
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
    """Log-mel [B, NUM_MELS, T] -> [B, EMBEDDING_SIZE]. Parameters are named as in the published file."""

    def __init__(self, num_blocks: tuple[int, ...] = NUM_BLOCKS, channels: int = CHANNELS) -> None:
        super().__init__()
        self.front = _Front(num_blocks, channels)
        pooled = channels * 8 * (NUM_MELS // 8)
        self.pooling = _Pooling(pooled)
        self.bottleneck = nn.Linear(2 * pooled, EMBEDDING_SIZE)

    def forward(self, mel: torch.Tensor) -> torch.Tensor:
        embedding: torch.Tensor = self.bottleneck(self.pooling(self.front(mel[:, None])))
        return embedding


class SpeakerEncoder:
    """A loaded speaker encoder."""

    def __init__(self, net: SpeakerNet, projection: nn.Linear) -> None:
        self._net, self._projection = net.eval(), projection.eval()

    @classmethod
    def load(cls, folder: Path, *, device: torch.device) -> SpeakerEncoder:
        """Load the two files as Zyphra publishes them. Raises: ModelLoadError."""
        with torch.device("meta"):
            net = SpeakerNet()
        _fill(net, folder / ENCODER_NAME)
        weights = _read(folder / PROJECTION_NAME)
        shape = tuple(weights["weight"].shape) if "weight" in weights else ()
        if len(shape) != 2:
            raise ModelLoadError(f"{folder / PROJECTION_NAME} holds no projection: copy it again")
        with torch.device("meta"):
            projection = nn.Linear(shape[1], shape[0])
        _fill(projection, folder / PROJECTION_NAME)
        return cls(net.to(device), projection.to(device))

    @torch.inference_mode()
    def encode(self, voice: Voice) -> NDArray[np.float32]:
        """What a voice sounds like: float32 [128]. Raises: InvalidRequest for audio that cannot be used."""
        audio = prepare_reference(voice.audio, voice.sample_rate_hz, target_rate_hz=RATE_HZ)
        return self.encode_audio(torch.from_numpy(audio).to(self._projection.weight.device)).cpu().numpy()

    @torch.inference_mode()
    def encode_audio(self, audio: torch.Tensor) -> torch.Tensor:
        """float32 [S] at RATE_HZ -> [128]."""
        embedding: torch.Tensor = self._projection(self._net(log_mel(audio)[None]))
        return embedding[0]


def _read(path: Path) -> dict[str, torch.Tensor]:
    try:
        weights = torch.load(path, weights_only=True, map_location="cpu")
    except FileNotFoundError:
        raise ModelLoadError(
            f"{path} does not exist: copy {ENCODER_NAME} and {PROJECTION_NAME} of Zyphra/Zonos-v0.1-speaker-embedding"
            " into this folder, to clone voices"
        ) from None
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ModelLoadError(f"{path} cannot be read ({error}): copy it again") from error
    if not isinstance(weights, dict):
        raise ModelLoadError(f"{path} holds a {type(weights).__name__}, not tensors by name: copy it again")
    return weights


def _fill(module: nn.Module, path: Path) -> None:
    """Put a file's tensors into a module without memory, in float32."""
    weights = {name: value.float() if value.is_floating_point() else value for name, value in _read(path).items()}
    try:
        module.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        raise ModelLoadError(f"{path} does not hold what this version reads ({error}): copy it again") from error
