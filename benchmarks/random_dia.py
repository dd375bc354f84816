"""Dia checkpoints of a chosen size with random weights, saved by transformers, for the benchmarks that need one.

Their head can never draw an end: its row for the end code is zero, while the largest of a thousand random logits is
far above zero. So each request is exactly as long as it was asked to be. Random weights say nothing about quality.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import (
    DacConfig,
    DacModel,
    DiaConfig,
    DiaFeatureExtractor,
    DiaForConditionalGeneration,
    DiaProcessor,
    DiaTokenizer,
    GenerationConfig,
)
from transformers.models.dia.configuration_dia import DiaDecoderConfig, DiaEncoderConfig
from transformers.utils import logging as transformers_logging

DELAY = (0, 8, 9, 10, 11, 12, 13, 14, 15)
FRAME_RATE_HZ = 44100 / 512
REAL_DAC_WIDTH = 1536
# What all that speak with one of these draw with.
GUIDANCE, TOP_K = 3.0, 45


@dataclass(frozen=True)
class DiaSize:
    """The vocabulary, the nine codebooks and their delays are the real model's where nothing else is said."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    cross_heads: int
    head_dim: int
    ffn: int
    encoder_layers: int
    encoder_hidden: int
    encoder_heads: int
    encoder_ffn: int
    max_positions: int
    delay: tuple[int, ...] = DELAY
    codebook_size: int = 1024

    @property
    def eos(self) -> int:
        return self.codebook_size

    @property
    def pad(self) -> int:
        return self.codebook_size + 1

    @property
    def bos(self) -> int:
        return self.codebook_size + 2

    @property
    def vocab_size(self) -> int:
        return self.codebook_size + 4

    @property
    def num_drain_rows(self) -> int:
        """Rows after the last frame's first code, until its last codebook's."""
        return max(self.delay) + 1


# Dia's proportions (four query heads to a KV head, FFN four times as wide): 18 M parameters in the decoder's layers.
MEDIUM = DiaSize(
    layers=4,
    hidden=512,
    heads=8,
    kv_heads=2,
    cross_heads=8,
    head_dim=64,
    ffn=2048,
    encoder_layers=4,
    encoder_hidden=256,
    encoder_heads=4,
    encoder_ffn=1024,
    max_positions=1024,
)
TINY = DiaSize(
    layers=2,
    hidden=64,
    heads=4,
    kv_heads=2,
    cross_heads=2,
    head_dim=16,
    ffn=96,
    encoder_layers=1,
    encoder_hidden=32,
    encoder_heads=2,
    encoder_ffn=64,
    max_positions=512,
)

# Dia-1.6B's own sizes.
LARGE = DiaSize(
    layers=18,
    hidden=2048,
    heads=16,
    kv_heads=4,
    cross_heads=16,
    head_dim=128,
    ffn=8192,
    encoder_layers=12,
    encoder_hidden=1024,
    encoder_heads=16,
    encoder_ffn=4096,
    max_positions=3072,
)
# For a rehearsal in the interpreter, where every row of every codebook counts.
REHEARSED = DiaSize(
    layers=1,
    hidden=32,
    heads=2,
    kv_heads=1,
    cross_heads=2,
    head_dim=16,
    ffn=32,
    encoder_layers=1,
    encoder_hidden=32,
    encoder_heads=2,
    encoder_ffn=32,
    max_positions=128,
    delay=(0, 1, 2),
    codebook_size=64,
)


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without its progress bars and remarks on stderr."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        transformers_logging.enable_progress_bar()


def save_dia(
    folder: Path,
    size: DiaSize,
    *,
    scale: float,
    seed: int = 0,
    dac_width: int = 64,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> int:
    """Save model, processor, and a DAC in codec/. Returns the number of the decoder's parameters.

    scale: standard deviation of every matrix. Attention is not divided by sqrt(head_dim) in this family, so a large
    scale makes it all but one-hot. dac_width: REAL_DAC_WIDTH is the real one's. device: where the weights are drawn.
    """
    torch.manual_seed(seed)
    with quiet_transformers():
        with torch.device(device):
            model = DiaForConditionalGeneration(_config(size)).to(dtype)
        with torch.no_grad():
            for weight in model.parameters():
                if weight.ndim > 1:
                    weight.normal_(0, scale)
            model.logits_dense.weight[size.eos] = 0
        save_dac(folder / "codec", size, width=dac_width)
        # Only a codec that was itself loaded from a folder has the name that the processor's file needs.
        dac = DacModel.from_pretrained(folder / "codec")
        extractor = DiaFeatureExtractor(feature_size=1, sampling_rate=44100, hop_length=512)
        DiaProcessor(extractor, DiaTokenizer(), dac).save_pretrained(folder)
        model.save_pretrained(folder)
    decoder = [*model.model.decoder.parameters(), model.logits_dense.weight]
    return sum(int(weight.numel()) for weight in decoder)


def _config(size: DiaSize) -> DiaConfig:
    return DiaConfig(
        encoder_config=DiaEncoderConfig(
            max_position_embeddings=256,
            num_hidden_layers=size.encoder_layers,
            hidden_size=size.encoder_hidden,
            num_attention_heads=size.encoder_heads,
            num_key_value_heads=size.encoder_heads,
            head_dim=size.head_dim,
            intermediate_size=size.encoder_ffn,
        ),
        decoder_config=DiaDecoderConfig(
            max_position_embeddings=size.max_positions,
            num_hidden_layers=size.layers,
            hidden_size=size.hidden,
            intermediate_size=size.ffn,
            num_attention_heads=size.heads,
            num_key_value_heads=size.kv_heads,
            head_dim=size.head_dim,
            cross_num_attention_heads=size.cross_heads,
            cross_num_key_value_heads=size.cross_heads,
            cross_head_dim=size.head_dim,
            cross_hidden_size=size.encoder_hidden,
            vocab_size=size.vocab_size,
            num_channels=len(size.delay),
        ),
        delay_pattern=list(size.delay),
        bos_token_id=size.bos,
        eos_token_id=size.eos,
        pad_token_id=size.pad,
    )


def save_dac(folder: Path, size: DiaSize, *, width: int) -> None:
    """Save a DAC with the real strides, for the codebooks of `size`; its decoder is so wide at its widest."""
    DacModel(
        DacConfig(
            encoder_hidden_size=8 if width < REAL_DAC_WIDTH else 64,
            decoder_hidden_size=width,
            n_codebooks=len(size.delay),
            codebook_size=size.codebook_size,
            codebook_dim=8,
            sampling_rate=44100,
            downsampling_ratios=[2, 4, 8, 8],
        )
    ).save_pretrained(folder)


def generation_config(
    size: DiaSize, num_frames: int, *, temperature: float | None = None, top_p: float | None = None
) -> GenerationConfig:
    """What transformers' generate() takes for so many frames; greedy without a temperature."""
    return GenerationConfig(
        max_new_tokens=num_frames + size.num_drain_rows,
        do_sample=temperature is not None,
        guidance_scale=GUIDANCE,
        temperature=temperature,
        top_k=TOP_K,
        top_p=top_p,
        bos_token_id=size.bos,
        decoder_start_token_id=size.bos,
        eos_token_id=size.eos,
        pad_token_id=size.pad,
    )


def undelay(grid: NDArray[np.int64], size: DiaSize, num_frames: int) -> NDArray[np.int64]:
    """What generate() made, a delayed grid [T, Q] -> its first frames [num_frames, Q]."""
    rows = np.arange(num_frames)
    return np.stack([grid[rows + 1 + delay, q] for q, delay in enumerate(size.delay)], axis=1)
