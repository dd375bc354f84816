"""A checkpoint folder's weights, taken by name and checked by shape as they are taken; quantized on the way, or before.

A folder that `engine/quantize.py` wrote holds three tensors for each int4 weight, and QUANTIZATION_NAME, which says
which they are and what the files' SHA-256 is.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import torch

from declaim.engine.config import INT4_GROUP_SIZES, Int4Recipe
from declaim.engine.errors import ModelLoadError
from declaim.engine.integrity import QUANTIZATION_NAME, half_written, hash_file
from declaim.engine.progress import Progress, ignore_progress
from declaim.engine.safetensors_io import (
    read_integer,
    read_json,
    read_tensors,
    refuse_leftovers,
    release_pages,
    take_tensor,
)
from declaim.kernels.int4 import (
    Int4Weight,
    can_quantize,
    concatenate_outputs,
    lay_out_int4,
    quantize_weight,
    w4a16_dequantize_reference,
)
from declaim.kernels.linear import Linear, pack_linear

log = logging.getLogger(__name__)

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
QUANTIZATION_FORMAT = "declaim-int4-planar128-v1"
INT4_SUFFIXES = (".int4", ".scales", ".offsets")
INT4_DTYPES = (torch.int32, torch.float32, torch.float32)


@dataclass
class _Taken:
    """Bytes of a folder's tensors that were handed out, told under a stage's name."""

    progress: Progress
    stage: str
    total: int
    done: int = 0

    def add(self, num_bytes: int) -> None:
        self.done += num_bytes
        self.progress(self.stage, self.done, self.total)


class Checkpoint:
    """The tensors of one folder: `model.safetensors`, or the shards its index names."""

    # Class-wide, so that a checkpoint without files need not set them.
    _recipe: Int4Recipe | None = None
    _stored_groups: Mapping[str, int] = {}
    _mapped: frozenset[int] = frozenset()  # addresses of what was handed out as it lies in a file

    def __init__(
        self,
        folder: Path,
        *,
        dtype: torch.dtype,
        device: torch.device,
        recipe: Int4Recipe | None = None,
        progress: Progress = ignore_progress,
    ) -> None:
        """Map the files; what is taken is read then.

        recipe: makes the linear layers that it names int4 as they are taken. What lies in the folder as int4 stays so,
        whatever the recipe. progress: stage "verify" where the folder knows its files' hashes; then "quantize" where
        the recipe does that, else "read", both in bytes of the folder's tensors. Raises: ModelLoadError.
        """
        self.folder = folder
        self.weight_bytes = 0
        self._dtype = dtype
        self._device = device
        self._recipe = recipe
        self._stored_groups = _read_stored_groups(folder, progress)
        self._tensors: dict[str, torch.Tensor] = {}
        for name in shard_names(folder):
            self._tensors |= read_tensors(folder / name)
        stage = "quantize" if recipe is not None and not self._stored_groups else "read"
        self._taken = _Taken(progress, stage, sum(tensor.nbytes for tensor in self._tensors.values()))

    def on(self, device: torch.device, *, dtype: torch.dtype) -> Checkpoint:
        """The same tensors, handed out elsewhere and in another dtype, and as they lie in the folder."""
        other = copy.copy(self)
        other._device, other._dtype, other._recipe, other.weight_bytes = device, dtype, None, 0
        return other

    def take(self, name: str, shape: Sequence[int]) -> torch.Tensor:
        """Hand out a tensor in the checkpoint's target dtype and device. Raises: ModelLoadError."""
        tensor = take_tensor(self._tensors, name, shape=shape, path=self.folder)
        taken = tensor.to(device=self._device, dtype=self._dtype)
        if taken is tensor:
            self._mapped |= {tensor.data_ptr()}
        else:
            release_pages(tensor)
        self.weight_bytes += taken.numel() * taken.element_size()
        self._taken.add(tensor.nbytes)
        return taken

    def refuse_leftovers(self) -> None:
        """Once a model has taken what it has places for. Raises: ModelLoadError naming what nobody took."""
        refuse_leftovers(self._tensors, self.folder)

    def take_linear(
        self, parts: Sequence[tuple[str, int]], num_in: int, *, bias: str | None = None, is_gate_last: bool = False
    ) -> Linear:
        """Hand out a layer whose outputs are those of `parts` side by side: names of weights, and outputs of each.

        int4 where the folder or the recipe makes all parts int4 of one group size. bias: the name of the whole layer's.
        is_gate_last: the outputs are [value | gate], and change places. Raises: ModelLoadError.
        """
        num_out = sum(size for _, size in parts)
        biases = None if bias is None else self.take(bias, (num_out,))
        group_size = self._group_size(parts, num_in)
        if group_size is None:
            weights = [self._take_dense(name, (size, num_in)) for name, size in parts]
            dense = weights[0]
            if len(weights) > 1:
                dense = torch.cat(weights)
                self._drop(weights)
            packed = pack_linear(dense.roll(num_out // 2, 0) if is_gate_last else dense, bias=biases)
            self._drop(weights)
            return packed
        quantized = concatenate_outputs([self._take_int4(name, (size, num_in), group_size) for name, size in parts])
        if is_gate_last:
            quantized = _swap_halves(quantized)
        weight = lay_out_int4(quantized, dtype=self._dtype, device=self._device)
        self.weight_bytes += weight.num_bytes
        return Linear(weight, biases, num_out, is_packed=False)

    def _drop(self, copied: list[torch.Tensor]) -> None:
        """Give back the memory of tensors that were copied. Pages of a file can be read again, if ever; memory that is
        not a file's would be lost to whoever else holds it."""
        for tensor in copied:
            if tensor.data_ptr() in self._mapped:
                release_pages(tensor)
        copied.clear()

    def _group_size(self, parts: Sequence[tuple[str, int]], num_in: int) -> int | None:
        """The group size that all parts of a layer have; None makes it dense."""
        if any(name in self._stored_groups for name, _ in parts):
            found = {self._stored_groups.get(name) for name, _ in parts}
        elif self._recipe is not None:
            found = {choose_group_size(self._recipe, name, num_in, num_out=size) for name, size in parts}
        else:
            return None
        return found.pop() if len(found) == 1 else None

    def _take_dense(self, name: str, shape: tuple[int, int]) -> torch.Tensor:
        if name not in self._stored_groups:
            return self.take(name, shape)
        # Beside a part that does not fit int4, as where 16 does not divide its outputs, this one is made dense again.
        stored = self._take_stored(name, shape, self._stored_groups[name])
        taken = w4a16_dequantize_reference(stored).t().to(device=self._device, dtype=self._dtype)
        self.weight_bytes += taken.numel() * taken.element_size()
        return taken

    def _take_int4(self, name: str, shape: tuple[int, int], group_size: int) -> Int4Weight:
        if name in self._stored_groups:
            return self._take_stored(name, shape, group_size)
        tensor = take_tensor(self._tensors, name, shape=shape, path=self.folder)
        quantized = quantize_tensor(tensor.to(self._device), group_size, name=name, folder=self.folder)
        release_pages(tensor)
        self._taken.add(tensor.nbytes)
        return quantized

    def _take_stored(self, name: str, shape: tuple[int, int], group_size: int) -> Int4Weight:
        num_out, num_in = shape
        shapes = ((-(-num_in // 128) * 16, num_out), *[(num_in // group_size, num_out)] * 2)
        packed, scales, offsets = (
            take_tensor(self._tensors, name + suffix, shape=expected, path=self.folder, dtypes=(dtype,))
            for suffix, expected, dtype in zip(INT4_SUFFIXES, shapes, INT4_DTYPES, strict=True)
        )
        self._taken.add(packed.nbytes + scales.nbytes + offsets.nbytes)
        return Int4Weight(packed, scales, offsets, num_in)


def _swap_halves(weight: Int4Weight) -> Int4Weight:
    """The outputs' second half first."""
    half = weight.num_out // 2
    packed, scales, offsets = (part.roll(half, 1) for part in (weight.packed, weight.scales, weight.offsets))
    return Int4Weight(packed, scales, offsets, weight.num_in)


def quantize_tensor(tensor: torch.Tensor, group_size: int, *, name: str, folder: Path) -> Int4Weight:
    """Quantize a folder's weight [out, in] on its device. Raises: ModelLoadError where it is not finite."""
    quantized = quantize_weight(tensor, group_size)
    if not bool(torch.isfinite(quantized.scales).all() & torch.isfinite(quantized.offsets).all()):
        raise ModelLoadError(f"{folder}: {name} holds values that are not finite: download the model again")
    return quantized


def choose_group_size(recipe: Int4Recipe, name: str, num_in: int, *, num_out: int) -> int | None:
    """The group size of a weight [num_out, num_in]; None leaves it dense.

    Raises: ModelLoadError where the recipe fixes a size that does not fit.
    """
    if any(fnmatchcase(name, pattern) for pattern in recipe.keep_dense):
        return None
    if can_quantize(num_in, num_out, recipe.group_size):
        return recipe.group_size
    shown = f"{name} ({num_out} outputs of {num_in} inputs)"
    if recipe.is_group_fixed:
        raise ModelLoadError(
            f"{shown} cannot have int4 groups of {recipe.group_size}, which must divide the inputs, as 16 must the"
            " outputs: leave the group size out, or name the layer in int4_keep_dense"
        )
    sizes = (size for size in INT4_GROUP_SIZES if size < recipe.group_size and can_quantize(num_in, num_out, size))
    smaller = next(sizes, None)
    log.info("event=int4_fallback layer=%r asked=%d group_size=%s", shown, recipe.group_size, smaller or "dense")
    return smaller


def shard_names(folder: Path) -> list[str]:
    """The files of weights in a folder. Raises: ModelLoadError."""
    index = folder / INDEX_NAME
    if not index.exists():
        return [SINGLE_NAME]
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ModelLoadError(f"{index} has no weight_map: it is not a safetensors index; download it again")
    return sorted({str(name) for name in weight_map.values()})


def _read_stored_groups(folder: Path, progress: Progress) -> dict[str, int]:
    """Group sizes of the weights that lie in a folder as int4, its files checked. Raises: ModelLoadError."""
    unfinished = half_written(folder)
    if unfinished is not None:
        raise ModelLoadError(unfinished)
    path = folder / QUANTIZATION_NAME
    if not path.exists():
        return {}
    config = read_json(path)
    found, group_sizes, hashes = config.get("format"), config.get("group_sizes"), config.get("sha256")
    if found != QUANTIZATION_FORMAT:
        raise ModelLoadError(
            f"{path} says format {found!r}, this version reads {QUANTIZATION_FORMAT!r}: quantize the original model"
            " again with declaim quantize"
        )
    if not isinstance(group_sizes, dict) or not isinstance(hashes, dict):
        raise ModelLoadError(f"{path} has no group_sizes or no sha256: quantize the model again")
    for name in hashes:
        if not (folder / name).is_file():
            raise ModelLoadError(f"{folder} has no {name}, which {path.name} lists: quantize or copy it again")
    sizes = {name: (folder / name).stat().st_size for name in hashes}
    done, total = 0, sum(sizes.values())
    for name, expected in hashes.items():
        if hash_file(folder / name, progress, before=done, total=total).sha256 != expected:
            raise ModelLoadError(f"{folder / name} is not what was written (its SHA-256 differs): copy it again")
        done += sizes[name]
    return {name: read_integer(group_sizes, name, path) for name in group_sizes}
