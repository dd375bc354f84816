"""What would a server do under that load? The real scheduler against a simulated machine, faster than time passes.

Modelled, by the engine's own code: the order and the fair shares (scheduler.py, fairness.py), blocks and preemption
(blocks.py), the frame rule and what it delays (frames.py, sequence.py), which frames are decoded together (chunks.py),
and the refusal of what exceeds max_waiting.
Modelled, by a formula fitted to measurements: how long a step takes, `a + b positions + c sequences`, and a window,
`a + b frames`, context included; windows wait for one of --vocoder-workers, or are decoded between steps ("inline").
Drawn at random: arrivals (gamma; cv 1 is Poisson) and how long each text is spoken (log-normal, --median-s, --sigma).
Not modelled: network, encoding and HTTP; what the engine does beside its steps, such as the text side of a request;
longer attention over longer sequences; noise in the step's time; codes read one step late on a GPU; clients that stop.

So a result is a PREDICTION for a machine like the one that was fitted, never a measurement: it compares policies, finds
where a limit lies, and says how many machines to try. --speedup N supposes a machine N times as fast; nothing was
measured on such a machine. Fit your own with --fit, on the machine in question, and give the file to --steps.

    python benchmarks/simulate.py --fit FILE          measure this machine's steps and windows with the embedded voice
    python benchmarks/simulate.py --policies          first-come, deadline and fair, with one tenant that floods
    python benchmarks/simulate.py --plan 1000         how many machines for 1000 streams at the SLO
    python benchmarks/simulate.py --sweep             one configuration from idle to saturation against two fixed ones
    python benchmarks/simulate.py --cost [--base REF] the scheduler's own cost a step: this one IS measured, here
Common: [--steps FILE] [--requests N] [--speedup X] [--vocoder-workers N] [--quick] [--threads N]

Chunks and batches. Nothing has to be tuned for the load. Few streams leave the machine idle, so each step is short and
the small first window is there at once; many streams lengthen the steps, and whoever is far ahead gives up its place
until its lead has shrunk, so the batch holds who needs it. Windows double in length with the frame's index, which is
what a stream's lead does while the machine keeps up; so windows are small while there is no lead and large, with little
context decoded twice, once there is. They could follow the true lead and the load instead ("by lead" in --sweep). Then
a window's length would depend on the neighbours, and with it the bits of the samples wherever the codec's arithmetic
depends on the length of its input: the same request would no longer give the same audio, a replay after a worker's
death would not match, and a cached result would differ from a fresh one. Nor is anything gained, by --sweep: under
load leads are short, so windows by lead are small just where time is short, and most of what is decoded is context.
"""

from __future__ import annotations

import argparse
import heapq
import json
import math
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter, defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import machine
import numpy as np
import torch
from numpy.typing import NDArray

from declaim.engine.blocks import BlockPool
from declaim.engine.chunks import ChunkPlanner, ChunkPolicy, Cut
from declaim.engine.request import ResolvedSampling
from declaim.engine.scheduler import Scheduler, SchedulerLimits
from declaim.engine.sequence import Playback, Prompt, SequenceInput
from declaim.engine.sequence import Sequence as EngineSequence
from declaim.engine.spec import CodecSpec, FrameRule

STEPS = Path(__file__).resolve().parent / "simulate_steps.json"
SAMPLING = ResolvedSampling(1.0, 0, 1.0, 0.0, 1.0, 1.0, 0, 600.0)
UNDERRUN_S = 0.001  # a gap shorter than this is not heard


# The machine.


@dataclass(frozen=True, slots=True)
class Machine:
    """A model on a machine: its tables, and times fitted to what was measured there.

    step_ms: a, b, c of `a + b positions + c sequences`. window_ms: a, b of `a + b frames`. speedup: divides both.
    """

    name: str
    rule: FrameRule
    codec: CodecSpec
    num_branches: int
    prefix_len: int
    step_ms: tuple[float, float, float]
    window_ms: tuple[float, float]
    speedup: float = 1.0

    @classmethod
    def load(cls, path: Path, *, speedup: float) -> Machine:
        measured = json.loads(path.read_text())
        steps, windows = np.array(measured["steps"]), np.array(measured["windows"])
        rule = measured["rule"]
        return cls(
            name=measured["name"],
            rule=FrameRule(
                tuple(rule["delay"]), rule["fill"], None, tuple(tuple(row) for row in rule["drain"]), eos_codebook=0
            ),
            codec=CodecSpec(**measured["codec"]),
            num_branches=measured["num_branches"],
            prefix_len=measured["prefix_len"],
            step_ms=tuple(fit_line(steps[:, :-1], steps[:, -1])),
            window_ms=tuple(fit_line(windows[:, :-1], windows[:, -1])),
            speedup=speedup,
        )

    def step_s(self, num_positions: int, num_sequences: int) -> float:
        a, b, c = self.step_ms
        return (a + b * num_positions + c * num_sequences) / 1e3 / self.speedup

    def window_s(self, num_frames: int) -> float:
        a, b = self.window_ms
        return (a + b * num_frames) / 1e3 / self.speedup


def fit_line(x: NDArray[np.float64], y: NDArray[np.float64]) -> list[float]:
    """Least squares of relative errors with no negative coefficient. x: [n, k]. Returns the constant, then k slopes."""
    columns = np.column_stack([np.ones(len(x)), x])
    kept = list(range(columns.shape[1]))
    while True:
        solution = np.linalg.lstsq(columns[:, kept] / y[:, None], np.ones(len(y)), rcond=None)[0]
        if (solution >= 0).all():
            break
        del kept[int(np.argmin(solution))]
    coefficients = np.zeros(columns.shape[1])
    coefficients[kept] = solution
    return [float(value) for value in coefficients]


# The load.


@dataclass(frozen=True, slots=True)
class Tenant:
    """share: of the arrivals."""

    name: str
    share: float = 1.0
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Load:
    """rate_hz: arrivals a second of all tenants. cv: of the time between them; 1 is Poisson, more comes in bursts."""

    num_requests: int
    rate_hz: float
    cv: float = 1.0
    median_s: float = 3.0
    sigma: float = 0.6
    tenants: tuple[Tenant, ...] = (Tenant(""),)
    seed: int = 0

    @property
    def mean_s(self) -> float:
        """Of the audio of a request, before it is cut to 0.5 .. 30 s."""
        return self.median_s * math.exp(self.sigma**2 / 2)

    def draw(self) -> list[Arrival]:
        random = np.random.default_rng(self.seed)
        shape = 1 / self.cv**2
        times = np.cumsum(random.gamma(shape, 1 / (shape * self.rate_hz), self.num_requests))
        audio_s = np.clip(self.median_s * np.exp(self.sigma * random.standard_normal(self.num_requests)), 0.5, 30)
        shares = np.array([tenant.share for tenant in self.tenants])
        owners = random.choice(len(self.tenants), self.num_requests, p=shares / shares.sum())
        return [
            Arrival(at, seconds, self.tenants[owner])
            for at, seconds, owner in zip(times.tolist(), audio_s.tolist(), owners.tolist(), strict=True)
        ]


@dataclass(frozen=True, slots=True)
class Arrival:
    at: float
    audio_s: float
    tenant: Tenant


# The server.


@dataclass(frozen=True, slots=True)
class Setup:
    """How the server is set up; the names are those of EngineConfig. policy: see `POLICIES`. vocoder_workers: 0 decodes
    between steps. chunks: "by index" is chunks.py; "by lead" exists here alone."""

    policy: str = "fair"
    max_batch: int = 32
    max_waiting: int = 256
    max_step_positions: int = 256
    block_size: int = 32
    num_blocks: int = 4096
    max_lead_s: float = 8.0
    first_chunk_s: float = 0.16
    max_chunk_s: float = 1.28
    vocoder_workers: int = 1
    chunks: str = "by index"


class FirstComeScheduler(Scheduler):
    """Everybody in one line, in the order of arrival: what a server does that knows neither playback nor tenants."""

    def _standing(self, sequence: EngineSequence, now: float) -> tuple[int, tuple[int, float, int, int], float | None]:
        given = sequence.given
        return 0, (0, given.arrived_at, given.segment, given.sequence_id), None


POLICIES: Mapping[str, type[Scheduler]] = {
    "first-come": FirstComeScheduler,
    "deadline": Scheduler,  # all tenants are one
    "fair": Scheduler,
}


class LeadPlanner(ChunkPlanner):
    """Windows of half the lead that the stream has: what chunks.py would do without its law."""

    def __init__(self, policy: ChunkPolicy, codec: CodecSpec, playback: Playback) -> None:
        super().__init__(_ByLead(policy.first_frames, policy.max_frames), codec)
        self._playback = playback

    def ready_at(self, now: float, num_ready: int, *, is_done: bool) -> list[Cut]:
        wanted = round(max(0.0, self._playback.lead_s(now)) / 2 * self._codec.frame_rate_hz)
        policy = self._policy
        self._policy = _ByLead(policy.first_frames, policy.max_frames, wanted)
        return self.ready(num_ready, is_done=is_done)


@dataclass(frozen=True, slots=True)
class _ByLead(ChunkPolicy):
    wanted: int = 0

    def length(self, index: int) -> int:
        return min(max(self.first_frames, self.wanted), self.max_frames)


@dataclass(slots=True, eq=False)
class Stream:
    """A request in the simulated server; its windows are delivered in order, as engine/stream.py does."""

    arrival: Arrival
    sequence: EngineSequence
    planner: ChunkPlanner
    num_cuts: int = 0
    decoded: dict[int, Cut] = field(default_factory=dict)
    num_delivered: int = 0
    dry_at: float = math.inf  # when the listener, who waits out every gap, has heard all that was delivered
    longest_gap_s: float = 0.0


@dataclass(slots=True)
class Outcome:
    """What happened to a load. first_audio_s, gap_s: by request that was served, after arrival, and its longest gap."""

    tenants: list[str] = field(default_factory=list)
    first_audio_s: list[float] = field(default_factory=list)
    gap_s: list[float] = field(default_factory=list)
    audio_s: list[float] = field(default_factory=list)
    ended_at: list[float] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)
    num_steps: int = 0
    num_preemptions: int = 0
    busy_s: float = 0.0
    ends_at: float = 0.0
    wall_s: float = 0.0

    def summary(self, tenant: str | None = None, *, until: float = math.inf) -> dict[str, float]:
        """Of one tenant, or of all; `until`: of what ended before."""
        chosen = [
            i for i, name in enumerate(self.tenants) if (tenant is None or name == tenant) and self.ended_at[i] <= until
        ]
        first = np.array([self.first_audio_s[i] for i in chosen]) * 1e3
        gaps = np.array([self.gap_s[i] for i in chosen])
        refused = self.refused.total() if tenant is None else self.refused[tenant]
        nothing = not chosen
        return {
            "requests": len(chosen),
            "refused_percent": 100 * refused / max(1, len(chosen) + refused),
            "first_audio_p50_ms": math.inf if nothing else float(np.percentile(first, 50)),
            "first_audio_p95_ms": math.inf if nothing else float(np.percentile(first, 95)),
            "underrun_percent": 100.0 if nothing else float(100 * np.mean(gaps > UNDERRUN_S)),
            "audio_s_per_s": sum(self.audio_s[i] for i in chosen) / max(1e-9, min(until, self.ends_at)),
        }


class Server:
    """A discrete-event simulation: its clock jumps from step to step, or to the next event where nobody can run."""

    def __init__(self, made_of: Machine, setup: Setup) -> None:
        self._machine, self._setup = made_of, setup
        self._scheduler = POLICIES[setup.policy](
            made_of.rule,
            BlockPool(setup.num_blocks),
            BlockPool(0),
            limits=SchedulerLimits(setup.block_size, setup.max_batch, setup.max_step_positions, setup.max_lead_s),
        )
        self._chunks = ChunkPolicy.from_seconds(made_of.codec, first_s=setup.first_chunk_s, max_s=setup.max_chunk_s)
        self._streams: dict[int, Stream] = {}
        self._drawn = np.zeros((setup.max_batch, made_of.rule.num_codebooks), dtype=np.int32)
        self._no_frames = np.zeros((0, made_of.rule.num_codebooks), dtype=np.int32)
        self._workers_free_at = [0.0] * setup.vocoder_workers  # a heap
        self._inline: tuple[deque[tuple[int, Cut]], deque[tuple[int, Cut]]] = (deque(), deque())  # first, the rest
        self._done: list[tuple[float, int, int, Cut]] = []  # a heap of decoded windows: when, stream, index
        self._outcome = Outcome()

    def serve(self, arrivals: Sequence[Arrival]) -> Outcome:
        """Serve all of them."""
        begin = time.perf_counter()
        now, num_taken = 0.0, 0
        while num_taken < len(arrivals) or self._streams:
            while num_taken < len(arrivals) and arrivals[num_taken].at <= now:
                self._take(arrivals[num_taken], num_taken)
                num_taken += 1
            self._deliver(now)
            batch = self._scheduler.schedule(now)
            if batch.entries:
                num_positions = sum(entry.num_positions * entry.sequence.num_branches for entry in batch.entries)
                step_s = self._machine.step_s(num_positions, len(batch.entries))
                for entry in batch.entries:
                    if not entry.sequence.num_cached:
                        self._begin(entry.sequence)
                self._scheduler.launch(batch)
                now += step_s
                self._outcome.busy_s += step_s
                self._outcome.num_steps += 1
                drawing = batch.drawing
                self._scheduler.commit(batch, self._drawn[: len(drawing)])
                for entry in drawing:
                    self._cut(entry.sequence, now)
            now = self._decode_inline(now)
            if not batch.entries and not (self._inline[0] or self._inline[1]):
                events = [arrivals[num_taken].at] if num_taken < len(arrivals) else []
                events += [self._done[0][0]] if self._done else []
                if not events and self._streams:
                    raise RuntimeError(f"{len(self._streams)} streams are left at {now:.3f} s, and nothing can happen")
                now = max(now, min(events, default=now))
        self._scheduler.check_integrity()
        outcome = self._outcome
        outcome.num_preemptions = self._scheduler.num_preemptions
        outcome.ends_at, outcome.wall_s = now, time.perf_counter() - begin
        return outcome

    def _take(self, arrival: Arrival, number: int) -> None:
        """Queue a request, or refuse it as engine.py does."""
        made_of, setup = self._machine, self._setup
        if len(self._streams) >= setup.max_batch + setup.max_waiting:
            self._outcome.refused[arrival.tenant.name] += 1
            return
        num_frames = max(1, round(arrival.audio_s * made_of.codec.frame_rate_hz))
        is_shared = setup.policy == "fair"
        sequence = EngineSequence(
            SequenceInput(
                sequence_id=number,
                request_id=str(number),
                segment=0,
                sampling=SAMPLING,
                prompt=Prompt(
                    text_ids=(),
                    prefix_len=made_of.prefix_len,
                    cross_len=0,
                    prompt_frames=self._no_frames,
                    max_frames=num_frames,
                    num_branches=made_of.num_branches,
                    speed=1.0,
                ),
                arrived_at=arrival.at,
                tenant=arrival.tenant.name if is_shared else "",
                weight=arrival.tenant.weight if is_shared else 1.0,
            ),
            made_of.rule,
            Playback(paced=True),
        )
        self._scheduler.check_fits(sequence)
        self._scheduler.add(sequence)
        codec = made_of.codec
        planner = (
            ChunkPlanner(self._chunks, codec)
            if setup.chunks == "by index"
            else LeadPlanner(self._chunks, codec, sequence.playback)
        )
        self._streams[number] = Stream(arrival, sequence, planner)

    def _begin(self, sequence: EngineSequence) -> None:
        """The length is known, as the embedded voice knows it: there is no model here to draw an end."""
        if sequence.end_row is None:
            sequence.set_num_frames(sequence.prompt.max_frames)

    def _cut(self, sequence: EngineSequence, now: float) -> None:
        stream = self._streams[sequence.sequence_id]
        planner, num_ready = stream.planner, sequence.num_ready_frames
        if isinstance(planner, LeadPlanner):
            cuts = planner.ready_at(now, num_ready, is_done=sequence.is_done)
        else:
            cuts = planner.ready(num_ready, is_done=sequence.is_done)
        for cut in cuts:
            stream.num_cuts += 1
            if not self._workers_free_at:
                self._inline[min(cut.index, 1)].append((sequence.sequence_id, cut))
                continue
            starts_at = max(now, heapq.heappop(self._workers_free_at))
            ends_at = starts_at + self._machine.window_s(cut.context_last - cut.context_first)
            heapq.heappush(self._workers_free_at, ends_at)
            heapq.heappush(self._done, (ends_at, sequence.sequence_id, cut.index, cut))

    def _decode_inline(self, now: float) -> float:
        """Decode at most four windows between two steps, first ones first, as vocoder/inline.py does."""
        first, rest = self._inline
        for _ in range(min(4, len(first) + len(rest))):
            number, cut = (first or rest).popleft()
            now += self._machine.window_s(cut.context_last - cut.context_first)
            heapq.heappush(self._done, (now, number, cut.index, cut))
        return now

    def _deliver(self, now: float) -> None:
        """Hand over what has been decoded, each window at its own time."""
        while self._done and self._done[0][0] <= now:
            at, number, index, cut = heapq.heappop(self._done)
            stream = self._streams[number]
            stream.decoded[index] = cut
            while stream.num_delivered in stream.decoded:
                self._hear(stream, stream.decoded.pop(stream.num_delivered), at)

    def _hear(self, stream: Stream, cut: Cut, at: float) -> None:
        playback, outcome = stream.sequence.playback, self._outcome
        stream.num_delivered += 1
        if playback.first_audio_at is None:
            playback.first_audio_at = stream.dry_at = at
        stream.longest_gap_s = max(stream.longest_gap_s, at - stream.dry_at)
        seconds = (cut.last - cut.first) / self._machine.codec.frame_rate_hz
        stream.dry_at = max(stream.dry_at, at) + seconds
        playback.delivered_s += seconds
        if not cut.is_last:
            return
        outcome.tenants.append(stream.arrival.tenant.name)
        outcome.first_audio_s.append(playback.first_audio_at - stream.arrival.at)
        outcome.gap_s.append(stream.longest_gap_s)
        outcome.audio_s.append(playback.delivered_s)
        outcome.ended_at.append(at)
        del self._streams[stream.sequence.sequence_id]


# The questions.


def capacity_hz(made_of: Machine, load: Load, setup: Setup) -> float:
    """Requests a second that full batches, prompts and windows not counted, would make: where to look for limits."""
    step_s = made_of.step_s(setup.max_batch * made_of.num_branches, setup.max_batch)
    frames_per_s = setup.max_batch / step_s
    return frames_per_s / made_of.codec.frame_rate_hz / load.mean_s


def compare_policies(made_of: Machine, load: Load, setup: Setup) -> list[dict[str, Any]]:
    """A crowd that sends nine tenths of the requests, 1.2 times what the machine can do, and a quiet tenant."""
    crowd = replace(
        load,
        rate_hz=1.2 * capacity_hz(made_of, load, setup),
        tenants=(Tenant("crowd", share=0.9), Tenant("quiet", share=0.1)),
    )
    rows: list[dict[str, Any]] = []
    for policy in POLICIES:
        outcome = Server(made_of, replace(setup, policy=policy)).serve(crowd.draw())
        last_arrival = crowd.num_requests / crowd.rate_hz
        for tenant in ("crowd", "quiet"):
            rows.append({"policy": policy, "tenant": tenant, **outcome.summary(tenant, until=last_arrival)})
        rows[-1]["preemptions"] = rows[-2]["preemptions"] = outcome.num_preemptions
    machine.print_table(
        f"PREDICTED: {crowd.rate_hz:.1f} requests/s, of which the crowd sends 90 %, by policy",
        ("policy, tenant", "served", "refused %", "first audio p50 ms", "p95 ms", "under-runs %", "audio s/s"),
        [(f"{row['policy']}, {row['tenant']}", *_numbers(row)) for row in rows],
    )
    return rows


def plan(made_of: Machine, load: Load, setup: Setup, slo: Slo, *, num_streams: int) -> dict[str, Any]:
    """How many machines hold the SLO for so many streams that play at once, evenly dispatched."""

    def holds(streams_per_machine: float) -> tuple[bool, dict[str, float]]:
        rate_hz = streams_per_machine / load.mean_s
        outcome = Server(made_of, setup).serve(replace(load, rate_hz=rate_hz).draw())
        summary = outcome.summary()
        return slo.holds(summary), summary

    low, high = 0.0, 2 * capacity_hz(made_of, load, setup) * load.mean_s
    tried: list[dict[str, Any]] = []
    for _ in range(8):
        middle = (low + high) / 2
        is_held, summary = holds(middle)
        tried.append({"streams": middle, "is_held": is_held, **summary})
        low, high = (middle, high) if is_held else (low, middle)
    tried.sort(key=lambda row: float(row["streams"]))
    machine.print_table(
        f"PREDICTED: streams on one machine; SLO: {slo}",
        ("streams, held", "served", "refused %", "first audio p50 ms", "p95 ms", "under-runs %", "audio s/s"),
        [(f"{row['streams']:.1f} {'yes' if row['is_held'] else 'no'}", *_numbers(row)) for row in tried],
    )
    num_machines = math.ceil(num_streams / low) if low else None
    machine.CONSOLE.print(
        f"PREDICTED: {low:.1f} streams a machine, so {num_machines or 'no number of'} machines for {num_streams}."
    )
    return {"streams_per_machine": low, "num_machines": num_machines, "num_streams": num_streams, "tried": tried}


@dataclass(frozen=True, slots=True)
class Slo:
    """first_audio_ms: at the 95th percentile. underrun_percent: of requests with any gap; none may be refused."""

    first_audio_ms: float
    underrun_percent: float

    def __str__(self) -> str:
        return f"p95 first audio <= {self.first_audio_ms:g} ms, under-runs <= {self.underrun_percent:g} %, none refused"

    def holds(self, summary: Mapping[str, float]) -> bool:
        return (
            summary["first_audio_p95_ms"] <= self.first_audio_ms
            and summary["underrun_percent"] <= self.underrun_percent
            and not summary["refused_percent"]
        )


def sweep(made_of: Machine, load: Load, setup: Setup, *, loads: Sequence[float]) -> list[dict[str, Any]]:
    """From idle to saturation with one configuration, with two that are fixed for one end, and with windows by lead."""
    setups = {
        "as served": setup,
        "fixed for idle": replace(setup, max_batch=max(1, setup.max_batch // 8), max_chunk_s=setup.first_chunk_s),
        "fixed for crowds": replace(setup, first_chunk_s=setup.max_chunk_s),
        "by lead": replace(setup, chunks="by lead"),
    }
    full_hz = capacity_hz(made_of, load, setup)
    rows: list[dict[str, Any]] = []
    for part in loads:
        for name, one in setups.items():
            at = replace(load, rate_hz=part * full_hz)
            outcome = Server(made_of, one).serve(at.draw())
            until = at.num_requests / at.rate_hz if part > 1 else math.inf
            rows.append({"load": part, "setup": name, **outcome.summary(until=until)})
    machine.print_table(
        f"PREDICTED: load as a part of {full_hz:.2f} requests/s, by configuration",
        ("load, configuration", "served", "refused %", "first audio p50 ms", "p95 ms", "under-runs %", "audio s/s"),
        [(f"{row['load']:g} {row['setup']}", *_numbers(row)) for row in rows],
    )
    return rows


def _numbers(row: Mapping[str, Any]) -> list[float]:
    names = ("requests", "refused_percent", "first_audio_p50_ms", "first_audio_p95_ms", "underrun_percent")
    return [row[name] for name in (*names, "audio_s_per_s")]


# The scheduler's own cost, measured.

CROWDS: Mapping[str, tuple[int, int, int]] = {  # sequences, places, tenants
    "64, all run": (64, 64, 1),
    "256, all run": (256, 256, 1),
    "512, 256 run": (512, 256, 1),
    "256 of 4 tenants, all run": (256, 256, 4),
    "512 of 4 tenants, 256 run": (512, 256, 4),
}


def measure_cost(*, num_steps: int) -> dict[str, dict[str, float]]:
    """Microseconds of schedule, launch and commit for a step of decoding sequences somebody listens to: the least of
    all steps, and the median."""
    codec_rule = FrameRule(delay=tuple(range(9)), fill=1025, eos=1024, drain=((-1,) * 9,))
    costs: dict[str, dict[str, float]] = {}
    for name, (num_sequences, num_places, num_tenants) in CROWDS.items():
        scheduler = Scheduler(
            codec_rule,
            BlockPool(100_000),
            BlockPool(0),
            limits=SchedulerLimits(32, num_places, 4 * num_places, max_lead_s=1e6),
        )
        for i in range(num_sequences):
            prompt = Prompt((), 0, 0, np.zeros((0, 9), np.int32), 100 + 3 * num_steps, 2, 1.0)
            tenant = i % num_tenants
            given = SequenceInput(i, str(i), 0, SAMPLING, prompt, float(i), tenant=str(tenant), weight=1.0 + tenant)
            playback = Playback(True, first_audio_at=0.0, delivered_s=10 + i / 100)
            scheduler.add(EngineSequence(given, codec_rule, playback))
        drawn = np.zeros((num_places, 9), dtype=np.int32)
        times = np.zeros((num_steps + 20, 3))
        for step in range(len(times)):
            clocks = [time.perf_counter()]
            batch = scheduler.schedule(step * 0.01)
            clocks.append(time.perf_counter())
            scheduler.launch(batch)
            clocks.append(time.perf_counter())
            scheduler.commit(batch, drawn)
            clocks.append(time.perf_counter())
            times[step] = np.diff(clocks)
        times = times[20:] * 1e6
        parts = dict(zip(("schedule_us", "launch_us", "commit_us"), times.min(0).tolist(), strict=True))
        costs[name] = {**parts, "step_us": float(times.sum(1).min()), "median_us": float(np.median(times.sum(1)))}
    return costs


def compare_cost(base: str | None, *, num_steps: int) -> dict[str, Any]:
    """Measure this checkout, and the commit `base` beside it in the same run, turn by turn."""
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        versions = {"now": ""}
        if base is not None:
            versions = {f"at {base}": _check_out(base, Path(folder)), **versions}
        for _ in range(2):
            for name, path in versions.items():
                costs = _measure_elsewhere(path, num_steps=num_steps)
                best = result.setdefault(name, costs)
                for crowd, cost in costs.items():
                    best[crowd] = min(best[crowd], cost, key=lambda one: float(one["step_us"]))
    machine.print_table(
        "MEASURED here: the scheduler's cost of a step, us, the least of all steps",
        ("sequences, version", "schedule", "launch", "commit", "together", "median"),
        [(f"{crowd}, {name}", *costs[crowd].values()) for crowd in CROWDS for name, costs in result.items()],
    )
    return result


def _check_out(ref: str, folder: Path) -> str:
    """Unpack a commit's packages, so that they can be imported as declaim.* from the folder that is returned."""
    command = ["git", "-C", str(machine.ROOT), "archive", ref, "engine", "kernels"]
    archive = subprocess.run(command, capture_output=True, check=True).stdout
    with tarfile.open(fileobj=BytesIO(archive)) as tar:
        tar.extractall(folder / "declaim", filter="data")
    return str(folder)


def _measure_elsewhere(path: str, *, num_steps: int) -> dict[str, dict[str, float]]:
    command = [sys.executable, __file__, "--cost-here", str(num_steps)]
    env = os.environ | ({"PYTHONPATH": path} if path else {})
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=True)
    costs: dict[str, dict[str, float]] = json.loads(done.stdout.splitlines()[-1])
    return costs


# The fit: the only part that runs a model.


def fit(path: Path, *, is_quick: bool) -> dict[str, Any]:
    """Time every step and window of the embedded voice while 1 to 32 requests run, and write them to a file."""
    from texts import SENTENCES

    from declaim.engine import Engine, EngineConfig, SamplingParams, SpeechRequest
    from declaim.engine.vocoder import inline

    steps: dict[tuple[int, int], list[float]] = defaultdict(list)
    windows: dict[int, list[float]] = defaultdict(list)
    with Engine.from_pretrained(config=EngineConfig(vocoder="inline")) as engine:
        engine.warm_up()
        runner, decode = engine._runner, inline.decode_window
        launch = runner.launch

        def timed_launch(batch: Any) -> Any:
            begin = time.perf_counter()
            step = launch(batch)
            step.drawn()
            num_positions = sum(entry.num_positions * entry.sequence.num_branches for entry in batch.entries)
            steps[num_positions, len(batch.entries)].append((time.perf_counter() - begin) * 1e3)
            return step

        def timed_decode(codec: Any, window: Any) -> Any:
            begin = time.perf_counter()
            samples = decode(codec, window)
            windows[window.codes.shape[1]].append((time.perf_counter() - begin) * 1e3)
            return samples

        runner.launch = timed_launch  # type: ignore[method-assign]
        inline.decode_window = timed_decode
        for count in (1, 2) if is_quick else (1, 2, 4, 8, 16, 32):
            requests = [
                SpeechRequest(SENTENCES[i % len(SENTENCES)], sampling=SamplingParams(seed=i)) for i in range(count)
            ]
            engine.generate(requests, progress=False)
        inline.decode_window = decode
        spec, name, config = engine.spec, engine.model_name, engine.config
    measured = {
        "name": name,
        "machine": machine.describe(),
        "command": f"python benchmarks/simulate.py --fit {path.name}",
        "device": config.device,
        "dtype": config.dtype,
        "rule": {"delay": spec.rule.delay, "fill": spec.rule.fill, "drain": spec.rule.drain},
        "codec": {name: getattr(spec.codec, name) for name in CodecSpec.__dataclass_fields__},
        "num_branches": 1,
        "prefix_len": 0,
        "steps": [[*key, round(statistics.median(times), 3)] for key, times in sorted(steps.items())],
        "windows": [[key, round(statistics.median(times), 3)] for key, times in sorted(windows.items())],
    }
    path.write_text(_compact(measured) + "\n")
    return {"num_steps": len(measured["steps"]), "num_windows": len(measured["windows"]), "file": str(path)}


def _compact(document: Mapping[str, Any]) -> str:
    """JSON with one line a key."""
    lines = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in document.items()]
    return "{\n" + ",\n".join(lines) + "\n}"


QUESTION = "What would the scheduler do under that load? Predicted from fitted step times, unless it says MEASURED"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fit", type=Path, metavar="FILE")
    parser.add_argument("--policies", action="store_true")
    parser.add_argument("--plan", type=int, metavar="STREAMS")
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--cost", action="store_true")
    parser.add_argument("--base", metavar="REF", help="with --cost: a commit to compare with, whose engine takes this")
    parser.add_argument("--cost-here", type=int, metavar="STEPS", help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=Path, default=STEPS)
    parser.add_argument("--speedup", type=float, default=1.0)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--cv", type=float, default=1.0)
    parser.add_argument("--median-s", type=float, default=3.0)
    parser.add_argument("--sigma", type=float, default=0.6)
    parser.add_argument("--max-batch", type=int, default=32)
    parser.add_argument("--max-waiting", type=int, default=256)
    parser.add_argument("--num-blocks", type=int, default=4096)
    parser.add_argument("--vocoder-workers", type=int, default=1)
    parser.add_argument("--slo-first-audio-ms", type=float, default=500.0)
    parser.add_argument("--slo-underrun-percent", type=float, default=1.0)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    if arguments.cost_here:
        print(json.dumps(measure_cost(num_steps=arguments.cost_here)))
        return
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    config = {key: str(value) if isinstance(value, Path) else value for key, value in vars(arguments).items()}
    document = machine.begin(QUESTION, config)
    result: dict[str, Any] = {}
    if arguments.fit:
        result["fit"] = fit(arguments.fit, is_quick=arguments.quick)
    everything = not (arguments.fit or arguments.policies or arguments.plan or arguments.sweep or arguments.cost)
    if everything or arguments.cost:
        result["cost"] = compare_cost(arguments.base, num_steps=40 if arguments.quick else 400)
    if everything or arguments.policies or arguments.plan or arguments.sweep:
        made_of = Machine.load(arguments.steps, speedup=arguments.speedup)
        machine.CONSOLE.print(
            f"{made_of.name}: a step takes {made_of.step_ms[0]:.2f} + {made_of.step_ms[1]:.3f} positions +"
            f" {made_of.step_ms[2]:.3f} sequences ms, a window {made_of.window_ms[0]:.2f} +"
            f" {made_of.window_ms[1]:.3f} frames ms; supposed to be {made_of.speedup:g} times as fast as measured",
            markup=False,
            soft_wrap=True,
        )
        load = Load(
            num_requests=min(arguments.requests, 150) if arguments.quick else arguments.requests,
            rate_hz=1.0,
            cv=arguments.cv,
            median_s=arguments.median_s,
            sigma=arguments.sigma,
        )
        setup = Setup(
            max_batch=arguments.max_batch,
            max_waiting=arguments.max_waiting,
            num_blocks=arguments.num_blocks,
            vocoder_workers=arguments.vocoder_workers,
        )
        slo = Slo(arguments.slo_first_audio_ms, arguments.slo_underrun_percent)
        result["machine"] = {"name": made_of.name, "step_ms": made_of.step_ms, "window_ms": made_of.window_ms}
        if everything or arguments.policies:
            result["policies"] = compare_policies(made_of, load, setup)
        if everything or arguments.plan:
            result["plan"] = plan(made_of, load, setup, slo, num_streams=arguments.plan or 1000)
        if everything or arguments.sweep:
            loads = (0.1, 1.3) if arguments.quick else (0.02, 0.3, 0.6, 0.8, 1.0, 1.3)
            result["sweep"] = sweep(made_of, load, setup, loads=loads)
    machine.end(document, result)


if __name__ == "__main__":
    main()
