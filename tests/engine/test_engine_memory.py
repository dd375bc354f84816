"""The memory plan in the engine: made before loading, kept while serving."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from declaim.engine import Engine, EngineConfig, InvalidConfig, OutOfMemory, SamplingParams, SpeechRequest
from declaim.engine.codec.base import CodecRecipe
from declaim.engine.codec.load import load_codec
from declaim.engine.models.dia import DiaModel
from declaim.engine.runner import Runner
from tests.dia_checkpoints import make_dia, seconds_of

MOST_GROWTH = 50e6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dia(tmp_path_factory.mktemp("dia") / "small")


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Peak:
    """The most memory that this process has had since it was made, looked at every few milliseconds."""

    def __init__(self) -> None:
        self.num_bytes = resident_bytes()
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def _watch(self) -> None:
        while not self._is_over.wait(0.005):
            self.num_bytes = max(self.num_bytes, resident_bytes())

    def end(self) -> int:
        self._is_over.set()
        self._thread.join()
        return self.num_bytes


def requests(count: int, *, seed: int) -> list[SpeechRequest]:
    random = np.random.default_rng(seed)
    return [
        SpeechRequest(
            "[S1] " + "word " * int(random.integers(1, 30)),
            sampling=SamplingParams(seed=i, max_seconds=seconds_of(int(random.integers(30, 120)))),
        )
        for i in range(count)
    ]


def test_serving_takes_no_more_memory_than_after_the_warm_up(folder: Path) -> None:
    with Engine.from_pretrained(folder, EngineConfig(memory_gb=0.5, max_batch=8, num_threads=1)) as engine:
        engine.generate(requests(4, seed=0), progress=False)
        before = resident_bytes()
        peak = Peak()
        results = engine.generate(requests(12, seed=1), progress=False)
        assert peak.end() - before < MOST_GROWTH
    assert all(result.error is None for result in results)


LENGTHS = """
import os, sys
from pathlib import Path
import torch
from declaim.engine.codec.base import CodecRecipe
from declaim.engine.codec.load import load_codec

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

torch.set_num_threads(1)
codec = load_codec(CodecRecipe(kind="dac", folder=sys.argv[1], dtype="float32", device="cpu"))

def decode(length):
    codes = torch.randint(0, codec.spec.codebook_size, (1, codec.spec.num_codebooks, length))
    codec.decode(codes, first=0, last=length - 10)

for length in (24, 48, 76, 130):  # what a stream repeats
    decode(length)
before = resident()
grown = []
for length in reversed(range(30, 70)):  # buffers are largest at first
    decode(length)
    grown.append(resident() - before)
print(max(grown), grown[-1] - grown[len(grown) // 2])
"""


def test_windows_of_every_length_leave_nothing_behind(folder: Path) -> None:
    """oneDNN compiles some thirty programs for each length, 2 MB of them."""
    environment = {name: value for name, value in os.environ.items() if "ONEDNN" not in name}
    done = subprocess.run(
        [sys.executable, "-c", LENGTHS, str(folder / "codec")],
        capture_output=True,
        text=True,
        timeout=250,
        check=True,
        env=environment | {"OMP_NUM_THREADS": "1"},
    )
    most, late = map(int, done.stdout.split())
    assert most < MOST_GROWTH
    assert late < 10e6  # it does not go on


def test_the_plan_is_made_before_a_weight_is_read_and_kept(folder: Path) -> None:
    with Engine.from_pretrained(folder, EngineConfig(memory_gb=0.2, max_batch=4)) as engine:
        plan = engine.device_plan
        assert plan is not None
        assert plan.memory == engine.plan
        assert plan.used_bytes <= 0.2e9
        assert engine.config.max_batch == plan.max_batch <= 4
        assert engine.stats().blocks_total == plan.memory.num_blocks + plan.memory.num_cross_blocks
    (folder / "model.safetensors").rename(folder / "hidden")
    try:
        with pytest.raises(OutOfMemory, match="memory_gb of at least"):
            Engine.from_pretrained(folder, EngineConfig(memory_gb=0.001))
    finally:
        (folder / "hidden").rename(folder / "model.safetensors")


@pytest.mark.parametrize("num_blocks", [None, 24])
def test_the_cache_is_told_as_large_as_it_is(folder: Path, num_blocks: int | None) -> None:
    with Engine.from_pretrained(folder, EngineConfig(memory_gb=0.2, num_blocks=num_blocks)) as engine:
        runner = engine._runner
        assert isinstance(runner, Runner)
        tensors = [tensor for pair in (*runner.caches, *runner.cross_caches) for tensor in pair]
        assert engine.stats().cache_bytes == sum(tensor.nbytes for tensor in tensors) > 0
        assert num_blocks in (None, engine.plan.num_blocks)


def test_too_small_a_budget_is_refused_with_one_that_starts_and_what_would_lower_it(folder: Path) -> None:
    with pytest.raises(OutOfMemory) as refused:
        Engine.from_pretrained(folder, EngineConfig(memory_gb=0.005, dtype="float32"))
    named = re.search(r"memory_gb of at least ([0-9.]+) starts, with one request at a time; (.+)", str(refused.value))
    assert named is not None
    assert "int4 starts from" in named[2]
    with Engine.from_pretrained(folder, EngineConfig(memory_gb=float(named[1]) + 0.001, dtype="float32")) as engine:
        assert engine.config.max_batch <= 2
        (result,) = engine.generate(
            [SpeechRequest("[S1] Hi.", sampling=SamplingParams(max_seconds=0.2))], progress=False
        )
    assert result.error is None


@pytest.mark.parametrize("field", ["offload", "dtype"])
def test_unknown_choices_are_refused(field: str) -> None:
    with pytest.raises(InvalidConfig, match=field):
        EngineConfig(**{field: "sometimes"})  # type: ignore[arg-type]


def test_a_text_encoder_that_stays_on_the_cpu_computes_in_float32_and_gives_what_the_decoder_takes(
    folder: Path,
) -> None:
    cpu = torch.device("cpu")
    codec = load_codec(CodecRecipe(kind="dac", folder=str(folder / "codec"), dtype="float32", device="cpu")).spec
    beside = DiaModel.load(folder, codec=codec, dtype=torch.float32, device=cpu)
    apart = DiaModel.load(folder, codec=codec, dtype=torch.bfloat16, device=cpu, text_device=cpu)
    assert apart._encoder.embedding.dtype == torch.float32
    with torch.inference_mode():
        expected, encoded = beside._encode([1, 65, 66]), apart._encode([1, 65, 66])
    assert encoded.dtype == torch.bfloat16
    # The encoder's bytes are not the device's.
    assert apart.weight_bytes < beside.weight_bytes / 2
    torch.testing.assert_close(encoded, expected.to(torch.bfloat16), rtol=0, atol=0)
