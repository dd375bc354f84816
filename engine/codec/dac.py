"""The Descript audio codec: transformers' `DacModel` behind the `Codec` contract, for Dia and Zonos.

Owns loading a local folder (config.json, model.safetensors) without the encoder unless that is asked for,
and how many frames of context a window needs. Never downloads, never keeps anything between two calls.
Slow to import, as transformers is: `declaim.engine.codec.base` imports it on demand.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import DacConfig, DacModel
from transformers.models.dac.modeling_dac import Snake1d

from declaim.engine.codec.base import CodecRecipe
from declaim.engine.errors import ModelLoadError
from declaim.engine.safetensors_io import (
    read_integer,
    read_json,
    read_tensors,
    refuse_leftovers,
    take_tensor,
)
from declaim.engine.spec import CodecSpec

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_KERNEL_REACH = 3  # of a convolution of 7
_DILATIONS = (1, 3, 9)  # of the residual units after each transposed convolution
_INTEGERS = (
    "encoder_hidden_size",
    "decoder_hidden_size",
    "n_codebooks",
    "codebook_size",
    "codebook_dim",
    "sampling_rate",
)


def stage_reaches(upsampling_ratios: Sequence[int]) -> tuple[int, ...]:
    """Frames on each side that a frame's samples depend on: of the codes, then of each upsampling block's input.

    Walks from the samples of frame 0 back through the decoder: a convolution of 7 with dilation d widens an
    interval by 3 d each side; a transposed convolution of 2 s, stride s, padding s / 2 maps outputs j to
    inputs i with j = i s - s / 2 + tap.
    """
    rate = math.prod(upsampling_ratios)
    low, high = -_KERNEL_REACH, rate - 1 + _KERNEL_REACH
    reaches: list[int] = []
    for stride in reversed(upsampling_ratios):
        reach = _KERNEL_REACH * sum(_DILATIONS)
        low, high = low - reach, high + reach
        padding = stride // 2
        low, high = -((2 * stride - 1 - padding - low) // stride), (high + padding) // stride
        rate //= stride
        reaches.append(max(-(low // rate), high // rate))
    return (reaches[-1] + _KERNEL_REACH, *reversed(reaches))


def _read_config(path: Path) -> DacConfig:
    raw = read_json(path)
    values = {key: read_integer(raw, key, path) for key in _INTEGERS}
    ratios = _read_ratios(raw, path)
    size = values["codebook_size"]
    if size & (size - 1):
        raise ModelLoadError(f"{path}: codebook_size is {size}, it must be a power of two: not a DAC folder")
    depth = 2 ** len(ratios)
    if values["decoder_hidden_size"] % depth:
        raise ModelLoadError(
            f"{path}: decoder_hidden_size is {values['decoder_hidden_size']}, it must be a multiple of "
            f"{depth}, 2 to the number of downsampling_ratios: not a DAC folder"
        )
    return DacConfig(
        encoder_hidden_size=values["encoder_hidden_size"],
        decoder_hidden_size=values["decoder_hidden_size"],
        n_codebooks=values["n_codebooks"],
        codebook_size=size,
        codebook_dim=values["codebook_dim"],
        sampling_rate=values["sampling_rate"],
        downsampling_ratios=list(ratios),
    )


def _read_ratios(raw: Mapping[str, object], path: Path) -> tuple[int, ...]:
    """Even ratios only: with an odd one a frame is not a whole number of samples."""
    if "downsampling_ratios" not in raw:
        raise ModelLoadError(f"{path} has no key 'downsampling_ratios': copy the checkpoint again")
    value = raw["downsampling_ratios"]
    items: list[object] = value if isinstance(value, list) else []
    ratios = tuple(item for item in items if isinstance(item, int) and item >= 2 and item % 2 == 0)
    if not ratios or len(ratios) != len(items):
        raise ModelLoadError(
            f"{path}: downsampling_ratios is {value!r}, it must be a list of even integers: "
            f"use a codec such as descript/dac_44khz, whose ratios are [2, 4, 8, 8]"
        )
    return ratios


def _read_model(folder: Path, config: DacConfig, *, with_encoder: bool) -> DacModel:
    path = folder / "model.safetensors"
    tensors = read_tensors(path, skip_prefixes=() if with_encoder else ("encoder.",))
    # On the meta device nothing is allocated or drawn, so what is dropped or replaced costs nothing.
    with torch.device("meta"):
        model = DacModel(config)
    if not with_encoder:
        del model.encoder
    state = {
        name: take_tensor(tensors, name, shape=parameter.shape, path=path)
        for name, parameter in model.state_dict().items()
    }
    refuse_leftovers(tensors, path)
    model.load_state_dict(state, assign=True)
    for name, module in list(model.named_modules()):
        if isinstance(module, Snake1d):
            model.set_submodule(name, _Snake(module.alpha))
    return model.eval().requires_grad_(False)


class _Snake(nn.Module):
    """x + sin(alpha x)^2 / alpha, the bits of transformers' `Snake1d`, with one new tensor where that makes five: these
    are the largest tensors of a decode. Source: Ziyin et al. 2020, equation 3."""

    def __init__(self, alpha: nn.Parameter) -> None:
        super().__init__()
        self.alpha = alpha

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, T] -> [B, C, T]."""
        return (self.alpha * x).sin_().square_().mul_((self.alpha + 1e-9).reciprocal()).add_(x)


class DacCodec:
    """The Descript audio codec; see `Codec`. `load` makes one.

    The decoder computes in the recipe's dtype. Quantizer and encoder stay float32: they are small or run once
    a voice, and rounding there would change codes.
    """

    def __init__(self, model: DacModel, *, spec: CodecSpec, strides: Sequence[int], has_encoder: bool) -> None:
        self._model = model
        self._strides = tuple(strides)
        self._reaches = stage_reaches(strides)[1:]
        self._spec = spec
        self._has_encoder = has_encoder

    @classmethod
    def load(cls, recipe: CodecRecipe, *, with_encoder: bool = False) -> DacCodec:
        """Read the folder of `recipe`; without `with_encoder` the encoder's weights are not read.

        Raises: ModelLoadError.
        """
        folder = Path(recipe.folder)
        config = _read_config(folder / "config.json")
        model = _read_model(folder, config, with_encoder=with_encoder)
        torch.nn.Module.to(model, device=torch.device(recipe.device), dtype=torch.float32)
        model.decoder.to(_DTYPES[recipe.dtype])
        context = stage_reaches(config.upsampling_ratios)[0]
        spec = CodecSpec(
            sample_rate_hz=config.sampling_rate,
            hop=math.prod(config.upsampling_ratios),
            left=context,
            right=context,
            num_codebooks=config.n_codebooks,
            codebook_size=config.codebook_size,
        )
        return cls(model, spec=spec, strides=config.upsampling_ratios, has_encoder=with_encoder)

    @property
    def spec(self) -> CodecSpec:
        return self._spec

    @property
    def device(self) -> torch.device:
        return self._weight.device

    @property
    def _weight(self) -> torch.Tensor:
        """Stands for all of the decoder's weights: same device, same dtype."""
        weight: torch.Tensor = self._model.decoder.conv1.weight
        return weight

    @torch.inference_mode()
    def decode(self, codes: torch.Tensor, *, first: int = 0, last: int | None = None, timbre: int = 0) -> torch.Tensor:
        """See `Codec.decode`. On the CPU an item's samples are the same bits in any batch."""
        if codes.device.type == "cpu" and len(codes) > 1:
            # The CPU's convolutions may split their sums by batch size, and a batch gains nothing there.
            items = [self.decode_exact(codes[i : i + 1], first=first, last=last) for i in range(len(codes))]
            return torch.cat(items).float()
        return self.decode_exact(codes, first=first, last=last).float()

    @torch.inference_mode()
    def decode_exact(self, codes: torch.Tensor, *, first: int = 0, last: int | None = None) -> torch.Tensor:
        """`decode` of one batch, not rounded to float32: [B, (last - first) * hop] in the decoder's dtype.

        Each block computes no more context than the samples wanted need from it. The blocks are most of the work,
        the later ones most of the blocks, and their reach is shorter: a small window costs half.
        """
        decoder: Any = self._model.decoder
        begin, end = 0, codes.shape[2]
        stop = end if last is None else last
        quantizer: Any = self._model.quantizer
        x = decoder.conv1(quantizer.from_codes(codes)[0].to(self._weight.dtype))
        rate = 1
        for block, stride, reach in zip(decoder.block, self._strides, self._reaches, strict=True):
            low, high = max(begin, first - reach), min(end, stop + reach)
            x = block(x[..., (low - begin) * rate : (high - begin) * rate])
            begin, end, rate = low, high, rate * stride
        samples: torch.Tensor = decoder.tanh(decoder.conv2(decoder.snake1(x))).squeeze(1)
        return samples[:, (first - begin) * rate : (stop - begin) * rate]

    @torch.inference_mode()
    def encode(self, audio: torch.Tensor) -> torch.Tensor:
        """See `Codec.encode`.

        Raises: ModelLoadError if the codec was loaded without its encoder.
        """
        if not self._has_encoder:
            raise ModelLoadError("this DAC codec has no encoder: load it with with_encoder=True")
        if audio.numel() == 0:
            return torch.empty(self._spec.num_codebooks, 0, dtype=torch.int64, device=self.device)
        padded = F.pad(audio.to(self.device, torch.float32), (0, -len(audio) % self._spec.hop))
        encoded = self._model.encode(padded[None, None])
        codes: torch.Tensor = encoded.audio_codes  # pyright: ignore[reportAttributeAccessIssue, reportAssignmentType]
        return codes[0]
