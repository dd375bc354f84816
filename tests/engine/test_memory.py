"""The memory plan against the bytes that a runner really allocates."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from declaim.engine.errors import OutOfMemory
from declaim.engine.memory import MemoryPlan, available_bytes, plan_memory
from declaim.engine.models.base import LayerCache
from declaim.engine.runner import Runner
from declaim.engine.spec import CacheSpec, CrossSpec, ModelSpec
from tests.fakes import FakeModel

WITH_CROSS = CacheSpec(3, 2, 8, cross=CrossSpec(2, 4, 16, max_positions=64, positions_per_row=0.15))


def spec_with(cache: CacheSpec) -> ModelSpec:
    return replace(FakeModel().spec, cache=cache)


def tensor_bytes(caches: tuple[LayerCache, ...]) -> int:
    return sum(tensor.untyped_storage().nbytes() for pair in caches for tensor in pair)


@pytest.mark.parametrize("cache", [CacheSpec(3, 2, 8), CacheSpec(1, 1, 128), WITH_CROSS])
@pytest.mark.parametrize("block_size", [4, 32])
def test_the_plan_counts_the_bytes_that_the_runner_allocates(cache: CacheSpec, block_size: int) -> None:
    model = FakeModel()
    model.spec = spec_with(cache)
    plan = plan_memory(
        model.spec, element_bytes=4, weight_bytes=1000, budget_bytes=2_000_000, block_size=block_size, max_batch=100
    )
    runner = Runner(model, num_blocks=plan.num_blocks, num_cross_blocks=plan.num_cross_blocks, block_size=block_size)
    assert tensor_bytes(runner._caches) + tensor_bytes(runner._cross_caches) == plan.kv_bytes
    assert (plan.num_cross_blocks > 0) == (cache.cross is not None)


caches = st.builds(
    CacheSpec,
    num_layers=st.integers(1, 30),
    num_kv_heads=st.integers(1, 16),
    head_dim=st.integers(8, 128),
    cross=st.none()
    | st.builds(CrossSpec, st.integers(1, 18), st.integers(1, 16), st.integers(8, 128), st.floats(0.01, 2)),
)


@settings(deadline=None)
@given(
    cache=caches,
    weight_bytes=st.integers(0, 4_000_000_000),
    spare_bytes=st.integers(0, 10_000_000_000),
    block_size=st.integers(1, 128),
    max_batch=st.integers(1, 300),
)
def test_weights_and_cache_stay_within_the_budget_and_a_refusal_names_one_that_works(
    cache: CacheSpec, weight_bytes: int, spare_bytes: int, block_size: int, max_batch: int
) -> None:
    spec = replace(spec_with(cache), max_positions=3072)

    def plan(budget_bytes: int) -> MemoryPlan:
        return plan_memory(
            spec,
            element_bytes=2,
            weight_bytes=weight_bytes,
            budget_bytes=budget_bytes,
            block_size=block_size,
            max_batch=max_batch,
        )

    try:
        made = plan(weight_bytes + spare_bytes)
    except OutOfMemory as error:
        named = re.search(r"memory_gb of at least ([0-9.]+) starts", str(error))
        assert named is not None
        budget = int(float(named[1]) * 1e9)
        assert budget > weight_bytes + spare_bytes
        made = plan(budget)
    else:
        budget = weight_bytes + spare_bytes
    assert weight_bytes + made.kv_bytes <= budget
    assert made.budget_bytes == budget
    assert made.num_blocks >= 2


def test_no_more_is_planned_than_the_largest_batch_of_longest_sequences_can_use() -> None:
    spec = replace(spec_with(CacheSpec(3, 2, 8)), max_positions=320)
    plan = plan_memory(spec, element_bytes=4, weight_bytes=0, budget_bytes=10**12, block_size=32, max_batch=4)
    num_branches = 2
    assert plan.num_blocks == num_branches * 4 * 320 // 32


def test_the_budget_is_split_as_ordinary_speech_needs_it() -> None:
    plan = plan_memory(
        spec_with(WITH_CROSS), element_bytes=4, weight_bytes=0, budget_bytes=50_000_000, block_size=32, max_batch=10_000
    )
    rows = plan.num_blocks / 2
    assert plan.num_cross_blocks == pytest.approx(0.15 * rows, abs=1.5)
    assert plan.kv_bytes > 0.99 * 50_000_000


def test_what_a_cpu_offers_is_a_part_of_what_is_free() -> None:
    with open("/proc/meminfo", encoding="ascii") as lines:
        total = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemTotal"))
    assert 0 < available_bytes(torch.device("cpu")) <= total / 2
