"""The codec as it is trained: modules whose parameters have the names and shapes of the shipped file.

Activations are [B, T, C]. What the engine computes with these weights is in `engine/codec/lark.py`; a test holds the
two against each other.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from teacher import SPEAKERS
from torch import nn

from declaim.engine.codec.lark import PITCH_AHEAD, PITCH_BACK
from declaim.engine.codec.mel import slaney_mel_filters
from declaim.engine.codec.source_filter import SourceFilter, Timbre

KERNEL = 7
RESAMPLE_KERNEL = 4


@dataclass(frozen=True, slots=True)
class CodecShape:
    """What `codec/config.json` says; the defaults are the shipped codec's."""

    sampling_rate: int = 24_000
    hop_length: int = 960
    frame_rate: int = 25
    num_codebooks: int = 8
    codebook_size: int = 1024
    codebook_dim: int = 8
    hidden_size: int = 256
    encoder_hidden_size: int = 192
    convnext_mult: int = 3
    kernel_size: int = KERNEL
    n_fft: int = 1024
    stft_hop: int = 240
    n_mels: int = 80
    mel_fmin: int = 0
    mel_fmax: int = 12_000
    mel_log_floor: float = 1e-4
    mel_shift: float = 5.0
    mel_scale: float = 3.0
    synthesis_n_fft: int = 1200
    noise_n_fft: int = 480
    num_bands: int = 80
    pitch_hidden_size: int = 256
    log_magnitude_clip: float = 7.0
    contrast: float = 1.2  # this and the next: chosen by DNSMOS and by what a recogniser heard, benchmarks/LOG.md
    unvoiced_gain: float = 0.35
    left_context: int = 32
    envelope_context: int = 17
    right_context: int = 4
    timbres: tuple[Timbre, ...] = SPEAKERS


class Conv(nn.Conv1d):
    """[B, T, C] to [B, T / stride, out], zero-padded."""

    def __init__(self, inputs: int, outputs: int, *, kernel: int, stride: int = 1) -> None:
        super().__init__(inputs, outputs, kernel, stride=stride, padding=(kernel - stride + 1) // 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # One product over unfolded rows: on the CPU far faster than the convolution's own backward pass.
        (padding,), (kernel,), (stride,) = self.padding, self.kernel_size, self.stride
        rows = F.pad(x, (0, 0, int(padding), int(padding))).unfold(1, kernel, stride)
        return F.linear(rows.flatten(2), self.weight.flatten(1), self.bias)


class Upsample(nn.ConvTranspose1d):
    """[B, T, C] to [B, 2T, C]."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, RESAMPLE_KERNEL, stride=2, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class Depthwise(nn.Conv1d):
    """[B, T, C] to itself; seven shifted products."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, KERNEL, groups=channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        length = x.shape[1]
        padded = F.pad(x, (0, 0, KERNEL // 2, KERNEL // 2))
        taps = self.weight[:, 0].t()
        y = self.bias + padded[:, :length] * taps[0]
        for k in range(1, KERNEL):
            y = torch.addcmul(y, padded[:, k : k + length], taps[k])
        return y


class Block(nn.Module):
    """ConvNeXt: x + gamma * project(gelu(expand(norm(depthwise(x)))))."""

    def __init__(self, channels: int, mult: int) -> None:
        super().__init__()
        self.depthwise = Depthwise(channels)
        self.norm = nn.LayerNorm(channels)
        self.expand = nn.Linear(channels, mult * channels)
        self.project = nn.Linear(mult * channels, channels)
        self.gamma = nn.Parameter(torch.full((channels,), 0.3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.gamma * self.project(F.gelu(self.expand(self.norm(self.depthwise(x)))))


def _stage(num_blocks: int, channels: int, mult: int) -> nn.Sequential:
    return nn.Sequential(*(Block(channels, mult) for _ in range(num_blocks)))


class Encoder(nn.Module):
    """Scaled log-mel [B, 4T, mels] to frame vectors [B, T, C]."""

    def __init__(self, shape: CodecShape) -> None:
        super().__init__()
        narrow, wide, mult = shape.encoder_hidden_size, shape.hidden_size, shape.convnext_mult
        self.conv_in = Conv(shape.n_mels, narrow, kernel=KERNEL)
        self.stage1 = _stage(2, narrow, mult)
        self.down1 = Conv(narrow, narrow, kernel=RESAMPLE_KERNEL, stride=2)
        self.stage2 = _stage(2, narrow, mult)
        self.down2 = Conv(narrow, wide, kernel=RESAMPLE_KERNEL, stride=2)
        self.stage3 = _stage(1, wide, mult)
        self.proj = nn.Linear(wide, wide)

    def forward(self, mel: torch.Tensor) -> torch.Tensor:
        x = self.stage1(self.conv_in(mel))
        x = self.stage2(self.down1(x))
        return self.proj(self.stage3(self.down2(x)))


class Pitch(nn.Sequential):
    """The codebooks' rows of each frame [B, T, Q * dim] to [B, 4T, 2]: the logarithm of the pitch in hundreds of Hz,
    and a logit of whether there is any.
    """

    def __init__(self, shape: CodecShape) -> None:
        heard = (PITCH_BACK + 1 + PITCH_AHEAD) * shape.num_codebooks * shape.codebook_dim
        hidden = shape.pitch_hidden_size
        super().__init__(nn.Linear(heard, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, 8))

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        x = F.pad(vectors, (0, 0, PITCH_BACK, PITCH_AHEAD)).unfold(1, PITCH_BACK + 1 + PITCH_AHEAD, 1).flatten(2)
        first, second, out = self
        return out(F.gelu(second(F.gelu(first(x))))).unflatten(2, (4, 2)).flatten(1, 2)


@dataclass(frozen=True, slots=True, eq=False)
class Said:
    """What the decoder says of a hundred rows a second.

    harmonic, noise: log-magnitudes in bands [B, R, bands], as `source_filter.Rows` has them. log_pitch, voicing: float
    [B, R], of hundreds of Hz, and a logit.
    """

    harmonic: torch.Tensor
    noise: torch.Tensor
    log_pitch: torch.Tensor
    voicing: torch.Tensor


class Decoder(nn.Module):
    """Frame vectors [B, T, C] and the codebooks' rows [B, T, Q * dim] to what is said."""

    def __init__(self, shape: CodecShape) -> None:
        super().__init__()
        width, mult = shape.hidden_size, shape.convnext_mult
        self.conv_in = Conv(width, width, kernel=KERNEL)
        self.stage1 = _stage(2, width, mult)
        self.up1 = Upsample(width)
        self.stage2 = _stage(2, width, mult)
        self.up2 = Upsample(width)
        self.stage3 = _stage(4, width, mult)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 2 * shape.num_bands)
        self.pitch = Pitch(shape)

    def forward(self, z: torch.Tensor, vectors: torch.Tensor) -> Said:
        x = self.stage1(self.conv_in(z))
        x = self.stage2(self.up1(x))
        x = self.norm(self.stage3(self.up2(x)))
        harmonic, noise = self.head(x).chunk(2, dim=2)
        log_pitch, voicing = self.pitch(vectors).unbind(2)
        return Said(harmonic, noise, log_pitch, voicing)

    def future_taps(self) -> Iterator[tuple[nn.Parameter, tuple[slice | int, ...]]]:
        """The weights that look ahead and must stay zero, so that a frame needs 4 frames after it and no more.

        15 rows of 10 ms lie ahead of a frame's last sample: half an STFT window, and three blocks that look both ways.
        The pulses need as much: a whole window of them, and a pitch that is read from two frames more.
        """
        ahead = slice(KERNEL // 2 + 1, KERNEL)
        yield self.conv_in.weight, (slice(None), slice(None), ahead)
        for block in (*self.stage1, *self.stage2, self.stage3[0]):
            yield block.depthwise.weight, (slice(None), slice(None), ahead)

    @torch.no_grad()
    def clear_future(self) -> None:
        for weight, index in self.future_taps():
            weight[index] = 0.0


class Quantizer(nn.Module):
    """One residual step: the codebook's row whose direction is nearest."""

    def __init__(self, shape: CodecShape) -> None:
        super().__init__()
        self.codebook = nn.Parameter(torch.randn(shape.codebook_size, shape.codebook_dim))
        self.in_proj = nn.Linear(shape.hidden_size, shape.codebook_dim)
        self.out_proj = nn.Linear(shape.codebook_dim, shape.hidden_size)

    def nearest(self, projected: torch.Tensor) -> torch.Tensor:
        """[..., dim] to codes int64 [...]."""
        return (projected @ F.normalize(self.codebook, dim=1).t()).argmax(-1)

    def vectors(self, codes: torch.Tensor) -> torch.Tensor:
        return self.out_proj(self.codebook[codes])


@dataclass(frozen=True, slots=True, eq=False)
class Quantized:
    """z: [B, T, C], with the gradient of what was quantized; codes: int64 [B, T, Q]; loss: codebook and commitment."""

    z: torch.Tensor
    vectors: torch.Tensor  # [B, T, Q * dim], the codebooks' rows, with the gradient of what was quantized
    codes: torch.Tensor
    loss: torch.Tensor
    projected: tuple[torch.Tensor, ...]  # what each codebook was asked for, detached: [B * T, dim]


class Codec(nn.Module):
    def __init__(self, shape: CodecShape) -> None:
        super().__init__()
        self.shape = shape
        self.encoder = Encoder(shape)
        self.decoder = Decoder(shape)
        self.quantizer = nn.ModuleList(Quantizer(shape) for _ in range(shape.num_codebooks))
        filters = slaney_mel_filters(
            shape.sampling_rate, shape.n_fft, num_mels=shape.n_mels, fmin=shape.mel_fmin, fmax=shape.mel_fmax
        )
        self.register_buffer("mel_filters", filters, persistent=False)
        self.register_buffer("window", torch.hann_window(shape.n_fft), persistent=False)

    @classmethod
    def load(cls, folder: Path) -> Codec:
        raw = json.loads((folder / "config.json").read_text())
        known = CodecShape.__dataclass_fields__
        values = {name: value for name, value in raw.items() if name in known}
        timbres = tuple(Timbre(**timbre) for timbre in raw["timbres"])
        codec = cls(CodecShape(**(values | {"timbres": timbres})))
        codec.load_state_dict({name: t.float() for name, t in load_file(folder / "model.safetensors").items()})
        return codec

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        config = {"model_type": "lark_codec"} | asdict(self.shape)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        weights = {name: t.detach().to(torch.float16).contiguous() for name, t in self.state_dict().items()}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    def log_mel(self, audio: torch.Tensor) -> torch.Tensor:
        """[B, S], S a multiple of the hop, to scaled log-mel [B, S / stft_hop, mels]."""
        shape = self.shape
        spectrum = torch.stft(audio, shape.n_fft, shape.stft_hop, window=self.window, return_complex=True)
        mel = spectrum.abs().transpose(1, 2)[:, :-1] @ self.mel_filters
        return (mel.clamp(min=shape.mel_log_floor).log() + shape.mel_shift) / shape.mel_scale

    def quantize(self, z: torch.Tensor) -> Quantized:
        """Residual quantization with the straight-through gradient."""
        residual, total = z, torch.zeros_like(z)
        loss, codes, projected, vectors = z.new_zeros(()), [], [], []
        for quantizer in self.quantizer:
            e = quantizer.in_proj(residual)
            code = quantizer.nearest(e)
            row = quantizer.codebook[code]
            e_unit, row_unit = F.normalize(e, dim=-1), F.normalize(row, dim=-1)
            loss = loss + F.mse_loss(e_unit.detach(), row_unit) + 0.25 * F.mse_loss(e_unit, row_unit.detach())
            vectors.append(e + (row - e).detach())
            out = quantizer.out_proj(vectors[-1])
            # Rows carry the length too: they follow what they stand for.
            loss = loss + 0.1 * F.mse_loss(row, e.detach()) + 0.025 * F.mse_loss(e, row.detach())
            total = total + out
            residual = residual - out
            codes.append(code)
            projected.append(e.detach().flatten(0, 1))
        return Quantized(total, torch.cat(vectors, dim=-1), torch.stack(codes, dim=-1), loss, tuple(projected))

    def vectors(self, codes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes int64 [B, T, Q] to the decoder's two inputs, [B, T, C] and [B, T, Q * dim]."""
        rows = [quantizer.codebook[codes[..., k]] for k, quantizer in enumerate(self.quantizer)]
        total = self.quantizer[0].out_proj(rows[0])
        for quantizer, row in zip(self.quantizer[1:], rows[1:], strict=True):
            total = total + quantizer.out_proj(row)
        return total, torch.cat(rows, dim=-1)

    def source_filter(self) -> SourceFilter:
        """What makes samples of what the decoder says, in the arithmetic of the parameters."""
        shape, parameter = self.shape, self.decoder.head.weight
        return SourceFilter(
            sample_rate_hz=shape.sampling_rate,
            n_fft=shape.synthesis_n_fft,
            noise_n_fft=shape.noise_n_fft,
            hop=shape.stft_hop,
            num_bands=shape.num_bands,
            timbres=shape.timbres,
            contrast=shape.contrast,
            unvoiced_gain=shape.unvoiced_gain,
            log_magnitude_clip=shape.log_magnitude_clip,
            device=parameter.device,
            dtype=parameter.dtype,
        )

    @torch.no_grad()
    def revive(self, projected: tuple[torch.Tensor, ...], used: torch.Tensor) -> int:
        """Put rows that nothing chose on vectors that were asked for; used: bool [Q, size]. Returns how many."""
        revived = 0
        for quantizer, asked, alive in zip(self.quantizer, projected, used, strict=True):
            dead = (~alive).nonzero()[:, 0].to(asked.device)
            chosen = torch.randint(len(asked), (len(dead),), device=asked.device)
            quantizer.codebook[dead] = asked[chosen]
            revived += len(dead)
        return revived


def k_means(vectors: torch.Tensor, count: int, *, rounds: int = 10) -> torch.Tensor:
    """[N, dim] to [count, dim] centres by direction (spherical k-means): how the codebooks begin."""
    centres = vectors[torch.randperm(len(vectors))[:count]]
    if len(centres) < count:
        centres = centres[torch.randint(len(centres), (count,))]
        centres = centres + 0.01 * torch.randn_like(centres)
    for _ in range(rounds):
        nearest = (F.normalize(vectors, dim=1) @ F.normalize(centres, dim=1).t()).argmax(1)
        sums = torch.zeros_like(centres).index_add_(0, nearest, vectors)
        counts = torch.bincount(nearest, minlength=count)
        centres = torch.where((counts > 0)[:, None], sums / counts.clamp(min=1)[:, None], centres)
    return centres
