"""Shards of synthesised speech: made by workers, read by the trainers.

A shard is a folder-less `.npz` of a few hundred utterances: their audio as one run of int16 samples, their bytes,
durations and speakers. Each is written under another name first, so one that exists is whole, and a run that is cut
off goes on with the first that is missing.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
from corpus import front_end, is_held_out, phonemes_of, texts
from numpy.typing import NDArray
from pause import wait_while_paused
from teacher import SPEAKERS, Teacher

UTTERANCES = 250
# Who speaks the shards, by how many speakers there are. The first is the voice that newcomers hear.
_TURNS = {1: (0,), 2: (0, 1), 3: (0, 1, 0, 2)}


@dataclass(frozen=True, slots=True, eq=False)
class Utterance:
    """text_ids: uint8 [L], the first the speaker's mark; durations_s: float32 [L]; audio: int16 [S]; bands, pitch_hz:
    see `teacher.Speech`.
    """

    speaker: int
    text_ids: NDArray[np.uint8]
    durations_s: NDArray[np.float32]
    audio: NDArray[np.int16]
    bands: NDArray[np.float16]
    pitch_hz: NDArray[np.float32]
    held_out: bool


def make_shards(
    folder: Path, count: int, *, speakers: int, sentences: Path, workers: int, size: int = UTTERANCES
) -> Iterator[Path]:
    """Make the shards 0 .. count - 1 that `folder` lacks, of the first `speakers`; yields each as it is done."""
    folder.mkdir(parents=True, exist_ok=True)
    missing = [i for i in range(count) if not shard_path(folder, i).exists()]
    make = partial(_make_shard, folder, turns=_TURNS[speakers], sentences=sentences, size=size)
    if workers < 2:
        yield from map(make, missing)
        return
    with ProcessPoolExecutor(workers) as pool:
        for done in as_completed([pool.submit(make, i) for i in missing]):
            yield done.result()


def shard_path(folder: Path, index: int) -> Path:
    return folder / f"shard-{index:05d}.npz"


def _make_shard(folder: Path, index: int, *, turns: tuple[int, ...], sentences: Path, size: int) -> Path:
    phonemizer, teacher = front_end(), Teacher()
    speaker = turns[index % len(turns)]
    # Each speaker reads its own stretch of one endless shuffled text.
    turn = index // len(turns) * turns.count(speaker) + turns[: index % len(turns)].count(speaker)
    lines = islice(texts(sentences, seed=speaker), turn * size, (turn + 1) * size)
    utterances = []
    for number, line in enumerate(lines):
        wait_while_paused()
        for phonemes in phonemes_of(line, phonemizer):
            speech = teacher.speak(phonemes, SPEAKERS[speaker], seed=index * size + number)
            text_ids = [phonemizer.speaker_byte, *(phonemizer.byte_of_symbol[symbol] for symbol in phonemes)]
            utterances.append(
                Utterance(
                    speaker,
                    np.array([*text_ids, phonemizer.end_byte], np.uint8),
                    speech.durations_s,
                    np.round(speech.audio * 32767).astype(np.int16),
                    speech.bands,
                    speech.pitch_hz,
                    is_held_out(line),
                )
            )
    return write_shard(shard_path(folder, index), utterances)


def write_shard(path: Path, utterances: Sequence[Utterance]) -> Path:
    """Whole or not at all; returns `path`."""
    partial_path = path.with_suffix(".partial")
    with partial_path.open("wb") as file:
        np.savez(
            file,
            speaker=np.array([u.speaker for u in utterances], np.int64),
            held_out=np.array([u.held_out for u in utterances], np.bool_),
            num_bytes=np.array([len(u.text_ids) for u in utterances], np.int64),
            num_samples=np.array([len(u.audio) for u in utterances], np.int64),
            text_ids=np.concatenate([u.text_ids for u in utterances]),
            durations_s=np.concatenate([u.durations_s for u in utterances]),
            audio=np.concatenate([u.audio for u in utterances]),
            num_rows=np.array([len(u.bands) for u in utterances], np.int64),
            bands=np.concatenate([u.bands for u in utterances]),
            pitch_hz=np.concatenate([u.pitch_hz for u in utterances]),
        )
    os.replace(partial_path, path)
    return path


def read_shard(path: Path) -> list[Utterance]:
    with np.load(path) as stored:
        arrays = {name: stored[name] for name in stored.files}
    byte_ends, sample_ends, row_ends = (
        np.cumsum(arrays[name])[:-1] for name in ("num_bytes", "num_samples", "num_rows")
    )
    rows = zip(
        arrays["speaker"].tolist(),
        np.split(arrays["text_ids"], byte_ends),
        np.split(arrays["durations_s"], byte_ends),
        np.split(arrays["audio"], sample_ends),
        np.split(arrays["bands"], row_ends),
        np.split(arrays["pitch_hz"], row_ends),
        arrays["held_out"].tolist(),
        strict=True,
    )
    return [Utterance(*row) for row in rows]


def shards(folder: Path) -> list[Path]:
    """Those that are there by now, in order."""
    return sorted(folder.glob("shard-*.npz"))


def shuffled(folder: Path, draw: random.Random) -> Iterator[Path]:
    """Shards in random order without end; those that appear meanwhile take part from the next round."""
    while True:
        paths = shards(folder)
        if not paths:
            raise FileNotFoundError(f"{folder} holds no shard: run the stage before this one")
        draw.shuffle(paths)
        yield from paths
