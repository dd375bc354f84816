"""How a Triton kernel is launched, and how every launch that serving makes can be listed without a GPU.

All kernels go through `launch`. On a GPU, or under Triton's interpreter (TRITON_INTERPRET=1), it runs the kernel;
inside `recording` it only notes which variant would have run, so that tests can compile each of them ahead of time for
every GPU generation.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

IS_INTERPRETED: bool = bool(knobs.runtime.interpret)

_TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.uint8: "u8",
    torch.bool: "i1",
}


@dataclass(frozen=True, slots=True)
class Variant:
    """One compile of a kernel: what the compiler is told besides its source.

    types: argument name to Triton type. aligned: arguments known to be multiples of 16 (pointers in bytes).
    constexprs: argument name to value. warps, stages: as Triton counts them.
    """

    kernel: Any
    types: tuple[tuple[str, str], ...]
    aligned: tuple[str, ...]
    constexprs: tuple[tuple[str, Any], ...]
    warps: int
    stages: int

    def __str__(self) -> str:
        of_types = " ".join(f"{name}:{kind}{'/16' if name in self.aligned else ''}" for name, kind in self.types)
        of_values = " ".join(f"{name}={value}" for name, value in self.constexprs)
        return f"{self.kernel.__name__} [{of_values}] warps={self.warps} stages={self.stages} ({of_types})"


@dataclass(slots=True)
class Recording:
    """Launches noted instead of made, as if on a GPU of compute capability `capability` (75, 80, 90, ...)."""

    capability: int
    num_processors: int
    variants: dict[str, Variant]


_recording: ContextVar[Recording | None] = ContextVar("recording", default=None)


@contextlib.contextmanager
def recording(capability: int, *, num_processors: int = 132) -> Iterator[Recording]:
    """Note launches instead of making them; `use_triton` is then true for any tensor, meta ones included."""
    record = Recording(capability, num_processors, {})
    token = _recording.set(record)
    try:
        yield record
    finally:
        _recording.reset(token)


def use_triton(x: torch.Tensor) -> bool:
    """Whether functions of `x` run as Triton kernels: on a GPU, under the interpreter, and while recording."""
    return x.is_cuda or IS_INTERPRETED or _recording.get() is not None


def capability_of(x: torch.Tensor) -> int:
    """Compute capability of the tensor's GPU, 90 for an H100. The interpreter counts as 90."""
    record = _recording.get()
    if record is not None:
        return record.capability
    if not x.is_cuda:
        return 90
    major, minor = torch.cuda.get_device_capability(x.device)
    return major * 10 + minor


def processors_of(x: torch.Tensor) -> int:
    """Streaming multiprocessors of the tensor's GPU; 132 under the interpreter, as an H100 has."""
    record = _recording.get()
    if record is not None:
        return record.num_processors
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 132


def dot_dtype(x: torch.Tensor) -> Any:
    """What tl.dot takes for operands of the dtype of `x`.

    The interpreter computes bfloat16 products on its bits, silently wrong; there they are float32.
    """
    import triton.language as tl

    if IS_INTERPRETED and x.dtype == torch.bfloat16:
        return tl.float32
    return {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[x.dtype]


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    arguments: dict[str, Any],
    constexprs: dict[str, Any],
    *,
    warps: int,
    stages: int,
) -> None:
    """Run `kernel` over `grid`. arguments: tensors and numbers by name; constexprs: compile-time values by name."""
    record = _recording.get()
    if record is not None:
        variant = _variant(kernel, arguments, constexprs, warps=warps, stages=stages)
        record.variants[str(variant)] = variant
        return
    # Fusing a product and a sum is what every comparison here was made with; Triton 3.10 changes the default.
    kernel[grid](**arguments, **constexprs, num_warps=warps, num_stages=stages, enable_fp_fusion=True)


def compile_variant(variant: Variant, capability: int) -> CompiledKernel:
    """Compile for a GPU generation that need not be here. Raises what Triton raises."""
    names = variant.kernel.arg_names
    attrs = {(names.index(name),): [["tt.divisibility", 16]] for name in variant.aligned}
    constexprs = {(names.index(name),): value for name, value in variant.constexprs}
    types = dict(variant.types)
    signature = {name: types.get(name, "constexpr") for name in names}
    source = ASTSource(variant.kernel, signature, constexprs=constexprs, attrs=attrs)
    options = {"num_warps": variant.warps, "num_stages": variant.stages, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def _variant(kernel: Any, arguments: dict[str, Any], constexprs: dict[str, Any], *, warps: int, stages: int) -> Variant:
    """What Triton's launcher would specialize on: types, and which arguments are multiples of 16, or the number 1."""
    fixed = {kernel.arg_names[i] for i in _unspecialized(kernel)}
    types: list[tuple[str, str]] = []
    aligned: list[str] = []
    values = dict(constexprs)
    for name, value in arguments.items():
        if value is None:
            values[name] = None
        elif isinstance(value, torch.Tensor):
            types.append((name, "*" + _TYPES[value.dtype]))
            if value.storage_offset() * value.element_size() % 16 == 0:
                aligned.append(name)
        elif isinstance(value, float):
            types.append((name, "fp32"))
        elif value == 1 and name not in fixed:
            values[name] = 1
        else:
            types.append((name, "i32" if -(2**31) <= value < 2**31 else "i64"))
            if value % 16 == 0 and name not in fixed:
                aligned.append(name)
    return Variant(kernel, tuple(types), tuple(aligned), tuple(sorted(values.items())), warps, stages)


def _unspecialized(kernel: Any) -> Iterator[int]:
    for parameter in kernel.params:
        if parameter.do_not_specialize:
            yield parameter.num
