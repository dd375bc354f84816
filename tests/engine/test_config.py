"""Every bad setting is refused with its name, its value and what would do."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch

from declaim.engine import EngineConfig, InvalidConfig


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        *((name, value) for name in ("max_batch", "block_size", "max_step_positions") for value in (0, -1, math.nan)),
        ("max_waiting", -1),
        ("vocoder_cpus", -0.5),
        ("vocoder_cpus", math.nan),
        ("vocoder_gpus", -1.0),
        *(
            (name, value)
            for name in ("memory_gb", "num_blocks", "num_threads", "max_lead_s", "first_chunk_s", "max_chunk_s")
            for value in (0, -1, math.nan)
        ),
        ("dtype", "float64"),
        ("dtype", ""),
        ("vocoder", "threads"),
    ],
)
def test_a_bad_setting_is_named_with_its_value(name: str, bad: object) -> None:
    with pytest.raises(InvalidConfig, match=f"{name} is {bad!r}"):
        EngineConfig(**{name: bad})  # type: ignore[arg-type]


@pytest.mark.parametrize("workers", [(0, 1), (2, 1), (-1, 3)])
def test_vocoder_workers_must_be_a_range(workers: tuple[int, int]) -> None:
    with pytest.raises(InvalidConfig, match=f"vocoder_workers is {workers[0]}:{workers[1]}: the fewest"):
        EngineConfig(vocoder_workers=workers)


@pytest.mark.parametrize(
    "good",
    [
        {"max_waiting": 0},
        {"memory_gb": None, "num_blocks": 1, "num_threads": 1},
        {"vocoder_workers": (3, 3), "vocoder_cpus": 0.0},
        {"max_batch": 1, "block_size": 1, "max_step_positions": 1},
    ],
)
def test_settings_at_their_limits_are_taken(good: dict[str, Any]) -> None:
    config = EngineConfig(**good)
    for name, value in good.items():
        assert getattr(config, name) == value


@pytest.mark.parametrize("device", ["", "gpu", "tpu:0", "cuda:x", "meta", "mps"])
def test_a_device_that_is_none_is_refused(device: str) -> None:
    with pytest.raises(InvalidConfig, match="use auto, cpu, cuda or cuda:N"):
        EngineConfig(device=device).resolve()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_refused_and_auto_takes_the_cpu() -> None:
    with pytest.raises(InvalidConfig, match="sees no GPU here: use cpu"):
        EngineConfig(device="cuda:0").resolve()
    assert EngineConfig().resolve().torch_device == torch.device("cpu")


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        ("auto", torch.float32),
        ("float32", torch.float32),
        ("float16", torch.float16),
        ("bfloat16", torch.bfloat16),
    ],
)
def test_resolving_on_the_cpu_fixes_the_dtype(dtype: Any, expected: torch.dtype) -> None:
    config = EngineConfig(device="cpu", dtype=dtype).resolve()
    assert config.torch_dtype == expected
    assert config.resolve() == config


def test_resolving_changes_nothing_but_what_was_auto() -> None:
    config = EngineConfig(device="cpu", max_batch=3, memory_gb=1.5)
    assert dataclasses.replace(config.resolve(), dtype="auto", num_threads=None) == config


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        EngineConfig().max_batch = 3  # type: ignore[misc]
