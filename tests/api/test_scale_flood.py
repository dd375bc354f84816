"""A flood beside a quiet tenant, in virtual time: the real scheduler, cuts and vocoder queue on a machine of numbers.

A step takes `STEP_S` and `SEQUENCE_S` for each of its sequences, a window `WINDOW_S` and `FRAME_S` for each of its
frames, by one worker: about what the embedded voice takes on two CPU cores. So the figures are the same on any machine.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pytest

from declaim.engine.blocks import BlockPool
from declaim.engine.chunks import ChunkPlanner, ChunkPolicy
from declaim.engine.request import ResolvedSampling
from declaim.engine.scheduler import Scheduler, SchedulerLimits
from declaim.engine.sequence import Playback, Prompt, Sequence, SequenceInput
from declaim.engine.spec import CodecSpec, FrameRule
from declaim.engine.vocoder.base import Window
from declaim.engine.vocoder.queue import WindowQueue

STEP_S, SEQUENCE_S = 0.010, 0.0007
WINDOW_S, FRAME_S = 0.004, 0.0004
RULE = FrameRule(delay=tuple(range(8)), fill=1024, eos=None, drain=tuple((1025,) * 8 for _ in range(7)))
CODEC = CodecSpec(24_000, 960, left=10, right=4, num_codebooks=8, codebook_size=1024)
POLICY = ChunkPolicy.from_seconds(CODEC, first_s=0.16, max_s=1.28)
SAMPLING = ResolvedSampling(1.0, 0, 1.0, 0.0, 1.0, 1.0, 0, 600.0)


@dataclass(eq=False)
class Request:
    """One text of so many frames, and when its audio came."""

    sequence: Sequence
    asked_at: float
    planner: ChunkPlanner
    played: Playback
    num_undecoded: int = 0
    heard_at: list[float] = field(default_factory=list)

    @property
    def is_done(self) -> bool:
        return self.planner.is_finished and not self.num_undecoded


class Machine:
    """The engine's loop with a clock that only its own work moves."""

    def __init__(self, *, hurries: bool = True, frame_s: float = FRAME_S) -> None:
        limits = SchedulerLimits(32, max_batch=32, max_step_positions=256, max_lead_s=8.0, hurries=hurries)
        self._scheduler = Scheduler(RULE, BlockPool(4096), BlockPool(16), limits=limits)
        self.now = 0.0
        self._frame_s = frame_s
        self.drawn: Counter[str] = Counter()  # frames, by tenant
        self.heard: Counter[str] = Counter()
        self._open: dict[int, Request] = {}
        self._queue: WindowQueue[Window] = WindowQueue(window_of=lambda window: window)
        self._decoding: Window | None = None
        self._decoded_at = 0.0
        self._next_id = 0

    def ask(self, tenant: str, *, num_frames: int = 80, weight: float = 1.0) -> Request:
        playback = Playback(paced=True)
        prompt = Prompt((), 0, 0, np.zeros((0, 8), np.int32), num_frames, 1, 1.0)
        given = SequenceInput(self._next_id, f"r{self._next_id}", 0, SAMPLING, prompt, self.now, tenant, weight)
        sequence = Sequence(given, RULE, playback)
        sequence.set_num_frames(num_frames)
        request = Request(sequence, self.now, ChunkPlanner(POLICY, CODEC), playback)
        self._open[self._next_id] = request
        self._next_id += 1
        self._scheduler.add(sequence)
        return request

    def run(self) -> list[Request]:
        """One step, and what the vocoder made of windows meanwhile. Returns the requests that ended."""
        batch = self._scheduler.schedule(self.now)
        if batch.entries:
            self.now += STEP_S + SEQUENCE_S * len(batch.entries)
            self._scheduler.launch(batch)
            self._scheduler.commit(batch, np.zeros((len(batch.drawing), 8), np.int32))
        else:
            self.now = max(self.now, self._decoded_at)
        for entry in batch.entries:
            self.drawn[entry.sequence.given.tenant] += 1
            self._submit(self._open[entry.sequence.sequence_id])
        return list(self._decode())

    def _submit(self, request: Request) -> None:
        sequence = request.sequence
        for cut in request.planner.ready(sequence.num_ready_frames, is_done=sequence.is_done):
            request.num_undecoded += 1
            context = np.zeros((8, cut.context_last - cut.context_first), np.int16)
            given = sequence.given
            window = Window(
                given.sequence_id, cut.index, context, 0, cut.last - cut.first, tenant=given.tenant, weight=given.weight
            )
            self._queue.push(window)

    def _decode(self) -> Iterator[Request]:
        while True:
            if self._decoding is not None:
                if self._decoded_at > self.now:
                    return
                window, self._decoding = self._decoding, None
                request = self._open[window.sequence_id]
                request.num_undecoded -= 1
                request.heard_at.append(self._decoded_at)
                if request.played.first_audio_at is None:
                    request.played.first_audio_at = self._decoded_at
                self.heard[window.tenant] += window.num_frames
                request.played.delivered_s += window.num_frames / CODEC.frame_rate_hz
                if request.is_done:
                    del self._open[window.sequence_id]
                    yield request
            if not len(self._queue):
                return
            self._decoding = self._queue.pop()
            begin = max(self._decoded_at, self.now - STEP_S)
            self._decoded_at = begin + WINDOW_S + self._frame_s * self._decoding.codes.shape[1]


def first_audio_s(machine: Machine, *, num_asks: int, flood: int) -> list[float]:
    """Of a tenant that asks for one text after the other, while another has so many in the machine at all times."""
    for i in range(flood):
        machine.ask("loud", num_frames=60 + i % 50)
    for _ in range(300 if flood else 0):
        for ended in machine.run():
            machine.ask(ended.sequence.given.tenant)
    times = []
    for _ in range(num_asks):
        quiet = machine.ask("quiet")
        while not quiet.is_done:
            for ended in machine.run():
                if ended is not quiet:
                    machine.ask("loud")
        times.append(quiet.heard_at[0] - quiet.asked_at)
        assert quiet.heard_at[-1] - quiet.asked_at < 5.0, "the rest of its audio waits behind the flood's"
    return times


def test_a_flood_of_200_delays_a_quiet_tenants_first_audio_by_less_than_half() -> None:
    alone = statistics.median(first_audio_s(Machine(), num_asks=8, flood=0))
    beside = statistics.median(first_audio_s(Machine(), num_asks=8, flood=200))
    assert beside < 1.5 * alone
    assert statistics.median(first_audio_s(Machine(hurries=False), num_asks=8, flood=200)) > 1.5 * alone


@pytest.mark.parametrize("frame_s", [FRAME_S / 2, 2 * FRAME_S], ids=["the steps are slow", "the vocoder is slow"])
@pytest.mark.parametrize(("weight", "num_frames"), [(2.0, 80), (2.0, 300), (5.0, 80)])
def test_two_floods_hear_by_their_weights(weight: float, num_frames: int, frame_s: float) -> None:
    machine = Machine(frame_s=frame_s)
    weights = {"heavy": weight, "light": 1.0}
    for tenant in weights:
        for _ in range(60):
            machine.ask(tenant, num_frames=num_frames, weight=weights[tenant])
    for step in range(3000):
        if step == 1000:
            machine.heard.clear()
        for ended in machine.run():
            tenant = ended.sequence.given.tenant
            machine.ask(tenant, num_frames=num_frames, weight=weights[tenant])
    assert machine.heard["heavy"] / machine.heard["light"] == pytest.approx(weight, rel=0.1)


def test_newcomers_without_end_pause_the_crowd_no_more_than_every_other_step() -> None:
    machine = Machine()
    for _ in range(100):
        machine.ask("loud", num_frames=4000)
    num_steps = 2000
    for step in range(num_steps):
        if step % 8 == 0:
            machine.ask("quiet", num_frames=12)
        machine.run()
    assert machine.drawn["loud"] > 0.5 * num_steps * 16
