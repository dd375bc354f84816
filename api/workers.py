"""`declaim serve --api-workers N`: one process with the engine, N that speak HTTP on one listening socket.

Owns the worker processes: how they start, what they are told, who starts them again, and their end. The process with
the engine answers no client; a worker has no engine, but `remote.RemoteEngine`. Each has an event loop, encoders, a
gate and a voice store of its own; what they share they share through the database, as servers on several machines do.

A worker that dies takes its clients' connections with it, and what the engine did for them ends at once; it is started
again, later each time if it does not live. Workers whose engine's process dies end by themselves: their socket to it
breaks, however it died.

Metrics: every worker keeps its own in files that all of them read (prometheus_client's multiprocess mode), so /metrics
tells of all workers, whichever answers, and a worker that died is still counted.
"""

from __future__ import annotations

import asyncio
import logging
import os
import pickle
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType

from prometheus_client.multiprocess import mark_process_dead

from declaim.api.remote import EngineLink, EngineServer, FrameSocket, Order
from declaim.api.server import ServerOptions, make_server, serving_app
from declaim.api.serving import Serving, SpeechEngine
from declaim.api.store.database import Database
from declaim.engine.progress import Progress

logger = logging.getLogger(__name__)

_COMMAND = "from declaim.api.workers import main; main()"
# A worker that lived so long was well: if it dies, it starts again at once.
_WELL_S = 10.0
_MAX_DELAY_S = 30.0
# So many that were not well, one after the other in one place, before the first request could be served.
_MAX_FAILED_STARTS = 4
# Beyond the time to drain, or to heed an interrupt.
_END_S = 15.0
_TICK_S = 0.25


@dataclass(frozen=True, slots=True)
class WorkerPlan:
    """What a worker must know; its parent writes it, pickled, to its standard input."""

    options: ServerOptions
    database_url: str
    host: str
    set_up_logs: Callable[[], None]


def run_workers(
    load: Callable[[Progress], SpeechEngine],
    listener: socket.socket,
    database: Database,
    options: ServerOptions,
    *,
    host: str,
    num_workers: int,
    set_up_logs: Callable[[], None],
) -> str | None:
    """As `run_server`, with `num_workers` processes that answer. Blocks; the listener is closed at the end.

    set_up_logs: called in every worker; can be pickled.
    """
    settings = replace(options.settings, cache_bytes=max(1, options.settings.cache_bytes // num_workers))
    plan = WorkerPlan(
        replace(options, settings=settings),
        database.engine.url.render_as_string(hide_password=False),
        host,
        set_up_logs,
    )
    with tempfile.TemporaryDirectory(prefix="declaim-metrics-") as folder:
        return asyncio.run(_Supervisor(load, listener, plan, Path(folder), num_workers).run())


class _Supervisor:
    """The engine's process: loads the engine, keeps the workers alive, and ends them all."""

    def __init__(
        self,
        load: Callable[[Progress], SpeechEngine],
        listener: socket.socket,
        plan: WorkerPlan,
        metrics_folder: Path,
        num_workers: int,
    ) -> None:
        self._serving = Serving(lambda: load(self._serving.report), on_failure=self._on_load_failure)
        self._engines = EngineServer(self._serving)
        self._listener = listener
        self._plan = plan
        self._metrics_folder = metrics_folder
        self._num_workers = num_workers
        self._failure: str | None = None
        self._processes: set[asyncio.subprocess.Process] = set()
        self._ending = asyncio.Event()
        self._kill_at: float | None = None

    async def run(self) -> str | None:
        """Serve until a signal comes; returns why it could not, if so."""
        self._loop = asyncio.get_running_loop()
        self._serving.start()
        workers = [asyncio.create_task(self._keep_alive()) for _ in range(self._num_workers)]
        watch = asyncio.create_task(self._watch())
        try:
            await asyncio.gather(*workers)
        finally:
            self._ending.set()
            self._kill()
            await asyncio.gather(*workers, return_exceptions=True)
            watch.cancel()
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            await asyncio.to_thread(self._serving.close)
            self._listener.close()
        return self._serving.failure or self._failure

    async def _watch(self) -> None:
        """Hear signals, and see to it that the end comes."""
        while True:
            # Ray's C++ side takes SIGTERM for itself when it starts, in the thread that loads: take it back.
            signal.signal(signal.SIGTERM, self._on_signal)
            signal.signal(signal.SIGINT, self._on_signal)
            if self._kill_at is not None and time.monotonic() >= self._kill_at:
                self._kill()
            await asyncio.sleep(_TICK_S)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        is_first = number == signal.SIGTERM and not self._ending.is_set()
        self._loop.call_soon_threadsafe(self._end, "drain" if is_first else "stop")

    def _on_load_failure(self) -> None:
        self._loop.call_soon_threadsafe(self._end, "stop")

    def _end(self, order: Order) -> None:
        """No worker starts any more, and those that run are told to end; new connections find nobody once they did."""
        self._ending.set()
        self._listener.close()
        self._engines.order(order)
        self._kill_at = time.monotonic() + _END_S + (self._plan.options.drain_s if order == "drain" else 0.0)

    def _kill(self) -> None:
        for process in self._processes:
            if process.returncode is None:
                process.kill()

    async def _keep_alive(self) -> None:
        """One worker after the other, until the end."""
        num_failed = 0
        while not self._ending.is_set():
            began = time.monotonic()
            code = await self._run_worker()
            if self._ending.is_set():
                return
            num_failed = 0 if time.monotonic() - began >= _WELL_S else num_failed + 1
            if num_failed >= _MAX_FAILED_STARTS and self._serving.warm_engine is None:
                self._failure = f"an API worker ended {num_failed} times right after its start: the log says why"
                self._end("stop")
                return
            delay_s = min(_MAX_DELAY_S, 2.0 ** (num_failed - 1)) if num_failed else 0.0
            logger.error("event=worker_died code=%d restart_s=%.1f", code, delay_s)
            try:
                await asyncio.wait_for(self._ending.wait(), delay_s)
            except TimeoutError:
                continue

    async def _run_worker(self) -> int:
        """Start one and serve it until it has ended; its exit status."""
        ours, its = socket.socketpair()
        with its:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-c",
                _COMMAND,
                str(self._listener.fileno()),
                str(its.fileno()),
                stdin=asyncio.subprocess.PIPE,
                pass_fds=(self._listener.fileno(), its.fileno()),
                env={**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(self._metrics_folder)},
                # Out of reach of a terminal's interrupt: this process alone says when they end.
                process_group=0,
            )
        self._processes.add(process)
        if self._ending.is_set():  # meanwhile, and nobody could tell it
            process.kill()
        try:
            assert process.stdin is not None
            process.stdin.write(pickle.dumps(self._plan))
            process.stdin.close()
            logger.info("event=worker_started pid=%d", process.pid)
            await self._engines.serve(ours)
            return await process.wait()
        finally:
            self._processes.discard(process)
            mark_process_dead(process.pid, str(self._metrics_folder))  # type: ignore[no-untyped-call]


def main() -> None:
    """A worker process. Its arguments: the descriptors of the listening socket and of the one to the engine."""
    # Both are its parent's to hear; a worker hears its parent.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    listener, link = (socket.socket(fileno=int(argument)) for argument in sys.argv[1:3])
    plan: WorkerPlan = pickle.load(sys.stdin.buffer)
    plan.set_up_logs()
    asyncio.run(_work(plan, listener, link))


async def _work(plan: WorkerPlan, listener: socket.socket, connected: socket.socket) -> None:
    def obey(order: Order) -> None:
        if order == "drain":
            server.handle_exit(signal.SIGTERM, None)
        else:
            server.should_exit = True

    def stop() -> None:
        server.should_exit = True

    link = EngineLink(await FrameSocket.open(connected), on_progress=lambda *work: serving.report(*work), on_order=obey)
    serving = Serving(link.ready.result, on_failure=stop)
    database = Database(plan.database_url)
    with serving_app(serving, database, plan.options, host=plan.host) as served:
        server = make_server(served, serving, plan.options)
        reader = asyncio.create_task(link.run())
        await server.serve(sockets=[listener])
        reader.cancel()
        await asyncio.wait({reader})
    database.close()
