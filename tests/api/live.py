"""A real server in a thread, for what only sockets can show: streaming, cut bodies, clients that hang up."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import uvicorn

from declaim.api.app import create_app
from declaim.api.gate import Gate
from declaim.api.serving import Serving, SpeechEngine
from tests.api.fake_engine import eventually


@contextmanager
def serving_at(
    load: Callable[[], SpeechEngine], *, wait_ready: bool = True, drain_s: int = 5, gate: Gate | None = None
) -> Iterator[tuple[str, uvicorn.Server]]:
    """Serve what `load` makes; gives the base URL and the server."""
    listener = socket.create_server(("127.0.0.1", 0))
    serving = Serving(load)
    config = uvicorn.Config(
        create_app(serving, gate=gate),
        log_config=None,
        log_level="warning",
        access_log=False,
        lifespan="on",
        timeout_graceful_shutdown=drain_s,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        ready = (lambda: serving.stage == "ready") if wait_ready else (lambda: server.started)
        if not eventually(ready, within_s=10):
            raise TimeoutError(f"the server did not come up: {serving.stage} {serving.failure}")
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", server
    finally:
        server.should_exit = True
        thread.join(20)
        listener.close()
        if thread.is_alive():
            raise TimeoutError("the server did not stop")
