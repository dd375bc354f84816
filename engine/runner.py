"""Runs one step on the device. Owns every tensor of the serving loop: the KV caches and what was prepared per sequence.

`run` changes no sequence: it writes K and V at positions the scheduler gave out and returns what was drawn. So a step
that failed can be run again, with fewer entries.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from declaim.engine import sampler
from declaim.engine.batch import Batch, Entry
from declaim.engine.models.base import LayerCache, Prefill, SpeechModel, StepContext
from declaim.engine.sequence import Sequence
from declaim.engine.spec import RepetitionPenalty
from declaim.kernels.attention import AttentionPlan, plan_attention
from declaim.kernels.kv_cache import allocate_cache, write_cache


@dataclass(frozen=True, slots=True, eq=False)
class LaunchedStep:
    """A step under way. drawn: waits for it, and gives the drawn codes [Q] by sequence id; negative ones mean that the
    logits were not finite, or that nothing was left to draw."""

    batch: Batch
    drawn: Callable[[], dict[int, NDArray[np.int32]]]


class Runner:
    """The model, its caches, and the step."""

    is_asynchronous = False

    def __init__(self, model: SpeechModel, *, num_blocks: int, num_cross_blocks: int, block_size: int) -> None:
        self._model = model
        self._block_size = block_size
        self.num_blocks = num_blocks
        cache, cross = model.spec.cache, model.spec.cache.cross
        self.caches = self._allocate(cache.num_layers, num_blocks, cache.num_kv_heads, head_dim=cache.head_dim)
        self.cross_caches: tuple[LayerCache, ...] = ()
        if cross is not None:
            self.cross_caches = self._allocate(
                cross.num_layers, num_cross_blocks, cross.num_kv_heads, head_dim=cross.head_dim
            )
        self._prefills: dict[int, Prefill] = {}
        windows = [op.window for op in model.spec.sampling.ops if isinstance(op, RepetitionPenalty)]
        self._history_rows = max(windows, default=0)

    def begin(self, sequence: Sequence) -> None:
        """Run the text side of a sequence, once, before its first step; its length is then known if it ever is."""
        prefill = self._model.prepare(sequence.prompt)
        self._prefills[sequence.sequence_id] = prefill
        if prefill.num_frames is not None:
            sequence.set_num_frames(prefill.num_frames)

    def has_begun(self, sequence: Sequence) -> bool:
        return sequence.sequence_id in self._prefills

    def release(self, sequence: Sequence) -> None:
        """Forget what `begin` made."""
        self._prefills.pop(sequence.sequence_id, None)

    def launch(self, batch: Batch) -> LaunchedStep:
        """Run a step's positions; where an entry reaches its last one, draw."""
        drawn = self.run(batch)
        return LaunchedStep(batch, lambda: drawn)

    @torch.inference_mode()
    def run(self, batch: Batch) -> dict[int, NDArray[np.int32]]:
        """Run a step and wait for it. Returns the drawn codes [Q] by sequence id."""
        drawing, logits = self.compute(batch)
        if logits is None:
            return {}
        guided = [i for i, entry in enumerate(drawing) if entry.sequence.num_branches > 1]
        inputs = sampler.DrawInputs(
            cond=logits[: len(drawing)],
            uncond=logits[len(drawing) :],
            guided=torch.tensor(guided, dtype=torch.int64, device=logits.device),
            params=tuple(entry.sequence.given.sampling for entry in drawing),
            rows=tuple(entry.sequence.num_rows for entry in drawing),
            history=self._history(drawing),
        )
        drawn = sampler.draw(inputs, self._model.spec.sampling).to("cpu", torch.int32).numpy()
        return {entry.sequence.sequence_id: codes for entry, codes in zip(drawing, drawn, strict=True)}

    def compute(self, batch: Batch) -> tuple[list[Entry], torch.Tensor | None]:
        """Run a step up to the logits.

        Returns the D entries that draw, and their logits, float32 [D + G, Q, V]: those of branch 0, then those of
        branch 1 of the G that have it; None where nobody draws.
        """
        for entry in batch.entries:
            if entry.sequence.num_cached == 0:
                self._write_cross(entry.sequence)
        order = _branch_major(batch.entries)
        hidden = self._model.forward(self._embed(order), self._context(batch.entries, order))
        drawing = [entry for entry in batch.entries if entry.draws]
        return drawing, self._model.logits(hidden) if drawing else None

    def side(self, sequence: Sequence) -> torch.Tensor | None:
        """The side vectors of a sequence that has begun, [rows, C]."""
        return self._prefills[sequence.sequence_id].side

    def _allocate(
        self, num_layers: int, num_blocks: int, num_kv_heads: int, *, head_dim: int
    ) -> tuple[LayerCache, ...]:
        def tensor() -> torch.Tensor:
            return allocate_cache(
                num_blocks,
                num_kv_heads,
                block_size=self._block_size,
                head_dim=head_dim,
                dtype=self._model.dtype,
                device=self._model.device,
            )

        return tuple((tensor(), tensor()) for _ in range(num_layers))

    def _write_cross(self, sequence: Sequence) -> None:
        if not self.cross_caches:
            return
        prefill = self._prefills[sequence.sequence_id]
        if not prefill.cross:  # preempted after its cross-attention had been written
            prefill = self._model.prepare(sequence.prompt)
        num_positions = sequence.prompt.cross_len
        slots = self._slots(sequence.cross_blocks, 0, num_positions)
        on_device = torch.from_numpy(slots).to(self._model.device)
        for (k, v), (k_cache, v_cache) in zip(prefill.cross, self.cross_caches, strict=True):
            write_cache(k, v, on_device, k_cache, v_cache)
        # The cache holds them now; kept a second time, they would be as large as seconds of speech.
        self._prefills[sequence.sequence_id] = replace(prefill, cross=())

    def _context(self, entries: Items[Entry], order: list[tuple[Entry, int]]) -> StepContext:
        device = self._model.device
        first = [entry.sequence.num_cached for entry, _ in order]
        counts = [entry.num_positions for entry, _ in order]
        tables = [entry.sequence.block_tables[branch] for entry, branch in order]
        ends = [begin + count for begin, count in zip(first, counts, strict=True)]
        positions = np.concatenate([np.arange(begin, end) for begin, end in zip(first, ends, strict=True)])
        slots = np.concatenate([self._slots(*item) for item in zip(tables, first, ends, strict=True)])
        ends_in_step = np.cumsum(counts)
        last = [end - 1 for (entry, _), end in zip(order, ends_in_step, strict=True) if entry.draws]
        return StepContext(
            positions=torch.from_numpy(positions).to(device),
            slots=torch.from_numpy(slots).to(device),
            attention=plan_attention(
                tables, counts, context_lens=ends, block_size=self._block_size, causal=True, device=device
            ),
            caches=self.caches,
            cross=self._cross_plan(entries),
            cross_caches=self.cross_caches,
            num_conditional=sum(entry.num_positions for entry in entries),
            last=torch.tensor(last, dtype=torch.int64, device=device),
        )

    def _cross_plan(self, entries: Items[Entry]) -> AttentionPlan | None:
        if not self.cross_caches:
            return None
        return plan_attention(
            [entry.sequence.cross_blocks for entry in entries],
            [entry.num_positions for entry in entries],
            context_lens=[entry.sequence.prompt.cross_len for entry in entries],
            block_size=self._block_size,
            causal=False,
            device=self._model.device,
        )

    def _slots(self, table: list[int], begin: int, end: int) -> NDArray[np.int64]:
        positions = np.arange(begin, end)
        return np.asarray(table, dtype=np.int64)[positions // self._block_size] * self._block_size + (
            positions % self._block_size
        )

    def _embed(self, order: list[tuple[Entry, int]]) -> torch.Tensor:
        """Row embeddings, plus the side vectors of those rows; positions of the prefix take its embeddings instead."""
        codes = [entry.sequence.rows[np.maximum(_row_indices(entry), 0)] for entry, _ in order]
        x = self._model.embed(torch.from_numpy(np.concatenate(codes).astype(np.int64)).to(self._model.device))
        begin = 0
        for entry, branch in order:
            prefill = self._prefills[entry.sequence.sequence_id]
            part = x[begin : begin + entry.num_positions]
            rows = _row_indices(entry)
            num_prefix = int((rows < 0).sum())
            if prefill.side is not None and num_prefix < len(rows):
                part[num_prefix:] += prefill.side[rows[num_prefix] : rows[-1] + 1]
            if prefill.prefix is not None and num_prefix:
                first = entry.sequence.num_cached
                part[:num_prefix] = prefill.prefix[branch, first : first + num_prefix]
            begin += entry.num_positions
        return x

    def _history(self, drawing: Items[Entry]) -> torch.Tensor:
        """The last rows of each sequence, -1 before the first. int64 [B, W, Q]."""
        width = self._history_rows
        history = np.full((len(drawing), width, self._model.spec.rule.num_codebooks), -1, dtype=np.int64)
        for i, entry in enumerate(drawing):
            past = entry.sequence.rows[max(0, entry.sequence.num_rows - width) : entry.sequence.num_rows]
            history[i, width - len(past) :] = past
        return torch.from_numpy(history).to(self._model.device)


def _branch_major(entries: Items[Entry]) -> list[tuple[Entry, int]]:
    """All of branch 0 in the order of the entries, then branch 1 of those that have it, and so on."""
    num_branches = max(entry.sequence.num_branches for entry in entries)
    return [
        (entry, branch) for branch in range(num_branches) for entry in entries if branch < entry.sequence.num_branches
    ]


def _row_indices(entry: Entry) -> NDArray[np.int64]:
    """The grid row of each of an entry's positions; negative within the prefix."""
    first = entry.sequence.num_cached - entry.sequence.prompt.prefix_len
    return np.arange(first, first + entry.num_positions)
