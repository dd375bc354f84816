"""The vocoder as an elastic pool of Ray actors, on any core, GPU or node. The one file that imports ray.

Owns a dispatch thread, which alone speaks to Ray, and the books: a window is queued or in one worker's call,
and leaves them once, with samples or with an error. A worker keeps nothing between calls, so what a dead one
had in hand goes to another. Never retries through Ray (max_restarts=0): two parties repairing one pool would
double windows. Ray itself may be lost too: the pool leaves it and joins or starts another, and until a worker of that
one is ready, a thread of this process decodes in their place, on the CPU with the same samples.
"""

from __future__ import annotations

import atexit
import logging
import math
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import ray
import torch
from ray.exceptions import RayError, RayTaskError

from declaim.engine.codec.base import CodecRecipe
from declaim.engine.codec.load import load_codec
from declaim.engine.errors import EngineClosed, EngineError, ModelLoadError, VocoderLost
from declaim.engine.vocoder.base import DecodedWindow, Wake, Window
from declaim.engine.vocoder.inline import decode_windows
from declaim.engine.vocoder.queue import WindowQueue

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
_CONNECT_TIMEOUT_S = 3.0
_TRIAL_TIMEOUT_S = 10.0
_CLOSE_TIMEOUT_S = 30.0
# How often Ray is looked at, and how many times in a row it may not answer.
_RAY_CHECK_S = 1.0
_RAY_CHECKS = 2
_JOIN_TIMEOUT_S = 120.0
_FOR_EVER_S = 100_000_000
_CRASHED = "the vocoder pool's thread crashed: see its traceback in the log, and build a new pool"
_OBJECT_STORE_BYTES = 90 * 1024 * 1024
# A session's sockets take up to 62 characters below Ray's folder, and an AF_UNIX path ends at 107.
_MAX_TEMP_DIR_CHARS = 40


@dataclass(frozen=True, slots=True)
class RayPoolOptions:
    """How many workers, what each may use, and when one counts as lost.

    address: "host:port" of a Ray cluster's head, "auto" for the one this machine belongs to, None to start a
    local Ray. Where this process has already initialised Ray, that one is used whatever the address.
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


class DecodeWorker:
    """What runs in a worker process: one codec, and no state beside it.

    The codec is loaded by a call and not by the constructor, whose errors reach the pool as text only.
    """

    def load(self, recipe: CodecRecipe, *, num_threads: int) -> int:
        """Load the codec, decode a window of silence with it, and return this process's id.

        Raises: ModelLoadError.
        """
        torch.set_num_threads(num_threads)
        self._codec = load_codec(recipe)
        # The first decode sets up kernels and, on a GPU, its context: no first audio should wait for that.
        spec = self._codec.spec
        codes = torch.zeros((1, spec.num_codebooks, spec.left + spec.right + 1), dtype=torch.int64)
        self._codec.decode(codes.to(self._codec.device))
        return os.getpid()

    def decode(self, windows: list[Window]) -> list[DecodedWindow]:
        """Samples of each window, or the error of that window alone."""
        return decode_windows(self._codec, windows)

    def ping(self) -> None:
        """Answer, from a thread of its own, that this process still runs."""


@dataclass(slots=True, eq=False)
class _Job:
    """A window on its way. num_lost: workers lost while they decoded it."""

    window: Window
    num_lost: int = 0


@dataclass(slots=True, eq=False)
class _Worker:
    """The dispatch thread's view of one actor."""

    number: int
    handle: Any  # ray.actor.ActorHandle
    started_at: float
    pid: int | None = None  # None until its codec is loaded
    # In the order sent, which is the order in which they are decoded.
    calls: dict[int, list[_Job]] = field(default_factory=dict)
    head_since: float = 0.0  # when the oldest call's turn began, or when the last one ended
    pinged_at: float | None = None
    answered_at: float = 0.0

    def jobs(self) -> list[_Job]:
        return [job for jobs in self.calls.values() for job in jobs]


@dataclass(frozen=True, slots=True, eq=False)
class _Reply:
    """A finished call to a worker: what Ray's thread hands to the dispatch thread."""

    worker: int
    call: int
    future: Future[Any]


_LOAD, _PING = -1, -2  # call numbers of what is not a decode


class _RayStuck(EngineError):
    """Ray neither started nor failed."""


class _JoinedRay:
    """The Ray that this process has joined or started: whose it is, and whether it still listens.

    A thread holds it, from before it is started until it is left: on Linux, Ray's processes die with the thread that
    forked them. So nothing is left of a Ray that did not start, or that is lost, and on the main thread ray.init would
    replace the server's SIGTERM handler.

    Workers whose Ray is gone decode on for seconds, but none of them is replaced. So a lost Ray must be noticed before
    that is felt, by what stops at once: the ports of its control service (GCS) and of this machine's raylet.

    Ray that starts waits for a GCS that died, for ever, and what waits so holds up any other Ray of this process. Then
    there is none until the process is started again.
    """

    def __init__(self, options: RayPoolOptions) -> None:
        """Returns once Ray is joined. Raises: EngineError; _RayStuck where it is no use to try again."""
        self.is_owned = False  # no: this process had initialised Ray before, so that it is not ours to shut down
        self._ports: dict[str, tuple[str, int]] = {}
        self._checked_at = 0.0
        self._num_silent = 0
        self._error: EngineError | None = None
        self._is_settled = threading.Event()
        self._is_left = threading.Event()
        self._thread = threading.Thread(target=self._hold, args=(options,), name="declaim-ray", daemon=True)
        self._thread.start()
        if not self._is_settled.wait(_JOIN_TIMEOUT_S):
            self._is_left.set()
            raise _RayStuck(
                f"Ray did not start within {_JOIN_TIMEOUT_S:g} s and cannot be stopped: start this process again to "
                "have vocoder workers; see Ray's logs (/tmp/ray/session_latest/logs)"
            )
        if self._error is not None:
            self._thread.join()
            raise self._error

    def leave(self) -> None:
        """Shut it down, if it is ours."""
        self._is_left.set()
        self._thread.join(_JOIN_TIMEOUT_S)

    def _hold(self, options: RayPoolOptions) -> None:
        try:
            self.is_owned = _connect(options)
            self._ports = _ray_ports()
        except EngineError as error:
            self._error = error
        except Exception as error:  # also where a node does not start, Ray raises Exception itself
            where = "a local Ray" if options.address is None else f"the Ray cluster at {options.address}"
            self._error = EngineError(
                f"{where} could not be used: {error}; see its logs (/tmp/ray/session_latest/logs), "
                "or use the inline vocoder"
            )
            self._error.__cause__ = error
        self._is_settled.set()
        if self._error is None:
            self._is_left.wait()
        if self.is_owned and ray.is_initialized():
            ray.shutdown()

    def why_lost(self, now: float) -> str | None:
        """What no longer answers, twice in a row; None while all is well, and between two looks."""
        if now - self._checked_at < _RAY_CHECK_S:
            return None
        self._checked_at = now
        silent = self._silent()
        self._num_silent = self._num_silent + 1 if silent else 0
        return silent if self._num_silent >= _RAY_CHECKS else None

    def _silent(self) -> str | None:
        for name, address in self._ports.items():
            try:
                socket.create_connection(address, timeout=_RAY_CHECK_S).close()
            except OSError as error:
                return f"Ray's {name} at {address[0]}:{address[1]} does not answer ({error})"
        return None


class RayVocoderPool:
    """A `Vocoder` whose workers are Ray actors. Returns once one worker can decode.

    wake: called from the dispatch thread when `poll` has something new. A process has one Ray: a pool built
    while another one's Ray runs shares it, and must be closed first.
    Raises: ModelLoadError if the codec cannot be loaded; EngineError if Ray cannot be started or joined, or
    no worker gets ready within `start_timeout_s`.
    """

    def __init__(self, recipe: CodecRecipe, options: RayPoolOptions, *, wake: Wake) -> None:
        self._recipe = recipe
        self._options = options
        self._wake = wake

        # Shared with the engine thread, guarded by _changed.
        self._changed = threading.Condition()
        self._queue: WindowQueue[_Job] = WindowQueue()
        self._unanswered: dict[int, set[int]] = {}  # sequence_id -> indices queued or in flight
        self._done: list[DecodedWindow] = []
        self._replies: deque[_Reply] = deque()
        self._closed = False
        self._stopped = False
        self._started = False
        self._fatal: EngineError | None = None  # why the dispatch thread ended or is about to
        self._news = False  # something came into _done since the last wake
        self._needs_stand_in = False
        self._num_decoded = 0
        self._stats = RayPoolStats(0, 0, 0, 0, 0)
        self._pids: list[int] = []

        # The dispatch thread's own.
        self._ray: _JoinedRay | None = None  # None while it is lost
        self._stand_in: threading.Thread | None = None
        self._actor_class: Any = None
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
        # After ray's own handler was registered, and so run before it.
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
        """Kill the workers, drop what is pending, and end or leave the Ray this pool started or joined."""
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
            self._join()
            while not self._closed and self._fatal is None:
                self._turn()
        except EngineError as error:
            self._fatal = error
        finally:
            # Also where an unforeseen error ends this thread: its traceback is printed, no window waits on.
            self._fail_everything()
            if self._stand_in is not None:
                self._stand_in.join()
            if self._ray is not None:
                for worker in self._workers.values() if ray.is_initialized() else ():
                    _kill(worker)
                self._workers.clear()
                self._ray.leave()

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
        self._take_replies(now)
        if self._ray is None:
            self._rejoin(now)
        elif not ray.is_initialized():
            raise EngineError("Ray was shut down under the vocoder pool: close the pool before its Ray")
        elif why := self._ray.why_lost(now):
            self._leave(self._ray, why, now)
        else:
            self._check_workers(now)
            self._scale(now)
            self._dispatch(now)
        self._publish()

    def _has_work(self) -> bool:
        if self._closed or self._replies:
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

    def _join(self) -> None:
        """Raises: EngineError."""
        self._ray = _JoinedRay(self._options)
        self._actor_class = _actor_class(self._options)

    def _leave(self, lost: _JoinedRay, why: str, now: float) -> None:
        """Put back what the workers have in hand, have it decoded here, and be done with this Ray.

        Raises: EngineError where this process had initialised Ray before: another may be using it.
        """
        if not lost.is_owned:
            raise EngineError(f"{why}: initialise Ray anew and build a new pool, or leave Ray to the pool")
        _log.error("event=ray_lost workers=%d cause=%r", len(self._workers), why)
        self._num_restarts += len(self._workers)
        if self._stand_in is not None and not self._needs_stand_in:
            self._stand_in.join()  # it is ending: of the last time that Ray was lost
        with self._changed:
            for worker in reversed(self._workers.values()):
                self._put_back(worker.jobs())
            self._replies.clear()
            self._needs_stand_in = self._recipe.device == "cpu"
        # Before the next Ray: their handles belong to this one.
        self._workers.clear()
        self._ray = self._actor_class = None
        self._next_start_at = now
        if self._needs_stand_in and (self._stand_in is None or not self._stand_in.is_alive()):
            self._stand_in = threading.Thread(target=self._decode_here, name="declaim-vocoder-stand-in", daemon=True)
            self._stand_in.start()
        lost.leave()

    def _rejoin(self, now: float) -> None:
        """Where it fails, again after a while."""
        if now < self._next_start_at:
            return
        try:
            self._join()
        except _RayStuck as error:
            _log.error("event=ray_stuck decodes_here=%s cause=%r", self._needs_stand_in, str(error))
            self._next_start_at = math.inf
            if not self._needs_stand_in:
                self._fatal = error
            return
        except EngineError as error:
            _log.warning("event=ray_not_joined cause=%r", str(error))
            self._on_failed_start(error, time.monotonic())
            return
        _log.info("event=ray_joined seconds=%.2f", time.monotonic() - now)

    def _decode_here(self) -> None:
        """The stand-in thread: decode what is queued, until a worker is ready to. Its samples are a worker's, for it
        computes with as many threads."""
        torch.set_num_threads(_num_threads(self._options))
        try:
            codec = load_codec(self._recipe)
        except ModelLoadError as error:
            _log.error("event=stand_in_not_loaded cause=%r", str(error))
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

    def _call(self, worker: _Worker, call: int, ref: Any) -> None:
        """Have the reply to a call put where this thread finds it."""
        number = worker.number  # and not the worker, whose handle must not outlive its Ray

        def finished(future: Future[Any]) -> None:
            with self._changed:
                self._replies.append(_Reply(number, call, future))
                self._changed.notify_all()

        ref.future().add_done_callback(finished)

    def _take_replies(self, now: float) -> None:
        with self._changed:
            replies = list(self._replies)
            self._replies.clear()
        for reply in replies:
            self._take(reply, now)

    def _take(self, reply: _Reply, now: float) -> None:
        worker = self._workers.get(reply.worker)
        if worker is None:
            return  # given up before it answered; its windows are elsewhere by now
        error = reply.future.exception()
        if error is not None:
            self._lose(worker, _explain(error), now)
        elif reply.call == _LOAD:
            self._on_ready(worker, reply.future.result(), now)
        elif reply.call == _PING:
            worker.pinged_at, worker.answered_at = None, now
        else:
            self._on_decoded(worker, reply.call, reply.future.result(), now)

    def _on_ready(self, worker: _Worker, pid: int, now: float) -> None:
        worker.pid = pid
        worker.answered_at = worker.head_since = now
        self._num_failed_starts = 0
        _log.info("worker ready number=%d pid=%d seconds=%.2f", worker.number, pid, now - worker.started_at)

    def _on_decoded(self, worker: _Worker, call: int, decoded: list[DecodedWindow], now: float) -> None:
        jobs = worker.calls.pop(call)
        self._window_s = 0.5 * self._window_s + 0.5 * (now - worker.head_since) / len(jobs)
        worker.head_since = now
        owned = [_owned(window) for window in decoded]
        with self._changed:
            self._num_decoded += sum(window.samples is not None for window in owned)
            for window in owned:
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
        for job in self._queue:
            self._fail(job, cause)
        self._queue.clear()

    # Life and death of workers.

    def _start_workers(self, now: float) -> None:
        """Bring the pool up to min_workers, unless a failed start says to wait."""
        while len(self._workers) < self._options.min_workers and now >= self._next_start_at:
            self._start_worker(now)

    def _start_worker(self, now: float) -> None:
        number, self._next_number = self._next_number, self._next_number + 1
        try:
            handle = self._actor_class.remote()
            worker = self._workers[number] = _Worker(number, handle, now)
            load = handle.load.remote(self._recipe, num_threads=_num_threads(self._options))
        except RayError as error:
            self._workers.pop(number, None)
            self._on_failed_start(EngineError(f"no vocoder worker could be started: {_explain(error)}"), now)
            return
        _log.info("worker starting number=%d workers=%d", number, len(self._workers))
        self._call(worker, _LOAD, load)

    def _check_workers(self, now: float) -> None:
        """Give up workers that are late with an answer, and ask the others how they are."""
        options = self._options
        for worker in list(self._workers.values()):
            if worker.pid is None:
                if now - worker.started_at > options.start_timeout_s:
                    self._lose(worker, self._late_start(), now)
            elif worker.calls and now - worker.head_since > options.decode_timeout_s:
                late = EngineError(f"no samples within decode_timeout_s ({options.decode_timeout_s})")
                self._lose(worker, late, now)
            elif worker.pinged_at is not None:
                if now - worker.pinged_at > options.health_timeout_s:
                    silent = EngineError(f"no answer within health_timeout_s ({options.health_timeout_s})")
                    self._lose(worker, silent, now)
            elif now - worker.answered_at > options.health_interval_s:
                self._ping(worker, now)

    def _late_start(self) -> EngineError:
        options = self._options
        return EngineError(
            f"a vocoder worker was not ready within start_timeout_s ({options.start_timeout_s}): it needs "
            f"{options.cpus_per_worker} CPUs and {options.gpus_per_worker} GPUs free in the Ray cluster (see "
            "`ray status`); free some, ask for less per worker, or raise the limit"
        )

    def _ping(self, worker: _Worker, now: float) -> None:
        try:
            ref = worker.handle.ping.options(concurrency_group="health").remote()
        except RayError as error:
            self._lose(worker, _explain(error), now)
            return
        worker.pinged_at = now
        self._call(worker, _PING, ref)

    def _lose(self, worker: _Worker, cause: EngineError, now: float) -> None:
        """Put a dead or stuck worker's windows back in front, and have it replaced."""
        del self._workers[worker.number]
        _kill(worker)
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
        elif not self._workers and not (self._stand_in is not None and self._stand_in.is_alive()):
            with self._changed:
                self._fail_queued(f"no worker could be started: {cause}")

    def _scale(self, now: float) -> None:
        """Replace what was lost, grow while more waits than the next calls will take, shrink when idle."""
        options = self._options
        self._start_workers(now)
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
            self._start_worker(now)
        self._shrink(now)

    def _shrink(self, now: float) -> None:
        for worker in sorted(self._workers.values(), key=lambda worker: -worker.number):
            if len(self._workers) <= self._options.min_workers:
                return
            idle = worker.pid is not None and not worker.calls
            if idle and now - worker.head_since >= self._options.idle_timeout_s:
                del self._workers[worker.number]
                _kill(worker)
                number, pid = worker.number, worker.pid
                _log.info("worker stopped number=%d pid=%s workers=%d", number, pid, len(self._workers))

    # Sending.

    def _windows_per_call(self) -> int:
        if self._window_s <= 0:
            return 1
        target_s = _CPU_CALL_TARGET_S if self._recipe.device == "cpu" else _CALL_TARGET_S
        return max(1, min(self._options.max_windows_per_call, int(target_s / self._window_s)))

    def _dispatch(self, now: float) -> None:
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
            try:
                ref = worker.handle.decode.remote([job.window for job in jobs])
            except RayError as error:
                self._lose(worker, _explain(error), now)
                continue
            self._call(worker, call, ref)

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


def _actor_class(options: RayPoolOptions) -> Any:
    """The worker as Ray starts it: calls run one by one, but pings in a thread of their own."""
    remote: Any = ray.remote  # its type stubs do not know concurrency_groups
    return remote(
        num_cpus=options.cpus_per_worker,
        num_gpus=options.gpus_per_worker,
        max_restarts=0,
        max_task_retries=0,
        max_concurrency=1,
        concurrency_groups={"health": 1},
    )(DecodeWorker)


def _owned(window: DecodedWindow) -> DecodedWindow:
    """A window with its own samples: Ray's are read-only views, and one keeps a whole call in its store."""
    if window.samples is None:
        return window
    return DecodedWindow(window.sequence_id, window.index, np.array(window.samples))


def _num_threads(options: RayPoolOptions) -> int:
    """What a worker computes with; a window's last bits depend on it."""
    return max(1, int(options.cpus_per_worker))


def _lost(job: _Job, cause: str) -> DecodedWindow:
    sequence_id, index = job.window.sequence_id, job.window.index
    error = VocoderLost(f"window {index} of sequence {sequence_id} was not decoded: {cause}")
    return DecodedWindow(sequence_id, index, None, error)


def _kill(worker: _Worker) -> None:
    try:
        ray.kill(worker.handle, no_restart=True)
    except RayError:
        _log.debug("event=worker_already_gone number=%d", worker.number)


def _explain(error: BaseException) -> EngineError:
    """What Ray raised, as an error of ours: the worker's own where it is one, else Ray's words."""
    cause: BaseException = error.cause if isinstance(error, RayTaskError) else error
    if isinstance(cause, ModelLoadError):
        return ModelLoadError(str(cause))
    # Indented lines are Ray's own ids, and past the first few hundred characters it gives general advice.
    words = " ".join(line.strip() for line in str(cause).splitlines() if not line.startswith("\t"))
    return EngineError(f"{type(cause).__name__}: {words[:240]}")


def _connect(options: RayPoolOptions) -> bool:
    """Join Ray or start it; False where this process had done so before.

    Raises: EngineError, and whatever Ray does.
    """
    if ray.is_initialized():
        return False
    # Nothing phones home. A worker that asks for no GPU (it shares the engine's) still sees it. And a lost GCS never
    # ends this process, which Ray does after a minute: the pool notices sooner, but not while Ray starts.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Ray's GCS keeps the last 100,000 calls for a dashboard that is not there.
    os.environ.setdefault("RAY_task_events_report_interval_ms", "0")
    os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", str(_FOR_EVER_S))
    if options.address is not None:
        _check_cluster(options.address)
    with _quiet_ray():
        if options.address is None:
            _start_local_ray(options)
        else:
            ray.init(options.address, log_to_driver=False, configure_logging=False)
    return True


def _ray_ports() -> dict[str, tuple[str, int]]:
    """Where Ray's control service and this machine's raylet listen."""
    context = ray.get_runtime_context()
    host, _, port = context.gcs_address.rpartition(":")
    node = next(node for node in ray.nodes() if node["NodeID"] == context.get_node_id())
    return {
        "GCS": (host.strip("[]"), int(port)),
        "raylet": (str(node["NodeManagerAddress"]), int(node["NodeManagerPort"])),
    }


def _start_local_ray(options: RayPoolOptions) -> None:
    temp_dir = None
    if "RAY_TMPDIR" not in os.environ and len(tempfile.gettempdir()) > _MAX_TEMP_DIR_CHARS:
        temp_dir = "/tmp/ray"
    ray.init(
        address="local",
        # Logical CPUs only count what may run. One worker more: a dead one's share comes back a little late.
        num_cpus=max(1, math.ceil((options.max_workers + 1) * options.cpus_per_worker)),
        object_store_memory=_OBJECT_STORE_BYTES,
        include_dashboard=False,
        log_to_driver=False,
        configure_logging=False,
        _temp_dir=temp_dir,
    )


@contextmanager
def _quiet_ray() -> Iterator[None]:
    """Keep ray.init's notices (no signal handler, token authentication) out of the log; errors stay."""
    logger = logging.getLogger("ray")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _check_cluster(address: str) -> None:
    """Fail fast where ray.init would try for minutes: at an address where nobody, or somebody else, listens.

    Raises: EngineError.
    """
    remedy = (
        "start one there with `ray start --head --port=6379`, join this machine to it with "
        "`ray start --address=HOST:6379`, set RAY_AUTH_MODE=token here if the cluster asks for its token, check "
        "the firewall, or leave the address unset for a local Ray"
    )
    if address != "auto":
        host, separator, port = address.rpartition(":")
        if not separator or not host or not port.isdecimal() or "/" in host:
            raise EngineError(f"Ray address {address!r} is not of the form HOST:PORT (or 'auto')")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_TIMEOUT_S).close()
        except (OSError, OverflowError) as error:
            raise EngineError(f"no Ray cluster answers at {address} ({error}): {remedy}") from error
    # That a port is open does not make it Ray's. A child process can be given a time limit, ray.init cannot.
    trial = [
        sys.executable,
        "-c",
        f"import ray; ray.init({address!r}, log_to_driver=False, configure_logging=False)",
    ]
    try:
        done = subprocess.run(trial, capture_output=True, text=True, timeout=_TRIAL_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired as error:
        # Bytes whatever `text` says: subprocess had no chance to decode them.
        heard = error.stderr.decode(errors="replace") if isinstance(error.stderr, bytes) else ""
        raise EngineError(
            f"{address} let nobody join a Ray cluster within {_TRIAL_TIMEOUT_S} s ({_last_line(heard)}): {remedy}"
        ) from error
    if done.returncode != 0:
        raise EngineError(f"the Ray cluster at {address} could not be joined ({_last_line(done.stderr)}): {remedy}")


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1][:240] if lines else "it said nothing"
