"""The engine's settings: checked when made, and resolved once into what the machine has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from declaim.engine.errors import InvalidConfig
from declaim.engine.memory import Offload

if TYPE_CHECKING:
    import torch

DTypeName = Literal["auto", "float32", "float16", "bfloat16", "int4"]
VocoderName = Literal["inline", "ray"]
Shed = Literal["late", "full"]

MAX_EXACT_THREADS = 4  # kernels/linear.py keeps its law up to here, measured; see benchmarks/LOG.md

INT4_GROUP_SIZES = (128, 64, 32)

_DTYPES = ("float32", "float16", "bfloat16")

# By family: what int4 leaves in the activations' dtype, as patterns of checkpoint names. Embeddings are read and not
# multiplied; heads, and the few layers that say how long a phoneme lasts, cost more than they save. Of the embedded
# voice only the encoder's feed-forward layers are int4: with every layer, 90 % of its next codes are float32's, where
# benchmarks/quality.py asks for 97 % (and bfloat16 has 98 %).
_KEPT_DENSE: Mapping[str, tuple[str, ...]] = {
    "dia": ("*.embedding.*", "*.embeddings.*", "logits_dense.*"),
    "lark": (
        *("*_embedding.*", "head.*", "duration.*", "side_proj.*"),
        *("decoder.*", "encoder.*.qkv_proj.*", "encoder.*.o_proj.*"),
    ),
    "zonos": ("embeddings.*", "heads.*", "prefix_conditioner.*"),
}


@dataclass(frozen=True, slots=True)
class Int4Recipe:
    """How layers become int4.

    keep_dense: patterns, as of fnmatch, of the checkpoint names that do not. group_size: inputs that share a scale;
    unless is_group_fixed, a layer whose inputs it does not divide takes a smaller one, or stays dense.
    """

    keep_dense: tuple[str, ...]
    group_size: int = INT4_GROUP_SIZES[0]
    is_group_fixed: bool = False

    @classmethod
    def of_family(cls, family: str) -> Int4Recipe:
        """What the family's table says."""
        return cls(_KEPT_DENSE[family])


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """How an engine runs.

    device: "auto", "cpu", "cuda" or "cuda:N". dtype: "auto" is float32 on the CPU, bfloat16 or float16 on a GPU; "int4"
    is 4-bit weights, and activations and cache as "auto" has them.
    int4_group_size: inputs that share a scale; None takes 128, or less where that does not divide a layer's inputs.
    int4_keep_dense: patterns of the checkpoint names that int4 leaves as they are; None takes the family's own.
    vocoder: "inline" decodes in this process, "ray" in a pool of workers that survives their death.
    max_batch: sequences in one step. max_waiting: sequences that may wait beyond those; more are refused.
    shed: who is refused: "full" lets streams wait until there are max_waiting; "late", which `declaim serve` takes,
    also refuses whoever would be served slower than they listen, judged by the last steps, unless somebody is likely to
    leave soon, and so spares those who are being served. Requests that nobody listens to wait in either case.
    memory_gb: for everything: weights, codec, CUDA's context, graphs and workspaces, KV cache; None takes 90 % of a
    GPU's free memory, or three quarters of the host's.
    offload: on a GPU, "text" keeps what reads the text on the CPU, "none" nothing, not even what encodes reference
    audio; "auto" moves the text there, and before it a speaker encoder, only where that makes room for what is asked.
    num_blocks: fixes the number of KV blocks instead of planning it from memory.
    max_step_positions: positions computed in one step at most; a longer prompt is prefilled over several.
    eager: on a GPU, run each step operation by operation instead of as a captured graph: slower, for debugging.
    max_lead_s: a stream further ahead of its playback than this yields to others.
    first_chunk_s, max_chunk_s: the first piece of audio, and the largest.
    vocoder_workers: fewest and most Ray workers; vocoder_cpus, vocoder_gpus: each one's share.
    ray_address: a running cluster to join; None starts a local Ray. Start a cluster's nodes with RAY_worker_niceness=0:
    left to itself, Ray gives vocoder workers the smallest part of a busy CPU.
    num_threads: CPU threads of the engine's arithmetic. None takes torch's own number, less a core for a local Ray
    worker, and at most 4: beyond that MKL splits some sums between threads, and a row's bits depend on its neighbours.

    Raises: InvalidConfig.
    """

    device: str = "auto"
    dtype: DTypeName = "auto"
    int4_group_size: int | None = None
    int4_keep_dense: tuple[str, ...] | None = None
    vocoder: VocoderName = "inline"
    max_batch: int = 32
    max_waiting: int = 256
    shed: Shed = "full"
    memory_gb: float | None = None
    offload: Offload = "auto"
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
        if self.dtype not in ("auto", *_DTYPES, "int4"):
            raise InvalidConfig(f"dtype is {self.dtype!r}: use auto, {', '.join(_DTYPES)} or int4")
        if self.int4_group_size not in (None, *INT4_GROUP_SIZES):
            raise InvalidConfig(f"int4_group_size is {self.int4_group_size}: use 128, 64 or 32, or leave it out")
        if self.offload not in ("auto", "none", "text"):
            raise InvalidConfig(f"offload is {self.offload!r}: use auto, none or text")
        if self.shed not in ("late", "full"):
            raise InvalidConfig(f"shed is {self.shed!r}: use late or full")
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
        import torch

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
            dtype = _default_dtype(torch.device(device))
        return replace(self, device=device, dtype=dtype, num_threads=self.num_threads or self._default_threads())

    def _default_threads(self) -> int:
        import torch

        num_others = self.vocoder_workers[0] if self.vocoder == "ray" and self.ray_address is None else 0
        return max(1, min(MAX_EXACT_THREADS, torch.get_num_threads() - num_others))

    @property
    def torch_device(self) -> torch.device:
        """The resolved device."""
        import torch

        return torch.device(self.device)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The resolved dtype of activations, cache and whatever is not int4."""
        import torch

        name = _default_dtype(self.torch_device) if self.dtype == "int4" else self.dtype
        dtype: torch.dtype = getattr(torch, name)
        return dtype

    def int4_recipe(self, family: str) -> Int4Recipe | None:
        """How to quantize a model of this family while it is loaded; None leaves it as it is."""
        if self.dtype != "int4":
            return None
        recipe = Int4Recipe.of_family(family)
        if self.int4_keep_dense is not None:
            recipe = replace(recipe, keep_dense=self.int4_keep_dense)
        if self.int4_group_size is not None:
            recipe = replace(recipe, group_size=self.int4_group_size, is_group_fixed=True)
        return recipe


def _default_dtype(device: torch.device) -> DTypeName:
    """What a device computes well."""
    import torch

    if device.type == "cpu":
        return "float32"
    return "bfloat16" if torch.cuda.get_device_capability(device) >= (8, 0) else "float16"
