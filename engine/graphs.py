"""The decode step that stays on the GPU: one CUDA graph per batch size holds it from embedding to frame rule.

What a sequence's next step needs lies in its seat, a row of `Seats`: the last row of codes, its index, where it ends,
how it draws. A step reads the seats of its sequences and writes the rows it drew back into them, so the next one can
start before the CPU has seen any code. The CPU reads the codes one step late, and repeats the frame rule in
`Sequence.append`. Prompts run through the plain `Runner`, whose logits end in the same draw.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from declaim.engine import frames
from declaim.engine.batch import Batch, Entry
from declaim.engine.blocks import blocks_for
from declaim.engine.memory import batch_buckets
from declaim.engine.models.base import SpeechModel, StepContext
from declaim.engine.progress import Progress
from declaim.engine.runner import NEVER_DRAWN, LaunchedStep, Runner
from declaim.engine.sampler import sample_ops
from declaim.engine.sequence import Sequence
from declaim.engine.spec import ModelSpec, RepetitionPenalty
from declaim.kernels.attention import AttentionPlan
from declaim.kernels.mamba import StatePlan
from declaim.kernels.sample import SampleParams, guided_sample

_NEVER = 1 << 40  # a row no sequence reaches

# Columns of Seats.numbers.
_ROW, _END_ROW, _LAST_END_ROW, _PREFIX_LEN, _CROSS_LEN, _FIRST_FORCED, _IS_GUIDED = range(7)


class Seats:
    """What the device knows of each sequence between steps; the last seat is nobody's, for a graph's padding.

    last: int64 [S + 1, Q], the newest row. history: int64 [S + 1, W, Q], the newest W rows, -1 before the first.
    forced: int64 [S + 1, F, Q], codes that overwrite the drawn ones from row `_FIRST_FORCED` on, -1 where free.
    side: [S + 1, rows, C], what each row's embedding is added. numbers: int64 [S + 1, 7], see the columns above.
    """

    def __init__(self, spec: ModelSpec, num_seats: int, *, device: torch.device, dtype: torch.dtype) -> None:
        count, num_codebooks, rule = num_seats + 1, spec.rule.num_codebooks, spec.rule
        window = max((op.window for op in spec.sampling.ops if isinstance(op, RepetitionPenalty)), default=0)

        def full(*shape: int, value: float = 0, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.full((count, *shape), value, dtype=dtype, device=device)

        self.nobody = num_seats
        self.last = full(num_codebooks)
        self.history = full(window, num_codebooks, value=-1)
        self.forced = full(rule.max_delay, num_codebooks, value=frames.FREE)
        self.side = full(spec.max_positions, spec.hidden_size, dtype=dtype) if spec.has_side else None
        self.numbers = full(7)
        self.params = SampleParams(
            temperature=full(dtype=torch.float32),
            top_k=full(dtype=torch.int32),
            top_p=full(value=1.0, dtype=torch.float32),
            min_p=full(dtype=torch.float32),
            repetition_penalty=full(value=1.0, dtype=torch.float32),
            guidance_scale=full(value=1.0, dtype=torch.float32),
            seed=full(),
        )
        drain = rule.drain or ((-1,) * num_codebooks,)
        self.drain = torch.tensor(drain, dtype=torch.int64, device=device)  # [D, Q]

    def take(self, seat: int, sequence: Sequence, side: torch.Tensor | None) -> None:
        """Write a sequence's state as the host knows it; it has no row in flight."""
        given, prompt, row = sequence.given, sequence.prompt, sequence.num_rows - 1
        first_forced = sequence.num_prompt_frames + 1
        numbers = [0] * 7
        numbers[_ROW], numbers[_PREFIX_LEN], numbers[_CROSS_LEN] = row, prompt.prefix_len, prompt.cross_len
        numbers[_END_ROW] = _NEVER if sequence.end_row is None else sequence.end_row
        numbers[_LAST_END_ROW], numbers[_FIRST_FORCED] = sequence.last_end_row, first_forced
        numbers[_IS_GUIDED] = int(sequence.num_branches > 1)
        self._put(self.numbers, seat, np.array(numbers))
        self._put(self.last, seat, sequence.rows[row])
        self._put(self.forced, seat, sequence.forced[first_forced:])
        window = self.history.shape[1]
        if window:
            past = sequence.grid(max(0, sequence.num_rows - window), sequence.num_rows)
            history = np.full(self.history.shape[1:], -1, dtype=np.int64)
            history[window - len(past) :] = past
            self._put(self.history, seat, history)
        if self.side is not None and side is not None:
            self.side[seat, : len(side)] = side
        sampling, params = given.sampling, self.params
        params.temperature[seat] = 0.0 if sampling.greedy else sampling.temperature
        params.top_k[seat] = sampling.top_k
        params.top_p[seat] = sampling.top_p
        params.min_p[seat] = sampling.min_p
        params.repetition_penalty[seat] = sampling.repetition_penalty
        params.guidance_scale[seat] = sampling.guidance_scale
        params.seed[seat] = sampling.seed

    def params_of(self, seats: torch.Tensor) -> SampleParams:
        """The parameters of the sequences in `seats` (int64 [B])."""
        every = self.params
        return SampleParams(
            temperature=every.temperature[seats],
            top_k=every.top_k[seats],
            top_p=every.top_p[seats],
            min_p=every.min_p[seats],
            repetition_penalty=every.repetition_penalty[seats],
            guidance_scale=every.guidance_scale[seats],
            seed=every.seed[seats],
        )

    def advance(self, seats: torch.Tensor, drawn: torch.Tensor, *, eos: int | None, eos_codebook: int) -> None:
        """Turn drawn codes into the next rows: the frame rule of frames.py and `Sequence.append`, on the device.

        seats: int64 [B]; drawn: int32 [B, Q].
        """
        numbers, codes = self.numbers[seats], drawn.long()
        row = numbers[:, _ROW] + 1
        end_row = numbers[:, _END_ROW]
        is_open = end_row == _NEVER
        ends = row == numbers[:, _LAST_END_ROW]
        if eos is not None:
            ends = ends | (codes[:, eos_codebook] == eos)
        end_row = torch.where(is_open & ends, row, end_row)
        drain = self.drain[(row - end_row).clamp(0, len(self.drain) - 1)]
        codes = torch.where((row >= end_row)[:, None] & (drain >= 0), drain, codes)
        if self.forced.shape[1]:
            behind = row - numbers[:, _FIRST_FORCED]
            is_forced = (behind >= 0) & (behind < self.forced.shape[1])
            forced = self.forced[seats, behind.clamp(0, self.forced.shape[1] - 1)]
            codes = torch.where(is_forced[:, None] & (forced != frames.FREE), forced, codes)
        codes = codes.clamp_(min=0)  # a failed draw is negative: the CPU will end its sequence, one step late
        self.last[seats] = codes
        self.numbers[seats, _ROW] = row
        self.numbers[seats, _END_ROW] = end_row
        if self.history.shape[1]:
            self.history[seats] = torch.cat([self.history[seats][:, 1:], codes[:, None]], dim=1)

    def pretend(self, count: int, *, row: int, cross_len: int) -> None:
        """Put guided sequences that never end into the first seats, at `row`: for timing a step without a crowd."""
        self.numbers[:count] = 0
        self.numbers[:count, _ROW], self.numbers[:count, _CROSS_LEN] = row, cross_len
        self.numbers[:count, _END_ROW] = self.numbers[:count, _LAST_END_ROW] = _NEVER
        self.numbers[:count, _IS_GUIDED] = 1

    def _put(self, table: torch.Tensor, seat: int, values: NDArray[np.generic]) -> None:
        table[seat] = torch.from_numpy(values.astype(np.int64)).to(table.device, non_blocking=True)


@dataclass(frozen=True, slots=True, eq=False)
class _Lanes:
    """A bucket's static inputs, and the graph that reads them.

    seats: int64 [B]; tables: int32 [branches * B, blocks], all of branch 0 first; cross_tables: int32 [B, blocks].
    states: int64 [branches * B], slots of recurrent state. drawn: int32 [B, Q], written by a replay. replay: runs the
    step.
    """

    seats: torch.Tensor
    tables: torch.Tensor
    cross_tables: torch.Tensor | None
    states: torch.Tensor | None
    drawn: torch.Tensor
    replay: Callable[[], object]


class GraphRunner:
    """Keeps `Runner`'s contract, one step ahead of the CPU. Without a GPU (under Triton's interpreter) the same step
    runs uncaptured."""

    is_asynchronous = True

    def __init__(self, model: SpeechModel, runner: Runner, *, block_size: int, max_batch: int) -> None:
        self._model, self._runner = model, runner
        self.block_size, self._max_batch = block_size, max_batch
        self.num_blocks = runner.num_blocks
        self._ops = sample_ops(model.spec.sampling)
        penalties = (op for op in model.spec.sampling.ops if isinstance(op, RepetitionPenalty))
        self._skips_first = any(op.skips_first for op in penalties)
        self._is_cuda = model.device.type == "cuda"
        # Rows in flight pin the seats of one step, and the next step may hold as many others.
        num_seats = 2 * max_batch
        self.seats = Seats(model.spec, num_seats, device=model.device, dtype=model.dtype)
        self._free = list(range(num_seats))
        self._seat_of: dict[int, int] = {}  # by sequence id, least recently stepped first
        self._held: set[int] = set()  # sequences of the last step
        self._max_branches = 2 if model.spec.sampling.has_guidance else 1
        self._max_blocks = blocks_for(model.spec.max_positions, block_size)
        cross = model.spec.cache.cross
        self._max_cross_blocks = blocks_for(cross.max_positions, block_size) if cross is not None else 0
        # Mirrors of the block tables by seat, so that a step copies rows instead of converting lists.
        self._tables = np.zeros((num_seats + 1, self._max_branches, self._max_blocks), dtype=np.int32)
        self._num_known = np.zeros((num_seats + 1, self._max_branches), dtype=np.int64)
        self._cross_tables = np.zeros((num_seats + 1, self._max_cross_blocks), dtype=np.int32)
        self.lanes: dict[tuple[int, int], _Lanes] = {}
        self._pool = torch.cuda.graph_pool_handle() if self._is_cuda else None

    def begin(self, sequence: Sequence) -> None:
        self._runner.begin(sequence)

    def has_begun(self, sequence: Sequence) -> bool:
        return self._runner.has_begun(sequence)

    def release(self, sequence: Sequence) -> None:
        """Forget a sequence. A step in flight may still write to its seat; whoever takes it writes later."""
        self._runner.release(sequence)
        self._leave(sequence.sequence_id)

    @torch.inference_mode()
    def capture(self, progress: Progress) -> None:
        """Make every bucket's graph, largest first so that they share its memory."""
        buckets = reversed(batch_buckets(self._max_batch))
        keys = [(bucket, num) for bucket in buckets for num in range(self._max_branches, 0, -1)]
        for i, (bucket, num_branches) in enumerate(keys):
            progress("capture", i, len(keys))
            self.lanes[bucket, num_branches] = self._make_lanes(bucket, num_branches)
        progress("capture", len(keys), len(keys))

    @torch.inference_mode()
    def launch(self, batch: Batch) -> LaunchedStep:
        """Start a step; its codes are there when the GPU is done with it.

        If it raises, no seat has moved on: whoever had one still has it as it was.
        """
        self._runner.hold_states(batch.entries)
        seated = [entry for entry in batch.entries if self._is_seated(entry)]
        stepping = {entry.sequence.sequence_id for entry in seated}
        others = [entry for entry in batch.entries if entry.sequence.sequence_id not in stepping]
        order: list[Entry] = []
        parts: list[torch.Tensor] = []
        if others:
            drawing, logits = self._runner.compute(Batch(tuple(others)))
            if logits is not None:
                order += drawing
                parts.append(self._draw_first(drawing, logits, busy=stepping))
        if seated:
            order += seated
            self._runner.begin_states(seated)
            parts.append(self._replay(seated))
            self._runner.advance_states(seated)
        self._held = {entry.sequence.sequence_id for entry in batch.entries}
        return LaunchedStep(batch, self._reader(batch, order, parts))

    def _is_seated(self, entry: Entry) -> bool:
        # A sequence that starts anew, after a preemption, has new blocks and goes through its prompt again.
        sequence = entry.sequence
        return sequence.sequence_id in self._seat_of and sequence.num_cached > 0 and sequence.num_pending == 1

    def _reader(self, batch: Batch, order: list[Entry], parts: list[torch.Tensor]) -> Callable[[], NDArray[np.int32]]:
        """Start copying the drawn codes to the host. parts: int32 [n, Q], together one row for each of `order`."""
        if not parts:
            return lambda: np.zeros((0, self._model.spec.rule.num_codebooks), dtype=np.int32)
        place = {entry.sequence.sequence_id: i for i, entry in enumerate(order)}
        places = [place[entry.sequence.sequence_id] for entry in batch.drawing]
        codes = torch.cat(parts)
        host = torch.empty(codes.shape, dtype=codes.dtype, pin_memory=self._is_cuda)
        host.copy_(codes, non_blocking=True)
        event: Any = torch.cuda.Event() if self._is_cuda else None  # type: ignore[no-untyped-call]
        if event is not None:
            event.record()

        def read() -> NDArray[np.int32]:
            if event is not None:
                event.synchronize()
            codes: NDArray[np.int32] = host.numpy()[places]
            return codes

        return read

    def _replay(self, entries: Items[Entry]) -> torch.Tensor:
        """Run the step of sequences that are all seated. Returns the drawn codes, int32 [len(entries), Q]."""
        count = len(entries)
        num_branches = max(entry.sequence.num_branches for entry in entries)
        bucket = min(size for size, num in self.lanes if size >= count and num == num_branches)
        lanes = self.lanes[bucket, num_branches]
        seats = np.full(bucket, self.seats.nobody, dtype=np.int64)
        for i, entry in enumerate(entries):
            seats[i] = self._touch(entry.sequence)
        tables = self._tables[seats, :num_branches].swapaxes(0, 1).reshape(num_branches * bucket, self._max_blocks)
        self._upload(seats, lanes.seats)
        self._upload(tables, lanes.tables)
        if lanes.cross_tables is not None:
            self._upload(self._cross_tables[seats], lanes.cross_tables)
        if lanes.states is not None:
            self._upload(self._state_slots(entries, num_branches, bucket), lanes.states)
        lanes.replay()
        return lanes.drawn[:count]

    def _state_slots(self, entries: Items[Entry], num_branches: int, bucket: int) -> NDArray[np.int64]:
        """Where the recurrent states lie, branch 0 first; -1 for nobody. int64 [branches * bucket]."""
        slots = np.full((num_branches, bucket), -1, dtype=np.int64)
        if self._runner.states is not None:
            for i, entry in enumerate(entries):
                for branch in range(entry.sequence.num_branches):
                    slots[branch, i] = self._runner.states.slot(entry.sequence.sequence_id, branch)
        return slots.reshape(-1)

    def _draw_first(self, drawing: Items[Entry], logits: torch.Tensor, *, busy: set[int]) -> torch.Tensor:
        """Seat sequences whose prompt has just run, and draw their first rows. logits: as `Runner.compute` gives."""
        busy = busy | {entry.sequence.sequence_id for entry in drawing}
        seats, uncond_rows, next_uncond = [], [], len(drawing)
        for entry in drawing:
            sequence = entry.sequence
            self._leave(sequence.sequence_id)
            seat = self._free_seat(busy)
            self._seat_of[sequence.sequence_id] = seat
            self._num_known[seat] = 0
            self._cross_tables[seat, : len(sequence.cross_blocks)] = sequence.cross_blocks
            self.seats.take(seat, sequence, self._runner.side(sequence))
            seats.append(seat)
            is_guided = sequence.num_branches > 1
            uncond_rows.append(next_uncond if is_guided else -1)
            next_uncond += is_guided
        device = self._model.device
        return self._draw(torch.tensor(seats, device=device), logits, torch.tensor(uncond_rows, device=device))

    def _touch(self, sequence: Sequence) -> int:
        """The seat of a sequence, its block tables up to date."""
        seat = self._seat_of.pop(sequence.sequence_id)
        self._seat_of[sequence.sequence_id] = seat
        for branch, table in enumerate(sequence.block_tables):
            known = self._num_known[seat, branch]
            if known < len(table):
                self._tables[seat, branch, known : len(table)] = table[known:]
                self._num_known[seat, branch] = len(table)
        return seat

    def _free_seat(self, busy: set[int]) -> int:
        if not self._free:
            self._leave(next(key for key in self._seat_of if key not in busy and key not in self._held))
        return self._free.pop()

    def _leave(self, sequence_id: int) -> None:
        seat = self._seat_of.pop(sequence_id, None)
        if seat is not None:
            self._free.append(seat)

    def _make_lanes(self, bucket: int, num_branches: int) -> _Lanes:
        device = self._model.device
        seats = torch.full((bucket,), self.seats.nobody, device=device)
        tables = torch.zeros(num_branches * bucket, self._max_blocks, dtype=torch.int32, device=device)
        cross = None
        if self._max_cross_blocks:
            cross = torch.zeros(bucket, self._max_cross_blocks, dtype=torch.int32, device=device)
        states = None
        if self._runner.states is not None:
            states = torch.full((num_branches * bucket,), -1, device=device)
        drawn = torch.zeros(bucket, self._model.spec.rule.num_codebooks, dtype=torch.int32, device=device)

        def step() -> None:
            drawn.copy_(self._step(seats, tables, cross, states))

        if not self._is_cuda:
            return _Lanes(seats, tables, cross, states, drawn, step)
        # The first run compiles kernels and allocates what they keep; both are forbidden while capturing.
        stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            step()
        return _Lanes(seats, tables, cross, states, drawn, graph.replay)

    def _step(
        self,
        seats: torch.Tensor,
        tables: torch.Tensor,
        cross_tables: torch.Tensor | None,
        state_slots: torch.Tensor | None,
    ) -> torch.Tensor:
        """Embedding, layers, logits, draw, frame rule: tensors in, tensors out, nothing the host must know."""
        count, num_branches = len(seats), len(tables) // len(seats)
        state, model = self.seats, self._model
        numbers = state.numbers[seats]
        row = numbers[:, _ROW]
        position = numbers[:, _PREFIX_LEN] + row
        x = model.embed(state.last[seats])
        if state.side is not None:
            x = x + state.side[seats, row]
        # Branch 1 is there for every sequence; one without guidance reads and writes nothing in it.
        is_real = seats != state.nobody
        is_there = torch.cat([is_real, is_real & (numbers[:, _IS_GUIDED] > 0)][:num_branches])
        positions = position.repeat(num_branches)
        blocks = tables.gather(1, (positions // self.block_size)[:, None])[:, 0].long()
        slots = torch.where(is_there, blocks * self.block_size + positions % self.block_size, -1)
        cross = None
        if cross_tables is not None:
            cross_lens = torch.where(is_real, numbers[:, _CROSS_LEN], 0)
            cross = self._plan(cross_tables, cross_lens, causal=False)
        plan = None
        if state_slots is not None:
            plan = StatePlan(
                query_start=torch.arange(len(tables) + 1, dtype=torch.int32, device=seats.device),
                slots=state_slots,
                is_new=torch.zeros_like(is_there),
                num_blocked=torch.zeros(len(tables), dtype=torch.int32, device=seats.device),
                has_new=False,
                has_blocks=False,
            )
        context = StepContext(
            positions=positions,
            slots=slots,
            attention=self._plan(tables, torch.where(is_there, positions + 1, 0), causal=True),
            caches=self._runner.caches,
            cross=cross,
            cross_caches=self._runner.cross_caches,
            num_conditional=count,
            last=torch.arange(num_branches * count, device=seats.device),
            state=plan,
            states=() if self._runner.states is None else self._runner.states.layers,
        )
        logits = model.logits(model.forward(x.repeat(num_branches, 1), context))
        lanes = torch.arange(count, device=seats.device)
        has_uncond = is_there[count:] if num_branches > 1 else torch.zeros_like(is_real)
        return self._draw(seats, logits, torch.where(has_uncond, lanes + count, -1))

    def _plan(self, tables: torch.Tensor, context_lens: torch.Tensor, *, causal: bool) -> AttentionPlan:
        return AttentionPlan(
            block_tables=tables,
            query_start=torch.arange(len(tables) + 1, dtype=torch.int32, device=tables.device),
            context_lens=context_lens.to(torch.int32),
            causal=causal,
            max_query_len=1,
            max_context_len=tables.shape[1] * self.block_size,
            cpu=None,
        )

    def _draw(self, seats: torch.Tensor, logits: torch.Tensor, uncond_rows: torch.Tensor) -> torch.Tensor:
        """Draw the next row of each sequence and move its seat on. Returns int32 [B, Q]."""
        state, rule = self.seats, self._model.spec.rule
        is_real = seats != state.nobody
        rows = state.numbers[seats, _ROW] + 1
        first_row = state.numbers[seats, _FIRST_FORCED]
        history = state.history[seats]
        if self._skips_first:
            history = torch.where((rows == first_row)[:, None, None], -1, history)
        if rule.min_frames:
            ends = logits[: len(seats), rule.eos_codebook, rule.eos]
            ends.copy_(torch.where(rows < first_row + rule.min_frames, NEVER_DRAWN, ends))
        drawn = guided_sample(
            logits,
            state.params_of(seats),
            rows=torch.where(is_real, rows, -1),
            uncond_rows=uncond_rows,
            history=history,
            ops=self._ops,
        )
        state.advance(seats, drawn, eos=rule.eos, eos_codebook=rule.eos_codebook)
        return drawn

    def _upload(self, values: NDArray[np.generic], target: torch.Tensor) -> None:
        source = torch.from_numpy(np.ascontiguousarray(values))
        target.copy_(source.pin_memory() if self._is_cuda else source, non_blocking=True)
