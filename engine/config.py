"""The engine's settings: checked when made, and resolved once into what the machine has."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

from declaim.engine.errors import InvalidConfig

DTypeName = Literal["auto", "float32", "float16", "bfloat16", "int4"]
VocoderName = Literal["inline", "ray"]

MAX_EXACT_THREADS = 4  # kernels/linear.py keeps its law up to here, measured; see benchmarks/LOG.md

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """How an engine runs.

    device: "auto", "cpu", "cuda" or "cuda:N". dtype: "auto" is float32 on the CPU, bfloat16 or float16 on a GPU.
    vocoder: "inline" decodes in this process, "ray" in a pool of workers that survives their death.
    max_batch: sequences in one step. max_waiting: sequences that may wait beyond those; more are refused.
    memory_gb: for the model's weights and its KV cache together; None takes 90 % of a GPU's free memory, or half of the
    host's.
    num_blocks: fixes the number of KV blocks instead of planning it from memory.
    max_step_positions: positions computed in one step at most; a longer prompt is prefilled over several.
    eager: on a GPU, run each step operation by operation instead of as a captured graph: slower, for debugging.
    max_lead_s: a stream further ahead of its playback than this yields to others.
    first_chunk_s, max_chunk_s: the first piece of audio, and the largest.
    vocoder_workers: fewest and most Ray workers; vocoder_cpus, vocoder_gpus: each one's share.
    ray_address: a running cluster to join; None starts a local Ray.
    num_threads: CPU threads of the engine's arithmetic. None takes torch's own number, less a core for a local Ray
    worker, and at most 4: beyond that MKL splits some sums between threads, and a row's bits depend on its neighbours.

    Raises: InvalidConfig.
    """

    device: str = "auto"
    dtype: DTypeName = "auto"
    vocoder: VocoderName = "inline"
    max_batch: int = 32
    max_waiting: int = 256
    memory_gb: float | None = None
    num_blocks: int | None = None
    block_size: int = 32
    max_step_positions: int = 256
    eager: bool = False
    max_lead_s: float = 8.0
    first_chunk_s: float = 0.16
    max_chunk_s: float = 1.28
    vocoder_workers: tuple[int, int] = (1, 2)
    vocoder_cpus: float = 1.0
    vocoder_gpus: float = 0.0
    ray_address: str | None = None
    num_threads: int | None = None

    def __post_init__(self) -> None:
        if self.dtype not in ("auto", *_DTYPES):
            raise InvalidConfig(f"dtype is {self.dtype!r}: use auto, {', '.join(_DTYPES)}")
        if self.vocoder not in ("inline", "ray"):
            raise InvalidConfig(f"vocoder is {self.vocoder!r}: use inline or ray")
        for name in ("max_batch", "block_size", "max_step_positions"):
            self._check_at_least(name, 1)
        for name in ("max_waiting", "vocoder_cpus", "vocoder_gpus"):
            self._check_at_least(name, 0)
        for name in ("memory_gb", "num_blocks", "num_threads", "max_lead_s", "first_chunk_s", "max_chunk_s"):
            self._check_positive(name)
        fewest, most = self.vocoder_workers
        if not 1 <= fewest <= most:
            raise InvalidConfig(f"vocoder_workers is {fewest}:{most}: the fewest must be at least 1, the most no fewer")

    def _check_at_least(self, name: str, low: int) -> None:
        value = getattr(self, name)
        if not value >= low:
            raise InvalidConfig(f"{name} is {value}: it must be at least {low}")

    def _check_positive(self, name: str) -> None:
        value = getattr(self, name)
        if value is not None and not value > 0:
            raise InvalidConfig(f"{name} is {value}: it must be positive; leave it out for the default")

    def resolve(self) -> EngineConfig:
        """A copy with "auto" replaced by what this machine has. Raises: InvalidConfig."""
        device = self.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            kind = torch.device(device).type
        except RuntimeError as error:
            raise InvalidConfig(f"device is {device!r}: use auto, cpu, cuda or cuda:N") from error
        if kind not in ("cpu", "cuda"):
            raise InvalidConfig(f"device is {device!r}: use auto, cpu, cuda or cuda:N")
        if kind == "cuda" and not torch.cuda.is_available():
            raise InvalidConfig(f"device is {device!r}, and torch {torch.__version__} sees no GPU here: use cpu")
        dtype = self.dtype
        if dtype == "auto":
            has_bfloat16 = kind == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
            dtype = "float32" if kind == "cpu" else "bfloat16" if has_bfloat16 else "float16"
        return replace(self, device=device, dtype=dtype, num_threads=self.num_threads or self._default_threads())

    def _default_threads(self) -> int:
        num_others = self.vocoder_workers[0] if self.vocoder == "ray" and self.ray_address is None else 0
        return max(1, min(MAX_EXACT_THREADS, torch.get_num_threads() - num_others))

    @property
    def torch_device(self) -> torch.device:
        """The resolved device."""
        return torch.device(self.device)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The resolved dtype."""
        return _DTYPES[self.dtype]
