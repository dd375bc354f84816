"""The outermost ASGI layer: what every HTTP request gets, whatever becomes of it.

Owns the request id, the headers that all answers carry, and at a request's end one log line and the counts.
Never reads a body and never changes one.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
import uuid
from dataclasses import dataclass, field
from typing import Literal

from fastapi import Request
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from declaim.api.metrics import ServerMetrics
from declaim.engine.request import FinishReason

logger = logging.getLogger(__name__)

SPEECH_PATH = "/v1/audio/speech"
OPENAI_VERSION = "2020-10-01"
# What clients may leave /v1 out of.
_UNVERSIONED = ("/audio/", "/models", "/organization/")

Outcome = Literal["answered", "complete", "cut", "client_gone", "stopped"]
_UNSAFE_IN_LOG = re.compile(r"[^\x21-\x7e]")


@dataclass(slots=True)
class RequestRecord:
    """What is known of one HTTP request; filled in as it goes, logged at its end.

    outcome: "answered" in one piece; of a stream "complete", "cut" (the engine failed), "client_gone", or
    "stopped" (the server was shut down).
    """

    request_id: str
    began_s: float  # time.perf_counter()
    status: int = 500
    outcome: Outcome = "answered"
    # set by speech
    chars: int | None = None
    ttfa_s: float | None = None
    audio_s: float = 0.0
    finish_reason: FinishReason | None = None
    headers: dict[str, str] = field(default_factory=dict)  # that its answer carries, whatever the answer is
    error: str | None = None


def record_of(request: Request) -> RequestRecord:
    """The record that AccessLayer opened for this request."""
    record = request.state.record
    if not isinstance(record, RequestRecord):
        raise TypeError("request.state.record was overwritten")
    return record


class AccessLayer:
    """Wraps the whole application, so that even the answer to an unexpected exception has its request id.

    metrics: of the application; what stands beside it adds its own.
    """

    def __init__(self, app: ASGIApp, metrics: ServerMetrics) -> None:
        self._app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket"):
            scope["path"] = canonical_path(scope["path"])
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = RequestRecord(f"req_{uuid.uuid4().hex}", time.perf_counter())
        scope.setdefault("state", {})["record"] = record

        is_speech = scope["path"] == SPEECH_PATH
        sent_at_s: float | None = None  # the last piece of audio

        async def send_with_headers(message: Message) -> None:
            nonlocal sent_at_s
            if message["type"] == "http.response.start":
                record.status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = record.request_id
                headers["openai-version"] = OPENAI_VERSION
                headers.update(record.headers)
                headers["openai-processing-ms"] = str(round((time.perf_counter() - record.began_s) * 1000))
            is_audio = is_speech and record.status == 200 and bool(message.get("body"))
            if is_audio and sent_at_s is not None:
                self.metrics.gap_s.observe(time.perf_counter() - sent_at_s)
            await send(message)
            if is_audio:
                sent_at_s = time.perf_counter()

        if is_speech:
            self.metrics.in_flight.inc()
        try:
            await self._app(scope, receive, send_with_headers)
        except asyncio.CancelledError:
            # Only the server cancels us, when its time to stop is up; it would print a traceback for each.
            record.outcome = "stopped"
        finally:
            if is_speech:
                self.metrics.in_flight.dec()
                self.metrics.requests.labels(str(record.status), record.outcome).inc()
            _log(scope, record, level=_level(record) if is_speech else logging.DEBUG)


def canonical_path(path: str) -> str:
    """The path that is routed: without a slash at its end, and with /v1 where a client left it out.

    A redirect would say the same, and many clients lose the body they post through one.
    """
    path = path.rstrip("/") or "/"
    return "/v1" + path if path.startswith(_UNVERSIONED) else path


def _level(record: RequestRecord) -> int:
    """A stream that said too much or too little was a 200: here it must be seen."""
    return logging.WARNING if record.finish_reason in ("runaway", "missing") else logging.INFO


def _log(scope: Scope, record: RequestRecord, *, level: int) -> None:
    wall_s = time.perf_counter() - record.began_s
    headers = Headers(scope=scope)
    fields: dict[str, object] = {
        "event": "request",
        "request_id": record.request_id,
        "method": scope["method"],
        "path": scope["path"],
        "status": record.status,
        "outcome": record.outcome,
        "wall_ms": round(wall_s * 1000),
    }
    if record.chars is not None:
        fields["chars"] = record.chars
    if record.ttfa_s is not None:
        fields["ttfa_ms"] = round(record.ttfa_s * 1000)
        fields["audio_s"] = f"{record.audio_s:.2f}"
    if record.finish_reason not in (None, "stop"):
        fields["finish_reason"] = record.finish_reason
    if record.audio_s > 0.0:
        fields["rtf"] = f"{wall_s / record.audio_s:.3f}"
    for name, header in (("retry", "x-stainless-retry-count"), ("client_request_id", "x-client-request-id")):
        if headers.get(header, "0") != "0":
            fields[name] = headers[header][:512]
    line = " ".join(f"{name}={_UNSAFE_IN_LOG.sub('_', str(value))}" for name, value in fields.items())
    if record.error is not None:
        line += f" error={json.dumps(record.error, ensure_ascii=False)}"
    logger.log(level, "%s", line)
