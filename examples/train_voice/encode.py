"""Shards of audio to shards of codes, by the codec that will serve."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from data import read_shard, shards
from numpy.typing import NDArray
from pause import wait_while_paused

from declaim.engine.codec.base import CodecRecipe
from declaim.engine.codec.lark import LarkCodec


def encode_shards(audio: Path, codes: Path, codec_folder: Path) -> Iterator[Path]:
    """Encode the shards that `codes` lacks; yields each as it is done."""
    codec = LarkCodec.load(CodecRecipe(kind="lark", folder=str(codec_folder)), with_encoder=True)
    for path in shards(audio):
        target = codes_path(codes, path)
        if not target.exists():
            encoded = []
            for utterance in read_shard(path):
                wait_while_paused()
                samples = torch.from_numpy(utterance.audio).float() / 32767
                encoded.append(codec.encode(samples).t().numpy().astype(np.int16))
            write_codes(target, encoded)
            yield target


def codes_path(folder: Path, shard: Path) -> Path:
    return folder / shard.name


def write_codes(path: Path, utterances: Sequence[NDArray[np.int16]]) -> None:
    """Whole or not at all; int16 [num_frames, Q] for each utterance."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        np.savez(file, codes=np.concatenate(utterances), num_frames=[len(frames) for frames in utterances])
    os.replace(partial, path)


def read_codes(path: Path) -> list[NDArray[np.int16]]:
    """int16 [num_frames, Q] for each utterance of the shard of the same name."""
    with np.load(path) as stored:
        return np.split(stored["codes"], np.cumsum(stored["num_frames"])[:-1])
