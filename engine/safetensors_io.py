"""Reads what a checkpoint folder holds: config.json and *.safetensors.

Owns the errors: whatever is missing, cut short, corrupted or of the wrong shape becomes a ModelLoadError that
names the file and the remedy. Never knows what the tensors mean, never downloads, never writes.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import mmap
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from declaim.engine.errors import ModelLoadError

_FETCH_AGAIN = "copy or download the checkpoint again"
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
WEIGHT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def read_json(path: Path) -> dict[str, object]:
    """Read a JSON object.

    Raises: ModelLoadError if the file cannot be read or holds anything but one JSON object.
    """
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ModelLoadError(f"{path} does not exist: name a folder that holds {path.name}") from None
    except OSError as error:
        raise ModelLoadError(f"{path} cannot be read ({error.strerror}): check its permissions") from error
    except (ValueError, RecursionError) as error:
        raise ModelLoadError(f"{path} is not valid JSON ({error}): {_FETCH_AGAIN}") from error
    if not isinstance(value, dict):
        kind = type(value).__name__
        raise ModelLoadError(f"{path} holds a JSON {kind}, not an object: {_FETCH_AGAIN}")
    return value


def read_integer(config: Mapping[str, object], key: str, path: Path) -> int:
    """A positive integer of a config read from `path`.

    Raises: ModelLoadError if the key is missing or its value is anything else.
    """
    if key not in config:
        raise ModelLoadError(f"{path} has no key {key!r}: {_FETCH_AGAIN}")
    value = config[key]
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ModelLoadError(f"{path}: {key} is {value!r}, it must be a positive integer: {_FETCH_AGAIN}")
    return value


def read_number(config: Mapping[str, object], key: str, path: Path) -> float:
    """A finite number of a config read from `path`.

    Raises: ModelLoadError if the key is missing or its value is anything else.
    """
    if key not in config:
        raise ModelLoadError(f"{path} has no key {key!r}: {_FETCH_AGAIN}")
    value = config[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < float("inf"):
        raise ModelLoadError(f"{path}: {key} is {value!r}, it must be a finite number: {_FETCH_AGAIN}")
    return float(value)


def read_tensors(path: Path, *, skip_prefixes: Sequence[str] = ()) -> dict[str, torch.Tensor]:
    """Read the tensors of one safetensors file, except those whose name starts with one of `skip_prefixes`.

    Skipped tensors are never read from disk. The rest may be views of the mapped file: never write into them.

    Raises: ModelLoadError if the file is missing, cut short or corrupted.
    """
    if not path.is_file():
        raise ModelLoadError(f"{path} does not exist: name a folder that holds {path.name}")
    skipped = tuple(skip_prefixes)
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys() if not name.startswith(skipped)}
    except (SafetensorError, OSError) as error:
        size = path.stat().st_size
        raise ModelLoadError(f"{path} ({size} bytes) is cut short or corrupted ({error}): {_FETCH_AGAIN}") from error


def take_tensor(
    tensors: dict[str, torch.Tensor],
    name: str,
    *,
    shape: Sequence[int],
    path: Path,
    dtypes: Sequence[torch.dtype] = WEIGHT_DTYPES,
) -> torch.Tensor:
    """Remove one tensor from what was read from `path`, after checking its shape and dtype.

    Raises: ModelLoadError if it is missing, has another shape, or a dtype that is none of `dtypes`.
    """
    tensor = tensors.pop(name, None)
    if tensor is None:
        raise ModelLoadError(
            f"{path} has no tensor {name!r}, its config.json asks for it: "
            f"weights and config.json are of different models; {_FETCH_AGAIN}"
        )
    if tensor.shape != torch.Size(shape):
        raise ModelLoadError(
            f"{path}: {name} is {list(tensor.shape)}, its config.json asks for {list(shape)}: "
            f"weights and config.json are of different models; {_FETCH_AGAIN}"
        )
    check_dtype(tensor, name, path=path, dtypes=dtypes)
    return tensor


def check_dtype(tensor: torch.Tensor, name: str, *, path: Path, dtypes: Sequence[torch.dtype] = WEIGHT_DTYPES) -> None:
    """Raises: ModelLoadError where a tensor of `path` has a dtype that is none of `dtypes`."""
    if tensor.dtype not in dtypes:
        found, *read = (str(dtype).removeprefix("torch.") for dtype in (tensor.dtype, *dtypes))
        raise ModelLoadError(
            f"{path}: {name} is {found}, this version reads {', '.join(read)}: take the model as it was published, and "
            "let --dtype int4 or declaim quantize make it smaller"
        )


def release_pages(tensor: torch.Tensor) -> None:
    """Give a mapped tensor's memory back to the system: call it once the tensor was copied and is not read again.

    Without this, a file that is converted stays in memory beside what it was converted to until all of it is.
    """
    if sys.platform != "linux":
        return
    first = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    last = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if last > first:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_DONTNEED)


@contextlib.contextmanager
def freed_at_once() -> Iterator[None]:
    """While a model is loaded, give back what a tensor took as soon as it is freed.

    glibc learns from each large block that is freed to keep the next ones: of tensors converted one by one it would
    hold some 100 MB. Afterwards it keeps what a step uses again and again, and gives back the largest, as of windows.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc's
    if mallopt is None:
        yield
        return
    mallopt(_M_MMAP_THRESHOLD, 1 << 17)
    try:
        yield
    finally:
        mallopt(_M_MMAP_THRESHOLD, 8 << 20)
        mallopt(_M_TRIM_THRESHOLD, 16 << 20)


def refuse_leftovers(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Refuse a file that holds more than the model has places for: it is another model's.

    Raises: ModelLoadError.
    """
    if tensors:
        raise ModelLoadError(
            f"{path} holds {len(tensors)} tensors that the model has no place for, {min(tensors)!r} among "
            f"them: weights and config.json are of different models; {_FETCH_AGAIN}"
        )
