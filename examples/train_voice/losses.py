"""What the codec's audio is judged by: spectra at several resolutions, and two kinds of discriminators.

The discriminators are small, and each step asks one of each kind at random: on a CPU they would otherwise take most of
the time. Sources: Kong et al., HiFi-GAN, 2020 (multi-period, feature matching); Defossez et al., EnCodec, 2022, and
Kumar et al., DAC, 2023 (complex spectrograms in bands).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from declaim.engine.codec.mel import slaney_mel_filters

RESOLUTIONS = ((2048, 512, 80), (1024, 256, 80), (512, 128, 40), (256, 64, 20))  # n_fft, hop, mels
PERIODS = (2, 3, 5, 7, 11)
FLOOR = 1e-4
LEVEL = 0.1  # of speech, about: what the discriminators of samples hear has a level of 1
SLOPE = 0.1  # of leaky ReLU


class SpectralLoss(nn.Module):
    """Mean distance of log-mel and of linear magnitudes at four resolutions."""

    def __init__(self, sample_rate_hz: int) -> None:
        super().__init__()
        for n_fft, _, mels in RESOLUTIONS:
            filters = slaney_mel_filters(sample_rate_hz, n_fft, num_mels=mels, fmin=0, fmax=sample_rate_hz / 2)
            self.register_buffer(f"filters{n_fft}", filters, persistent=False)
            self.register_buffer(f"window{n_fft}", torch.hann_window(n_fft), persistent=False)

    def forward(self, made: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        total = made.new_zeros(())
        for n_fft, hop, _ in RESOLUTIONS:
            window, filters = getattr(self, f"window{n_fft}"), getattr(self, f"filters{n_fft}")
            a, b = (torch.stft(x, n_fft, hop, window=window, return_complex=True).abs() for x in (made, real))
            mel_a, mel_b = ((x.transpose(1, 2) @ filters).clamp(min=FLOOR).log() for x in (a, b))
            total = total + F.l1_loss(mel_a, mel_b) + F.l1_loss(a.clamp(min=1e-3).log(), b.clamp(min=1e-3).log()) / 2
            total = total + (a - b).norm() / b.norm().clamp(min=1e-3) / 2
        return total / len(RESOLUTIONS)


class PeriodDiscriminator(nn.Module):
    """Every p-th sample in a column of its own."""

    def __init__(self, period: int, widths: tuple[int, ...] = (12, 32, 64, 96)) -> None:
        super().__init__()
        self.period = period
        ins = (1, *widths[:-1])
        self.layers = nn.ModuleList(
            nn.Conv2d(i, o, (5, 1), stride=(3, 1), padding=(2, 0)) for i, o in zip(ins, widths, strict=True)
        )
        self.out = nn.Conv2d(widths[-1], 1, (3, 1), padding=(1, 0))
        _begin(self)

    def forward(self, audio: torch.Tensor) -> list[torch.Tensor]:
        audio = audio[:, : audio.shape[1] // self.period * self.period] / LEVEL
        return _features(audio.view(len(audio), 1, -1, self.period), self.layers, self.out)


class BandDiscriminator(nn.Module):
    """The complex spectrogram, in four bands that share nothing."""

    def __init__(self, n_fft: int, hop: int, width: int = 16) -> None:
        super().__init__()
        self.n_fft, self.hop = n_fft, hop
        bins = n_fft // 2 + 1
        self.bands = tuple((int(a * bins), int(b * bins)) for a, b in ((0, 0.1), (0.1, 0.25), (0.25, 0.5), (0.5, 1)))
        strides = (2, 2, 1, 1)
        self.layers = nn.ModuleList(
            nn.ModuleList(
                nn.Conv2d(2 if i == 0 else width, width, (3, 5), stride=(1, stride), padding=(1, 2))
                for i, stride in enumerate(strides)
            )
            for _ in self.bands
        )
        self.outs = nn.ModuleList(nn.Conv2d(width, 1, 3, padding=1) for _ in self.bands)
        _begin(self)
        self.register_buffer("window", torch.hann_window(n_fft), persistent=False)

    def forward(self, audio: torch.Tensor) -> list[torch.Tensor]:
        spectrum = torch.stft(audio, self.n_fft, self.hop, window=self.window, return_complex=True)
        spectrum = spectrum / (spectrum.abs() + 1e-4).sqrt()  # square root of the magnitude: quiet bins count too
        x = torch.view_as_real(spectrum).permute(0, 3, 2, 1)
        found: list[torch.Tensor] = []
        for (low, high), layers, out in zip(self.bands, self.layers, self.outs, strict=True):
            found += _features(x[..., low:high], layers, out)
        return found


def _begin(judge: nn.Module) -> None:
    """Weights that keep the level from layer to layer; torch's own lose most of it, and then nothing is learned.

    Verdicts begin near 0.
    """
    for layer in judge.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, a=SLOPE)
            nn.init.zeros_(layer.bias)
            if layer.out_channels == 1:
                with torch.no_grad():
                    layer.weight.mul_(0.1)


def _features(x: torch.Tensor, layers: nn.ModuleList, out: nn.Module) -> list[torch.Tensor]:
    features = []
    for layer in layers:
        x = F.leaky_relu(layer(x), SLOPE)
        features.append(x)
    return [*features, out(x)]


def is_verdict(feature: torch.Tensor) -> bool:
    return feature.shape[1] == 1


def discriminator_loss(real: list[torch.Tensor], made: list[torch.Tensor]) -> torch.Tensor:
    """Least squares: 1 for real audio, 0 for made."""
    pairs = [(r, m) for r, m in zip(real, made, strict=True) if is_verdict(r)]
    return torch.stack([((1 - r) ** 2).mean() + (m**2).mean() for r, m in pairs]).mean()


def generator_loss(real: list[torch.Tensor], made: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """How far from real the discriminator holds it; and the mean relative distance of its features."""
    verdicts = torch.stack([((1 - m) ** 2).mean() for m in made if is_verdict(m)]).mean()
    features = [
        (r.detach() - m).abs().mean() / r.detach().abs().mean().clamp(min=1e-4)
        for r, m in zip(real, made, strict=True)
        if not is_verdict(r)
    ]
    return verdicts, torch.stack(features).mean()


def discriminators() -> nn.ModuleDict:
    return nn.ModuleDict(
        {
            "period": nn.ModuleList(PeriodDiscriminator(period) for period in PERIODS),
            "band": nn.ModuleList(BandDiscriminator(n_fft, hop) for n_fft, hop, _ in RESOLUTIONS[:3]),
        }
    )
