"""What carries one answer to its client: parts awaited while the client listens, the response, and the account.

Owns the disconnect, the keep-alives, the cut of a stream that failed, and the one report of what a request cost.
"""

from __future__ import annotations

import asyncio

from fastapi import Request, Response
from starlette.types import Message, Receive, Scope, Send

from declaim.api.access import RequestRecord
from declaim.api.errors import ClientGone, answer_for
from declaim.api.framing import Framing
from declaim.api.gate import Admission, Usage
from declaim.api.metrics import ServerMetrics
from declaim.api.rendering import Part, PartStream
from declaim.engine.errors import DeclaimError, EngineError

# A browser throws away what it has not read when the connection breaks: a failure that is told gets so long to be read.
_LAST_WORD_S = 0.1
_STREAM_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}


class Listening:
    """The parts of one answer, each awaited together with the client's hanging up.

    The body has been read before, so all that `request.receive` can still give is the disconnect.
    """

    def __init__(self, parts: PartStream, request: Request) -> None:
        self._parts = parts
        self._pending: asyncio.Task[Part] | None = None
        self._gone: asyncio.Task[Message] = asyncio.ensure_future(_receive(request))

    async def next(self, *, patience_s: float | None = None) -> Part:
        """The next part.

        Raises: TimeoutError if none came in `patience_s` (ask again), ClientGone, EngineError at a missing end, and
        what the engine raises.
        """
        if self._pending is None:
            self._pending = asyncio.ensure_future(_pull(self._parts))
        pending = self._pending
        await asyncio.wait({pending, self._gone}, timeout=patience_s, return_when=asyncio.FIRST_COMPLETED)
        if self._gone.done():
            raise ClientGone("the client hung up")
        if not pending.done():
            raise TimeoutError
        self._pending = None
        return pending.result()

    async def close(self) -> None:
        """End the engine's work, finished or not; idempotent."""
        self._gone.cancel()
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.cancel()
            await asyncio.wait({pending})
            if not pending.cancelled():
                pending.exception()  # seen: where the client is gone, nobody else will look
        await self._parts.aclose()


async def _receive(request: Request) -> Message:
    return await request.receive()


async def _pull(parts: PartStream) -> Part:
    try:
        return await parts.__anext__()
    except StopAsyncIteration:
        raise EngineError("the engine ended the request without a last piece of audio") from None


class Account:
    """What one admitted request came to; the gate is told once."""

    def __init__(
        self,
        admission: Admission,
        record: RequestRecord,
        metrics: ServerMetrics,
        *,
        model: str,
        voice: str,
        response_format: str,
        chars: int,
    ) -> None:
        self._admission = admission
        self._record = record
        self._metrics = metrics
        self._model = model
        self._voice = voice
        self._response_format = response_format
        self._chars = chars
        self._num_frames = 0
        self._generated_s = 0.0
        self._is_closed = False
        self.is_cached = False

    def made(self, part: Part) -> None:
        """Count what was made, whether or not anybody will hear it."""
        self._num_frames += part.num_frames
        self._generated_s += 0.0 if self.is_cached else part.generated_s

    def delivered(self, part: Part) -> None:
        """Count what was handed to the client, and learn how it ended."""
        self._record.audio_s += part.audio_s
        self._metrics.audio_s.inc(part.audio_s)
        if part.finish_reason is not None:
            self._record.finish_reason = part.finish_reason
            self._metrics.finished.labels(part.finish_reason).inc()

    def ended_by(self, error: BaseException) -> None:
        """Close it for a request that ended before its response began; a bug keeps the record's 500."""
        if isinstance(error, DeclaimError):
            self._record.status = answer_for(error).status
        if isinstance(error, asyncio.CancelledError):
            self._record.outcome = "stopped"
        elif isinstance(error, ClientGone):
            self._record.outcome = "client_gone"
        self.close()

    def close(self) -> None:
        """Tell the gate; idempotent. The record must hold the status and the outcome."""
        if self._is_closed:
            return
        self._is_closed = True
        record = self._record
        outcome: str = record.outcome
        if outcome in ("complete", "answered") and record.finish_reason in ("runaway", "missing"):
            outcome = record.finish_reason
        self._admission.close(
            Usage(
                model=self._model,
                voice=self._voice,
                response_format=self._response_format,
                chars=self._chars,
                frames=self._num_frames,
                generated_s=self._generated_s,
                delivered_s=record.audio_s,
                ttfa_s=record.ttfa_s,
                status=record.status,
                outcome=outcome,
                is_cached=self.is_cached,
            )
        )


class StreamedSpeech(Response):
    """Sends the parts as they come; returns without the last body message where the stream failed."""

    def __init__(
        self,
        first: Part,
        listening: Listening,
        *,
        framing: Framing,
        account: Account,
        record: RequestRecord,
        keepalive_s: float,
    ) -> None:
        super().__init__(media_type=framing.media_type, headers=_STREAM_HEADERS)
        del self.headers["content-length"]
        if first.finish_reason is not None:
            self.headers["x-finish-reason"] = first.finish_reason
        self._first = first
        self._listening = listening
        self._framing = framing
        self._account = account
        self._record = record
        self._keepalive_s = keepalive_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        record = self._record
        record.outcome = "cut"  # unless it turns out otherwise
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            part = self._first
            while True:
                await _send_part(send, self._framing.part(part))
                self._account.delivered(part)
                if part.finish_reason is not None:
                    break
                part = await self._next(send)
                self._account.made(part)
            await send({"type": "http.response.body", "body": b"", "more_body": False})
            record.outcome = "complete"
        except ClientGone:
            record.outcome = "client_gone"
        except asyncio.CancelledError:
            record.outcome = "stopped"
            raise
        except DeclaimError as error:
            record.error = str(error)
            last_word = self._framing.failure(error)
            await _send_part(send, last_word)
            if last_word:
                await asyncio.sleep(_LAST_WORD_S)
        finally:
            self._account.close()
            await self._listening.close()

    async def _next(self, send: Send) -> Part:
        while True:
            try:
                return await self._listening.next(patience_s=self._keepalive_s)
            except TimeoutError:
                await _send_part(send, self._framing.keepalive)


async def _send_part(send: Send, data: bytes) -> None:
    if data:
        await send({"type": "http.response.body", "body": data, "more_body": True})


class WholeSpeech(Response):
    """An answer known to its end before its first byte is sent, with its length."""

    def __init__(
        self, content: bytes, parts: list[Part], *, media_type: str, account: Account, record: RequestRecord
    ) -> None:
        headers = {"cache-control": "no-cache", "x-finish-reason": parts[-1].finish_reason or "stop"}
        super().__init__(content, media_type=media_type, headers=headers)
        self._parts = parts
        self._account = account
        self._record = record

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._record.outcome = "cut"
        try:
            await super().__call__(scope, receive, send)
            for part in self._parts:
                self._account.delivered(part)
            self._record.outcome = "complete"
        finally:
            self._account.close()


class NoResponse(Response):
    """What is sent to a client that hung up: nothing."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        return None
