"""Every kernel variant that serving launches compiles for every GPU generation, within its limits, without a GPU.

    pytest tests/aot

And with an older Triton than the one that is installed:

    pip install --target DIR --no-deps triton==3.6.0
    PYTHONPATH=DIR pytest tests/aot --triton 3.6.0

A card that a Triton cannot compile for fails its test. The list of variants is a file, so that a change which launches
something new shows it: after looking, write it again with `python -m tests.aot.served`.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import pytest
import triton
import triton.backends.nvidia
from triton.errors import TritonError

from declaim.kernels import backend
from tests.aot.served import CAPABILITIES, LIST, all_served

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

# Shared memory one program may take, bytes, by compute capability (CUDA programming guide, table of limits).
SHARED_LIMIT = {75: 64 << 10, 80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10}
# Bytes of local memory a thread may spill, which costs little; more is a wrong tile.
STACK_LIMIT = 64
# 16 bytes in one load from global memory, to registers or to shared memory.
WIDE_LOAD = re.compile(
    r"ld\.global[.\w:]*\.(v4\.b32|v4\.u32|v2\.b64|v2\.u64)|cp\.async\.cg\.shared\.global [^;]*\b(16|0x10)\b"
)
# What reads weights, or K and V: nearly all bytes of a step. Where there is no tl.dot, threads share narrower tiles.
READS_WIDE = ("_matmul_kernel", "_w4a16_kernel", "_dequantize_kernel", "_split_attention_kernel", "_attention_kernel")
CUOBJDUMP = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_serving_launches_what_the_list_says(capability: int) -> None:
    wanted = [line for line in LIST.read_text().splitlines() if line.startswith(f"sm_{capability} ")]
    served = [f"sm_{capability} {key}" for key in sorted(all_served(capability))]
    assert served == wanted, "serving launches other variants: look at them, then run `python -m tests.aot.served`"


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of a variant. shared, stack: bytes of a program, and of a thread."""

    key: str
    shared: int
    stack: int
    loads_wide: bool


def compile_part(capability: int, part: int, num_parts: int) -> list[Compiled]:
    """Compile every num_parts-th variant."""
    found = []
    for key, variant in sorted(all_served(capability).items())[part::num_parts]:
        try:
            compiled = backend.compile_variant(variant, capability)
        except (TritonError, RuntimeError) as error:
            raise AssertionError(f"Triton {triton.__version__} compiles no {key} for sm_{capability}") from error
        usage = resource_usage(compiled.asm["cubin"])
        stack = max((int(size) for size in re.findall(r"STACK:(\d+)", usage)), default=0)
        found.append(Compiled(key, compiled.metadata.shared, stack, bool(WIDE_LOAD.search(compiled.asm["ptx"]))))
    return found


def resource_usage(cubin: bytes) -> str:
    path = Path(os.environ.get("TMPDIR", "/tmp")) / f"declaim-aot-{os.getpid()}.cubin"
    path.write_bytes(cubin)
    try:
        done = subprocess.run([CUOBJDUMP, "-res-usage", path], capture_output=True, text=True, check=True)
    finally:
        path.unlink()
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def workers() -> Iterator[list[ProcessPoolExecutor]]:
    """A process for each core, for all cards, because starting one takes as long as ten variants."""
    with contextlib.ExitStack() as stack:
        context = get_context("spawn")
        pools = [ProcessPoolExecutor(1, mp_context=context) for _ in os.sched_getaffinity(0)]
        yield [stack.enter_context(pool) for pool in pools]


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_variant_compiles_within_the_limits_of_the_card(
    capability: int, workers: list[ProcessPoolExecutor]
) -> None:
    parts = [worker.submit(compile_part, capability, i, len(workers)) for i, worker in enumerate(workers)]
    found = [compiled for part in parts for compiled in part.result()]
    assert {compiled.key for compiled in found} == set(all_served(capability))
    for compiled in found:
        key = compiled.key
        assert compiled.shared <= SHARED_LIMIT[capability], f"{key} takes {compiled.shared} bytes of shared memory"
        assert compiled.stack <= STACK_LIMIT, f"{key} spills {compiled.stack} bytes"
        is_checked = capability >= 80 and key.startswith(READS_WIDE)
        assert compiled.loads_wide or not is_checked, f"{key} loads a few bytes at a time"
    kernels = {compiled.key.split()[0] for compiled in found}
    assert {"_split_attention_kernel", "_guided_sample_kernel", "_dequantize_kernel"} <= kernels
    assert ("_w4a16_kernel" in kernels) == (capability >= 80)  # below, int4 is dequantized and multiplied by cuBLAS
