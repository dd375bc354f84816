"""What fits where: arithmetic over tables, no tensor. Memory is planned once, at start; nothing is allocated later."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

import torch

from declaim.engine.blocks import blocks_for
from declaim.engine.errors import OutOfMemory
from declaim.engine.spec import ModelSpec

HOST_SHARE = 0.5
GPU_SHARE = 0.9
GB = 1e9


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Blocks of self- and cross-attention cache, and what they and the rest take."""

    num_blocks: int
    num_cross_blocks: int
    kv_bytes: int
    weight_bytes: int
    budget_bytes: int


def available_bytes(device: torch.device) -> int:
    """What the engine may take of a device when it is given no budget."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free * GPU_SHARE)
    return int(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * HOST_SHARE)


def plan_memory(
    spec: ModelSpec, *, element_bytes: int, weight_bytes: int, budget_bytes: int, block_size: int, max_batch: int
) -> MemoryPlan:
    """Give what the weights leave to KV blocks, but no more than `max_batch` of the longest sequences can use.

    budget_bytes: for weights and cache together. The cache is split between self- and cross-attention as ordinary
    speech needs them. Raises: OutOfMemory if not even a short sequence fits, naming the smallest budget that works.
    """
    num_branches = 2 if spec.sampling.has_guidance else 1
    block_bytes = spec.cache.bytes_per_position(element_bytes) * block_size
    cross_block_bytes = spec.cache.cross_bytes_per_position(element_bytes) * block_size
    cross_per_row = spec.cache.cross.positions_per_row if spec.cache.cross is not None else 0.0

    row_bytes = (num_branches * block_bytes + cross_per_row * cross_block_bytes) / block_size
    fixed_bytes = weight_bytes + num_branches * block_bytes + cross_block_bytes  # the last blocks may be part used
    wanted_rows = max_batch * spec.max_positions
    rows = min(wanted_rows, int(max(0, budget_bytes - fixed_bytes) / row_bytes))
    least_rows = 2 * block_size
    if rows < least_rows:
        least_gb = math.ceil((fixed_bytes + (least_rows + 1) * row_bytes) / GB * 1000) / 1000
        raise OutOfMemory(
            f"a budget of {budget_bytes / GB:.3f} GB leaves no room for the cache beside {weight_bytes / GB:.3f} GB of"
            f" weights: memory_gb of at least {least_gb:.3f} starts; a smaller dtype needs less"
        )
    num_blocks = num_branches * blocks_for(rows, block_size)
    num_cross_blocks = blocks_for(int(rows * cross_per_row) + 1, block_size) if cross_per_row else 0
    return MemoryPlan(
        num_blocks=num_blocks,
        num_cross_blocks=num_cross_blocks,
        kv_bytes=num_blocks * block_bytes + num_cross_blocks * cross_block_bytes,
        weight_bytes=weight_bytes,
        budget_bytes=budget_bytes,
    )
