"""Every kernel variant that serving launches compiles for every GPU generation, within its limits, without a GPU.

    pytest tests/aot

The list of variants is a file, so that a change which launches something new shows it: after looking, write it again
with `python -m tests.aot.served`.
"""

from __future__ import annotations

import os
import re
import subprocess
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
import triton.backends.nvidia

from declaim.kernels import backend
from tests.aot.served import CAPABILITIES, LIST, all_served

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

# Shared memory one program may take, bytes, by compute capability (CUDA programming guide, table of limits).
SHARED_LIMIT = {75: 64 << 10, 80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10}
# Bytes of local memory a thread may spill, which costs little; more is a wrong tile.
STACK_LIMIT = 64
CUOBJDUMP = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_serving_launches_what_the_list_says(capability: int) -> None:
    wanted = [line for line in LIST.read_text().splitlines() if line.startswith(f"sm_{capability} ")]
    served = [f"sm_{capability} {key}" for key in sorted(all_served(capability))]
    assert served == wanted, "serving launches other variants: look at them, then run `python -m tests.aot.served`"


def compile_all(capability: int, part: int, num_parts: int) -> list[tuple[str, int, int, bool]]:
    """Compile a part of the variants. Returns names, shared memory and stack in bytes, and whether they load wide."""
    found = []
    for key, variant in sorted(all_served(capability).items())[part::num_parts]:
        compiled = backend.compile_variant(variant, capability)
        usage = resource_usage(compiled.asm["cubin"])
        stack = max((int(size) for size in re.findall(r"STACK:(\d+)", usage)), default=0)
        has_wide_loads = any(word in compiled.asm["ptx"] for word in (".v4.b32", ".v2.b64", "cp.async.cg", ".v4.u32"))
        found.append((key, compiled.metadata.shared, stack, has_wide_loads))
    return found


def resource_usage(cubin: bytes) -> str:
    path = Path(os.environ.get("TMPDIR", "/tmp")) / f"declaim-aot-{os.getpid()}.cubin"
    path.write_bytes(cubin)
    try:
        done = subprocess.run([CUOBJDUMP, "-res-usage", path], capture_output=True, text=True, check=True)
    finally:
        path.unlink()
    return done.stdout + done.stderr


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_variant_compiles_within_the_limits_of_the_card(capability: int) -> None:
    num_parts = max(1, len(os.sched_getaffinity(0)))
    with ProcessPoolExecutor(num_parts, mp_context=get_context("spawn")) as pool:
        parts = [pool.submit(compile_all, capability, part, num_parts) for part in range(num_parts)]
        found = [row for part in parts for row in part.result()]
    assert len(found) > 15
    for key, shared, stack, has_wide_loads in found:
        assert shared <= SHARED_LIMIT[capability], f"{key} takes {shared} bytes of shared memory"
        assert stack <= STACK_LIMIT, f"{key} spills {stack} bytes"
        if key.startswith(("_matmul_kernel", "_split_attention_kernel", "_attention_kernel", "_w4a16_kernel")):
            assert has_wide_loads, f"{key} loads a few bytes at a time"
