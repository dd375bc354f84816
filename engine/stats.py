"""What an engine holds at one moment, for metrics and tests; plain numbers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EngineStats:
    """What the engine holds at one moment, and what it has done so far.

    cache_bytes: of the KV cache, whole; what of it was never written is no resident memory yet.
    retries: segments spoken anew with another seed. underruns: times that a listener had heard all there was.
    vocoder_workers: those ready to decode; 0 where the engine decodes itself. vocoder_restarts: workers lost.
    vocoder_failure: why nothing will be decoded any more; None while it may be.
    """

    running: int
    waiting: int
    streams: int
    blocks_used: int
    blocks_total: int
    cache_bytes: int
    vocoder_pending: int
    steps: int
    frames: int
    preemptions: int
    retries: int = 0
    underruns: int = 0
    vocoder_workers: int = 0
    vocoder_restarts: int = 0
    vocoder_failure: str | None = None
