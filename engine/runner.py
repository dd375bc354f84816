"""Runs one step on the device. Owns every tensor of the serving loop: the KV caches and what was prepared per sequence.

`run` changes no sequence but the times of its words: it writes K and V at positions the scheduler gave out and returns
what was drawn. So a step that failed can be run again, with fewer entries.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray

from declaim.engine import sampler
from declaim.engine.alignment import Aligner
from declaim.engine.batch import Batch, Entry
from declaim.engine.models.base import LayerCache, Prefill, SpeechModel, StepContext
from declaim.engine.parts import SPARE_STATES
from declaim.engine.sequence import Sequence
from declaim.engine.spec import FrameRule, RepetitionPenalty
from declaim.engine.states import StateSlots
from declaim.kernels.attention import AttentionPlan, attention_weights, plan_attention
from declaim.kernels.kv_cache import allocate_cache, write_cache
from declaim.kernels.mamba import StatePlan

NEVER_DRAWN = -1e30  # a logit no guidance and no penalty brings back, and still a finite one

REPLAY_POSITIONS = 256  # of one branch, run at once to make a lost state again; whole blocks of a scan


@dataclass(frozen=True, slots=True, eq=False)
class _Run:
    """Consecutive positions of one branch of a sequence. draws: whether the last one's logits are wanted."""

    sequence: Sequence
    branch: int
    first: int
    num_positions: int
    draws: bool

    @property
    def end(self) -> int:
        return self.first + self.num_positions

    @property
    def num_prefix(self) -> int:
        """How many of the positions, the first ones, lie within the prefix."""
        return min(max(0, self.sequence.prompt.prefix_len - self.first), self.num_positions)

    @property
    def rows(self) -> range:
        """The grid rows of the positions behind the prefix."""
        prefix_len = self.sequence.prompt.prefix_len
        return range(self.first + self.num_prefix - prefix_len, self.end - prefix_len)

    def codes(self) -> list[NDArray[np.int32]]:
        """The codes of each position's row, those of row 0 within the prefix. num_positions times [Q]."""
        first, num_prefix = self.first - self.sequence.prompt.prefix_len, self.num_prefix
        behind = self.sequence.rows[first + num_prefix : first + self.num_positions]
        return self.sequence.rows[:1] * num_prefix + behind if num_prefix else behind


@dataclass(frozen=True, slots=True, eq=False)
class LaunchedStep:
    """A step under way. drawn: waits for it, and gives the drawn codes, int32 [D, Q], a row for each entry of the batch
    that draws, in their order; negative ones mean that the logits were not finite, or that nothing was left to draw."""

    batch: Batch
    drawn: Callable[[], NDArray[np.int32]]


class Runner:
    """The model, its caches, and the step."""

    is_asynchronous = False

    def __init__(
        self, model: SpeechModel, *, num_blocks: int, num_cross_blocks: int, block_size: int, max_batch: int = 32
    ) -> None:
        """Allocate the caches. max_batch: sequences in a step; as many and a few more have a recurrent state."""
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
        self.states: StateSlots | None = None
        if cache.state is not None:
            self.states = StateSlots(
                cache.state,
                max_batch + SPARE_STATES,
                num_branches=2 if model.spec.sampling.has_guidance else 1,
                dtype=model.dtype,
                device=model.device,
            )
        self._prefills: dict[int, Prefill] = {}
        self._aligners: dict[int, Aligner] = {}  # of sequences whose words cross-attention tells
        penalties = [op for op in model.spec.sampling.ops if isinstance(op, RepetitionPenalty)]
        self._history_rows = max((op.window for op in penalties), default=0)
        self._skips_first = any(op.skips_first for op in penalties)

    def begin(self, sequence: Sequence) -> None:
        """Run the text side of a sequence, once, before its first step; its length is then known if it ever is."""
        prefill = self._model.prepare(sequence.prompt)
        self._prefills[sequence.sequence_id] = prefill
        if prefill.num_frames is not None:
            sequence.set_num_frames(prefill.num_frames)
        if prefill.durations_s is not None:
            sequence.time_words(prefill.durations_s)

    def has_begun(self, sequence: Sequence) -> bool:
        return sequence.sequence_id in self._prefills

    def release(self, sequence: Sequence) -> None:
        """Forget what `begin` made, the state, and what the words' times were found by."""
        self._prefills.pop(sequence.sequence_id, None)
        self._aligners.pop(sequence.sequence_id, None)
        if self.states is not None:
            self.states.release(sequence.sequence_id)

    def launch(self, batch: Batch) -> LaunchedStep:
        """Run a step's positions; where an entry reaches its last one, draw."""
        drawn = self.run(batch)
        return LaunchedStep(batch, lambda: drawn)

    @torch.inference_mode()
    def run(self, batch: Batch) -> NDArray[np.int32]:
        """Run a step and wait for it. Returns the drawn codes, [D, Q], as `LaunchedStep.drawn`."""
        queries: list[torch.Tensor] | None = None
        if self.cross_caches and any(entry.sequence.prompt.words for entry in batch.entries):
            queries = []
        drawing, logits = self.compute(batch, cross_queries=queries)
        if queries is not None:
            self._time_words(batch.entries, queries)
        rule = self._model.spec.rule
        if logits is None:
            return np.zeros((0, rule.num_codebooks), dtype=np.int32)
        for i, entry in enumerate(drawing):
            if is_too_early(rule, entry.sequence):
                logits[i, rule.eos_codebook, rule.eos] = NEVER_DRAWN
        guided = [i for i, entry in enumerate(drawing) if entry.sequence.num_branches > 1]
        inputs = sampler.DrawInputs(
            cond=logits[: len(drawing)],
            uncond=logits[len(drawing) :],
            guided=torch.tensor(guided, dtype=torch.int64, device=logits.device),
            params=tuple(entry.sequence.given.sampling for entry in drawing),
            rows=tuple(entry.sequence.num_rows for entry in drawing),
            history=self._history(drawing),
        )
        drawn: NDArray[np.int32] = sampler.draw(inputs, self._model.spec.sampling).to("cpu", torch.int32).numpy()
        return drawn

    def compute(
        self, batch: Batch, *, cross_queries: list[torch.Tensor] | None = None
    ) -> tuple[tuple[Entry, ...], torch.Tensor | None]:
        """Run a step up to the logits. cross_queries: see `StepContext`.

        Returns the D entries that draw, and their logits, float32 [D + G, Q, V]: those of branch 0, then those of
        branch 1 of the G that have it; None where nobody draws.
        """
        for entry in batch.entries:
            if entry.sequence.num_cached == 0:
                self._write_cross(entry.sequence)
        self.hold_states(batch.entries)
        self.begin_states(batch.entries)
        hidden = self._forward(_branch_major(batch.entries), cross_queries)
        self.advance_states(batch.entries)
        drawing = batch.drawing
        return drawing, self._model.logits(hidden) if drawing else None

    def hold_states(self, entries: Items[Entry]) -> None:
        """Have the recurrent state of each of a step's sequences in its slot, as its cached positions left it: those
        that were lost are made again."""
        if self.states is None:
            return
        self.states.hold([entry.sequence.sequence_id for entry in entries])
        for entry in entries:
            sequence = entry.sequence
            if self.states.has_taken(sequence.sequence_id, sequence.num_cached):
                continue
            for first in range(0, sequence.num_cached, REPLAY_POSITIONS):
                count = min(REPLAY_POSITIONS, sequence.num_cached - first)
                branches = range(sequence.num_branches)
                self._forward([_Run(sequence, branch, first, count, draws=False) for branch in branches])
            self.states.end_step(sequence.sequence_id, sequence.num_cached)

    def begin_states(self, entries: Items[Entry]) -> None:
        """From here to `advance_states` the states of these sequences count as lost: a step may fail half way."""
        if self.states is not None:
            for entry in entries:
                self.states.begin_step(entry.sequence.sequence_id)

    def advance_states(self, entries: Items[Entry]) -> None:
        """Record that the states of a step have taken in its positions."""
        if self.states is not None:
            for entry in entries:
                end = entry.sequence.num_cached + entry.num_positions
                self.states.end_step(entry.sequence.sequence_id, end)

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
        on_device = torch.tensor(slots, dtype=torch.int64, device=self._model.device)
        for (k, v), (k_cache, v_cache) in zip(prefill.cross, self.cross_caches, strict=True):
            write_cache(k, v, on_device, k_cache, v_cache)
        # The cache holds them now; kept a second time, they would be as large as seconds of speech.
        self._prefills[sequence.sequence_id] = replace(prefill, cross=())

    def _time_words(self, entries: Items[Entry], queries: list[torch.Tensor]) -> None:
        """Tell how far a step's sequences have come in their texts. queries: of each layer, [num_conditional, H, D].

        A row that was run before, in a step that failed or before a preemption, has told already.
        """
        begin = 0
        for entry in entries:
            sequence, first = entry.sequence, entry.sequence.num_cached
            begin, query_begin = begin + entry.num_positions, begin
            prompt = sequence.prompt
            if not prompt.words:
                continue
            aligner = self._aligners.get(sequence.sequence_id)
            if aligner is None:
                lag = self._model.spec.rule.max_delay
                aligner = self._aligners[sequence.sequence_id] = Aligner(prompt.words, prompt.cross_len, lag=lag)
            # Position 0 draws the first frame, and those of the voice prompt come before the new ones.
            wanted = prompt.prefix_len + sequence.num_prompt_frames + aligner.num_rows
            num_told = max(0, wanted - first)
            if num_told >= entry.num_positions:
                continue
            layers = [
                attention_weights(
                    q[query_begin + num_told : begin], k_cache, sequence.cross_blocks, context_len=prompt.cross_len
                )
                for q, (k_cache, _) in zip(queries, self.cross_caches, strict=True)
            ]
            for weights in torch.cat(layers, 1).double().cpu().numpy():
                aligner.observe(weights)
            sequence.words = aligner.words(self._model.spec.codec.frame_rate_hz)

    def _forward(self, runs: Items[_Run], cross_queries: list[torch.Tensor] | None = None) -> torch.Tensor:
        """Run the decoder over runs in branch-major order. Returns the hidden states of those that draw, [M, C]."""
        return self._model.forward(self._embed(runs), self._context(runs, cross_queries))

    def _context(self, runs: Items[_Run], cross_queries: list[torch.Tensor] | None) -> StepContext:
        device = self._model.device
        counts = [run.num_positions for run in runs]
        tables = [run.sequence.block_tables[run.branch] for run in runs]
        positions = [position for run in runs for position in range(run.first, run.end)]
        slots = [
            slot for table, run in zip(tables, runs, strict=True) for slot in self._slots(table, run.first, run.end)
        ]
        starts = list(accumulate(counts, initial=0))
        last = [end - 1 for run, end in zip(runs, starts[1:], strict=True) if run.draws]
        conditional = [run for run in runs if run.branch == 0]
        return StepContext(
            positions=torch.tensor(positions, device=device),
            slots=torch.tensor(slots, device=device),
            attention=plan_attention(
                tables,
                counts,
                context_lens=[run.end for run in runs],
                block_size=self._block_size,
                causal=True,
                device=device,
            ),
            caches=self.caches,
            cross=self._cross_plan(conditional),
            cross_caches=self.cross_caches,
            num_conditional=sum(run.num_positions for run in conditional),
            last=torch.tensor(last, dtype=torch.int64, device=device),
            state=self._state_plan(runs, starts),
            states=() if self.states is None else self.states.layers,
            cross_queries=cross_queries,
        )

    def _cross_plan(self, conditional: Items[_Run]) -> AttentionPlan | None:
        if not self.cross_caches:
            return None
        return plan_attention(
            [run.sequence.cross_blocks for run in conditional],
            [run.num_positions for run in conditional],
            context_lens=[run.sequence.prompt.cross_len for run in conditional],
            block_size=self._block_size,
            causal=False,
            device=self._model.device,
        )

    def _state_plan(self, runs: Items[_Run], starts: Items[int]) -> StatePlan | None:
        if self.states is None:
            return None
        device = self._model.device
        slots = [self.states.slot(run.sequence.sequence_id, run.branch) for run in runs]
        scan_block = self.states.scan_block
        blocked = [max(0, min(run.end, run.sequence.num_blocked(scan_block)) - run.first) for run in runs]
        return StatePlan(
            query_start=torch.tensor(starts, dtype=torch.int32, device=device),
            slots=torch.tensor(slots, device=device),
            is_new=torch.tensor([run.first == 0 for run in runs], device=device),
            num_blocked=torch.tensor(blocked, dtype=torch.int32, device=device),
            has_new=any(run.first == 0 for run in runs),
            has_blocks=any(blocked),
        )

    def _slots(self, table: Items[int], begin: int, end: int) -> list[int]:
        size = self._block_size
        return [table[position // size] * size + position % size for position in range(begin, end)]

    def _embed(self, runs: Items[_Run]) -> torch.Tensor:
        """Row embeddings, plus the side vectors of those rows; positions of the prefix take its embeddings instead."""
        rows = np.concatenate([row for run in runs for row in run.codes()])
        codes = rows.astype(np.int64).reshape(-1, self._model.spec.rule.num_codebooks)
        x = self._model.embed(torch.from_numpy(codes).to(self._model.device))
        end = 0
        for run in runs:
            prefill, num_prefix = self._prefills[run.sequence.sequence_id], run.num_prefix
            begin, end = end, end + run.num_positions
            if prefill.side is not None and num_prefix < run.num_positions:
                x[begin + num_prefix : end] += prefill.side[run.rows.start : run.rows.stop]
            if prefill.prefix is not None and num_prefix:
                x[begin : begin + num_prefix] = prefill.prefix[run.branch, run.first : run.first + num_prefix]
        return x

    def _history(self, drawing: Items[Entry]) -> torch.Tensor:
        """The last rows of each sequence, -1 before the first, and all -1 where no penalty applies. int64 [B, W, Q]."""
        width = self._history_rows
        unknown = np.full(self._model.spec.rule.num_codebooks, -1, dtype=np.int32)
        history = []
        for entry in drawing:
            rows = entry.sequence.rows
            is_first = self._skips_first and len(rows) == entry.sequence.num_prompt_frames + 1
            past = [] if is_first or not width else rows[-width:]
            history += [unknown] * (width - len(past)) + past
        stacked = np.array(history, dtype=np.int64).reshape(len(drawing), width, len(unknown))
        return torch.from_numpy(stacked).to(self._model.device)


def is_too_early(rule: FrameRule, sequence: Sequence) -> bool:
    """Whether the row that a sequence draws next would end it before it may."""
    return sequence.num_rows <= sequence.num_prompt_frames + rule.min_frames


def _branch_major(entries: Items[Entry]) -> list[_Run]:
    """All of branch 0 in the order of the entries, then branch 1 of those that have it, and so on."""
    num_branches = max(entry.sequence.num_branches for entry in entries)
    return [
        _Run(entry.sequence, branch, entry.sequence.num_cached, entry.num_positions, entry.draws)
        for branch in range(num_branches)
        for entry in entries
        if branch < entry.sequence.num_branches
    ]
