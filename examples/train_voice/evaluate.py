"""What a run came to: losses on sentences held out, whether the text is heeded, how full the codebooks are, pictures.

Word error rates and DNSMOS are `benchmarks/voice.py`'s, which takes an exported folder.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from code_model import Batch, CodeModel
from codec import Codec
from corpus import front_end
from data import shards
from encode import codes_path, read_codes
from plots import plot_losses, plot_spectrograms
from teacher import SAMPLE_RATE_HZ, SPEAKERS, Teacher
from train_codec import perplexity
from train_model import Sentence, collate, losses_of, read_sentences

from declaim.engine import Engine, EngineConfig, SamplingParams, SpeechRequest

SENTENCE = "The birch canoe slid on the smooth planks."
MOST_SENTENCES = 64


def evaluate(work: Path, exported: Path) -> dict[str, object]:
    """Write `work/report/`: report.json, loss curves and spectrograms. Returns what report.json says."""
    report = work / "report"
    report.mkdir(parents=True, exist_ok=True)
    for name in ("codec", "model"):
        if (work / f"{name}.jsonl").exists():
            plot_losses(work / f"{name}.jsonl", report / f"{name}_losses.png")
    model, codec = CodeModel.load(work / "model"), Codec.load(work / "codec")
    sentences = _held_out(work, model)
    result: dict[str, object] = {
        "held_out": _losses(model, sentences) if sentences else None,
        "codebook_perplexity": _perplexities(work, codec),
        "parameters": {"model": _count(model), "codec": _count(codec)},
    }
    _draw(exported, report)
    (report / "report.json").write_text(json.dumps(result, indent=2) + "\n")
    return result


def _held_out(work: Path, model: CodeModel) -> list[Sentence]:
    found: list[Sentence] = []
    for path in shards(work / "data"):
        if codes_path(work / "codes", path).exists():
            found += read_sentences(path, work / "codes", model.shape, held_out=True)
        if len(found) >= MOST_SENTENCES:
            break
    return found[:MOST_SENTENCES]


@torch.no_grad()
def _losses(model: CodeModel, sentences: Sequence[Sentence]) -> dict[str, float]:
    """Nats a code with the sentence's own text, and with another's: a model that heeds its text tells them apart."""
    sums = np.zeros(3)
    for begin in range(0, len(sentences), 16):
        batch = collate(sentences[begin : begin + 16])
        own, durations = losses_of(model, batch, fed=batch.codes)
        other, _ = losses_of(model, _other_text(batch), fed=batch.codes)
        sums += len(batch.codes) * np.array([own.mean().item(), other.mean().item(), durations.item()])
    own_nats, other_nats, duration_error = (sums / len(sentences)).tolist()
    return {"nats": own_nats, "nats_with_another_text": other_nats, "log_duration_error": duration_error**0.5}


def _other_text(batch: Batch) -> Batch:
    """The same frames, each told of its neighbour's phonemes over its own length."""
    ids, durations = batch.text_ids.roll(1, 0), batch.durations_s.roll(1, 0)
    scale = batch.durations_s.sum(1, keepdim=True) / durations.sum(1, keepdim=True)
    return replace(batch, text_ids=ids, durations_s=durations * scale, num_bytes=batch.num_bytes.roll(1, 0))


def _perplexities(work: Path, codec: Codec) -> list[float]:
    codes = np.concatenate(
        [frames for path in shards(work / "data")[:8] for frames in read_codes(codes_path(work / "codes", path))]
    )
    size = codec.shape.codebook_size
    return [perplexity(torch.from_numpy(column.astype(np.int64)), size) for column in codes.T]


def _count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _draw(exported: Path, report: Path) -> None:
    """The test sentence by the teacher and by the exported voice, which also proves that the engine loads it."""
    phonemes = front_end().phonemes(SENTENCE)
    teacher = Teacher()
    audios = {f"teacher as {speaker.name}": teacher.speak(phonemes, speaker).audio for speaker in SPEAKERS}
    with Engine.from_pretrained(str(exported), config=EngineConfig(device="cpu", dtype="float32")) as engine:
        (result,) = engine.generate([SpeechRequest(SENTENCE, sampling=SamplingParams(seed=1))], progress=False)
    if result.error is not None:
        raise result.error
    plot_spectrograms(audios | {"the voice": result.audio}, report / "spectrograms.png", sample_rate_hz=SAMPLE_RATE_HZ)
