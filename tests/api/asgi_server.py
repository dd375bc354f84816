"""Any ASGI application behind real sockets, in a thread."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from starlette.types import ASGIApp

from tests.api.fake_engine import eventually


@contextmanager
def served(app: ASGIApp) -> Iterator[str]:
    """Serve `app`; gives HOST:PORT."""
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(app, log_config=None, log_level="warning", access_log=False, timeout_graceful_shutdown=2)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        if not eventually(lambda: server.started, within_s=10):
            raise TimeoutError("the server did not come up")
        yield f"127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)
        listener.close()
        if thread.is_alive():
            raise TimeoutError("the server did not stop")
