"""Writes a model's folder again with its large layers as int4: the codes that loading with `--dtype int4` makes.

Weights go into shards, each written under another name, flushed to the disk and renamed; PROGRESS_NAME says which are
whole, lies in the folder until all is, and makes loading refuse it. So a run that was killed anywhere goes on where it
was, and what it leaves is never mistaken for a model. Whatever is not a weight is copied as it is, the codec included.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypedDict, cast

import torch
from safetensors.torch import save

from declaim.engine.checkpoint import (
    INDEX_NAME,
    INT4_SUFFIXES,
    QUANTIZATION_FORMAT,
    SINGLE_NAME,
    choose_group_size,
    quantize_tensor,
    shard_names,
)
from declaim.engine.config import INT4_GROUP_SIZES, Int4Recipe
from declaim.engine.errors import InvalidConfig, ModelLoadError
from declaim.engine.integrity import CHUNK_BYTES, PROGRESS_NAME, QUANTIZATION_NAME, hash_file
from declaim.engine.loader import WEIGHT_SUFFIXES, read_family
from declaim.engine.progress import Progress, ignore_progress
from declaim.engine.safetensors_io import check_dtype, read_json, read_tensors, release_pages

SHARD_BYTES = 256 << 20  # of the original's weights: what a killed run has to do again
_UNFINISHED = ".new"


class _Source(TypedDict):
    """What a quantized folder was made from, so that no other model's shards are mixed with it."""

    weights: dict[str, list[int]]  # name to size in bytes and time of change in ns
    group_size: int | None


@dataclass(frozen=True, slots=True)
class _Shard:
    """Tensors of the original that go into one file, and where they lie."""

    file_name: str
    tensors: Mapping[str, torch.Tensor]  # mapped, not read


def quantize_folder(
    source: Path, target: Path, *, group_size: int | None = None, progress: Progress = ignore_progress
) -> None:
    """Quantize the model in `source` into `target`, or go on with it; a folder that is whole is left as it is.

    group_size: inputs that share a scale, for every layer; None takes 128, or less where that does not divide a layer's
    inputs, and leaves a layer dense that no size fits. progress: stage "quantize", in bytes of the original's weights.
    Raises: InvalidConfig; ModelLoadError where the original is damaged or does not fit, or the disk is full.
    """
    recipe = _recipe(source, group_size)
    origin: _Source = {"weights": _describe_weights(source), "group_size": group_size}
    if _is_whole(target, origin):
        return
    tensors = {name: tensor for file in shard_names(source) for name, tensor in read_tensors(source / file).items()}
    for name, tensor in tensors.items():
        check_dtype(tensor, name, path=source)
    groups = _choose_groups(tensors, recipe)
    shards, copied = _cut(tensors), _other_files(source)
    hashes = _begin(source, target, origin)
    _check_room(target, _output_bytes(tensors, groups) + sum(path.stat().st_size for path in copied.values()))
    done, total = 0, sum(tensor.nbytes for tensor in tensors.values())
    tensors.clear()
    progress("quantize", done, total)
    while shards:
        shard = shards.pop(0)
        if _is_written(target / shard.file_name, hashes.get(shard.file_name)):
            done += sum(tensor.nbytes for tensor in shard.tensors.values())
            progress("quantize", done, total)
            continue
        written: dict[str, torch.Tensor] = {}
        for name, tensor in shard.tensors.items():
            written |= _quantize(name, tensor, groups, source)
            done += tensor.nbytes
            progress("quantize", done, total)
        hashes[shard.file_name] = _write(target / shard.file_name, [save(written, metadata={"format": "pt"})])
        _save_progress(target, origin, hashes)
        for tensor in shard.tensors.values():
            release_pages(tensor)
    for name, path in copied.items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        hashes[name] = _write(target / name, _chunks(path))
    _finish(target, origin, hashes, groups)


def _recipe(source: Path, group_size: int | None) -> Int4Recipe:
    """Raises: InvalidConfig, ModelLoadError."""
    if group_size not in (None, *INT4_GROUP_SIZES):
        raise InvalidConfig(f"group_size is {group_size}: use 128, 64 or 32, or leave it out")
    if (source / QUANTIZATION_NAME).exists() or (source / PROGRESS_NAME).exists():
        raise InvalidConfig(f"{source} is int4 already: name the model that it was made from")
    recipe = Int4Recipe.of_family(read_family(source))
    return recipe if group_size is None else replace(recipe, group_size=group_size, is_group_fixed=True)


def _describe_weights(source: Path) -> dict[str, list[int]]:
    described = {}
    for name in shard_names(source):
        path = source / name
        if not path.is_file():
            raise ModelLoadError(f"{path} does not exist: copy or download the model again")
        described[name] = [path.stat().st_size, path.stat().st_mtime_ns]
    return described


def _is_whole(target: Path, origin: _Source) -> bool:
    """Whether `target` is finished already. Raises: InvalidConfig where it is another model or other files."""
    if not target.exists():
        return False
    if not target.is_dir():
        raise InvalidConfig(f"{target} is a file: name a folder to write")
    if (target / PROGRESS_NAME).exists():
        return False
    if (target / QUANTIZATION_NAME).exists():
        if read_json(target / QUANTIZATION_NAME).get("source") == origin:
            return True
        raise InvalidConfig(f"{target} holds another quantized model: name a new folder, or delete it first")
    if any(not path.name.endswith(_UNFINISHED) for path in target.iterdir()):
        raise InvalidConfig(f"{target} holds other files: name a new folder")
    return False


def _begin(source: Path, target: Path, origin: _Source) -> dict[str, str]:
    """Make `target`, or see how far it is: SHA-256 by name of what was written.

    Raises: InvalidConfig, ModelLoadError.
    """
    if (target / PROGRESS_NAME).exists():
        state = read_json(target / PROGRESS_NAME)
        if state.get("source") != origin:
            raise InvalidConfig(
                f"{target} was begun from other weights or with another group size than {source} and"
                f" {origin['group_size']}: give the same as before, or delete it first"
            )
        return cast(dict[str, str], state["sha256"])
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _write_error(error, target) from error
    _save_progress(target, origin, {})
    return {}


def _choose_groups(tensors: Mapping[str, torch.Tensor], recipe: Int4Recipe) -> dict[str, int]:
    """Group sizes of the weights that become int4. Raises: ModelLoadError where a fixed size does not fit."""
    matrices = {name: t for name, t in tensors.items() if t.dim() == 2 and t.is_floating_point()}
    chosen = {
        name: choose_group_size(recipe, name, matrix.shape[1], num_out=matrix.shape[0])
        for name, matrix in matrices.items()
    }
    groups = {name: size for name, size in chosen.items() if size is not None}
    if not groups:
        raise ModelLoadError(f"none of the {len(matrices)} matrices can be int4: serve the model as it is")
    return groups


def _cut(tensors: Mapping[str, torch.Tensor]) -> list[_Shard]:
    """Cut a model into files of about SHARD_BYTES of the original."""
    parts: list[dict[str, torch.Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if parts[-1] and size + tensor.nbytes > SHARD_BYTES:
            parts.append({})
            size = 0
        parts[-1][name] = tensor
        size += tensor.nbytes
    if len(parts) == 1:
        return [_Shard(SINGLE_NAME, parts[0])]
    return [_Shard(f"model-{i:05}-of-{len(parts):05}.safetensors", part) for i, part in enumerate(parts, 1)]


def _other_files(source: Path) -> dict[str, Path]:
    """What is copied, by name: files beside the weights, and the codec."""
    weights = (*WEIGHT_SUFFIXES, ".index.json")
    top = [path for path in source.iterdir() if not path.name.startswith(".") and not path.name.endswith(weights)]
    paths = [path for path in (*top, *(source / "codec").rglob("*")) if path.is_file()]
    return {path.relative_to(source).as_posix(): path for path in sorted(paths)}


def _output_bytes(tensors: Mapping[str, torch.Tensor], groups: Mapping[str, int]) -> int:
    """Codes of half a byte, and a scale and an offset in float32 for each group."""
    dense = sum(tensor.nbytes for name, tensor in tensors.items() if name not in groups)
    return dense + sum(tensors[name].numel() // 2 + tensors[name].numel() // size * 8 for name, size in groups.items())


def _check_room(target: Path, needed: int) -> None:
    """Raises: ModelLoadError where the disk cannot hold the folder."""
    held = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    free = shutil.disk_usage(target).free
    if needed - held > free:
        raise ModelLoadError(_disk_full(target, f"{needed - held} more bytes are needed, and {free} are free there"))


def _quantize(name: str, tensor: torch.Tensor, groups: Mapping[str, int], source: Path) -> dict[str, torch.Tensor]:
    """What is written of a tensor of the original, by name. Raises: ModelLoadError."""
    if name not in groups:
        return {name: tensor}
    quantized = quantize_tensor(tensor, groups[name], name=name, folder=source)
    parts = (quantized.packed, quantized.scales, quantized.offsets)
    return {name + suffix: part for suffix, part in zip(INT4_SUFFIXES, parts, strict=True)}


def _is_written(path: Path, sha256: str | None) -> bool:
    if sha256 is None or not path.is_file():
        return False
    return hash_file(path, ignore_progress, before=0, total=path.stat().st_size).sha256 == sha256


def _finish(target: Path, origin: _Source, hashes: dict[str, str], groups: Mapping[str, int]) -> None:
    """Write the index of several shards, and what loading reads; then the folder is no longer half written."""
    files = sorted(name for name in hashes if "/" not in name and name.endswith(".safetensors"))
    if files != [SINGLE_NAME]:
        weight_map = {tensor: name for name in files for tensor in read_tensors(target / name)}
        hashes[INDEX_NAME] = _write_json(target / INDEX_NAME, {"weight_map": weight_map})
    config = {"format": QUANTIZATION_FORMAT, "group_sizes": dict(groups), "sha256": hashes, "source": origin}
    _write_json(target / QUANTIZATION_NAME, config)
    (target / PROGRESS_NAME).unlink()


def _save_progress(target: Path, origin: _Source, hashes: Mapping[str, str]) -> None:
    _write_json(target / PROGRESS_NAME, {"source": origin, "sha256": dict(hashes)})


def _write_json(path: Path, value: Mapping[str, object]) -> str:
    return _write(path, [json.dumps(value, indent=1).encode()])


def _write(path: Path, chunks: Iterable[bytes]) -> str:
    """Write a file that is there whole or not at all; its SHA-256. Raises: ModelLoadError."""
    fresh = path.with_name(path.name + _UNFINISHED)
    digest = hashlib.sha256()
    try:
        with fresh.open("wb") as file:
            for chunk in chunks:
                file.write(chunk)
                digest.update(chunk)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)
    except OSError as error:
        fresh.unlink(missing_ok=True)
        raise _write_error(error, path) from error
    return digest.hexdigest()


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk


def _write_error(error: OSError, path: Path) -> ModelLoadError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ModelLoadError(_disk_full(path, "no more can be written there"))
    return ModelLoadError(f"{path} cannot be written ({error.strerror or error}): check it, and run again")


def _disk_full(path: Path, found: str) -> str:
    return (
        f"the disk of {path} is full: {found}; make room and run the same command again, it goes on from there, or name"
        " a folder on another disk"
    )
