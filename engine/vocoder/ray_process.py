"""The process that holds Ray, as the server sees it: what is said between the two, and its life and end.

Ray's client cannot be trusted with the server's own process: where Ray dies while it is being joined, the client waits
for ever and lets no other join begin, or ends its process. So it has a process of its own (`ray_host.py`), which can be
killed and replaced at any moment. Windows and samples pass through it pickled; it never looks at them.
"""

from __future__ import annotations

import os
import pickle
import queue
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection

from declaim.engine.errors import EngineError

HOW_TO_JOIN = (
    "start a cluster there with `RAY_worker_niceness=0 ray start --head --port=6379`, join this machine to it with "
    "`RAY_worker_niceness=0 ray start --address=HOST:6379`, set RAY_AUTH_MODE=token here if the cluster asks for its "
    "token, check the firewall, or leave the address unset for a local Ray"
)
_LEAVE_TIMEOUT_S = 10.0
# The module by name and not as a script: what Ray pickles of it must be found under that name by the workers.
# -P: a folder of the working directory must not hide a package.
_COMMAND = (sys.executable, "-P", "-c", "from declaim.engine.vocoder.ray_host import main; main()")


# What the server says.


@dataclass(frozen=True, slots=True)
class Join:
    """The first word: join the cluster at `address`, or start a Ray of `num_cpus` on this machine."""

    address: str | None
    num_cpus: int
    cpus_per_worker: float
    gpus_per_worker: float


@dataclass(frozen=True, slots=True)
class Start:
    """Start a worker and have it load its codec. recipe: a pickled CodecRecipe. The Reply's value: its process id."""

    worker: int
    call: int
    recipe: bytes
    num_threads: int


@dataclass(frozen=True, slots=True)
class Decode:
    """windows: a pickled list[Window]. The Reply's value: a pickled list[DecodedWindow]."""

    worker: int
    call: int
    windows: bytes


@dataclass(frozen=True, slots=True)
class Ping:
    """The Reply's value: None."""

    worker: int
    call: int


@dataclass(frozen=True, slots=True)
class Kill:
    worker: int


@dataclass(frozen=True, slots=True)
class Leave:
    """The last word: end the Ray that was started, or leave the one that was joined."""


Command = Join | Start | Decode | Ping | Kill | Leave


# What the process that holds Ray says.


@dataclass(frozen=True, slots=True)
class Joined:
    """Workers can be started."""


@dataclass(frozen=True, slots=True)
class Reply:
    """How a Start, Decode or Ping ended."""

    worker: int
    call: int
    value: bytes | int | None
    error: EngineError | None = None


@dataclass(frozen=True, slots=True)
class Beat:
    """Ray answers; told every second."""


@dataclass(frozen=True, slots=True)
class Lost:
    """Ray could not be joined, or it no longer answers. The last word; `RayProcess` says it for a process that ended
    without."""

    error: EngineError


Message = Joined | Reply | Beat | Lost


class RayProcess:
    """A process that holds Ray.

    told: called with this object and each message, from a thread of this object's. Lost comes at the end unless it was
    told to leave or killed, and may come twice. Nothing here waits for the process but `leave`.
    Raises: EngineError where the process cannot be started.
    """

    def __init__(self, join: Join, *, told: Callable[[RayProcess, Message], None]) -> None:
        self._told = told
        self._commands: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._is_ending = False
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                # A session of its own: Ctrl-C at a terminal is for the server, which then ends its Ray in order. And
                # a group, by which all that Ray has started can be found.
                self._process = subprocess.Popen(
                    [*_COMMAND, str(theirs.fileno())],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    pass_fds=[theirs.fileno()],
                    start_new_session=True,
                )
            except OSError as error:
                ours.close()
                raise EngineError(f"the process that holds Ray could not be started: {error}") from error
        self._connection = Connection(ours.detach())
        self._reader = threading.Thread(target=self._read, name="declaim-ray-reader", daemon=True)
        self._writer = threading.Thread(target=self._write, name="declaim-ray-writer", daemon=True)
        self.say(join)
        self._reader.start()
        self._writer.start()

    def say(self, command: Command) -> None:
        """Never waits, whatever the process does; one that has ended hears nothing."""
        self._commands.put(command)

    def kill(self) -> None:
        """End it at once, with all that it started."""
        self._is_ending = True
        self._kill_group()

    def leave(self) -> None:
        """Have it leave Ray; where it does not within some seconds, kill it."""
        self._is_ending = True
        self.say(Leave())
        self._reader.join(_LEAVE_TIMEOUT_S)
        self.kill()
        self._reader.join(_LEAVE_TIMEOUT_S)

    # The reader thread.

    def _read(self) -> None:
        while True:
            try:
                message: Message = self._connection.recv()
            except (EOFError, OSError, pickle.UnpicklingError):  # it has ended, perhaps in the middle of a word
                break
            self._told(self, message)
        # Ray's agents outlive a raylet that was killed.
        self._kill_group()
        status = self._process.wait()
        self._commands.put(None)
        if not self._is_ending:
            how = f"exit status {status}" if status >= 0 else f"signal {-status}"
            self._told(self, Lost(EngineError(f"the process that holds Ray has ended ({how}); see standard error")))
        self._writer.join()
        self._connection.close()

    def _kill_group(self) -> None:
        if self._process.returncode is None:  # until it is waited for, its number is nobody else's
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    # The writer thread: a pipe that nobody empties holds up nobody else.

    def _write(self) -> None:
        while (command := self._commands.get()) is not None:
            try:
                self._connection.send(command)
            except OSError:
                return
