"""One server process: its application with everything plugged in, and its end.

Owns who may ask (an open gate or keys), the order in which parts are closed, and draining: told to stop, a server
refuses new work while what runs goes on, for a bounded time.
"""

from __future__ import annotations

import ipaddress
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import NoReturn

import uvicorn
from starlette.types import ASGIApp

from declaim.api.app import create_app
from declaim.api.deepgram import build_deepgram_router
from declaim.api.gate import Gate
from declaim.api.keys import KeyGate
from declaim.api.ledger import Ledger
from declaim.api.lexicon import LexiconStore, build_lexicon_router
from declaim.api.live import build_live_router
from declaim.api.live_session import LiveServices
from declaim.api.metrics import GateMetrics, MeteredGate, make_socket_gauge
from declaim.api.page import build_page_router
from declaim.api.serving import Serving, SpeechEngine
from declaim.api.settings import ApiSettings
from declaim.api.sockets import SocketLimits, SocketPlaces
from declaim.api.store.database import Database
from declaim.api.store.tenants import has_keys
from declaim.api.tracing import open_tracing
from declaim.api.usage import build_usage_router
from declaim.api.voices import VoiceStore, build_voices_router
from declaim.engine.errors import InvalidConfig
from declaim.engine.progress import Progress

# Clients pool connections for a minute or two; closing first makes a request of theirs fail now and then.
_KEEP_ALIVE_S = 130
# What a stream still gets when the time to drain, or to heed an interrupt, is up.
_LAST_S = 1
_INTERRUPT_S = 10
# Encoding leaves the interpreter's lock for most of its time; more threads than cores gain nothing.
_MAX_ENCODE_THREADS = 8
# Above the live sessions' own limits, so that theirs give the error.
_MAX_MESSAGE_BYTES = 5 << 20


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """How a server is open to the world. drain_s: the longest that running streams hold up its end."""

    settings: ApiSettings
    is_open: bool = False
    drain_s: float = 25.0


@dataclass(frozen=True, slots=True)
class ServedApp:
    """An application. close_sockets: lets its WebSockets say what they have taken in, and closes them; for its event
    loop alone."""

    app: ASGIApp
    close_sockets: Callable[[], None]


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_open_to(host: str, database: Database, *, is_open: bool) -> bool:
    """Whether there are keys. Raises: InvalidConfig where everybody could come in, and nobody said so."""
    with database.reader() as session:
        if has_keys(session):
            return True
    if not is_open and not is_loopback(host):
        raise InvalidConfig(
            f"--host {host} would let in everybody who can reach it, for there is no API key: make one with "
            "`declaim keys create --tenant NAME`, or say --no-auth"
        )
    return False


@contextmanager
def serving_app(serving: Serving, database: Database, options: ServerOptions, *, host: str) -> Iterator[ServedApp]:
    """The application of one process, and what it needs beside the engine, closed at the end."""
    settings = options.settings
    counts = GateMetrics(has_cache=settings.cache_folder is not None)
    keys = KeyGate(
        database,
        ledger=Ledger(database),
        open_always=options.is_open,
        open_without_keys=is_loopback(host),
    )
    gate: Gate = keys
    voices = VoiceStore(serving.engine_for_accepted, database)
    lexicons = LexiconStore(database)
    workers = ThreadPoolExecutor(min(_MAX_ENCODE_THREADS, os.cpu_count() or 1), "declaim-encode")
    tracing = open_tracing()
    if tracing is not None:
        gate = tracing.gate(gate)
    live = LiveServices(serving, MeteredGate(gate, counts, asked_by="live"), voices, lexicons, workers)
    open_sockets = make_socket_gauge()
    places = SocketPlaces(SocketLimits(), on_change=open_sockets.set)
    routers = [
        build_voices_router(voices, gate, check_open=serving.engine, lists_publicly=settings.public_listings),
        build_lexicon_router(lexicons, gate),
        build_usage_router(gate, database),
        build_live_router(live, places),
        build_deepgram_router(live, places),
        build_page_router(serving, max_input_chars=settings.max_input_chars),
    ]
    try:
        app = create_app(
            serving,
            gate=MeteredGate(gate, counts, asked_by="http"),
            voices=voices,
            lexicons=lexicons,
            settings=settings,
            workers=workers,
            routers=routers,
        )
        app.metrics.add(*counts.collectors, open_sockets)
        yield ServedApp(app, places.stopping.set)
    finally:
        voices.close()
        keys.close()
        if tracing is not None:
            tracing.close()


class DrainingServer(uvicorn.Server):
    """At SIGTERM, first lets running requests end while it answers 503 to new ones; a second one ends that.

    WebSockets say what they have taken in and are closed with code 1001, "going away"; those that say nothing at once.
    """

    def __init__(
        self, config: uvicorn.Config, serving: Serving, *, close_sockets: Callable[[], None], drain_s: float
    ) -> None:
        super().__init__(config)
        self._serving = serving
        self._close_sockets = close_sockets
        self._drain_s = drain_s
        self._drained_at: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called by the signal."""
        if sig == signal.SIGTERM and self._drained_at is None:
            self._serving.drain()
            self._drained_at = time.monotonic() + self._drain_s
        else:
            super().handle_exit(sig, frame)

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second."""
        if self._drained_at is not None:
            self._close_sockets()
            if not self.server_state.tasks or time.monotonic() >= self._drained_at:
                self.config.timeout_graceful_shutdown = _LAST_S
                self.should_exit = True
        return await super().on_tick(counter)


def make_server(served: ServedApp, serving: Serving, options: ServerOptions) -> DrainingServer:
    """The HTTP server of one process."""
    config = uvicorn.Config(
        served.app,
        log_config=None,
        log_level="warning",
        access_log=False,
        lifespan="on",
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=_INTERRUPT_S,
        timeout_notify=0,
        ws_max_size=_MAX_MESSAGE_BYTES,
        ws_per_message_deflate=False,
    )
    return DrainingServer(config, serving, close_sockets=served.close_sockets, drain_s=options.drain_s)


def run_server(
    load: Callable[[Progress], SpeechEngine],
    listener: socket.socket,
    database: Database,
    options: ServerOptions,
    *,
    host: str,
) -> str | None:
    """Serve until a signal comes or the model cannot be loaded: then returns why."""

    def stop() -> None:
        server.should_exit = True

    async def hear_sigterm() -> None:
        # Ray's C++ side takes SIGTERM for itself when it starts, in the thread that loads: take it back.
        signal.signal(signal.SIGTERM, server.handle_exit)

    serving = Serving(lambda: load(serving.report), on_failure=stop)
    with serving_app(serving, database, options, host=host) as served:
        server = make_server(served, serving, options)
        server.config.callback_notify = hear_sigterm
        # Uvicorn, once stopped, sends itself the signal again; SIGTERM by default would then skip every clean-up.
        signal.signal(signal.SIGTERM, _exit_cleanly)
        try:
            server.run(sockets=[listener])
        except KeyboardInterrupt:
            return None
        return serving.failure


def _exit_cleanly(number: int, frame: FrameType | None) -> NoReturn:
    sys.exit(0)
