"""Train the code model on codes, or go on with one that exists."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from checkpoints import Run
from code_model import MIN_FRAMES, Batch, CodeModel, ModelShape
from data import read_shard, shuffled
from encode import codes_path, read_codes
from numpy.typing import NDArray
from teacher import SPEAKERS
from train_codec import learning_rate

CPU = torch.device("cpu")
MAX_NOISE = 0.1  # of the codes that are fed are replaced by others, at most: what is drawn in serving errs too
DURATION_WEIGHT = 0.5


@dataclass(frozen=True, slots=True)
class ModelSettings:
    """steps, minutes: the end, whichever comes first. rows: how many a step has, with their padding.

    init: a shipped model's folder to go on from.
    """

    steps: int
    minutes: float = math.inf
    rows: int = 1900
    peak_learning_rate: float = 6e-4
    init: Path | None = None
    device: torch.device = CPU
    shape: ModelShape = ModelShape(tuple(speaker.name for speaker in SPEAKERS))


@dataclass(frozen=True, slots=True, eq=False)
class Sentence:
    """text_ids: [L]; durations_s: [L]; codes: [N, Q], N as long as the durations."""

    speaker: int
    text_ids: NDArray[np.int64]
    durations_s: NDArray[np.float32]
    codes: NDArray[np.int64]


def train_model(shards: Path, codes: Path, work: Path, settings: ModelSettings) -> CodeModel:
    """Train to the end, from the last checkpoint in `work` where there is one."""
    torch.manual_seed(1)
    speakers = settings.shape.speakers
    model = CodeModel.load(settings.init, speakers) if settings.init else CodeModel(settings.shape)
    model.to(settings.device)
    average = CodeModel(model.shape).to(settings.device)
    average.load_state_dict(model.state_dict())
    optimizer = _optimizer(model)
    run = Run(work, "model", {"model": model, "average": average, "optimizer": optimizer})
    batches = training_batches(shards, codes, model.shape, rows=settings.rows, seed=run.step)
    noise = torch.Generator().manual_seed(run.step)
    while (progress := run.progress(steps=settings.steps, minutes=settings.minutes)) < 1:
        rate = learning_rate(progress, settings.peak_learning_rate)
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch = next(batches)
        fed = noisy(batch.codes, model.shape, noise).to(settings.device)
        code_loss, duration_loss = losses_of(model, batch.to(settings.device), fed=fed)
        optimizer.zero_grad(set_to_none=True)
        (code_loss.mean() + DURATION_WEIGHT * duration_loss).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        decay = min(0.995, (1 + run.step) / (10 + run.step))
        with torch.no_grad():
            for kept, now in zip(average.parameters(), model.parameters(), strict=True):
                kept.lerp_(now, 1 - decay)
        run.finish_step(
            {
                "codes": code_loss.mean().item(),
                "first": code_loss[0].item(),
                "durations": duration_loss.item(),
                "norm": norm.item(),
            },
            steps=settings.steps,
            minutes=settings.minutes,
        )
    average.save(work / "model")
    return average


def losses_of(model: CodeModel, batch: Batch, *, fed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy in nats of each codebook [Q], `fed` [B, N, Q] given; squared error of log durations."""
    encoded = model.encode(batch)
    rows, targets = model.grid(batch, fed)
    hidden = model.decode(rows, model.side_vectors(encoded, batch, rows.shape[1]))
    used = (targets >= 0).any(-1)
    logits = model.head(hidden[used]).view(-1, model.shape.num_codebooks, model.shape.codebook_size)
    wanted = targets[used]
    each = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=-1, reduction="none").view(wanted.shape)
    code_loss = each.sum(0) / (wanted >= 0).sum(0)
    told = batch.durations_s > 0
    error = (model.log_durations(encoded)[told] - batch.durations_s[told].log()).square().mean()
    return code_loss, error


def noisy(codes: torch.Tensor, shape: ModelShape, generator: torch.Generator) -> torch.Tensor:
    """Codes of whole frames and single codes replaced by random ones, in each sentence at a rate of its own."""
    rate = MAX_NOISE * torch.rand(len(codes), 1, 1, generator=generator)
    replaced = torch.rand(codes.shape, generator=generator) < rate
    return torch.where(replaced, torch.randint(shape.codebook_size, codes.shape, generator=generator), codes)


def _optimizer(model: CodeModel) -> torch.optim.AdamW:
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embedding" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embedding" in name]
    groups = [{"params": matrices, "weight_decay": 0.02}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.97), eps=1e-9)


def read_sentences(shard: Path, codes: Path, shape: ModelShape, *, held_out: bool) -> list[Sentence]:
    """Those of a shard that are held out, or those that are not, of the model's speakers and with their bytes."""
    sentences = []
    for utterance, frames in zip(read_shard(shard), read_codes(codes_path(codes, shard)), strict=True):
        num_frames = max(MIN_FRAMES, round(float(utterance.durations_s.sum()) * shape.frame_rate))
        known = utterance.speaker < len(shape.speakers)
        if utterance.held_out != held_out or not known or len(frames) < num_frames:
            continue
        text_ids = utterance.text_ids.astype(np.int64)
        text_ids[0] = shape.speaker_bytes[utterance.speaker]
        sentence = Sentence(utterance.speaker, text_ids, utterance.durations_s, frames[:num_frames].astype(np.int64))
        sentences.append(sentence)
    return sentences


def training_batches(shards: Path, codes: Path, shape: ModelShape, *, rows: int, seed: int) -> Iterator[Batch]:
    """Sentences of like length side by side, without end."""
    draw = random.Random(seed)
    pool: list[Sentence] = []
    for path in shuffled(shards, draw):
        if not codes_path(codes, path).exists():
            continue
        pool += read_sentences(path, codes, shape, held_out=False)
        if len(pool) < 4 * draw.randint(100, 250):
            continue
        groups = list(_by_length(pool, rows))
        draw.shuffle(groups)
        for group in groups:
            yield collate(group)
        pool = []


def _by_length(sentences: Sequence[Sentence], rows: int) -> Iterator[list[Sentence]]:
    group: list[Sentence] = []
    for sentence in sorted(sentences, key=lambda s: len(s.codes)):
        if group and (len(group) + 1) * len(sentence.codes) > rows:
            yield group
            group = []
        group.append(sentence)
    if group:
        yield group


def collate(sentences: Sequence[Sentence]) -> Batch:
    def padded(arrays: Sequence[np.ndarray], dtype: torch.dtype) -> torch.Tensor:
        return torch.nn.utils.rnn.pad_sequence([torch.from_numpy(a).to(dtype) for a in arrays], batch_first=True)

    return Batch(
        text_ids=padded([s.text_ids for s in sentences], torch.int64),
        num_bytes=torch.tensor([len(s.text_ids) for s in sentences]),
        durations_s=padded([s.durations_s for s in sentences], torch.float32),
        codes=padded([s.codes for s in sentences], torch.int64),
        num_frames=torch.tensor([len(s.codes) for s in sentences]),
        speaker=torch.tensor([s.speaker for s in sentences]),
    )
