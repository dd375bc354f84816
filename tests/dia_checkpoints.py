"""Small random Dia checkpoints, saved by transformers itself, and what transformers makes of them."""

from __future__ import annotations

import contextlib
import math
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
BOS, EOS, PAD = 1026, 1024, 1025
FRAME_RATE_HZ = 44100 / 512


@dataclass(frozen=True)
class DiaSize:
    """Sizes of a small Dia; head dims and group sizes differ between them on purpose."""

    layers: int = 2
    hidden: int = 48
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    cross_heads: int = 2
    ffn: int = 64
    encoder_layers: int = 2
    encoder_hidden: int = 32
    max_positions: int = 512


SMALL = DiaSize()
WIDE = DiaSize(layers=3, hidden=80, heads=6, kv_heads=3, head_dim=32, cross_heads=3, ffn=112, encoder_hidden=64)
MULTI_QUERY = DiaSize(layers=2, hidden=64, heads=4, kv_heads=1, head_dim=24, cross_heads=4, ffn=96, encoder_layers=1)


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """transformers writes progress bars and remarks to stderr."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        transformers_logging.enable_progress_bar()


def make_dac(folder: Path, *, seed: int = 0, num_channels: int = 64) -> None:
    """A random DAC of real strides and few channels, its weights scaled so that it makes a sound. num_channels: of the
    decoder's first block."""
    torch.manual_seed(seed)
    dac = DacModel(
        DacConfig(
            encoder_hidden_size=8,
            decoder_hidden_size=num_channels,
            n_codebooks=9,
            codebook_size=1024,
            codebook_dim=8,
            sampling_rate=44100,
            downsampling_ratios=[2, 4, 8, 8],
            upsampling_ratios=[8, 8, 4, 2],
        )
    )
    with torch.no_grad():
        for name, weight in dac.decoder.named_parameters():
            if weight.ndim == 3 and "alpha" not in name:
                fan = 2 * weight.shape[0] if "conv_t1" in name else weight.shape[1] * weight.shape[2]
                weight.normal_(0, 0.7 / math.sqrt(fan))
            elif "bias" in name:
                weight.normal_(0, 0.05)
        for quantizer in dac.quantizer.quantizers:
            quantizer.codebook.weight.normal_(0, 1)
    dac.save_pretrained(folder)


def make_dia(folder: Path, size: DiaSize = SMALL, *, seed: int = 0, scale: float = 0.15) -> Path:
    """Save model, processor and codec as transformers lays them out; the codec lies in codec/."""
    torch.manual_seed(seed)
    config = DiaConfig(
        encoder_config=DiaEncoderConfig(
            max_position_embeddings=192,
            num_hidden_layers=size.encoder_layers,
            hidden_size=size.encoder_hidden,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=16,
            intermediate_size=64,
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
            cross_head_dim=16,
            cross_hidden_size=size.encoder_hidden,
            vocab_size=1028,
            num_channels=9,
        ),
    )
    with quiet_transformers():
        model = DiaForConditionalGeneration(config)
        with torch.no_grad():
            for weight in model.parameters():
                if weight.ndim > 1:
                    weight.normal_(0, scale)
        make_dac(folder / "codec", seed=seed)
        dac = DacModel.from_pretrained(folder / "codec")
        feature_extractor = DiaFeatureExtractor(feature_size=1, sampling_rate=44100, hop_length=512)
        DiaProcessor(feature_extractor, DiaTokenizer(), dac).save_pretrained(folder)
        model.save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class Reference:
    """transformers' own pipeline over a saved checkpoint."""

    model: DiaForConditionalGeneration
    processor: DiaProcessor

    @classmethod
    def load(cls, folder: Path) -> Reference:
        with quiet_transformers():
            model = DiaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
            return cls(model, DiaProcessor.from_pretrained(folder))

    def greedy(
        self,
        text: str,
        *,
        max_new_tokens: int,
        guidance_scale: float | None,
        prompt: NDArray[np.float32] | None = None,
    ) -> NDArray[np.int64]:
        """Greedy codes of new frames, delay undone: [num_frames, 9]."""
        inputs = self.processor(text=[text], audio=None if prompt is None else [prompt], return_tensors="pt")
        settings = GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=False,
            guidance_scale=guidance_scale,
            top_k=45,
            bos_token_id=BOS,
            decoder_start_token_id=BOS,
            eos_token_id=EOS,
            pad_token_id=PAD,
        )
        with quiet_transformers(), torch.no_grad():
            grid = self.model.generate(**inputs, generation_config=settings)[0].numpy()
        num_prompt = 0 if prompt is None else -(-len(prompt) // 512)
        return undelay(grid, num_prompt)


def undelay(grid: NDArray[np.int64], num_prompt: int) -> NDArray[np.int64]:
    """New frames of a delayed grid [T, 9] that ends where channel 0 says EOS."""
    end = int(np.flatnonzero(grid[:, 0] == EOS)[0])
    frames = np.arange(num_prompt, end - 1)
    return np.stack([grid[frames + 1 + delay, q] for q, delay in enumerate(DELAY)], axis=1)


def seconds_of(max_new_tokens: int) -> float:
    """The max_seconds that allows the frames of `max_new_tokens`: the last 16 rows only end the audio."""
    return (max_new_tokens - 16) / FRAME_RATE_HZ
