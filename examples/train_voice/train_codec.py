"""Train the codec: from nothing, or its decoder alone on codes that stay as they are.

The decoder says what speech is made of, and the teacher told what its speech was made of: so it learns by regression,
which a laptop's core does in minutes. Then, if there is time for it, the audio is judged too: by spectra at several
resolutions and by discriminators.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from checkpoints import Run
from codec import Codec, CodecShape, Said, k_means
from data import Utterance, read_shard, shuffled
from encode import codes_path, read_codes
from losses import SpectralLoss, discriminator_loss, discriminators, generator_loss

from declaim.engine.codec.lark import PITCH_UNIT_HZ
from declaim.engine.codec.source_filter import Rows, SourceFilter

CPU = torch.device("cpu")
HEARD_AFTER = 6  # frames of a window that are its left context
JUDGED_FRAMES = 12
SPECTRUM_WEIGHT = 5.0  # beside the judges' 1 for their verdict and 2 for their features
JUDGE_LEARNING_RATE = 8e-4
PITCH_WEIGHT = 2.0  # beside the envelopes' 1 each
# Of a band of pulses where none are heard: windows beside a voiced stretch hear it all the same.
UNVOICED_WEIGHT = 0.2
LEAST_PITCH_HZ = 30.0
REVIVE_EVERY = 50  # steps over which a codebook's row must be chosen at least once


@dataclass(frozen=True, slots=True)
class CodecSettings:
    """steps, minutes: the end, whichever comes first. batch: windows of `window` frames.

    judged_from: the step from which the audio is judged. init: a codec's folder; its codes are kept.
    """

    steps: int
    minutes: float = math.inf
    batch: int = 8
    window: int = 40
    judged_from: int = 4000
    peak_learning_rate: float = 4e-4
    init: Path | None = None
    device: torch.device = CPU
    shape: CodecShape = CodecShape()


@dataclass(frozen=True, slots=True, eq=False)
class Window:
    """audio: float32 [B, W * hop]; codes: int64 [B, W, Q] or None; bands: float32 [B, 4W, 2 * bands] and pitch_hz:
    float32 [B, 4W], as `teacher.Speech` has them; heard: float32 [B, 4W], the rows that count.
    """

    audio: torch.Tensor
    codes: torch.Tensor | None
    bands: torch.Tensor
    pitch_hz: torch.Tensor
    heard: torch.Tensor

    def to(self, device: torch.device) -> Window:
        codes = None if self.codes is None else self.codes.to(device)
        return Window(
            self.audio.to(device), codes, self.bands.to(device), self.pitch_hz.to(device), self.heard.to(device)
        )


def train_codec(shards: Path, codes: Path | None, work: Path, settings: CodecSettings) -> Codec:
    """Train to the end, from the last checkpoint in `work` where there is one. codes: as `encode` left them."""
    torch.manual_seed(1)
    codec = Codec.load(settings.init) if settings.init else Codec(settings.shape)
    codec.decoder.clear_future()
    codec.to(settings.device)
    average = Codec(codec.shape).to(settings.device)
    average.load_state_dict(codec.state_dict())
    judges, spectral = discriminators().to(settings.device), SpectralLoss(codec.shape.sampling_rate).to(settings.device)
    source_filter = codec.source_filter()
    trained = list(codec.decoder.parameters() if settings.init else codec.parameters())
    optimizer = torch.optim.AdamW(trained, betas=(0.8, 0.99), weight_decay=1e-3)
    judge_optimizer = torch.optim.AdamW(judges.parameters(), lr=JUDGE_LEARNING_RATE, betas=(0.8, 0.99))
    run = Run(
        work,
        "codec",
        {"codec": codec, "average": average, "judges": judges, "optimizer": optimizer, "judge": judge_optimizer},
    )
    windows = _windows(shards, codes, codec.shape, settings, seed=run.step)
    if run.step == 0 and not settings.init:
        _start_codebooks(codec, windows, settings.device)
    used = torch.zeros(codec.shape.num_codebooks, codec.shape.codebook_size, dtype=torch.bool)
    while (progress := run.progress(steps=settings.steps, minutes=settings.minutes)) < 1:
        rate = learning_rate(progress, settings.peak_learning_rate)
        optimizer.param_groups[0]["lr"] = rate
        window = next(windows).to(settings.device)
        losses: dict[str, float] = {}
        if window.codes is not None:
            with torch.no_grad():
                z, vectors = codec.vectors(window.codes)
            extra = z.new_zeros(())
        else:
            quantized = codec.quantize(codec.encoder(codec.log_mel(window.audio)))
            z, vectors, extra = quantized.z, quantized.vectors, quantized.loss
            for k in range(codec.shape.num_codebooks):
                used[k][quantized.codes[..., k].flatten().cpu()] = True
            losses["perplexity"] = perplexity(quantized.codes[..., 0].cpu(), codec.shape.codebook_size)
            if run.step % REVIVE_EVERY == REVIVE_EVERY - 1:
                losses["revived"] = codec.revive(quantized.projected, used)
                used.zero_()
        said = codec.decoder(z, vectors)
        loss = _regression(said, window, losses) + extra
        if run.step >= settings.judged_from:
            heard = window.heard.repeat_interleave(codec.shape.stft_hop, dim=1)
            made, real = _spoken(said, window, source_filter) * heard, window.audio * heard
            spectrum = spectral(made, real)
            losses["spectrum"] = spectrum.item()
            draw = random.Random(run.step)
            judged = _judged(settings.window, codec.shape, draw)
            verdict = _adversarial(judges, judge_optimizer, made[:, judged], real[:, judged], losses, draw=draw)
            loss = loss + SPECTRUM_WEIGHT * spectrum + verdict
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        losses["norm"] = float(torch.nn.utils.clip_grad_norm_(trained, 20.0))
        optimizer.step()
        codec.decoder.clear_future()
        _follow(average, codec, run.step)
        run.finish_step(losses, steps=settings.steps, minutes=settings.minutes)
    average.save(work / "codec")
    return average


def _regression(said: Said, window: Window, losses: dict[str, float]) -> torch.Tensor:
    """How far from what the teacher's speech was made of."""
    heard, voiced = window.heard, (window.pitch_hz > 0).float()
    harmonic, noise = window.bands.chunk(2, dim=2)

    def mean(errors: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return (errors * weight).sum() / weight.sum().clamp(min=1.0)

    log_pitch = (window.pitch_hz.clamp(min=LEAST_PITCH_HZ) / PITCH_UNIT_HZ).log()
    errors = {
        "harmonic": mean((said.harmonic - harmonic).abs().mean(2) * (UNVOICED_WEIGHT + voiced), heard),
        "noise": mean((said.noise - noise).abs().mean(2), heard),
        "voicing": mean(
            torch.nn.functional.binary_cross_entropy_with_logits(said.voicing, voiced, reduction="none"), heard
        ),
        "pitch": mean((said.log_pitch - log_pitch).abs(), heard * voiced),
    }
    losses |= {name: error.item() for name, error in errors.items()}
    return errors["harmonic"] + errors["noise"] + errors["voicing"] + PITCH_WEIGHT * errors["pitch"]


def _spoken(said: Said, window: Window, source_filter: SourceFilter) -> torch.Tensor:
    """Samples [B, W * hop] at the teacher's pitch, so that harmonics can be compared."""
    keys = torch.randint(0, 1 << 31, window.pitch_hz.shape, device=window.pitch_hz.device)
    return source_filter(Rows(said.harmonic, said.noise, keys, window.pitch_hz.double(), window.pitch_hz > 0))


def _judged(window: int, shape: CodecShape, draw: random.Random) -> slice:
    """The samples of a window that are judged: half a second that is heard. All of it would take most of the time."""
    first, last = HEARD_AFTER, window - shape.right_context
    begin = draw.randint(first, max(first, last - JUDGED_FRAMES))
    return slice(begin * shape.hop_length, min(last, begin + JUDGED_FRAMES) * shape.hop_length)


def _adversarial(
    judges: torch.nn.ModuleDict,
    optimizer: torch.optim.Optimizer,
    made: torch.Tensor,
    real: torch.Tensor,
    losses: dict[str, float],
    *,
    draw: random.Random,
) -> torch.Tensor:
    """Train one discriminator of each kind, drawn at random, and return what they say to the decoder."""
    chosen = [judges[kind][draw.randrange(len(judges[kind]))] for kind in ("period", "band")]
    expected = [judge(real) for judge in chosen]
    judged = torch.stack(
        [discriminator_loss(features, judge(made.detach())) for features, judge in zip(expected, chosen, strict=True)]
    ).sum()
    optimizer.zero_grad(set_to_none=True)
    judged.backward()
    optimizer.step()
    losses["judge"] = judged.item()
    total = made.new_zeros(())
    for features, judge in zip(expected, chosen, strict=True):
        judge.requires_grad_(False)
        verdict, distance = generator_loss(features, judge(made))
        judge.requires_grad_(True)
        losses["fooled"] = losses.get("fooled", 0.0) + verdict.item()
        losses["features"] = losses.get("features", 0.0) + distance.item()
        total = total + verdict + 2 * distance
    return total


def learning_rate(progress: float, peak: float) -> float:
    """Linear from a fiftieth of the peak over the first fiftieth of the run, then half a cosine down to it again."""
    if progress < 0.02:
        return peak * (0.02 + 0.98 * progress / 0.02)
    return peak * (0.02 + 0.98 * (1 + math.cos(math.pi * (progress - 0.02) / 0.98)) / 2)


@torch.no_grad()
def _follow(average: torch.nn.Module, model: torch.nn.Module, step: int) -> None:
    """Exponential moving average over the last few hundred steps."""
    decay = min(0.995, (1 + step) / (10 + step))
    for kept, now in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
        kept.lerp_(now, 1 - decay)


def perplexity(codes: torch.Tensor, size: int) -> float:
    """exp of the entropy of the codes in use: the size of the codebook at best."""
    share = torch.bincount(codes.flatten(), minlength=size).double() / codes.numel()
    return float(torch.special.entr(share).sum().exp())


@torch.no_grad()
def _start_codebooks(codec: Codec, windows: Iterator[Window], device: torch.device) -> None:
    mels = torch.cat([codec.log_mel(next(windows).audio.to(device)) for _ in range(8)])
    residual = codec.encoder(mels).flatten(0, 1)
    for quantizer in codec.quantizer:
        asked = quantizer.in_proj(residual)
        quantizer.codebook.copy_(k_means(asked, codec.shape.codebook_size))
        residual = residual - quantizer.vectors(quantizer.nearest(asked))


def _windows(
    shards: Path, codes: Path | None, shape: CodecShape, settings: CodecSettings, *, seed: int
) -> Iterator[Window]:
    """Random windows of utterances, without end; the window's context is made but not heard."""
    draw, batch = random.Random(seed), []
    for path in shuffled(shards, draw):
        if codes is not None and not codes_path(codes, path).exists():
            continue
        utterances = read_shard(path)
        rows: list[np.ndarray | None] = list(read_codes(codes_path(codes, path))) if codes else [None] * len(utterances)
        pairs = [pair for pair in zip(utterances, rows, strict=True) if not pair[0].held_out]
        draw.shuffle(pairs)
        # A part of each shard, so that the voices alternate.
        for utterance, row in pairs[: 3 * settings.batch]:
            if len(utterance.audio) >= settings.window * shape.hop_length:
                batch.append(_window(utterance, row, shape, settings.window, draw))
            if len(batch) >= settings.batch * 12:
                draw.shuffle(batch)
            while len(batch) >= settings.batch * 12:
                taken, batch = batch[: settings.batch], batch[settings.batch :]
                yield Window(
                    torch.stack([w.audio for w in taken]),
                    torch.stack([w.codes for w in taken if w.codes is not None]) if codes else None,
                    torch.stack([w.bands for w in taken]),
                    torch.stack([w.pitch_hz for w in taken]),
                    torch.stack([w.heard for w in taken]),
                )


def _window(utterance: Utterance, row: np.ndarray | None, shape: CodecShape, size: int, draw: random.Random) -> Window:
    hop = shape.hop_length
    audio = torch.from_numpy(utterance.audio).float() / 32767
    frames = len(audio) // hop if row is None else len(row)
    audio = torch.nn.functional.pad(audio, (0, max(0, frames * hop - len(audio))))
    begin, per_frame = draw.randint(0, frames - size), hop // shape.stft_hop
    heard = torch.ones(size * per_frame)
    if begin > 0:
        heard[: HEARD_AFTER * per_frame] = 0.0
    if begin + size < frames:
        heard[-shape.right_context * per_frame :] = 0.0
    codes = None if row is None else torch.from_numpy(row[begin : begin + size].astype(np.int64))
    # The last frame may be longer than what was said.
    rows = np.minimum(np.arange(begin * per_frame, (begin + size) * per_frame), len(utterance.pitch_hz) - 1)
    return Window(
        audio[begin * hop : (begin + size) * hop],
        codes,
        torch.from_numpy(utterance.bands[rows].astype(np.float32)),
        torch.from_numpy(utterance.pitch_hz[rows]),
        heard,
    )
