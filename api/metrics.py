"""Prometheus metrics of one server: its own counters, and the engine's read at each scrape.

Owns one registry a server, so that two servers in one process never share a counter.
"""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from declaim.api.serving import Serving

_TTFA_BUCKETS_S = (0.025, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.5, 5.0, 10.0, 30.0)


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
        yield GaugeMetricFamily("declaim_streams", "Streams open in the engine", stats.streams)
        yield GaugeMetricFamily("declaim_vocoder_pending", "Windows not decoded yet", stats.vocoder_pending)
        yield CounterMetricFamily("declaim_steps", "Engine steps", stats.steps)
        yield CounterMetricFamily("declaim_frames", "Frames generated", stats.frames)
        yield CounterMetricFamily("declaim_preemptions", "Sequences preempted", stats.preemptions)


class ServerMetrics:
    """The metrics of one server, and their text."""

    def __init__(self, serving: Serving) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(serving))
        self.requests = Counter(
            "declaim_requests", "Speech requests ended", ["status", "outcome"], registry=self._registry
        )
        self.in_flight = Gauge("declaim_requests_in_flight", "Speech requests not ended", registry=self._registry)
        self.ttfa_s = Histogram(
            "declaim_ttfa_seconds",
            "From a request's arrival to its first audio",
            buckets=_TTFA_BUCKETS_S,
            registry=self._registry,
        )
        self.finished = Counter(
            "declaim_speech_finished",
            "Answers sent to their end, by why they ended",
            ["reason"],
            registry=self._registry,
        )
        self.cached = Counter("declaim_cached_answers", "Answers that cost the engine nothing", registry=self._registry)
        self.audio_s = Counter("declaim_audio_seconds", "Audio handed to clients", registry=self._registry)

    def text(self) -> bytes:
        """The exposition format, UTF-8."""
        return generate_latest(self._registry)
