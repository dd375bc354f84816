"""The codec of the embedded voice, lark: 25 frames a second of 8 codes to 24 kHz samples, and back.

A network says from the codes what a hundred rows a second hold: two envelopes, and from a smaller one the pitch;
`source_filter` makes samples of these. Owns the networks' arithmetic and the reading of its folder. Activations are
[B, T, C], so that nearly all of the work is one matrix product after another and nothing is transposed; so are the
transposed convolutions. Never keeps anything between two calls.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F

from declaim.engine.codec.base import CodecRecipe
from declaim.engine.codec.mel import slaney_mel_filters
from declaim.engine.codec.source_filter import Rows, SourceFilter, Timbre
from declaim.engine.errors import ModelLoadError
from declaim.engine.safetensors_io import (
    read_integer,
    read_json,
    read_number,
    read_tensors,
    refuse_leftovers,
    take_tensor,
)
from declaim.engine.spec import CodecSpec

# Four blocks of kernel 7 and half an STFT window reach 15 rows of the last stage, four of which make a frame.
_LAST_STAGE_MARGIN = 4

# What the architecture fixes and config.json does not say.
_DECODER_STAGES = (2, 2, 4)
_ENCODER_STAGES = (2, 2, 1)
_UPSAMPLING = 4  # two stages of two
_RESAMPLE_KERNEL = 4
_NORM_EPS = 1e-5
# Frames before and after one whose codes its pitch is read from.
PITCH_BACK, PITCH_AHEAD = 7, 2
PITCH_UNIT_HZ = 100.0  # the pitch network says the logarithm of a multiple of it
# The noise of a frame is drawn by its codes and those before it: any window that holds it draws the same.
_NOISE_FRAMES = 3
_MIX = 6364136223846793005  # Knuth's multiplier for 64 bits

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class _Config:
    """config.json, checked."""

    sampling_rate: int
    hop_length: int
    num_codebooks: int
    codebook_size: int
    codebook_dim: int
    hidden_size: int
    encoder_hidden_size: int
    convnext_mult: int
    kernel_size: int
    n_fft: int
    stft_hop: int
    n_mels: int
    mel_fmin: float
    mel_fmax: float
    mel_log_floor: float
    mel_shift: float
    mel_scale: float
    synthesis_n_fft: int
    noise_n_fft: int
    num_bands: int
    pitch_hidden_size: int
    log_magnitude_clip: float
    contrast: float
    unvoiced_gain: float
    left_context: int
    envelope_context: int  # frames before one that its envelopes need: fewer than its phase does
    right_context: int


def _read_config(path: Path) -> tuple[_Config, tuple[Timbre, ...]]:
    raw = read_json(path)
    values = {
        field.name: (read_integer if field.type == "int" else read_number)(raw, field.name, path)
        for field in fields(_Config)
    }
    config = _Config(**values)  # type: ignore[arg-type]
    if config.hop_length != _UPSAMPLING * config.stft_hop:
        raise ModelLoadError(
            f"{path}: hop_length is {config.hop_length}, it must be {_UPSAMPLING} times stft_hop "
            f"({config.stft_hop}): this folder is not a lark codec's"
        )
    if config.kernel_size % 2 == 0 or config.n_fft % 2 or config.n_fft < 2 * config.stft_hop:
        raise ModelLoadError(
            f"{path}: kernel_size {config.kernel_size} must be odd, n_fft {config.n_fft} even and at least "
            f"twice stft_hop ({config.stft_hop}): this folder is not a lark codec's"
        )
    if config.mel_scale == 0 or config.mel_log_floor <= 0 or not 0 <= config.mel_fmin < config.mel_fmax:
        raise ModelLoadError(
            f"{path}: mel_scale {config.mel_scale} must not be 0, mel_log_floor {config.mel_log_floor} must "
            f"be positive, mel_fmin {config.mel_fmin} below mel_fmax {config.mel_fmax} and not negative: "
            f"this folder is not a lark codec's"
        )
    for name, length in (("synthesis_n_fft", config.synthesis_n_fft), ("noise_n_fft", config.noise_n_fft)):
        if length < 2 * config.stft_hop or length % config.stft_hop or length > config.synthesis_n_fft:
            raise ModelLoadError(
                f"{path}: {name} is {length}, it must be a multiple of stft_hop ({config.stft_hop}), two at least, and "
                "noise_n_fft no longer than synthesis_n_fft"
            )
    if config.envelope_context > config.left_context or config.left_context < PITCH_BACK + _NOISE_FRAMES:
        raise ModelLoadError(
            f"{path}: left_context is {config.left_context}, it must be at least envelope_context "
            f"({config.envelope_context}) and {PITCH_BACK + _NOISE_FRAMES}"
        )
    return config, _read_timbres(raw, path)


def _read_timbres(raw: dict[str, object], path: Path) -> tuple[Timbre, ...]:
    entries = raw.get("timbres")
    if not isinstance(entries, list) or not entries:
        raise ModelLoadError(f"{path}: timbres must be a list of {{name, pitch, warp, gain}}, one at least")
    timbres = []
    for entry in entries:
        if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
            raise ModelLoadError(f"{path}: timbres holds {entry!r}: each must be {{name, pitch, warp, gain}}")
        pitch, warp, gain = (read_number(entry, name, path) for name in ("pitch", "warp", "gain"))
        if not (0.25 <= pitch <= 4.0 and 0.5 <= warp <= 2.0 and 0.0 < gain <= 4.0):
            raise ModelLoadError(
                f"{path}: timbres: {entry['name']!r} has pitch {pitch:g}, warp {warp:g}, gain {gain:g}: they must lie "
                "in 0.25 .. 4, 0.5 .. 2 and above 0 .. 4"
            )
        timbres.append(Timbre(str(entry["name"]), pitch, warp, gain))
    return tuple(timbres)


class _Weights:
    """The file's tensors, handed out once each in one dtype."""

    def __init__(self, path: Path, *, device: torch.device, with_encoder: bool) -> None:
        self._path = path
        self._device = device
        self._tensors = read_tensors(path, skip_prefixes=() if with_encoder else ("encoder.",))

    def take(self, name: str, *shape: int) -> torch.Tensor:
        """float32, a copy of its own: folding is done before rounding to the arithmetic's dtype."""
        tensor = take_tensor(self._tensors, name, shape=shape, path=self._path)
        return tensor.to(self._device, torch.float32, copy=True)

    def finish(self) -> None:
        refuse_leftovers(self._tensors, self._path)


@dataclass(frozen=True, slots=True)
class _Linear:
    """y = x @ weight.T + bias; weight [out, in]."""

    weight: torch.Tensor
    bias: torch.Tensor

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)


def _packed(weight: torch.Tensor, bias: torch.Tensor) -> _Linear:
    return _Linear(_input_major(weight), bias)


def _input_major(weight: torch.Tensor) -> torch.Tensor:
    """The same [out, in] matrix, stored [in, out]: half the time of a product with 16 to 60 rows on the CPU."""
    return weight.t().contiguous().t()


@dataclass(frozen=True, slots=True)
class _Conv:
    """A dense convolution over time as one matrix product; [B, T, C] to [B, T / stride, out]."""

    linear: _Linear
    kernel: int
    stride: int
    padding: int

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        rows = F.pad(x, (0, 0, self.padding, self.padding)).unfold(1, self.kernel, self.stride)
        return self.linear(rows.flatten(2))


@dataclass(frozen=True, slots=True)
class _Upsample:
    """Transposed convolution, kernel 4, stride 2, padding 1; [B, T, C] to [B, 2T, out].

    Row 2m is tap 1 of row m and tap 3 of row m - 1; row 2m + 1 is tap 2 of row m and tap 0 of row m + 1.
    `centre` holds taps 1 and 2, `sides` taps 3 and 0.
    """

    centre: _Linear
    sides: torch.Tensor

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        y = self.centre(x)
        sides = F.linear(x, self.sides)
        half = y.shape[2] // 2
        y[:, 1:, :half] += sides[:, :-1, :half]
        y[:, :-1, half:] += sides[:, 1:, half:]
        return y.view(batch, 2 * length, half)


@dataclass(frozen=True, slots=True)
class _Block:
    """x + project(gelu(expand(layer_norm(depthwise(x))))), the block's gamma folded into project."""

    taps: torch.Tensor  # [kernel, C]
    depthwise_bias: torch.Tensor
    norm_weight: torch.Tensor
    norm_bias: torch.Tensor
    expand: _Linear
    project: _Linear

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        length, channels = x.shape[1:]
        kernel = len(self.taps)
        padded = F.pad(x, (0, 0, kernel // 2, kernel // 2))
        # Shifted products: at these widths faster than conv1d, which would transpose twice.
        y = torch.addcmul(self.depthwise_bias, padded[:, :length], self.taps[0])
        for k in range(1, kernel):
            y.addcmul_(padded[:, k : k + length], self.taps[k])
        y = F.layer_norm(y, (channels,), self.norm_weight, self.norm_bias, _NORM_EPS)
        return self.project(F.gelu(self.expand(y))).add_(x)


def _linear(weights: _Weights, name: str, dtype: torch.dtype, *, inputs: int, outputs: int) -> _Linear:
    weight = weights.take(f"{name}.weight", outputs, inputs)
    return _packed(weight.to(dtype), weights.take(f"{name}.bias", outputs).to(dtype))


def _conv(
    weights: _Weights,
    name: str,
    dtype: torch.dtype,
    *,
    inputs: int,
    outputs: int,
    kernel: int,
    stride: int = 1,
) -> _Conv:
    weight = weights.take(f"{name}.weight", outputs, inputs, kernel).flatten(1)
    linear = _packed(weight.to(dtype), weights.take(f"{name}.bias", outputs).to(dtype))
    return _Conv(linear, kernel=kernel, stride=stride, padding=(kernel - stride + 1) // 2)


def _upsample(weights: _Weights, name: str, dtype: torch.dtype, *, channels: int) -> _Upsample:
    weight = weights.take(f"{name}.weight", channels, channels, _RESAMPLE_KERNEL)  # [in, out, tap]
    taps = weight.permute(2, 1, 0).to(dtype)
    bias = weights.take(f"{name}.bias", channels).to(dtype)
    return _Upsample(
        centre=_packed(torch.cat([taps[1], taps[2]]), torch.cat([bias, bias])),
        sides=_input_major(torch.cat([taps[3], taps[0]])),
    )


def _stage(
    weights: _Weights, name: str, dtype: torch.dtype, *, num_blocks: int, channels: int, config: _Config
) -> tuple[_Block, ...]:
    names = (f"{name}.{i}" for i in range(num_blocks))
    return tuple(_block(weights, block, dtype, channels=channels, config=config) for block in names)


def _block(weights: _Weights, name: str, dtype: torch.dtype, *, channels: int, config: _Config) -> _Block:
    inner = config.convnext_mult * channels
    taps = weights.take(f"{name}.depthwise.weight", channels, 1, config.kernel_size)[:, 0].t()
    gamma = weights.take(f"{name}.gamma", channels)
    project = gamma[:, None] * weights.take(f"{name}.project.weight", channels, inner)
    project_bias = gamma * weights.take(f"{name}.project.bias", channels)
    return _Block(
        taps=taps.contiguous().to(dtype),
        depthwise_bias=weights.take(f"{name}.depthwise.bias", channels).to(dtype),
        norm_weight=weights.take(f"{name}.norm.weight", channels).to(dtype),
        norm_bias=weights.take(f"{name}.norm.bias", channels).to(dtype),
        expand=_linear(weights, f"{name}.expand", dtype, inputs=channels, outputs=inner),
        project=_packed(project.to(dtype), project_bias.to(dtype)),
    )


def _apply(blocks: tuple[_Block, ...], x: torch.Tensor) -> torch.Tensor:
    for block in blocks:
        x = block(x)
    return x


@dataclass(frozen=True, slots=True)
class _Decoder:
    conv_in: _Conv
    stage1: tuple[_Block, ...]
    up1: _Upsample
    stage2: tuple[_Block, ...]
    up2: _Upsample
    stage3: tuple[_Block, ...]
    norm_weight: torch.Tensor
    norm_bias: torch.Tensor
    head: _Linear

    def __call__(self, z: torch.Tensor, rows: slice) -> torch.Tensor:
        """Frame vectors [B, T, C] to two envelopes side by side, log-magnitudes [B, N, 2 * bands].

        rows: the N of the 4T rows that the last stage computes; it is most of the work.
        """
        x = _apply(self.stage1, self.conv_in(z))
        x = _apply(self.stage2, self.up1(x))
        x = _apply(self.stage3, self.up2(x)[:, rows])
        x = F.layer_norm(x, x.shape[2:], self.norm_weight, self.norm_bias, _NORM_EPS)
        return self.head(x)


@dataclass(frozen=True, slots=True)
class _Pitch:
    """In float64: summed over a second to a phase, its rounding would be heard where two windows meet."""

    layers: tuple[_Linear, _Linear, _Linear]

    def __call__(self, vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The codebooks' rows of each frame [B, T, Q * dim] to Hz, float64 [B, 4T], and whether there is any pitch."""
        padded = F.pad(vectors.double(), (0, 0, PITCH_BACK, PITCH_AHEAD))
        x = padded.unfold(1, PITCH_BACK + 1 + PITCH_AHEAD, 1).flatten(2)
        first, second, out = self.layers
        y = out(F.gelu(second(F.gelu(first(x))))).view(len(vectors), -1, 2)
        return PITCH_UNIT_HZ * y[..., 0].clamp(-4.0, 4.0).exp(), y[..., 1] > 0.0


@dataclass(frozen=True, slots=True)
class _Encoder:
    mel_filters: torch.Tensor  # [bins, mels]
    conv_in: _Conv
    stage1: tuple[_Block, ...]
    down1: _Conv
    stage2: tuple[_Block, ...]
    down2: _Conv
    stage3: tuple[_Block, ...]
    proj: _Linear
    in_projs: tuple[_Linear, ...]

    def __call__(self, mel: torch.Tensor) -> torch.Tensor:
        """Log-mel [B, 4T, mels] to frame vectors [B, T, C], not yet quantised."""
        x = _apply(self.stage1, self.conv_in(mel))
        x = _apply(self.stage2, self.down1(x))
        x = _apply(self.stage3, self.down2(x))
        return self.proj(x)


def _load_decoder(weights: _Weights, config: _Config, dtype: torch.dtype) -> _Decoder:
    width = config.hidden_size
    stage1, stage2, stage3 = (
        _stage(weights, f"decoder.stage{i}", dtype, num_blocks=n, channels=width, config=config)
        for i, n in enumerate(_DECODER_STAGES, start=1)
    )
    return _Decoder(
        conv_in=_conv(weights, "decoder.conv_in", dtype, inputs=width, outputs=width, kernel=config.kernel_size),
        stage1=stage1,
        up1=_upsample(weights, "decoder.up1", dtype, channels=width),
        stage2=stage2,
        up2=_upsample(weights, "decoder.up2", dtype, channels=width),
        stage3=stage3,
        norm_weight=weights.take("decoder.norm.weight", width).to(dtype),
        norm_bias=weights.take("decoder.norm.bias", width).to(dtype),
        head=_linear(weights, "decoder.head", dtype, inputs=width, outputs=2 * config.num_bands),
    )


def _load_pitch(weights: _Weights, config: _Config) -> _Pitch:
    heard = (PITCH_BACK + 1 + PITCH_AHEAD) * config.num_codebooks * config.codebook_dim
    hidden = config.pitch_hidden_size
    sizes = ((heard, hidden), (hidden, hidden), (hidden, 2 * _UPSAMPLING))
    first, second, out = (
        _linear(weights, f"decoder.pitch.{i}", torch.float64, inputs=inputs, outputs=outputs)
        for i, (inputs, outputs) in enumerate(sizes)
    )
    return _Pitch((first, second, out))


def _load_encoder(weights: _Weights, config: _Config, in_projs: tuple[_Linear, ...]) -> _Encoder:
    """Always float32: a voice is encoded once, and a wrong code would stay in every request of that voice."""
    narrow, wide, dtype = config.encoder_hidden_size, config.hidden_size, torch.float32
    stage1, stage2, stage3 = (
        _stage(weights, f"encoder.stage{i}", dtype, num_blocks=n, channels=channels, config=config)
        for i, (n, channels) in enumerate(zip(_ENCODER_STAGES, (narrow, narrow, wide), strict=True), start=1)
    )
    kernel = _RESAMPLE_KERNEL
    filters = slaney_mel_filters(
        config.sampling_rate,
        config.n_fft,
        num_mels=config.n_mels,
        fmin=config.mel_fmin,
        fmax=config.mel_fmax,
    )
    return _Encoder(
        mel_filters=filters.to(in_projs[0].weight.device),
        conv_in=_conv(
            weights, "encoder.conv_in", dtype, inputs=config.n_mels, outputs=narrow, kernel=config.kernel_size
        ),
        stage1=stage1,
        down1=_conv(weights, "encoder.down1", dtype, inputs=narrow, outputs=narrow, kernel=kernel, stride=2),
        stage2=stage2,
        down2=_conv(weights, "encoder.down2", dtype, inputs=narrow, outputs=wide, kernel=kernel, stride=2),
        stage3=stage3,
        proj=_linear(weights, "encoder.proj", dtype, inputs=wide, outputs=wide),
        in_projs=in_projs,
    )


class LarkCodec:
    """The lark codec; see `Codec`. `load` makes one."""

    def __init__(
        self,
        spec: CodecSpec,
        *,
        config: _Config,
        codebooks: torch.Tensor,
        out_projs: tuple[_Linear, ...],
        decoder: _Decoder,
        pitch: _Pitch,
        source_filter: SourceFilter,
        encoder: _Encoder | None,
    ) -> None:
        self._spec = spec
        self._config = config
        self._codebooks = codebooks  # float32 [Q, codebook_size, codebook_dim]
        self._out_projs = out_projs  # float32, codebook_dim to C
        self._decoder = decoder
        self._pitch = pitch
        self._source_filter = source_filter
        self._encoder = encoder
        self._dtype = decoder.head.weight.dtype
        # The sum over codebooks of their projections is one product with the projections side by side.
        self._out_proj = _packed(
            torch.cat([proj.weight for proj in out_projs], dim=1),
            torch.stack([proj.bias for proj in out_projs]).sum(0),
        )
        self._window = torch.hann_window(config.n_fft, device=codebooks.device)

    @classmethod
    def load(cls, recipe: CodecRecipe, *, with_encoder: bool = False) -> LarkCodec:
        """Read the folder of `recipe`; without `with_encoder` the encoder's weights are not read.

        Raises: ModelLoadError.
        """
        folder = Path(recipe.folder)
        config, timbres = _read_config(folder / "config.json")
        device = torch.device(recipe.device)
        weights = _Weights(folder / "model.safetensors", device=device, with_encoder=with_encoder)
        num_codebooks, size, dim = config.num_codebooks, config.codebook_size, config.codebook_dim
        width, names = config.hidden_size, [f"quantizer.{k}" for k in range(num_codebooks)]
        codebooks = torch.stack([weights.take(f"{name}.codebook", size, dim) for name in names])
        out_projs, in_projs = (
            tuple(_linear(weights, f"{name}.{way}", torch.float32, inputs=i, outputs=o) for name in names)
            for way, i, o in (("out_proj", dim, width), ("in_proj", width, dim))
        )
        decoder, pitch = _load_decoder(weights, config, _DTYPES[recipe.dtype]), _load_pitch(weights, config)
        encoder = _load_encoder(weights, config, in_projs) if with_encoder else None
        weights.finish()
        spec = CodecSpec(
            sample_rate_hz=config.sampling_rate,
            hop=config.hop_length,
            left=config.left_context,
            right=config.right_context,
            num_codebooks=num_codebooks,
            codebook_size=size,
            timbres=tuple(timbre.name for timbre in timbres),
        )
        source_filter = SourceFilter(
            sample_rate_hz=config.sampling_rate,
            n_fft=config.synthesis_n_fft,
            noise_n_fft=config.noise_n_fft,
            hop=config.stft_hop,
            num_bands=config.num_bands,
            timbres=timbres,
            contrast=config.contrast,
            unvoiced_gain=config.unvoiced_gain,
            log_magnitude_clip=config.log_magnitude_clip,
            device=device,
        )
        return cls(
            spec,
            config=config,
            codebooks=codebooks,
            out_projs=out_projs,
            decoder=decoder,
            pitch=pitch,
            source_filter=source_filter,
            encoder=encoder,
        )

    @property
    def spec(self) -> CodecSpec:
        return self._spec

    @property
    def device(self) -> torch.device:
        return self._codebooks.device

    @torch.inference_mode()
    def decode(self, codes: torch.Tensor, *, first: int = 0, last: int | None = None, timbre: int = 0) -> torch.Tensor:
        """See `Codec.decode`. On the CPU an item's samples are the same bits in any batch."""
        stop = codes.shape[2] if last is None else last
        if codes.device.type == "cpu" and len(codes) > 1:
            # The matrix product picks its kernel by the number of rows, and with it the order of its sums.
            return torch.cat([self._decode(codes[i : i + 1], first, stop, timbre) for i in range(len(codes))])
        return self._decode(codes, first, stop, timbre)

    def _decode(self, codes: torch.Tensor, first: int, last: int, timbre: int) -> torch.Tensor:
        # [B, T, Q, dim]. Indexed per codebook: an id beyond its codebook raises and reads no neighbour's row.
        codebook = torch.arange(self._spec.num_codebooks, device=codes.device)
        vectors = self._codebooks[codebook, codes.transpose(1, 2)].flatten(2)
        begin = max(0, first - _LAST_STAGE_MARGIN)
        end = min(codes.shape[2], last + _LAST_STAGE_MARGIN)
        # The phase is summed over all frames; the envelopes, most of the work, need no more than their own context.
        heard = max(0, first - self._config.envelope_context)
        z = self._out_proj(vectors[:, heard:]).to(self._dtype)
        rows = slice(_UPSAMPLING * (begin - heard), _UPSAMPLING * (end - heard))
        harmonic, noise = self._decoder(z, rows).float().chunk(2, dim=2)
        pitch_hz, voiced = self._pitch(vectors)
        before = max(0, begin + 1 - _NOISE_FRAMES)
        keys = noise_keys(codes[:, :, before:end])[:, _UPSAMPLING * (begin - before) :]
        said = Rows(harmonic, noise, keys, pitch_hz, voiced)
        samples = self._source_filter(said, first=_UPSAMPLING * begin, timbre=timbre)
        return samples[:, (first - begin) * self._spec.hop : (last - begin) * self._spec.hop]

    @torch.inference_mode()
    def encode(self, audio: torch.Tensor) -> torch.Tensor:
        """See `Codec.encode`.

        Raises: ModelLoadError if the codec was loaded without its encoder.
        """
        if self._encoder is None:
            raise ModelLoadError("this lark codec has no encoder: load it with with_encoder=True")
        if audio.numel() == 0:
            return torch.empty(self._spec.num_codebooks, 0, dtype=torch.int64, device=self.device)
        mel = self._log_mel(audio.to(self.device, torch.float32), self._encoder.mel_filters)
        residual = self._encoder(mel[None])[0]
        codes = []
        for in_proj, codebook, out_proj in zip(self._encoder.in_projs, self._codebooks, self._out_projs, strict=True):
            # Normalising the residual's projection would not move the argmax over the codebook's rows.
            code = (in_proj(residual) @ F.normalize(codebook, dim=1).t()).argmax(dim=1)
            residual = residual - out_proj(codebook[code])
            codes.append(code)
        return torch.stack(codes)

    def _log_mel(self, audio: torch.Tensor, filters: torch.Tensor) -> torch.Tensor:
        """Samples [S] and filters [bins, mels] to scaled log-mel [4 * ceil(S / hop), mels]."""
        config = self._config
        audio = F.pad(audio, (0, -len(audio) % config.hop_length))
        spectrum = torch.stft(
            audio, config.n_fft, config.stft_hop, window=self._window, center=True, return_complex=True
        )
        mel = spectrum.abs().t()[:-1] @ filters
        return (mel.clamp(min=config.mel_log_floor).log() + config.mel_shift) / config.mel_scale


def noise_keys(codes: torch.Tensor) -> torch.Tensor:
    """Codes int64 [B, Q, T] to a number for every row, int64 [B, 4T]; a hash, which wraps around."""
    num_codebooks = codes.shape[1]
    powers = [pow(_MIX, 2 + i, 1 << 64) for i in range(num_codebooks * _NOISE_FRAMES)]
    weights = torch.tensor([power - (power >> 63 << 64) for power in powers], device=codes.device)
    frames = (F.pad(codes, (_NOISE_FRAMES - 1, 0)) + 1).unfold(2, _NOISE_FRAMES, 1)  # [B, Q, T, 3]
    keys = (frames * weights.view(num_codebooks, 1, _NOISE_FRAMES)).sum((1, 3))
    rows = keys[:, :, None] + torch.arange(_UPSAMPLING, device=codes.device)
    # The low bits of such products are poor.
    return ((rows * _MIX) >> 33).flatten(1)
