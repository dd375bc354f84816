"""OpenTelemetry: one span a request or utterance, from its admission to its end, if the operator names a collector.

Owns the exporter. Like the counts, spans are made at the gate, which everything passes that costs anything. They hold
no key and no text. The collector is named as everywhere: OTEL_EXPORTER_OTLP_ENDPOINT, or
OTEL_EXPORTER_OTLP_TRACES_ENDPOINT; without it, or without the extra `otel`, nothing is traced.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from declaim.api.gate import Admission, Caller, Gate, Usage
from declaim.engine.request import Tier

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Span

logger = logging.getLogger(__name__)

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
# For one batch, all tries together; so long can a collector that is gone hold up the end.
_TIMEOUT_S = 3.0


def open_tracing() -> Tracing | None:
    """What the environment asks for; None if nothing is to be traced, or cannot be: the log then says why."""
    if not any(os.environ.get(name) for name in _ENDPOINTS):
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError as error:
        logger.warning("event=not_traced error=%r remedy='pip install declaim[otel]'", str(error))
        return None
    return Tracing(OTLPSpanExporter(timeout=_TIMEOUT_S))


class Tracing:
    """Sends spans in batches from a thread of its own; a collector that is gone costs requests nothing."""

    def __init__(self, exporter: SpanExporter) -> None:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        name = os.environ.get("OTEL_SERVICE_NAME", "declaim")
        self._provider = TracerProvider(resource=Resource.create({"service.name": name}))
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("declaim")

    def gate(self, gate: Gate) -> Gate:
        """The same gate, its admissions traced."""
        return _TracedGate(gate, self)

    def start(self, caller: Caller, *, request_id: str) -> Span:
        """The span of something that was let in."""
        attributes = {"declaim.request_id": request_id, "declaim.tenant": caller.tenant}
        return self._tracer.start_span("speech", attributes=attributes, start_time=time.time_ns())

    def close(self) -> None:
        """Send what there is."""
        self._provider.shutdown()


class _TracedGate:
    def __init__(self, gate: Gate, tracing: Tracing) -> None:
        self._gate = gate
        self._tracing = tracing

    async def authenticate(self, credential: str | None) -> Caller:
        """As the gate behind it."""
        return await self._gate.authenticate(credential)

    async def admit(self, caller: Caller, *, request_id: str, chars: int, service_tier: str | None) -> Admission:
        """As the gate behind it."""
        admission = await self._gate.admit(caller, request_id=request_id, chars=chars, service_tier=service_tier)
        return _TracedAdmission(admission, self._tracing.start(caller, request_id=request_id))


class _TracedAdmission:
    def __init__(self, admission: Admission, span: Span) -> None:
        self._admission = admission
        self._span = span
        self._began_ns = time.time_ns()

    @property
    def tier(self) -> Tier:
        return self._admission.tier

    @property
    def headers(self) -> Mapping[str, str]:
        return self._admission.headers

    async def charge(self, chars: int) -> None:
        """As the admission behind it."""
        await self._admission.charge(chars)

    def close(self, usage: Usage) -> None:
        """Ends the span; only the first time counts."""
        self._admission.close(usage)
        span = self._span
        if not span.is_recording():
            return
        if usage.ttfa_s is not None:
            # Its clock started a little before it was let in.
            at_ns = min(self._began_ns + int(usage.ttfa_s * 1e9), time.time_ns())
            span.add_event("first audio", {"declaim.ttfa_s": usage.ttfa_s}, at_ns)
        span.set_attributes(
            {
                "declaim.model": usage.model,
                "declaim.response_format": usage.response_format,
                "declaim.chars": usage.chars,
                "declaim.audio_s": usage.delivered_s,
                "declaim.status": usage.status,
                "declaim.outcome": usage.outcome,
                "declaim.is_cached": usage.is_cached,
            }
        )
        if usage.status >= 500 or usage.outcome == "cut":
            from opentelemetry.trace import StatusCode

            span.set_status(StatusCode.ERROR)
        span.end()
