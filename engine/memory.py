"""What fits where: arithmetic over tables, no tensor. Memory is planned once, at start; nothing is allocated later.

`plan_device` decides before the first weight is read, from the configs alone (parts.py): the precision, what stays on
the CPU, the batch cap, the codec's windows, and with what is left the cache. `plan_memory` is its last step alone, for
a model that is loaded already.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from declaim.engine.blocks import blocks_for
from declaim.engine.errors import InvalidConfig, OutOfMemory
from declaim.engine.parts import ELEMENT_BYTES, SPARE_STATES, ModelParts, Precision, check_precision
from declaim.engine.spec import CacheSpec, ModelSpec

if TYPE_CHECKING:
    import torch

Offload = Literal["auto", "none", "text"]

HOST_SHARE = 0.5  # beside weights that are loaded already
UNLOADED_HOST_SHARE = 0.75  # with weights that are still to be loaded
GPU_SHARE = 0.9
GB = 1e9
MB = 1e6

BATCH_BUCKETS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
WINDOW_BATCHES = (4, 2, 1)  # codec windows decoded in one call, as many as there is room for
SHORT_STREAM_S = 2.0  # no more sequences run together than blocks could hold so much of each

KEPT_PRIMITIVES = 160  # programs of oneDNN: for every number of rows of the embedded voice, and windows (LOG.md)
OLDEST_GPU = (7, 5)  # compute capability of the oldest that Triton compiles for and tests/aot checks

# Allowances, each an upper bound to be compared with a card; none follows from a config.
CUDA_CONTEXT_BYTES = 500 * MB  # of a budget that was named; free memory that was measured is without it
LIBRARY_BYTES = 96 * MB  # workspaces of cuBLAS (32 MiB a stream on Hopper, two streams) and cuDNN
GRAPH_BYTES = 4 * MB  # of each captured step: some 400 nodes and their parameters
KV_CHUNK = 256  # kernels/attention.py sums over chunks of so many positions
DEQUANTIZE_ROWS = 128  # more rows than this multiply a dequantized layer (kernels/int4.py)
# Float32 copies of a request's logits while it draws: guided, filtered, noise, sorted, and ids twice their size.
SAMPLER_COPIES = 6


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Blocks of self- and cross-attention cache, and what they and the rest take.

    reserved_bytes: for all but weights and cache.
    """

    num_blocks: int
    num_cross_blocks: int
    kv_bytes: int
    weight_bytes: int
    budget_bytes: int
    reserved_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Device:
    """Where a model is to run. context_bytes: of the budget, what CUDA itself takes."""

    kind: Literal["cpu", "cuda"]
    budget_bytes: int
    context_bytes: int = 0
    has_bfloat16: bool = True


@dataclass(frozen=True, slots=True)
class Load:
    """What the engine is asked to carry, from its settings.

    max_batch: sequences in a step; the asked concurrency. stream_s: how long an ordinary stream is.
    """

    max_batch: int = 32
    stream_s: float = 20.0
    block_size: int = 32
    max_step_positions: int = 256
    max_chunk_s: float = 1.28

    def __post_init__(self) -> None:
        for name in ("max_batch", "stream_s", "block_size", "max_step_positions", "max_chunk_s"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise InvalidConfig(f"{name} is {value}: it must be positive")


@dataclass(frozen=True, slots=True)
class Use:
    """One line of the plan: what takes how many bytes of the device."""

    name: str
    num_bytes: int


@dataclass(frozen=True, slots=True)
class DevicePlan:
    """How a model is to run on a device, and where its memory goes.

    max_batch: the batch cap. window_batch: codec windows decoded at once. weights, workspaces: lines of the plan.
    offloaded: what takes host memory beyond the budget. reason: why this precision, if it was not asked for.
    """

    parts: ModelParts
    device: Device
    load: Load
    precision: Precision
    is_text_offloaded: bool
    is_reference_offloaded: bool
    is_speaker_offloaded: bool
    max_batch: int
    window_batch: int
    weights: tuple[Use, ...]
    workspaces: tuple[Use, ...]
    offloaded: tuple[Use, ...]
    memory: MemoryPlan
    reason: str = ""

    @property
    def element_bytes(self) -> int:
        """Of an activation, and of the cache."""
        return ELEMENT_BYTES[self.precision]

    @property
    def stream_blocks(self) -> tuple[int, int]:
        """Self- and cross-attention blocks of one ordinary stream with guidance."""
        return _stream_blocks(self.parts, self.load.stream_s, self.load.block_size)

    @property
    def num_streams(self) -> int:
        """Ordinary streams that the cache holds whole at once."""
        return _num_streams(self.parts, self.memory, self.load.stream_s, self.load.block_size)

    @property
    def num_running(self) -> int:
        """Ordinary streams that run at once: the cache's or the batch cap's number."""
        return min(self.num_streams, self.max_batch)

    @property
    def held_s(self) -> float:
        """Seconds of speech that the cache holds."""
        rows = self.memory.num_blocks * self.load.block_size / self.parts.num_branches
        return rows / self.parts.codec.frame_rate_hz

    @property
    def used_bytes(self) -> int:
        return self.memory.weight_bytes + self.memory.reserved_bytes + self.memory.kv_bytes


def available_bytes(device: torch.device) -> int:
    """What the engine may take of a device when it is given no budget."""
    if device.type == "cuda":
        import torch

        free, _ = torch.cuda.mem_get_info(device)
        return int(free * GPU_SHARE)
    return int(_free_host_bytes() * HOST_SHARE)


def probe_device(device: torch.device, *, memory_gb: float | None) -> Device:
    """A device of this machine, with the budget named or measured, before any weight is loaded.

    Raises: InvalidConfig for a GPU that is too old.
    """
    if device.type != "cuda":
        budget = _free_host_bytes() * UNLOADED_HOST_SHARE if memory_gb is None else memory_gb * GB
        return Device("cpu", int(budget))
    import torch

    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST_GPU:
        oldest = ".".join(map(str, OLDEST_GPU))
        raise InvalidConfig(
            f"{torch.cuda.get_device_name(device)} has compute capability {'.'.join(map(str, capability))}, and the"
            f" kernels run from {oldest} on (Turing, float16; bfloat16 from 8.0): use device cpu, or another GPU"
        )
    has_bfloat16 = capability >= (8, 0)
    if memory_gb is None:
        return Device("cuda", available_bytes(device), has_bfloat16=has_bfloat16)
    return imagined_gpu(memory_gb, has_bfloat16=has_bfloat16)


def find_device(name: Literal["auto", "cpu", "cuda"], *, memory_gb: float | None) -> Device:
    """A GPU that is only imagined where a budget is named, else what this machine has. Raises: InvalidConfig."""
    import torch

    if memory_gb is not None and not 0 < memory_gb < math.inf:
        raise InvalidConfig(f"memory_gb is {memory_gb}: it must be positive; leave it out for this machine's own")
    if memory_gb is not None and name != "cpu":
        return imagined_gpu(memory_gb)
    has_gpu = torch.cuda.is_available()
    if name == "cuda" and not has_gpu:
        raise InvalidConfig("device is 'cuda', and there is no GPU here to ask for its free memory: give --memory-gb")
    return probe_device(torch.device("cuda" if has_gpu and name != "cpu" else "cpu"), memory_gb=memory_gb)


def _free_host_bytes() -> int:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def bound_primitive_cache() -> None:
    """Keep few of the programs that oneDNN, the CPU's arithmetic, compiles for every shape that it meets.

    Audio ends after any number of frames, so its last windows have any length: by itself oneDNN keeps 1024 programs of
    100 to 600 KB each. Has no effect once oneDNN was used, nor where whoever started the process has chosen a number.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(KEPT_PRIMITIVES))


def imagined_gpu(memory_gb: float, *, has_bfloat16: bool = True) -> Device:
    """A GPU with so much memory, CUDA's context included."""
    return Device("cuda", int(memory_gb * GB), context_bytes=int(CUDA_CONTEXT_BYTES), has_bfloat16=has_bfloat16)


def plan_memory(
    spec: ModelSpec,
    *,
    element_bytes: int,
    weight_bytes: int,
    budget_bytes: int,
    block_size: int,
    max_batch: int,
    reserved_bytes: int = 0,
) -> MemoryPlan:
    """Give what the weights leave to KV blocks, but no more than `max_batch` of the longest sequences can use.

    budget_bytes: for weights, cache, recurrent states and `reserved_bytes` together; the plan's own reserved bytes
    count the states. The cache is split between self- and cross-attention as ordinary speech needs them.
    Raises: OutOfMemory if not even a short sequence fits, naming the smallest budget that works.
    """
    num_branches = 2 if spec.sampling.has_guidance else 1
    shape = _CacheShape(spec.cache, num_branches, element_bytes, block_size)
    states = state_bytes(spec.cache, num_branches, element_bytes=element_bytes, max_batch=max_batch)
    plan = shape.fill(
        weight_bytes=weight_bytes,
        reserved_bytes=reserved_bytes + states,
        budget_bytes=budget_bytes,
        max_batch=max_batch,
        max_rows=spec.max_positions,
    )
    if plan is None:
        least_gb = _least_gb(weight_bytes + reserved_bytes + states + shape.least_bytes)
        of_states = f" and {states / GB:.3f} GB of recurrent states" if states else ""
        raise OutOfMemory(
            f"a budget of {budget_bytes / GB:.3f} GB leaves no room for the cache beside {weight_bytes / GB:.3f} GB of"
            f" weights{of_states}: memory_gb of at least {least_gb:.3f} starts; a smaller dtype"
            f"{' or max_batch' if states else ''} needs less"
        )
    return plan


def state_bytes(cache: CacheSpec, num_branches: int, *, element_bytes: int, max_batch: int) -> int:
    """What the recurrent layers of a batch carry, and those of sequences that pause; none without such layers."""
    if cache.state is None:
        return 0
    return (max_batch + SPARE_STATES) * num_branches * cache.state.bytes_per_branch(element_bytes)


def plan_device(
    parts: ModelParts,
    device: Device,
    *,
    load: Load,
    dtype: str = "auto",
    offload: str = "auto",
) -> DevicePlan:
    """Choose how a model runs on a device.

    dtype "auto": on a GPU the largest precision of 16 bits or fewer that holds `load.max_batch` streams at once, or
    int4 if none does; on the CPU float32, whose results have the same bits in any batch. offload "auto": the text
    encoder goes to the CPU only where that is what it takes to hold them, or to start at all; so does the speaker
    encoder, which gives way first; what makes codes of reference audio always does, since its peak over the longest
    audio is larger than itself.
    Raises: InvalidConfig; OutOfMemory, naming the smallest budget and what would lower it.
    """
    check_precision(dtype)
    if offload not in ("auto", "none", "text"):
        raise InvalidConfig(f"offload is {offload!r}: use auto, none or text")
    choices = _choices(parts, device, dtype=dtype, offload=offload)
    plans: list[DevicePlan] = []
    for choice in choices:
        plan = _plan_as(parts, device, load, choice)
        if plan is None:
            continue
        plans.append(plan)
        if plan.num_running >= load.max_batch:
            return replace(plan, reason=_reason(plan, plans, dtype=dtype))
    if not plans:
        raise OutOfMemory(_too_small(parts, device, load, dtype=dtype, offload=offload))
    plan = _most(plans, smallest=choices[-1].precision)
    return replace(plan, reason=_reason(plan, plans, dtype=dtype))


@dataclass(frozen=True, slots=True)
class _Choice:
    """One way to run: what `plan_device` goes through in order of preference."""

    precision: Precision
    is_text_offloaded: bool
    is_reference_offloaded: bool
    is_speaker_offloaded: bool
    window_batch: int


def _choices(parts: ModelParts, device: Device, *, dtype: str, offload: str) -> tuple[_Choice, ...]:
    """The preferred first: precision before the text's place, that before the codec's windows, and these, which every
    stream needs, before the place of the speaker encoder, which a voice needs once. The last takes the least."""
    precisions = _precisions(device, dtype)
    if device.kind == "cpu":
        return tuple(_Choice(precision, False, True, True, 1) for precision in precisions)
    text_places = {"auto": (False, True), "none": (False,), "text": (True,)}[offload]
    speaker_places = (False,) if offload == "none" or parts.speaker is None else (False, True)
    return tuple(
        _Choice(precision, is_text_offloaded, offload != "none", is_speaker_offloaded, window_batch)
        for precision in precisions
        for is_text_offloaded in text_places
        for window_batch in WINDOW_BATCHES
        for is_speaker_offloaded in speaker_places
    )


def _precisions(device: Device, dtype: str) -> tuple[Precision, ...]:
    """What may be chosen, the largest first."""
    half: Precision = "bfloat16" if device.has_bfloat16 else "float16"
    match dtype:
        case "auto":
            return (half, "int4") if device.kind == "cuda" else ("float32",)
        case "bfloat16" if device.kind == "cuda" and not device.has_bfloat16:
            raise InvalidConfig(
                "dtype is 'bfloat16', which this GPU (before compute capability 8.0) lacks: use float16"
            )
        case "float32" | "float16" | "bfloat16" | "int4":
            return (dtype,)
        case _:
            raise InvalidConfig(f"dtype is {dtype!r}")


def _most(plans: list[DevicePlan], *, smallest: Precision) -> DevicePlan:
    """None holds what was asked: take the most streams in the smallest precision, the first of equals, and leave the
    text encoder on the GPU as long as one stream fits beside it."""
    of_smallest = [plan for plan in plans if plan.precision == smallest]
    with_text = [plan for plan in of_smallest if not plan.is_text_offloaded and plan.num_streams]
    return max(with_text or of_smallest, key=lambda plan: plan.num_streams)


def _plan_as(parts: ModelParts, device: Device, load: Load, choice: _Choice) -> DevicePlan | None:
    """The plan with these choices made and the largest batch cap that they allow; None if nothing fits."""
    weights, offloaded = _weights(parts, device, choice)
    shape = _CacheShape(parts.cache, parts.num_branches, ELEMENT_BYTES[choice.precision], load.block_size)
    for max_batch in reversed(batch_buckets(load.max_batch)):
        workspaces = tuple(_workspaces(parts, device, load, choice, max_batch=max_batch))
        memory = shape.fill(
            weight_bytes=_total(weights),
            reserved_bytes=_total(workspaces),
            budget_bytes=device.budget_bytes,
            max_batch=max_batch,
            max_rows=parts.max_positions,
        )
        if memory is None:
            continue
        if max_batch == 1 or _num_streams(parts, memory, SHORT_STREAM_S, load.block_size) >= max_batch:
            return DevicePlan(
                parts=parts,
                device=device,
                load=load,
                precision=choice.precision,
                is_text_offloaded=choice.is_text_offloaded,
                is_reference_offloaded=choice.is_reference_offloaded,
                is_speaker_offloaded=choice.is_speaker_offloaded,
                max_batch=max_batch,
                window_batch=choice.window_batch,
                weights=weights,
                workspaces=workspaces,
                offloaded=offloaded,
                memory=memory,
            )
    return None


def batch_buckets(max_batch: int) -> tuple[int, ...]:
    """Batch sizes that a step is captured for, ascending: those below the cap, and the cap itself."""
    return (*(size for size in BATCH_BUCKETS if size < max_batch), max_batch)


def codec_element_bytes(device: Device, precision: Precision) -> int:
    """Of the codec's decoder: float32 on the CPU, and on a GPU float16 unless the model is float32."""
    return ELEMENT_BYTES[precision] if device.kind == "cuda" else 4


def _total(uses: Iterable[Use]) -> int:
    return sum(use.num_bytes for use in uses)


def _weights(parts: ModelParts, device: Device, choice: _Choice) -> tuple[tuple[Use, ...], tuple[Use, ...]]:
    """What lies on the device, and what in host memory beyond the budget."""
    here: list[Use] = []
    there: list[Use] = []
    for part in parts.weights:
        if choice.is_text_offloaded and part.may_offload:
            there.append(Use(part.name, part.bytes_in("float32")))  # what the CPU computes in
        else:
            here.append(Use(part.name, part.bytes_in(choice.precision)))
    codec = parts.codec
    here.append(Use(f"codec ({codec.name})", codec.decoder_bytes(codec_element_bytes(device, choice.precision))))
    if codec.num_encoding:
        place = there if choice.is_reference_offloaded else here
        place.append(Use("reference-audio encoder", codec.encoding_bytes))
    if parts.speaker is not None:
        place = there if choice.is_speaker_offloaded else here
        place.append(Use("speaker encoder", parts.speaker.encoding_bytes))
    return tuple(here), tuple(there)


def _workspaces(parts: ModelParts, device: Device, load: Load, choice: _Choice, *, max_batch: int) -> Iterator[Use]:
    """Everything that is neither a weight nor the cache, as upper bounds.

    A step's tensors lie in the graphs' shared pool, those of a prefill beside them: live elements a position times
    positions. Sampling: the branches' logits and SAMPLER_COPIES; side vectors, as prepared and in the two seats that
    graphs have for each place in the batch. Partial sums: see `_partials_bytes`. Text: the longest one's activations,
    and its K and V before they are in blocks.
    """
    precision, window_batch = choice.precision, choice.window_batch
    element = ELEMENT_BYTES[precision]
    rows = max_batch * parts.num_branches
    if device.kind == "cuda":
        if device.context_bytes:
            yield Use("CUDA context", device.context_bytes)
        num_graphs = len(batch_buckets(max_batch)) * parts.num_branches
        yield Use("CUDA graphs", int(num_graphs * GRAPH_BYTES))
        yield Use("cuBLAS and cuDNN", int(LIBRARY_BYTES))
        yield Use("step activations", (rows + load.max_step_positions) * parts.row_elements * element)
    else:
        yield Use("step activations", max(rows, load.max_step_positions) * parts.row_elements * element)
    logits = max_batch * (parts.num_branches + SAMPLER_COPIES) * parts.logits_per_row * 4
    side = (3 * max_batch + 1) * parts.max_positions * parts.side_elements * element
    yield Use("logits and sampling", logits + side)
    states = state_bytes(parts.cache, parts.num_branches, element_bytes=element, max_batch=max_batch)
    if states:
        yield Use("recurrent states", states)
    if device.kind == "cuda":
        yield Use("attention and matmul partials", _partials_bytes(parts, load, choice, max_batch=max_batch))
    text_elements = 0 if choice.is_text_offloaded else parts.text_elements
    text = parts.max_text * (text_elements * element + parts.cache.cross_bytes_per_position(element))
    yield Use("text prefill", text)
    frames = math.ceil(load.max_chunk_s * parts.codec.frame_rate_hz)
    window = parts.codec.window_bytes(frames, codec_element_bytes(device, precision))
    yield Use(f"codec windows ({window_batch} of {load.max_chunk_s:g} s)", window_batch * window)


def _partials_bytes(parts: ModelParts, load: Load, choice: _Choice, *, max_batch: int) -> int:
    """What GPU kernels sum in parts, so that a row's bits do not depend on its neighbours; all float32.

    Attention: for each KV_CHUNK of a row's positions and each head a partial result, its maximum and its sum. Products:
    the parts of the layer that has most, in the graphs' pool for a batch and beside it for a prefill, of rows or of
    text. int4: the largest layer, dequantized for prefills, and for batches as large as they are.
    """
    rows = max_batch * parts.num_branches
    attention = rows * parts.num_heads * blocks_for(parts.max_positions, KV_CHUNK) * (parts.cache.head_dim + 2)
    if parts.cache.cross is not None:
        chunks = blocks_for(parts.max_text, KV_CHUNK)
        attention += max_batch * parts.cross_heads * chunks * (parts.cache.cross.head_dim + 2)
    layers = parts.matrices(read_text=False)
    text_layers = parts.matrices(read_text=True, is_text_offloaded=choice.is_text_offloaded)
    columns = max(layer.columns_in_parts for layer in layers)
    text_columns = max((layer.columns_in_parts for layer in text_layers), default=0)
    products = rows * columns + max(load.max_step_positions * columns, parts.max_text * text_columns)
    dequantized = 0
    if choice.precision == "int4":
        largest = max(layer.num_in * layer.num_out for layer in (*layers, *text_layers))
        dequantized = largest * ELEMENT_BYTES["int4"] * (2 if rows > DEQUANTIZE_ROWS else 1)
    return 4 * (attention + products) + dequantized


def _stream_blocks(parts: ModelParts, seconds: float, block_size: int) -> tuple[int, int]:
    rows = min(parts.rows_for(seconds), parts.max_positions)
    cross = parts.cache.cross
    num_cross = 0 if cross is None else blocks_for(math.ceil(rows * cross.positions_per_row), block_size)
    return parts.num_branches * blocks_for(rows, block_size), num_cross


def _num_streams(parts: ModelParts, memory: MemoryPlan, seconds: float, block_size: int) -> int:
    num_blocks, num_cross_blocks = _stream_blocks(parts, seconds, block_size)
    streams = memory.num_blocks // num_blocks
    return min(streams, memory.num_cross_blocks // num_cross_blocks) if num_cross_blocks else streams


@dataclass(frozen=True, slots=True)
class _CacheShape:
    """Bytes of a cache's blocks, and how many of each there are to be."""

    cache: CacheSpec
    num_branches: int
    element_bytes: int
    block_size: int

    @property
    def block_bytes(self) -> int:
        return self.cache.bytes_per_position(self.element_bytes) * self.block_size

    @property
    def cross_block_bytes(self) -> int:
        return self.cache.cross_bytes_per_position(self.element_bytes) * self.block_size

    @property
    def cross_per_row(self) -> float:
        return self.cache.cross.positions_per_row if self.cache.cross is not None else 0.0

    @property
    def row_bytes(self) -> float:
        """All that a row of one sequence caches, its branches' and its share of the text's."""
        return (self.num_branches * self.block_bytes + self.cross_per_row * self.cross_block_bytes) / self.block_size

    @property
    def rounding_bytes(self) -> int:
        """The last block of each kind may be part used."""
        return self.num_branches * self.block_bytes + self.cross_block_bytes

    @property
    def least_rows(self) -> int:
        """Of a short sequence."""
        return 2 * self.block_size

    @property
    def least_bytes(self) -> float:
        return self.rounding_bytes + (self.least_rows + 1) * self.row_bytes

    def fill(
        self, *, weight_bytes: int, reserved_bytes: int, budget_bytes: int, max_batch: int, max_rows: int
    ) -> MemoryPlan | None:
        """Blocks for what the rest leaves, at most `max_batch` of the longest sequences; None if not even a short
        sequence fits. max_rows: of one sequence. Once there are rows enough, what is left holds longer texts."""
        left = budget_bytes - weight_bytes - reserved_bytes - self.rounding_bytes
        rows = min(max_batch * max_rows, int(max(0, left) / self.row_bytes))
        if rows < self.least_rows:
            return None
        num_blocks = self.num_branches * blocks_for(rows, self.block_size)
        num_cross_blocks = 0
        if self.cache.cross is not None:
            num_cross_blocks = blocks_for(int(rows * self.cross_per_row) + 1, self.block_size)
            if rows == max_batch * max_rows:
                longest = max_batch * blocks_for(self.cache.cross.max_positions, self.block_size)
                spare = budget_bytes - weight_bytes - reserved_bytes - num_blocks * self.block_bytes
                num_cross_blocks = max(num_cross_blocks, min(longest, spare // self.cross_block_bytes))
        return MemoryPlan(
            num_blocks=num_blocks,
            num_cross_blocks=num_cross_blocks,
            kv_bytes=num_blocks * self.block_bytes + num_cross_blocks * self.cross_block_bytes,
            weight_bytes=weight_bytes,
            budget_bytes=budget_bytes,
            reserved_bytes=reserved_bytes,
        )


def _least_gb(num_bytes: float) -> float:
    """Rounded up to what a message shows."""
    return math.ceil(num_bytes / GB * 1000) / 1000


def _least_bytes(parts: ModelParts, device: Device, load: Load, *, dtype: str, offload: str) -> float:
    """The smallest budget that starts: one sequence at a time, and of the choices the one that takes the least."""

    def needed(choice: _Choice) -> float:
        weights, _ = _weights(parts, device, choice)
        workspaces = _workspaces(parts, device, load, choice, max_batch=1)
        shape = _CacheShape(parts.cache, parts.num_branches, ELEMENT_BYTES[choice.precision], load.block_size)
        return _total(weights) + _total(workspaces) + shape.least_bytes

    return min(needed(choice) for choice in _choices(parts, device, dtype=dtype, offload=offload))


def _too_small(parts: ModelParts, device: Device, load: Load, *, dtype: str, offload: str) -> str:
    """Names the least budget, and what would need less."""
    least = _least_bytes(parts, device, load, dtype=dtype, offload=offload)
    advice: list[str] = []
    if dtype != "int4" and not (dtype == "auto" and device.kind == "cuda"):
        of_int4 = _least_bytes(parts, device, load, dtype="int4", offload=offload)
        advice.append(f"dtype int4 starts from {_least_gb(of_int4):.3f}")
    if device.kind == "cuda" and offload == "none":
        of_text = _least_bytes(parts, device, load, dtype=dtype, offload="text")
        advice.append(f"offload text starts from {_least_gb(of_text):.3f}")
    if device.kind == "cuda" and not advice:
        advice.append("that is int4 with the text encoder on the CPU already, and device cpu needs no GPU")
    budget = f"{device.budget_bytes / GB:.3f} GB"
    return (
        f"{budget} is too little for {parts.name}: memory_gb of at least {_least_gb(least):.3f} starts, with one"
        f" request at a time; {', '.join(advice) or 'a smaller model needs less'}"
    )


def _reason(chosen: DevicePlan, plans: list[DevicePlan], *, dtype: str) -> str:
    """Why it was chosen of all that were made, and what it does not hold; empty where there is nothing to say."""
    asked, stream = chosen.load.max_batch, f"{chosen.load.stream_s:g} s"
    said: list[str] = []
    if dtype == "auto" and chosen.precision == "int4":
        most = max((plan.num_running for plan in plans if plan.precision != "int4"), default=0)
        said.append(f"16 bits hold {most} of {asked} streams of {stream}, so int4 was chosen")
    if chosen.num_running < asked:
        remedies = ["shorter streams", "more memory_gb"]
        if chosen.precision != "int4":
            remedies.insert(0, "dtype int4")
        said.append(
            f"{chosen.num_running} of {asked} streams of {stream} fit at once: {' or '.join(remedies)} holds more"
        )
    if chosen.is_text_offloaded:
        said.append("the text encoder runs on the CPU, which delays each first sound")
    return "; ".join(said)
