"""One WebSocket: who opened it, how many there are, what is read from it, and what is sent without piling up.

Owns authentication before the handshake, the limits on sockets, messages and time, the one writer at a time, and the
end of all of them when the server stops. Knows no message type.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Protocol

from starlette.websockets import WebSocket, WebSocketDisconnect

from declaim.api.errors import ClientGone, InvalidBody, error_response
from declaim.api.gate import NO_HEADERS, Caller, Gate, credential_of
from declaim.api.keys import check_affiliation
from declaim.api.serving import Serving, SpeechEngine
from declaim.engine.errors import DeclaimError, Overloaded

CLOSE_NORMAL = 1000
CLOSE_GOING_AWAY = 1001
CLOSE_POLICY = 1008
CLOSE_INTERNAL = 1011

_KEY_PROTOCOLS = ("token", "bearer")
_KEY_PREFIX = "openai-insecure-api-key."
_MAX_INLINE_CHARS = 64 << 10
STOPPING = "the server is stopping: connect again, another one will answer"


@dataclass(frozen=True, slots=True)
class SocketLimits:
    """config_timeout_s: until the first message. idle_timeout_s: without a message while nothing is spoken.

    send_timeout_s: how long one message may wait for a client that does not read. max_strikes: messages that cannot
    be used, one after another, before the socket is closed.
    """

    max_sockets: int = 2000
    max_sockets_per_tenant: int = 500
    config_timeout_s: float = 10.0
    idle_timeout_s: float = 600.0
    send_timeout_s: float = 20.0
    max_text_bytes: int = 128 << 10
    max_config_bytes: int = 4 << 20
    max_strikes: int = 32


class SocketPlaces:
    """The sockets that are open: how many, of all tenants and of each, and the one word that ends them all."""

    def __init__(self, limits: SocketLimits, *, on_change: Callable[[int], object] | None = None) -> None:
        """on_change: told how many are open, of all tenants."""
        self.limits = limits
        self.stopping = asyncio.Event()
        """Set once the server is told to stop: every socket then says what it has taken in, and closes."""
        self._on_change = on_change
        self._open: Counter[str] = Counter()

    @contextmanager
    def place(self, tenant: str) -> Iterator[None]:
        """Raises: Overloaded where there are as many as there may be."""
        limits = self.limits
        if self._open.total() >= limits.max_sockets or self._open[tenant] >= limits.max_sockets_per_tenant:
            raise Overloaded(
                f"{self._open[tenant]} of your sockets are open, {self._open.total()} in all: at most "
                f"{limits.max_sockets_per_tenant} and {limits.max_sockets} may be; close one",
                retry_after_s=5.0,
            )
        self._count(tenant, 1)
        try:
            yield
        finally:
            self._count(tenant, -1)

    def _count(self, tenant: str, change: int) -> None:
        self._open[tenant] += change
        if not self._open[tenant]:
            del self._open[tenant]
        if self._on_change is not None:
            self._on_change(self._open.total())


class SocketGone(Exception):
    """The client closed the socket, or does not read what it is sent."""


def socket_credential(websocket: WebSocket) -> tuple[str | None, str | None]:
    """The key that a socket carries, and the subprotocol to agree on.

    As `credential_of`; else a subprotocol, which is all that a browser can set: "token" or "bearer" and then the key,
    or "openai-insecure-api-key.KEY". A browser wants one of its subprotocols agreed on, whatever it means.
    """
    credential = credential_of(websocket.headers, websocket.query_params)
    offered = list(websocket.scope.get("subprotocols", ()))
    if len(offered) >= 2 and offered[0].lower() in _KEY_PROTOCOLS:
        return credential or offered[1], offered[0]
    for name in offered:
        if name.startswith(_KEY_PREFIX):
            others = [other for other in offered if other != name]
            return credential or name.removeprefix(_KEY_PREFIX), (others or [name])[0]
    return credential, offered[0] if offered else None


class Socket:
    """An accepted WebSocket. Any number of tasks may send."""

    def __init__(self, websocket: WebSocket, limits: SocketLimits) -> None:
        self._websocket = websocket
        self._limits = limits
        self._writing = asyncio.Lock()

    async def receive(self) -> Mapping[str, object]:
        """The next message, a JSON object.

        Raises: InvalidBody for any other message, SocketGone.
        """
        message = await self._websocket.receive()
        if message["type"] != "websocket.receive":
            raise SocketGone("the client closed the socket")
        text = message.get("text")
        if text is None:
            raise InvalidBody("A binary message was sent: send JSON objects as text messages")
        most = self._limits.max_config_bytes
        if len(text) > most:
            raise InvalidBody(f"The message has {len(text)} characters, at most {most} are taken: send less at once")
        fields = _parse(text) if len(text) <= _MAX_INLINE_CHARS else await asyncio.to_thread(_parse, text)
        if fields.get("type") != "session.config" and len(text) > self._limits.max_text_bytes:
            most = self._limits.max_text_bytes
            raise InvalidBody(f"The message has {len(text)} characters, at most {most} are taken: send less at once")
        return fields

    async def send(self, message: Mapping[str, object] | bytes) -> None:
        """Send JSON or audio; waits while the client is slow. Raises: SocketGone."""
        try:
            async with asyncio.timeout(self._limits.send_timeout_s), self._writing:
                if isinstance(message, bytes):
                    await self._websocket.send_bytes(message)
                else:
                    # ASCII: half a surrogate pair that a client sent may be in what it is told.
                    await self._websocket.send_text(json.dumps(message, separators=(",", ":")))
        except TimeoutError:
            raise SocketGone(f"the client read nothing for {self._limits.send_timeout_s:g} s") from None
        except (WebSocketDisconnect, RuntimeError, ClientGone):
            # RuntimeError: it was closed by us or by the server while this waited for its turn.
            raise SocketGone("the client closed the socket") from None

    async def close(self, code: int, *, reason: str = "") -> None:
        """Close it; no effect where it is closed."""
        try:
            async with asyncio.timeout(1.0):
                await self._websocket.close(code, reason=reason[:120])
        except (TimeoutError, RuntimeError, WebSocketDisconnect):
            return


@dataclass(frozen=True, slots=True)
class Opening:
    """Who opens a socket, before it is accepted."""

    engine: SpeechEngine
    caller: Caller
    credential: str | None


class SocketSession(Protocol):
    """What a protocol does with one socket."""

    @property
    def broken(self) -> asyncio.Future[None]:
        """Fails with what ends the session for good."""
        ...

    async def read(self) -> tuple[int, str]:
        """Handle messages until the client wants no more; gives the code and the reason to close."""
        ...

    async def finish(self) -> None:
        """Take in no more, and say what was taken in; `read` was cancelled."""
        ...

    async def end(self) -> None:
        """End all work, finished or not; idempotent."""
        ...


async def open_socket(
    websocket: WebSocket,
    serving: Serving,
    gate: Gate,
    places: SocketPlaces,
    prepare: Callable[[Opening], Awaitable[Callable[[Socket], SocketSession]]],
    *,
    headers: Mapping[str, str] = NO_HEADERS,
) -> None:
    """One socket from its handshake to its end.

    prepare: checks what the client asks for, and gives what makes its session; what it raises is answered as an HTTP
    error, as all that is wrong before the handshake is done. headers: of the handshake's answer.
    """
    credential, subprotocol = socket_credential(websocket)
    try:
        engine = serving.engine()
        caller = await gate.authenticate(credential)
        check_affiliation(caller, websocket.headers)
        session_on = await prepare(Opening(engine, caller, credential))
        with places.place(caller.tenant):
            raw_headers = [(name.encode(), value.encode()) for name, value in headers.items()]
            await websocket.accept(subprotocol=subprotocol, headers=raw_headers)
            socket = Socket(websocket, places.limits)
            await serve_socket(socket, session_on(socket), stopping=places.stopping)
    except DeclaimError as error:
        await _deny(websocket, error)


async def _deny(websocket: WebSocket, error: DeclaimError) -> None:
    """Answer the handshake with an HTTP error, as a client that has sent a request would get it."""
    try:
        await websocket.send_denial_response(error_response(error))
    except RuntimeError:  # the server cannot say more than 403
        await websocket.close(CLOSE_POLICY, reason=str(error)[:120])


async def serve_socket(socket: Socket, session: SocketSession, *, stopping: asyncio.Event) -> None:
    """Run a session until it gives a code to close, breaks, or has finished because the server stops; then close."""
    reader = asyncio.create_task(session.read())
    stop = asyncio.create_task(stopping.wait())
    code, reason = CLOSE_INTERNAL, "internal error"
    try:
        first: set[asyncio.Future[Any]] = {reader, session.broken, stop}
        await asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED)
        if not (reader.done() or session.broken.done()):
            reader.cancel()
            await asyncio.wait({reader})
            reader = asyncio.create_task(_finish(session))
            either: set[asyncio.Future[Any]] = {reader, session.broken}
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if session.broken.done():
            session.broken.result()
        code, reason = reader.result()
    except SocketGone as gone:
        code, reason = CLOSE_POLICY, str(gone)
    finally:
        for task in (reader, stop):
            task.cancel()
        await asyncio.wait({reader, stop})
        await session.end()
        await socket.close(code, reason=reason)


async def _finish(session: SocketSession) -> tuple[int, str]:
    await session.finish()
    return CLOSE_GOING_AWAY, STOPPING


async def finish_while_open(socket: Socket, finish: Coroutine[None, None, None], *, cancel: str) -> bool:
    """Wait for the rest to be spoken; whether a message of type `cancel` came first. Any other is ignored.

    Raises: SocketGone.
    """
    finishing = asyncio.create_task(finish)
    listening = asyncio.create_task(_hear(socket, cancel))
    try:
        await asyncio.wait({finishing, listening}, return_when=asyncio.FIRST_COMPLETED)
        if not listening.done():
            return False
        listening.result()
        return True
    finally:
        finishing.cancel()
        listening.cancel()
        await asyncio.wait({finishing, listening})


async def _hear(socket: Socket, kind: str) -> None:
    while True:
        with suppress(InvalidBody):
            if (await socket.receive()).get("type") == kind:
                return


def _parse(text: str) -> Mapping[str, object]:
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidBody(f"The message is not JSON ({str(error)[:100]}): send one JSON object") from None
    if not isinstance(fields, dict):
        raise InvalidBody("The message is not a JSON object: send one")
    return fields
