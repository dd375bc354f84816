"""`declaim plan`: where a model's memory would go, printed without loading it, and without a GPU.

Owns how a plan looks; the arithmetic is the engine's (engine/memory.py).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from declaim.api.terminal import exits_on_error
from declaim.engine.config import DTypeName
from declaim.engine.memory import GB, DevicePlan, Load, Offload, Use, find_device, plan_device
from declaim.engine.parts import DAC_44KHZ, KNOWN_CONFIGS, ModelParts, describe_model

_DEFAULT = Load()


def plan(
    model: Annotated[str, typer.Argument(help="A model's name, hub id or folder.")],
    memory_gb: Annotated[
        float | None, typer.Option(help="Plan for a GPU with so much memory; by default for this machine.")
    ] = None,
    dtype: Annotated[DTypeName, typer.Option(help="The model's arithmetic; auto chooses.")] = "auto",
    concurrency: Annotated[int, typer.Option(min=1, help="Streams to hold at once.")] = _DEFAULT.max_batch,
    seconds: Annotated[float, typer.Option(help="How long an ordinary stream is.")] = _DEFAULT.stream_s,
    offload: Annotated[Offload, typer.Option(help="What is used once a request may stay on the CPU.")] = "auto",
    device: Annotated[
        Literal["auto", "cpu", "cuda"], typer.Option(help="auto is a GPU where --memory-gb or this machine has one.")
    ] = "auto",
) -> None:
    """Show where MODEL's memory would go, and how many streams that holds."""
    with exits_on_error():
        planned = plan_device(
            describe(model),
            find_device(device, memory_gb=memory_gb),
            load=Load(max_batch=concurrency, stream_s=seconds),
            dtype=dtype,
            offload=offload,
        )
    Console().print(render_plan(planned))


def describe(model: str) -> ModelParts:
    """A model's parts from its config.json alone, which for a hub id not known here is all that is fetched.

    Raises: ModelNotFound, ModelLoadError.
    """
    from declaim.engine.hub import Hub
    from declaim.engine.loader import EMBEDDED_FOLDER, EMBEDDED_NAME, find_speaker
    from declaim.engine.safetensors_io import read_json

    if model in KNOWN_CONFIGS and not Path(model).exists():
        return describe_model(KNOWN_CONFIGS[model], DAC_44KHZ, name=model)
    folder = EMBEDDED_FOLDER if model == EMBEDDED_NAME else Path(model) if Path(model).exists() else _fetched(model)
    codec = folder / "codec" / "config.json"
    parts = describe_model(
        read_json(folder / "config.json"), read_json(codec) if codec.exists() else DAC_44KHZ, name=model
    )
    # A hub model is pulled with its speaker encoder; a folder may be without.
    is_without = parts.speaker is not None and Path(model).exists() and find_speaker(folder, Hub()) is None
    return replace(parts, speaker=None) if is_without else parts


def render_plan(plan: DevicePlan) -> RenderableType:
    """A plan as a table of what takes how much, and one paragraph on what that means in streams."""
    where = "a GPU" if plan.device.kind == "cuda" else "the CPU"
    table = Table(title=f"{plan.parts.name} in {plan.precision} on {where}", title_justify="left", show_edge=False)
    table.add_column("")
    table.add_column("GB", justify="right")
    table.add_column("share", justify="right")
    memory = plan.memory

    def add(use: Use, *, style: str = "") -> None:
        share = use.num_bytes / memory.budget_bytes
        table.add_row(use.name, f"{use.num_bytes / GB:.3f}", f"{share:.1%}", style=style)

    def add_section(title: str, uses: tuple[Use, ...]) -> None:
        add(Use(title, sum(use.num_bytes for use in uses)), style="bold")
        for use in uses:
            add(Use(f"  {use.name}", use.num_bytes))
        table.add_section()

    add_section("weights and codec", plan.weights)
    add_section("graphs and workspaces", plan.workspaces)
    add_section("KV cache", _cache_uses(plan))
    add(Use("unused", memory.budget_bytes - plan.used_bytes))
    add(Use("budget", memory.budget_bytes), style="bold")
    return Group(table, Text(), *(Text(line) for line in _meaning(plan)))


def _cache_uses(plan: DevicePlan) -> tuple[Use, ...]:
    """The cache's blocks; those of self-attention first."""
    memory, block_size = plan.memory, plan.load.block_size
    element_bytes = plan.element_bytes
    cross = memory.num_cross_blocks * block_size * plan.parts.cache.cross_bytes_per_position(element_bytes)
    uses = (Use(f"{memory.num_blocks:,} blocks of {block_size} positions", memory.kv_bytes - cross),)
    return (*uses, Use(f"{memory.num_cross_blocks:,} cross-attention blocks", cross)) if cross else uses


def _meaning(plan: DevicePlan) -> list[str]:
    """What the plan holds, in a reader's units."""
    seconds = f"{plan.load.stream_s:g} s"
    guidance = f", each with guidance ({plan.parts.num_branches} branches)" if plan.parts.num_branches > 1 else ""
    num_blocks, num_cross = plan.stream_blocks
    blocks = f"{num_blocks} blocks" + (f" and {num_cross} of cross-attention" if num_cross else "")
    lines = [
        f"Holds {plan.num_streams} streams of {seconds} at once{guidance}, {blocks} a stream: {plan.held_s:,.0f} s of"
        f" speech in all. Up to {plan.max_batch} sequences run in a step; more wait.",
    ]
    if plan.reason:
        lines.append(f"{plan.reason[0].upper()}{plan.reason[1:]}.")
    for use in plan.offloaded:
        lines.append(f"In host memory, beyond the budget: {use.name}, {use.num_bytes / GB:.3f} GB when in use.")
    return lines


def _fetched(repo_id: str) -> Path:
    """A hub model's folder with its config.json, and nothing else fetched. Raises: ModelNotFound, ModelLoadError."""
    from declaim.engine.hub import Hub
    from declaim.engine.loader import NAMING_FILES

    hub = Hub()
    return hub.cached_folder(repo_id) or hub.fetch_small(hub.list_files(repo_id).only(NAMING_FILES))
