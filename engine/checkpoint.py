"""A checkpoint folder's weights, taken by name and checked by shape as they are taken."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from declaim.engine.errors import ModelLoadError
from declaim.engine.safetensors_io import read_json, read_tensors, take_tensor

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"


class Checkpoint:
    """The tensors of one folder: `model.safetensors`, or the shards its index names."""

    def __init__(self, folder: Path, *, dtype: torch.dtype, device: torch.device) -> None:
        """Read everything into host memory, memory-mapped. Raises: ModelLoadError."""
        self.folder = folder
        self.weight_bytes = 0
        self._dtype = dtype
        self._device = device
        self._tensors: dict[str, torch.Tensor] = {}
        for name in _shard_names(folder):
            self._tensors |= read_tensors(folder / name)

    def take(self, name: str, shape: Sequence[int]) -> torch.Tensor:
        """Hand out a tensor in the checkpoint's target dtype and device. Raises: ModelLoadError."""
        tensor = take_tensor(self._tensors, name, shape=shape, path=self.folder)
        taken = tensor.to(device=self._device, dtype=self._dtype)
        self.weight_bytes += taken.numel() * taken.element_size()
        return taken


def _shard_names(folder: Path) -> list[str]:
    index = folder / INDEX_NAME
    if not index.exists():
        return [SINGLE_NAME]
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ModelLoadError(f"{index} has no weight_map: it is not a safetensors index; download it again")
    return sorted({str(name) for name in weight_map.values()})
