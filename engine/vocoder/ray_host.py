"""The process that holds Ray, from inside. The one file that imports ray, and never a part of the server's process.

The main thread alone speaks to Ray, in the order told; any of its calls may hang. A second thread listens to the server
and ends this process once the server is gone; a third, once Ray is joined, ends it as soon as Ray no longer answers.
So nobody waits for a Ray that died; and nothing is left, for this process leads a group where all of a local Ray is but
its workers, which end with their raylet. The server kills that group, or this process does.
Knows workers and calls by number; keeps no windows and repeats none (max_restarts=0: the pool repairs, and two parties
that do would double windows).
"""

from __future__ import annotations

import logging
import os
import pickle
import queue
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any, NoReturn

import ray
from ray.exceptions import RayError, RayTaskError

from declaim.engine.errors import EngineError, ModelLoadError
from declaim.engine.vocoder.ray_process import (
    HOW_TO_JOIN,
    Beat,
    Command,
    Decode,
    Join,
    Joined,
    Kill,
    Leave,
    Lost,
    Message,
    Ping,
    Reply,
    Start,
)

if TYPE_CHECKING:
    from declaim.engine.codec.base import Codec

_CONNECT_TIMEOUT_S = 3.0
# How often Ray is looked at, how many times in a row it may not answer, and how long one of its calls may take.
_CHECK_S = 1.0
_CHECKS = 2
_CALL_TIMEOUT_S = 20.0
_FOR_EVER_S = 100_000_000
_OBJECT_STORE_BYTES = 90 * 1024 * 1024
# A session's sockets take up to 62 characters below Ray's folder, and an AF_UNIX path ends at 107.
_MAX_TEMP_DIR_CHARS = 40


class DecodeWorker:
    """What runs in a worker process: one codec, and no state beside it.

    The codec is loaded by a call and not by the constructor, whose errors reach the pool as text only. Torch is
    imported by the calls: the process that names this class needs none.
    """

    def load(self, recipe: bytes, num_threads: int) -> int:
        """Load the codec, decode a window of silence with it, and return this process's id.

        Raises: ModelLoadError.
        """
        import torch

        from declaim.engine.codec.load import load_codec

        torch.set_num_threads(num_threads)
        self._codec: Codec = load_codec(pickle.loads(recipe))
        # The first decode sets up kernels and, on a GPU, its context: no first audio should wait for that.
        spec = self._codec.spec
        codes = torch.zeros((1, spec.num_codebooks, spec.left + spec.right + 1), dtype=torch.int64)
        self._codec.decode(codes.to(self._codec.device))
        return os.getpid()

    def decode(self, windows: bytes) -> bytes:
        """Samples of each window, or the error of that window alone."""
        from declaim.engine.vocoder.inline import decode_windows

        return pickle.dumps(decode_windows(self._codec, pickle.loads(windows)))

    def ping(self) -> None:
        """Answer, from a thread of its own, that this process still runs."""


class RayHost:
    """Obeys the server: joins Ray, starts and kills workers, and passes calls to them."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._sending = threading.Lock()
        self._commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
        # The main thread's own.
        self._actor_class: Any = None
        self._workers: dict[int, Any] = {}  # ray.actor.ActorHandle
        # Written by the main thread, read by the watching one.
        self._busy_since: float | None = None

    def serve(self) -> None:
        """Until told to leave."""
        threading.Thread(target=self._listen, name="listen", daemon=True).start()
        join = self._commands.get()
        assert isinstance(join, Join)
        try:
            ports = self._join(join)
        except EngineError as error:
            self._give_up(error)
        except Exception as error:  # also where a node does not start, Ray raises Exception itself
            where, remedy = "a local Ray could not be started", "see its logs (/tmp/ray/session_latest/logs)"
            if join.address is not None:
                where, remedy = f"the Ray cluster at {join.address} could not be joined", HOW_TO_JOIN
            self._give_up(EngineError(f"{where} ({error}): {remedy}, or use the inline vocoder"))
        # A service manager tells all processes to stop; the server, which drains first, tells this one itself.
        signal.signal(signal.SIGTERM, lambda number, frame: None)
        threading.Thread(target=self._watch, args=(ports,), name="watch", daemon=True).start()
        self._say(Joined())
        while not isinstance(command := self._commands.get(), Leave):
            self._busy_since = time.monotonic()
            self._obey(command)
            self._busy_since = None
        ray.shutdown()

    def _join(self, join: Join) -> dict[str, tuple[str, int]]:
        """Returns the ports by which to see whether Ray lives. Raises: EngineError, and whatever Ray does."""
        # Nothing phones home. A worker that asks for no GPU (it shares the engine's) still sees it. And a lost GCS is
        # noticed by `_watch`, sooner than by Ray.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        # Ray's GCS keeps the last 100,000 calls for a dashboard that is not there.
        os.environ.setdefault("RAY_task_events_report_interval_ms", "0")
        os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", str(_FOR_EVER_S))
        # Ray's workers are nice (15), for they are thought of as batch work: listeners wait for these.
        os.environ.setdefault("RAY_worker_niceness", "0")
        # Its notices (token authentication); errors stay.
        logging.getLogger("ray").setLevel(logging.ERROR)
        if join.address is None:
            _start_local_ray(join.num_cpus)
        else:
            _check_address(join.address)
            ray.init(join.address, log_to_driver=False, configure_logging=False)
        self._actor_class = _actor_class(join)
        return _ray_ports()

    # The main thread, once joined.

    def _obey(self, command: Command) -> None:
        match command:
            case Start():
                self._start(command)
            case Decode():
                self._call(command, lambda worker: worker.decode.remote(command.windows))
            case Ping():
                self._call(command, lambda worker: worker.ping.options(concurrency_group="health").remote())
            case Kill():
                worker = self._workers.pop(command.worker, None)
                if worker is not None:
                    with suppress(RayError):  # already gone
                        ray.kill(worker, no_restart=True)

    def _start(self, start: Start) -> None:
        try:
            self._workers[start.worker] = self._actor_class.remote()
        except RayError as error:
            self._say(Reply(start.worker, start.call, None, _explain(error)))
            return
        self._call(start, lambda worker: worker.load.remote(start.recipe, start.num_threads))

    def _call(self, command: Start | Decode | Ping, send: Callable[[Any], Any]) -> None:
        """Have a worker called, and the server told how it ended."""

        def ended(future: Future[Any]) -> None:
            error = future.exception()
            value = future.result() if error is None else None
            self._say(Reply(command.worker, command.call, value, None if error is None else _explain(error)))

        worker = self._workers.get(command.worker)
        if worker is None:
            return  # killed, or it could not be started, which was told
        try:
            send(worker).future().add_done_callback(ended)
        except RayError as error:
            self._say(Reply(command.worker, command.call, None, _explain(error)))

    # Any thread.

    def _say(self, message: Message) -> None:
        with self._sending, suppress(OSError):  # without a server this process ends: see `_listen`
            self._connection.send(message)

    def _give_up(self, error: EngineError) -> NoReturn:
        """End at once: no call to Ray is waited for, and its processes die with this one."""
        self._say(Lost(error))
        os._exit(1)

    # The other threads.

    def _listen(self) -> None:
        while True:
            try:
                command = self._connection.recv()
            except (EOFError, OSError):
                os.killpg(os.getpgrp(), signal.SIGKILL)
                return
            self._commands.put(command)

    def _watch(self, ports: dict[str, tuple[str, int]]) -> None:
        """Workers whose Ray is gone decode on for seconds, but none of them is replaced. So a lost Ray must be noticed
        before that is felt, by what stops at once: its ports."""
        num_silent = 0
        while True:
            time.sleep(_CHECK_S)
            silent = _silent(ports)
            num_silent = num_silent + 1 if silent else 0
            if silent and num_silent >= _CHECKS:
                self._give_up(EngineError(silent))
            busy_since = self._busy_since
            if busy_since is not None and time.monotonic() - busy_since > _CALL_TIMEOUT_S:
                self._give_up(EngineError(f"Ray did not return from a call within {_CALL_TIMEOUT_S:g} s"))
            self._say(Beat())


def _silent(ports: dict[str, tuple[str, int]]) -> str | None:
    for name, address in ports.items():
        try:
            socket.create_connection(address, timeout=_CHECK_S).close()
        except OSError as error:
            return f"Ray's {name} at {address[0]}:{address[1]} does not answer ({error})"
    return None


def _actor_class(join: Join) -> Any:
    """The worker as Ray starts it: calls run one by one, but pings in a thread of their own."""
    remote: Any = ray.remote  # its type stubs do not know concurrency_groups
    return remote(
        num_cpus=join.cpus_per_worker,
        num_gpus=join.gpus_per_worker,
        max_restarts=0,
        max_task_retries=0,
        max_concurrency=1,
        concurrency_groups={"health": 1},
    )(DecodeWorker)


def _explain(error: BaseException) -> EngineError:
    """What Ray raised, as an error of ours: the worker's own where it is one, else Ray's words."""
    cause: BaseException = error.cause if isinstance(error, RayTaskError) else error
    if isinstance(cause, ModelLoadError):
        return ModelLoadError(str(cause))
    # Indented lines are Ray's own ids, and past the first few hundred characters it gives general advice.
    words = " ".join(line.strip() for line in str(cause).splitlines() if not line.startswith("\t"))
    return EngineError(f"{type(cause).__name__}: {words[:240]}")


def _ray_ports() -> dict[str, tuple[str, int]]:
    """Where Ray's control service (GCS) and this machine's raylet listen."""
    context = ray.get_runtime_context()
    host, _, port = context.gcs_address.rpartition(":")
    node = next(node for node in ray.nodes() if node["NodeID"] == context.get_node_id())
    return {
        "GCS": (host.strip("[]"), int(port)),
        "raylet": (str(node["NodeManagerAddress"]), int(node["NodeManagerPort"])),
    }


def _start_local_ray(num_cpus: int) -> None:
    temp_dir = None
    if "RAY_TMPDIR" not in os.environ and len(tempfile.gettempdir()) > _MAX_TEMP_DIR_CHARS:
        temp_dir = "/tmp/ray"
    ray.init(
        address="local",
        num_cpus=num_cpus,
        object_store_memory=_OBJECT_STORE_BYTES,
        include_dashboard=False,
        log_to_driver=False,
        configure_logging=False,
        _temp_dir=temp_dir,
    )


def _check_address(address: str) -> None:
    """Fail fast where ray.init would try for long: at an address where nobody listens.

    Raises: EngineError.
    """
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_TIMEOUT_S).close()
    except (OSError, OverflowError) as error:
        raise EngineError(f"no Ray cluster answers at {address} ({error}): {HOW_TO_JOIN}") from error


def main() -> None:
    """argv: the file descriptor of the pipe to the server."""
    descriptor = int(sys.argv[1])
    os.set_inheritable(descriptor, False)  # or Ray's processes keep the pipe open after this one
    RayHost(Connection(descriptor)).serve()
