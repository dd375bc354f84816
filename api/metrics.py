"""Prometheus metrics of one server: its own counters, and the engine's read at each scrape.

Owns one registry a server, so that two servers in one process never share a counter, and the gate that counts: every
request that costs anything passes a gate, from HTTP or from a WebSocket, so tenants are counted there and nowhere else.
Every name is explained in examples/deploy/README.md.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from declaim.api.gate import NO_TENANT, Admission, Caller, Gate, Usage
from declaim.api.heap import HeapCollector
from declaim.api.serving import Serving
from declaim.api.tenant_errors import QuotaExceeded, RateLimited, TooManyStreams
from declaim.engine.request import Tier

_TTFA_BUCKETS_S = (0.025, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.5, 5.0, 10.0, 30.0)
_GAP_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 2.0, 5.0, 10.0)
_RTF_BUCKETS = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.85, 1.0, 1.2, 1.5, 2.0, 4.0)
# A label is a time series for ever: past so many tenants the next ones share one.
MAX_TENANT_LABELS = 50
OTHER_TENANTS = "other"

AskedBy = Literal["http", "live"]


class _EngineCollector(Collector):
    """Reads engine.stats() when scraped; nothing while there is no engine."""

    def __init__(self, serving: Serving) -> None:
        self._serving = serving

    def collect(self) -> Iterator[Metric]:
        engine = self._serving.warm_engine
        if engine is None:
            return
        stats = engine.stats()
        yield GaugeMetricFamily("declaim_running_sequences", "Sequences in the batch", stats.running)
        yield GaugeMetricFamily("declaim_waiting_sequences", "Sequences waiting for a place", stats.waiting)
        yield GaugeMetricFamily("declaim_kv_blocks_used", "KV blocks in use", stats.blocks_used)
        yield GaugeMetricFamily("declaim_kv_blocks_total", "KV blocks there are", stats.blocks_total)
        yield GaugeMetricFamily("declaim_kv_cache_bytes", "What the KV cache takes once written", stats.cache_bytes)
        yield GaugeMetricFamily("declaim_streams", "Streams open in the engine", stats.streams)
        yield GaugeMetricFamily("declaim_vocoder_pending", "Windows not decoded yet", stats.vocoder_pending)
        yield GaugeMetricFamily("declaim_vocoder_workers", "Vocoder workers ready", stats.vocoder_workers)
        yield CounterMetricFamily("declaim_vocoder_restarts", "Vocoder workers lost", stats.vocoder_restarts)
        yield CounterMetricFamily("declaim_steps", "Engine steps", stats.steps)
        yield CounterMetricFamily("declaim_frames", "Frames generated", stats.frames)
        yield CounterMetricFamily("declaim_preemptions", "Sequences preempted", stats.preemptions)
        yield CounterMetricFamily("declaim_retries", "Segments spoken anew with another seed", stats.retries)
        yield CounterMetricFamily("declaim_underruns", "Times a listener had heard all there was", stats.underruns)


class _WithoutTenants(Collector):
    """What a registry tells, but nothing of tenants by name: who they are and what they ask for is nobody else's
    business."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def collect(self) -> Iterator[Metric]:
        for metric in self._registry.collect():
            metric.samples = [sample for sample in metric.samples if sample.labels.get("tenant") in (None, NO_TENANT)]
            yield metric


class ServerMetrics:
    """The metrics of one server, and their text."""

    def __init__(self, serving: Serving) -> None:
        self._registry = CollectorRegistry()
        self._engine = _EngineCollector(serving)
        self._registry.register(self._engine)
        self._registry.register(HeapCollector())
        ProcessCollector(registry=self._registry)
        self.requests = Counter(
            "declaim_requests", "Speech requests ended", ["status", "outcome"], registry=self._registry
        )
        self.in_flight = Gauge(
            "declaim_requests_in_flight",
            "Speech requests not ended",
            registry=self._registry,
            multiprocess_mode="livesum",
        )
        self.ttfa_s = Histogram(
            "declaim_ttfa_seconds",
            "From a request's arrival to its first audio",
            buckets=_TTFA_BUCKETS_S,
            registry=self._registry,
        )
        self.gap_s = Histogram(
            "declaim_chunk_gap_seconds",
            "From one piece of a streamed answer having been sent to the next being there",
            buckets=_GAP_BUCKETS_S,
            registry=self._registry,
        )
        self.finished = Counter(
            "declaim_speech_finished",
            "Answers sent to their end, by why they ended",
            ["reason"],
            registry=self._registry,
        )
        self.cached = Counter("declaim_cached_answers", "Answers that cost the engine nothing", registry=self._registry)
        self.cache_bytes = Gauge(
            "declaim_cache_bytes",
            "What the cached answers take on disk",
            registry=self._registry,
            multiprocess_mode="livemax",
        )
        self.audio_s = Counter("declaim_audio_seconds", "Audio handed to clients", registry=self._registry)

    def add(self, *collectors: Collector) -> None:
        """Tell what others count, too. Raises: ValueError where a name is there already."""
        for collector in collectors:
            self._registry.register(collector)

    def text(self, *, names_tenants: bool) -> bytes:
        """The exposition format, UTF-8. names_tenants: whether series of tenants are among them."""
        registry = self._registry
        folder = os.environ.get("PROMETHEUS_MULTIPROC_DIR")
        if folder is not None:
            # One worker of several (workers.py): what all of them count lies in files, the engine is theirs together.
            registry = CollectorRegistry()
            MultiProcessCollector(registry, folder)  # type: ignore[no-untyped-call]
            registry.register(self._engine)
        if names_tenants:
            return generate_latest(registry)
        nameless = CollectorRegistry(auto_describe=False)
        nameless.register(_WithoutTenants(registry))
        return generate_latest(nameless)


def make_socket_gauge() -> Gauge:
    """The WebSockets that are open, to be set at every change."""
    return Gauge("declaim_websockets_open", "WebSockets open", registry=None, multiprocess_mode="livesum")


class TenantLabels:
    """Names for tenants in labels: the first `most` that come keep theirs, the rest share one. Any thread."""

    def __init__(self, most: int = MAX_TENANT_LABELS) -> None:
        self._most = most
        self._named: set[str] = set()
        self._lock = threading.Lock()

    def name(self, tenant: str) -> str:
        """The label's value; "" is the tenant of an open server."""
        if not tenant:
            return NO_TENANT
        with self._lock:
            if tenant not in self._named and len(self._named) < self._most:
                self._named.add(tenant)
            return tenant if tenant in self._named else OTHER_TENANTS


class GateMetrics:
    """What passed the gates of one server. has_cache: answers may come from a cache."""

    def __init__(self, *, has_cache: bool, labels: TenantLabels | None = None) -> None:
        self._labels = labels or TenantLabels()
        self._has_cache = has_cache
        self._requests = Counter(
            "declaim_tenant_requests", "Requests and utterances ended", ["tenant", "outcome"], registry=None
        )
        self._chars = Counter(
            "declaim_tenant_characters", "Characters of requests that were let in", ["tenant"], registry=None
        )
        self._audio_s = Counter("declaim_tenant_audio_seconds", "Audio handed to clients", ["tenant"], registry=None)
        self._refused = Counter(
            "declaim_rate_limited", "Requests and utterances refused for a tenant's limits", ["limit"], registry=None
        )
        for limit in ("requests", "characters", "streams", "quota"):
            self._refused.labels(limit)
        self._cache_misses = Counter("declaim_cache_misses", "Answers spoken because the cache had none", registry=None)
        self._utterances = Counter("declaim_utterances", "Utterances of WebSockets ended", ["outcome"], registry=None)
        self._utterances_in_flight = Gauge(
            "declaim_utterances_in_flight",
            "Utterances of WebSockets not ended",
            registry=None,
            multiprocess_mode="livesum",
        )
        self._rtf = Histogram(
            "declaim_real_time_factor",
            "Seconds from a request's admission to its end, for each second of audio; cached and broken ones left out",
            buckets=_RTF_BUCKETS,
            registry=None,
        )
        self.collectors: tuple[Collector, ...] = (
            self._requests,
            self._chars,
            self._audio_s,
            self._refused,
            self._cache_misses,
            self._utterances,
            self._utterances_in_flight,
            self._rtf,
        )

    def refused(self, error: RateLimited | QuotaExceeded) -> None:
        """Count one that was turned away."""
        self._refused.labels(_limit_of(error)).inc()

    def admitted(self, asked_by: AskedBy) -> None:
        """Count one that begins."""
        if asked_by == "live":
            self._utterances_in_flight.inc()

    def ended(self, tenant: str, asked_by: AskedBy, usage: Usage, *, wall_s: float) -> None:
        """Count what one came to. wall_s: since it was admitted."""
        name = self._labels.name(tenant)
        self._requests.labels(name, usage.outcome).inc()
        self._chars.labels(name).inc(usage.chars)
        self._audio_s.labels(name).inc(usage.delivered_s)
        if asked_by == "live":
            # An utterance waits for its text: its pace says nothing of ours.
            self._utterances_in_flight.dec()
            self._utterances.labels(usage.outcome).inc()
            return
        if self._has_cache and not usage.is_cached and usage.ttfa_s is not None:
            self._cache_misses.inc()
        if usage.outcome == "complete" and not usage.is_cached and usage.delivered_s > 0.0:
            self._rtf.observe(wall_s / usage.delivered_s)


def _limit_of(error: RateLimited | QuotaExceeded) -> str:
    if isinstance(error, QuotaExceeded):
        return "quota"
    if isinstance(error, TooManyStreams):
        return "streams"
    return "requests" if error.headers.get("x-ratelimit-remaining-requests") == "0" else "characters"


class MeteredGate:
    """A gate whose admissions are counted."""

    def __init__(self, gate: Gate, metrics: GateMetrics, *, asked_by: AskedBy) -> None:
        self._gate = gate
        self._metrics = metrics
        self._asked_by: AskedBy = asked_by

    async def authenticate(self, credential: str | None) -> Caller:
        """As the gate behind it."""
        return await self._gate.authenticate(credential)

    async def admit(self, caller: Caller, *, request_id: str, chars: int, service_tier: str | None) -> Admission:
        """As the gate behind it."""
        try:
            admission = await self._gate.admit(caller, request_id=request_id, chars=chars, service_tier=service_tier)
        except (RateLimited, QuotaExceeded) as error:
            self._metrics.refused(error)
            raise
        self._metrics.admitted(self._asked_by)
        began_s = time.perf_counter()

        def count(usage: Usage) -> None:
            self._metrics.ended(caller.tenant, self._asked_by, usage, wall_s=time.perf_counter() - began_s)

        return _MeteredAdmission(admission, count, refused=self._metrics.refused)


class _MeteredAdmission:
    def __init__(
        self,
        admission: Admission,
        count: Callable[[Usage], None],
        *,
        refused: Callable[[RateLimited | QuotaExceeded], None],
    ) -> None:
        self._admission = admission
        self._count = count
        self._refused = refused
        self._is_closed = False

    @property
    def tier(self) -> Tier:
        return self._admission.tier

    @property
    def headers(self) -> Mapping[str, str]:
        return self._admission.headers

    async def charge(self, chars: int) -> None:
        """As the admission behind it."""
        try:
            await self._admission.charge(chars)
        except (RateLimited, QuotaExceeded) as error:
            self._refused(error)
            raise

    def close(self, usage: Usage) -> None:
        """Counted once however often it is called."""
        if not self._is_closed:
            self._is_closed = True
            self._count(usage)
        self._admission.close(usage)
