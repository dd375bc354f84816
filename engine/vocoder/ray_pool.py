"""The vocoder as an elastic pool of Ray actors, on any core, GPU or node.

Owns a dispatch thread and the books: a window is queued or in one worker's call, and leaves them once, with samples or
with an error. A worker keeps nothing between calls, so what a dead one had in hand goes to another. Ray is another
process's (`ray_process.py`): this file says what it wants and hears what became of it, and waits for neither. Where Ray
or that process is lost, both are replaced, and until a worker of the new ones is ready a thread of this process decodes
in their place, on the CPU with the same samples.
"""

from __future__ import annotations

import atexit
import logging
import math
import pickle
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from declaim.engine.codec.base import CodecRecipe
from declaim.engine.codec.load import load_codec
from declaim.engine.errors import EngineClosed, EngineError, ModelLoadError, VocoderLost
from declaim.engine.vocoder.base import DecodedWindow, Wake, Window
from declaim.engine.vocoder.inline import decode_windows
from declaim.engine.vocoder.queue import WindowQueue
from declaim.engine.vocoder.ray_process import (
    HOW_TO_JOIN,
    Beat,
    Decode,
    Join,
    Joined,
    Kill,
    Lost,
    Message,
    Ping,
    RayProcess,
    Reply,
    Start,
)

_log = logging.getLogger(__name__)

# Two calls in flight: a worker starts on the second while the first one's samples travel.
_MAX_CALLS_PER_WORKER = 2
# A call gets as many windows as take about this long: well above a round trip (1-2 ms), and short enough that
# a first window, which cannot overtake calls in flight, waits little. On the CPU no window gains by company.
_CALL_TARGET_S = 0.05
_CPU_CALL_TARGET_S = 0.02
_MAX_LOST_WORKERS_PER_WINDOW = 3
_GROW_AFTER_S = 0.5
_TICK_S = 0.1
_BACK_OFF_S = (0.5, 10.0)  # first and longest
_CLOSE_TIMEOUT_S = 30.0
# How long a Ray may take to start, or a cluster to be joined, and how long the process that holds it may be silent
# then: it says something every second.
_START_RAY_TIMEOUT_S = 90.0
_JOIN_CLUSTER_TIMEOUT_S = 30.0
_SILENT_TIMEOUT_S = 20.0
_CRASHED = "the vocoder pool's thread crashed: see its traceback in the log, and build a new pool"


@dataclass(frozen=True, slots=True)
class RayPoolOptions:
    """How many workers, what each may use, and when one counts as lost.

    address: "host:port" of a Ray cluster's head, "auto" for the one this machine belongs to, None to start a
    local Ray for this pool alone.
    decode_timeout_s: for one call, at most `max_windows_per_call` windows.
    Raises: ValueError where a value makes no sense.
    """

    min_workers: int = 1
    max_workers: int = 2
    cpus_per_worker: float = 1.0
    gpus_per_worker: float = 0.0
    address: str | None = None
    max_windows_per_call: int = 8
    decode_timeout_s: float = 30.0
    health_interval_s: float = 2.0
    health_timeout_s: float = 10.0
    idle_timeout_s: float = 30.0
    start_timeout_s: float = 60.0

    def __post_init__(self) -> None:
        if not 1 <= self.min_workers <= self.max_workers:
            raise ValueError(
                f"min_workers is {self.min_workers} and max_workers {self.max_workers}; "
                "they must satisfy 1 <= min_workers <= max_workers"
            )
        if self.max_windows_per_call < 1:
            raise ValueError(f"max_windows_per_call is {self.max_windows_per_call}; it must be at least 1")
        if self.cpus_per_worker < 0 or self.gpus_per_worker < 0:
            raise ValueError(
                f"cpus_per_worker is {self.cpus_per_worker} and gpus_per_worker {self.gpus_per_worker}; "
                "neither can be negative"
            )
        seconds = {
            "decode_timeout_s": self.decode_timeout_s,
            "health_interval_s": self.health_interval_s,
            "health_timeout_s": self.health_timeout_s,
            "idle_timeout_s": self.idle_timeout_s,
            "start_timeout_s": self.start_timeout_s,
        }
        for name, value in seconds.items():
            if value <= 0:
                raise ValueError(f"{name} is {value}; it must be positive")


@dataclass(frozen=True, slots=True)
class RayPoolStats:
    """A moment of the pool. workers: those ready to decode. restarts: workers lost and to be replaced."""

    workers: int
    queued: int
    in_flight: int
    restarts: int
    windows_decoded: int


@dataclass(slots=True, eq=False)
class _Job:
    """A window on its way. num_lost: workers lost while they decoded it."""

    window: Window
    num_lost: int = 0


@dataclass(slots=True, eq=False)
class _Worker:
    """The dispatch thread's view of one actor."""

    number: int
    started_at: float
    pid: int | None = None  # None until its codec is loaded
    # In the order sent, which is the order in which they are decoded.
    calls: dict[int, list[_Job]] = field(default_factory=dict)
    head_since: float = 0.0  # when the oldest call's turn began, or when the last one ended
    pinged_at: float | None = None
    answered_at: float = 0.0

    def jobs(self) -> list[_Job]:
        return [job for jobs in self.calls.values() for job in jobs]


_LOAD, _PING = -1, -2  # call numbers of what is not a decode


@dataclass(slots=True, eq=False)
class _Ray:
    """The dispatch thread's view of the process that holds Ray. heard_at: when it last said something, or began."""

    process: RayProcess
    began_at: float
    heard_at: float
    is_joined: bool = False


class RayVocoderPool:
    """A `Vocoder` whose workers are Ray actors. Returns once one worker can decode.

    Nobody here may call Ray: the dispatch thread alone tells the process that holds it what to do, and never waits for
    it. What that process says is put among _heard by a thread of `RayProcess`, and taken by the dispatch thread, which
    throws away the words of one it has given up. It gives one up that ends, does not join Ray in time, or is silent;
    it starts another at once, or after a while where the last one brought no worker.

    wake: called, from any thread of the pool's, when `poll` has something new.
    Raises: ModelLoadError if the codec cannot be loaded; EngineError if Ray cannot be started or joined, or
    no worker gets ready within `start_timeout_s`.
    """

    def __init__(self, recipe: CodecRecipe, options: RayPoolOptions, *, wake: Wake) -> None:
        _check_address(options.address)
        self._recipe = recipe
        self._options = options
        self._wake = wake

        # Shared with the engine thread, guarded by _changed.
        self._changed = threading.Condition()
        self._queue: WindowQueue[_Job] = WindowQueue(window_of=lambda job: job.window)
        self._unanswered: dict[int, set[int]] = {}  # sequence_id -> indices queued or in flight
        self._done: list[DecodedWindow] = []
        self._heard: list[tuple[RayProcess, Message]] = []
        self._closed = False
        self._stopped = False
        self._started = False
        self._fatal: EngineError | None = None  # why the first worker did not get ready
        self._news = False  # something came into _done since the last wake
        self._needs_stand_in = False
        self._num_decoded = 0
        self._stats = RayPoolStats(0, 0, 0, 0, 0)
        self._pids: list[int] = []

        # The dispatch thread's own.
        self._ray: _Ray | None = None  # None until the next try
        self._stand_in: threading.Thread | None = None
        self._workers: dict[int, _Worker] = {}
        self._next_number = 0
        self._next_call = 0
        self._num_failed_starts = 0
        self._next_start_at = 0.0
        self._crowded_since: float | None = None
        self._window_s = 0.0  # what a window takes, by the last replies
        self._num_restarts = 0

        self._thread = threading.Thread(target=self._run, name="declaim-vocoder-pool", daemon=True)
        self._thread.start()
        try:
            with self._changed:
                self._changed.wait_for(lambda: self._started or self._fatal is not None or self._stopped)
        finally:
            if not self._started:
                self.close()
        if not self._started:
            raise self._fatal or EngineError(_CRASHED)
        atexit.register(self.close)

    def submit(self, windows: Sequence[Window]) -> None:
        """Queue windows.

        Raises: EngineClosed after `close`.
        """
        with self._changed:
            if self._closed:
                raise EngineClosed("the vocoder pool is closed: build a new one")
            for window in windows:
                self._unanswered.setdefault(window.sequence_id, set()).add(window.index)
                self._queue.push(_Job(window))
            if self._stopped:
                self._fail_queued(str(self._fatal or _CRASHED))
            self._changed.notify_all()

    def poll(self) -> list[DecodedWindow]:
        with self._changed:
            done, self._done = self._done, []
            return done

    def cancel(self, sequence_id: int) -> None:
        with self._changed:
            self._unanswered.pop(sequence_id, None)
            self._queue.cancel(sequence_id)
            self._done = [window for window in self._done if window.sequence_id != sequence_id]

    @property
    def num_pending(self) -> int:
        with self._changed:
            return len(self._done) + sum(len(indices) for indices in self._unanswered.values())

    def worker_pids(self) -> list[int]:
        """Process ids of the workers that are ready, oldest first (each on its own node)."""
        with self._changed:
            return list(self._pids)

    @property
    def num_workers(self) -> int:
        return self.stats().workers

    @property
    def num_restarts(self) -> int:
        return self.stats().restarts

    @property
    def failure(self) -> str | None:
        with self._changed:
            return str(self._fatal or _CRASHED) if self._stopped and not self._closed else None

    def stats(self) -> RayPoolStats:
        with self._changed:
            return self._stats

    def close(self) -> None:
        """Kill the workers, drop what is pending, and end the Ray this pool started or leave the one it joined."""
        atexit.unregister(self.close)
        with self._changed:
            self._closed = True
            self._queue.clear()
            self._unanswered.clear()
            self._done.clear()
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join(_CLOSE_TIMEOUT_S)

    # The dispatch thread from here on.

    def _run(self) -> None:
        try:
            while not self._closed and self._fatal is None:
                self._turn()
        finally:
            # Also where an unforeseen error ends this thread: its traceback is printed, no window waits on.
            self._fail_everything()
            if self._stand_in is not None:
                self._stand_in.join()
            if self._ray is not None:
                for number in self._workers:
                    self._ray.process.say(Kill(number))
                if not self._ray.is_joined:
                    self._ray.process.kill()
                self._ray.process.leave()

    def _fail_everything(self) -> None:
        with self._changed:
            self._stopped = True
            self._needs_stand_in = False
            cause = str(self._fatal or _CRASHED)
            for worker in self._workers.values():
                for job in worker.jobs():
                    self._fail(job, cause)
            self._fail_queued(cause)
            self._pids = []
            self._changed.notify_all()
            news = self._news
        if news:
            self._wake()

    def _turn(self) -> None:
        """Wait for something to do, and do it."""
        with self._changed:
            self._changed.wait_for(self._has_work, timeout=_TICK_S)
        now = time.monotonic()
        self._take_heard(now)
        if self._ray is None:
            self._start_ray(now)
        elif late := self._late_ray(self._ray, now):
            self._lose_ray(self._ray, late, now)
        elif self._ray.is_joined:
            self._check_workers(self._ray.process, now)
            self._scale(self._ray.process, now)
            self._dispatch(self._ray.process, now)
        self._publish()

    def _has_work(self) -> bool:
        if self._closed or self._heard:
            return True
        return len(self._queue) > 0 and bool(self._free_workers())

    def _free_workers(self) -> list[_Worker]:
        workers = self._workers.values()
        return [w for w in workers if w.pid is not None and len(w.calls) < _MAX_CALLS_PER_WORKER]

    def _publish(self) -> None:
        """What `stats` and `worker_pids` show, and whether `poll` has something new."""
        ready = [worker for worker in self._workers.values() if worker.pid is not None]
        with self._changed:
            self._pids = [worker.pid for worker in ready if worker.pid is not None]
            self._stats = RayPoolStats(
                workers=len(ready),
                queued=len(self._queue),
                in_flight=sum(len(worker.jobs()) for worker in ready),
                restarts=self._num_restarts,
                windows_decoded=self._num_decoded,
            )
            if ready and (self._needs_stand_in or not self._started):
                self._needs_stand_in = False
                self._started = True
                self._changed.notify_all()
            news, self._news = self._news, False
        if news:
            self._wake()

    # Life and death of Ray.

    def _start_ray(self, now: float) -> None:
        """Unless a failed start says to wait."""
        if now < self._next_start_at:
            return
        options = self._options
        # Logical CPUs only count what may run. One worker more: a dead one's share comes back a little late.
        num_cpus = max(1, math.ceil((options.max_workers + 1) * options.cpus_per_worker))
        join = Join(options.address, num_cpus, options.cpus_per_worker, options.gpus_per_worker)
        try:
            self._ray = _Ray(RayProcess(join, told=self._hear), began_at=now, heard_at=now)
        except EngineError as error:
            self._on_failed_start(error, now)

    def _hear(self, process: RayProcess, message: Message) -> None:
        """Called by a thread of `process`."""
        with self._changed:
            self._heard.append((process, message))
            self._changed.notify_all()

    def _take_heard(self, now: float) -> None:
        with self._changed:
            heard, self._heard = self._heard, []
        for process, message in heard:
            ray = self._ray
            if ray is None or process is not ray.process:
                continue  # given up; what it had in hand is elsewhere by now
            ray.heard_at = now
            match message:
                case Joined():
                    ray.is_joined = True
                    _log.info("event=ray_joined seconds=%.2f", now - ray.began_at)
                case Reply():
                    self._take(process, message, now)
                case Lost():
                    self._lose_ray(ray, message.error, now)
                case Beat():
                    pass

    def _late_ray(self, ray: _Ray, now: float) -> EngineError | None:
        """What it has not done in time."""
        silent_s = now - ray.heard_at
        address = self._options.address
        if ray.is_joined:
            if silent_s > _SILENT_TIMEOUT_S:
                return EngineError(f"the process that holds Ray has said nothing for {_SILENT_TIMEOUT_S:g} s")
        elif address is None:
            if silent_s > _START_RAY_TIMEOUT_S:
                return EngineError(
                    f"Ray did not start within {_START_RAY_TIMEOUT_S:g} s: see its logs "
                    "(/tmp/ray/session_latest/logs), or use the inline vocoder"
                )
        elif silent_s > _JOIN_CLUSTER_TIMEOUT_S:
            return EngineError(
                f"{address} let nobody join a Ray cluster within {_JOIN_CLUSTER_TIMEOUT_S:g} s: {HOW_TO_JOIN}"
            )
        return None

    def _lose_ray(self, ray: _Ray, cause: EngineError, now: float) -> None:
        """Be done with this Ray: put back what its workers have in hand, and start another, at once if this one was of
        use."""
        _log.error("event=ray_lost joined=%s workers=%d cause=%r", ray.is_joined, len(self._workers), str(cause))
        ray.process.kill()
        ready = [worker for worker in self._workers.values() if worker.pid is not None]
        self._num_restarts += len(ready)
        with self._changed:
            for worker in reversed(ready):
                self._put_back(worker.jobs())
        self._workers.clear()
        self._ray = None
        if not ready:
            self._on_failed_start(cause, now)
            return
        self._next_start_at = now
        if self._recipe.device == "cpu":
            self._have_it_decoded_here()

    def _have_it_decoded_here(self) -> None:
        if self._stand_in is not None and not self._needs_stand_in:
            self._stand_in.join()  # it is ending: of the last time that Ray was lost
        with self._changed:
            self._needs_stand_in = True
        if self._stand_in is None or not self._stand_in.is_alive():
            self._stand_in = threading.Thread(target=self._decode_here, name="declaim-vocoder-stand-in", daemon=True)
            self._stand_in.start()

    def _decode_here(self) -> None:
        """The stand-in thread: decode what is queued, until a worker is ready to. Its samples are a worker's, for it
        computes with as many threads. Where it cannot load the codec, what is queued fails."""
        torch.set_num_threads(_num_threads(self._options))
        try:
            codec = load_codec(self._recipe)
        except ModelLoadError as error:
            _log.error("event=stand_in_not_loaded cause=%r", str(error))
            with self._changed:
                self._fail_queued(str(error))
            self._wake()
            return
        while True:
            with self._changed:
                self._changed.wait_for(lambda: len(self._queue) or not self._needs_stand_in)
                if not self._needs_stand_in:
                    return
                job = self._queue.pop()
            decoded = _lost(job, _CRASHED)
            try:
                (decoded,) = decode_windows(codec, [job.window])
            finally:
                with self._changed:
                    self._num_decoded += decoded.samples is not None
                    self._answer(decoded)
                self._wake()

    # Replies.

    def _take(self, process: RayProcess, reply: Reply, now: float) -> None:
        worker = self._workers.get(reply.worker)
        if worker is None:
            return  # given up before it answered; its windows are elsewhere by now
        if reply.error is not None:
            self._lose(process, worker, reply.error, now)
        elif reply.call == _PING:
            worker.pinged_at, worker.answered_at = None, now
        elif isinstance(reply.value, bytes):
            self._on_decoded(worker, reply.call, pickle.loads(reply.value), now)
        elif reply.value is not None:
            self._on_ready(worker, reply.value, now)

    def _on_ready(self, worker: _Worker, pid: int, now: float) -> None:
        worker.pid = pid
        worker.answered_at = worker.head_since = now
        self._num_failed_starts = 0
        _log.info("event=worker_ready number=%d pid=%d seconds=%.2f", worker.number, pid, now - worker.started_at)

    def _on_decoded(self, worker: _Worker, call: int, decoded: list[DecodedWindow], now: float) -> None:
        jobs = worker.calls.pop(call)
        self._window_s = 0.5 * self._window_s + 0.5 * (now - worker.head_since) / len(jobs)
        worker.head_since = now
        with self._changed:
            self._num_decoded += sum(window.samples is not None for window in decoded)
            for window in decoded:
                self._answer(window)

    def _answer(self, window: DecodedWindow) -> None:
        """Hand a window to `poll`, unless its sequence was cancelled. Needs the lock."""
        indices = self._unanswered.get(window.sequence_id)
        if indices is None or window.index not in indices:
            return
        indices.remove(window.index)
        if not indices:
            del self._unanswered[window.sequence_id]
        self._done.append(window)
        self._news = True

    def _is_wanted(self, job: _Job) -> bool:
        return job.window.index in self._unanswered.get(job.window.sequence_id, ())

    def _put_back(self, jobs: Sequence[_Job]) -> None:
        """Queue windows again, before the others. Needs the lock."""
        for job in reversed(jobs):
            if self._is_wanted(job):
                self._queue.push(job, in_front=True)

    def _fail(self, job: _Job, cause: str) -> None:
        """Answer a window with VocoderLost. Needs the lock."""
        self._answer(_lost(job, cause))

    def _fail_queued(self, cause: str) -> None:
        """Needs the lock."""
        for job in self._queue:
            self._fail(job, cause)
        self._queue.clear()

    # Life and death of workers.

    def _start_worker(self, process: RayProcess, now: float) -> None:
        number, self._next_number = self._next_number, self._next_number + 1
        self._workers[number] = _Worker(number, now)
        process.say(Start(number, _LOAD, pickle.dumps(self._recipe), _num_threads(self._options)))
        _log.info("event=worker_starting number=%d workers=%d", number, len(self._workers))

    def _check_workers(self, process: RayProcess, now: float) -> None:
        """Give up workers that are late with an answer, and ask the others how they are."""
        options = self._options
        for worker in list(self._workers.values()):
            if worker.pid is None:
                if now - worker.started_at > options.start_timeout_s:
                    self._lose(process, worker, self._late_start(), now)
            elif worker.calls and now - worker.head_since > options.decode_timeout_s:
                late = EngineError(f"no samples within decode_timeout_s ({options.decode_timeout_s})")
                self._lose(process, worker, late, now)
            elif worker.pinged_at is not None:
                if now - worker.pinged_at > options.health_timeout_s:
                    silent = EngineError(f"no answer within health_timeout_s ({options.health_timeout_s})")
                    self._lose(process, worker, silent, now)
            elif now - worker.answered_at > options.health_interval_s:
                worker.pinged_at = now
                process.say(Ping(worker.number, _PING))

    def _late_start(self) -> EngineError:
        options = self._options
        return EngineError(
            f"a vocoder worker was not ready within start_timeout_s ({options.start_timeout_s}): it needs "
            f"{options.cpus_per_worker} CPUs and {options.gpus_per_worker} GPUs free in the Ray cluster (see "
            "`ray status`); free some, ask for less per worker, or raise the limit"
        )

    def _lose(self, process: RayProcess, worker: _Worker, cause: EngineError, now: float) -> None:
        """Put a dead or stuck worker's windows back in front, and have it replaced."""
        del self._workers[worker.number]
        process.say(Kill(worker.number))
        number, pid = worker.number, worker.pid
        _log.info("event=worker_lost number=%d pid=%s windows=%d cause=%r", number, pid, len(worker.jobs()), str(cause))
        if worker.pid is None:
            self._on_failed_start(cause, now)
            return
        self._num_restarts += 1
        # Calls are decoded in order, so the oldest is the one that may have done it; the next is innocent.
        oldest = next(iter(worker.calls.values()), [])
        for job in oldest:
            job.num_lost += 1
        with self._changed:
            for job in oldest:
                if job.num_lost >= _MAX_LOST_WORKERS_PER_WINDOW:
                    self._fail(job, f"{job.num_lost} workers were lost over it, the last one by: {cause}")
            # What was answered just now is no longer wanted.
            self._put_back(worker.jobs())

    def _on_failed_start(self, cause: EngineError, now: float) -> None:
        first, longest = _BACK_OFF_S
        self._next_start_at = now + min(longest, first * 2 ** min(self._num_failed_starts, 10))
        self._num_failed_starts += 1
        if not self._started:
            self._fatal = cause
        elif self._workers:
            return
        elif self._recipe.device == "cpu":
            self._have_it_decoded_here()
        else:
            with self._changed:
                self._fail_queued(f"no worker could be started: {cause}")

    def _scale(self, process: RayProcess, now: float) -> None:
        """Replace what was lost, grow while more waits than the next calls will take, shrink when idle."""
        options = self._options
        while len(self._workers) < options.min_workers and now >= self._next_start_at:
            self._start_worker(process, now)
        num_ready = sum(worker.pid is not None for worker in self._workers.values())
        with self._changed:
            num_queued = len(self._queue)
        if num_queued <= _MAX_CALLS_PER_WORKER * num_ready * self._windows_per_call():
            self._crowded_since = None
        elif self._crowded_since is None:
            self._crowded_since = now
        # One new worker at a time: whether two are needed shows once the first one helps.
        crowded = self._crowded_since is not None and now - self._crowded_since >= _GROW_AFTER_S
        if crowded and num_ready == len(self._workers) < options.max_workers and now >= self._next_start_at:
            self._start_worker(process, now)
        self._shrink(process, now)

    def _shrink(self, process: RayProcess, now: float) -> None:
        for worker in sorted(self._workers.values(), key=lambda worker: -worker.number):
            if len(self._workers) <= self._options.min_workers:
                return
            idle = worker.pid is not None and not worker.calls
            if idle and now - worker.head_since >= self._options.idle_timeout_s:
                del self._workers[worker.number]
                process.say(Kill(worker.number))
                number, pid = worker.number, worker.pid
                _log.info("event=worker_stopped number=%d pid=%s workers=%d", number, pid, len(self._workers))

    # Sending.

    def _windows_per_call(self) -> int:
        if self._window_s <= 0:
            return 1
        target_s = _CPU_CALL_TARGET_S if self._recipe.device == "cpu" else _CALL_TARGET_S
        return max(1, min(self._options.max_windows_per_call, int(target_s / self._window_s)))

    def _dispatch(self, process: RayProcess, now: float) -> None:
        """Fill the workers' calls, always the one with the least to do first."""
        while free := self._free_workers():
            worker = min(free, key=lambda w: (len(w.calls), len(w.jobs()), w.number))
            with self._changed:
                jobs = self._next_jobs(len(free))
            if not jobs:
                return
            call, self._next_call = self._next_call, self._next_call + 1
            if not worker.calls:
                worker.head_since = now
            worker.calls[call] = jobs
            process.say(Decode(worker.number, call, pickle.dumps([job.window for job in jobs])))

    def _next_jobs(self, num_free: int) -> list[_Job]:
        """The next call's windows. Needs the lock.

        A window that a worker died over goes alone, so that it takes no neighbour with it. On the CPU a first
        window does too: a call's windows are decoded one by one there, and its samples leave at the end.
        """
        queue = self._queue
        if not len(queue):
            return []
        limit = min(self._windows_per_call(), math.ceil(len(queue) / num_free))
        is_first = queue.peek().window.index == 0
        if is_first and self._recipe.device == "cpu":
            limit = 1
        jobs = [queue.pop()]
        while len(queue) and len(jobs) < limit and not jobs[0].num_lost:
            following = queue.peek()
            if following.num_lost or (following.window.index == 0) != is_first:
                break
            jobs.append(queue.pop())
        return jobs


def _check_address(address: str | None) -> None:
    """Raises: EngineError."""
    if address is None or address == "auto":
        return
    host, separator, port = address.rpartition(":")
    if not separator or not host or not port.isdecimal() or "/" in host:
        raise EngineError(f"Ray address {address!r} is not of the form HOST:PORT (or 'auto')")


def _num_threads(options: RayPoolOptions) -> int:
    """What a worker computes with; a window's last bits depend on it."""
    return max(1, int(options.cpus_per_worker))


def _lost(job: _Job, cause: str) -> DecodedWindow:
    sequence_id, index = job.window.sequence_id, job.window.index
    error = VocoderLost(f"window {index} of sequence {sequence_id} was not decoded: {cause}")
    return DecodedWindow(sequence_id, index, None, error)
