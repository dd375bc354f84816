"""An engine that speaks a sine: the api layer's tests need no model, and can make everything go wrong."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from declaim.engine import AudioChunk, DeclaimError, EngineStats, SpeechRequest
from declaim.engine.request import EncodedVoice, Voice
from declaim.engine.spec import CacheSpec, CodecSpec, FrameRule, ModelSpec, SamplingDefaults, SamplingSpec

FRAME_RATE_HZ = 25


def make_spec(sample_rate_hz: int) -> ModelSpec:
    return ModelSpec(
        family="fake",
        cache=CacheSpec(num_layers=1, num_kv_heads=1, head_dim=64),
        rule=FrameRule(delay=(0,), fill=0, eos=None, drain=()),
        sampling=SamplingSpec(ops=(), defaults=SamplingDefaults()),
        codec=CodecSpec(
            sample_rate_hz=sample_rate_hz,
            hop=sample_rate_hz // FRAME_RATE_HZ,
            left=0,
            right=0,
            num_codebooks=1,
            codebook_size=2,
        ),
        hidden_size=64,
        vocab_size=2,
        max_positions=1000,
        has_side=False,
        supports_speed=True,
        supports_voice_prompt=True,
    )


@dataclass(frozen=True, slots=True)
class Script:
    """What the fake does for every request.

    refuse: raised instead of the first chunk. failure: raised after `fail_after` chunks.
    """

    num_chunks: int = 3
    frames_per_chunk: int = 5
    first_delay_s: float = 0.0
    delay_s: float = 0.0
    sample_rate_hz: int = 24_000
    refuse: DeclaimError | Exception | None = None
    fail_after: int | None = None
    failure: DeclaimError | Exception | None = None


@dataclass(slots=True)
class FakeEngine:
    """Implements SpeechEngine. gate: waited for in warm_up. requests, cancelled, finished: what it saw."""

    script: Script = Script()
    model_name: str = "lark"
    fingerprint: str = "weights"
    vocoder_failure: str | None = None
    gate: threading.Event | None = None
    warm_up_failure: Exception | None = None
    requests: list[SpeechRequest] = field(default_factory=list)
    cancelled: dict[str, float] = field(default_factory=dict)  # request id -> time.perf_counter()
    finished: list[str] = field(default_factory=list)
    encoded: list[Voice] = field(default_factory=list)
    num_closed: int = 0
    num_warmed: int = 0

    @property
    def spec(self) -> ModelSpec:
        return make_spec(self.script.sample_rate_hz)

    def audio(self) -> NDArray[np.float32]:
        """All that a request that is not made to fail will hear."""
        return np.concatenate([chunk.audio for chunk in self._chunks("any")])

    def _chunks(self, request_id: str) -> Iterator[AudioChunk]:
        script = self.script
        hop = script.sample_rate_hz // FRAME_RATE_HZ
        for index in range(script.num_chunks):
            first_frame = index * script.frames_per_chunk
            times = (first_frame * hop + np.arange(script.frames_per_chunk * hop)) / script.sample_rate_hz
            is_last = index == script.num_chunks - 1
            yield AudioChunk(
                request_id=request_id,
                audio=(0.5 * np.sin(2 * np.pi * 440.0 * times)).astype(np.float32),
                first_frame=first_frame,
                num_frames=script.frames_per_chunk,
                sample_rate_hz=script.sample_rate_hz,
                is_last=is_last,
                finish_reason="stop" if is_last else None,
            )

    def _scripted(self, request: SpeechRequest) -> Iterator[tuple[float, AudioChunk]]:
        script = self.script
        if script.refuse is not None:
            raise script.refuse
        for index, chunk in enumerate(self._chunks(request.request_id or "none")):
            if index == script.fail_after and script.failure is not None:
                raise script.failure
            yield script.delay_s if index else script.first_delay_s, chunk

    def stream(self, request: SpeechRequest) -> Iterator[AudioChunk]:
        self.requests.append(request)
        for delay_s, chunk in self._scripted(request):
            time.sleep(delay_s)
            yield chunk

    async def astream(self, request: SpeechRequest) -> AsyncGenerator[AudioChunk, None]:
        self.requests.append(request)
        request_id = request.request_id or "none"
        try:
            for delay_s, chunk in self._scripted(request):
                await asyncio.sleep(delay_s)
                yield chunk
            self.finished.append(request_id)
        finally:
            if request_id not in self.finished:
                self.cancelled[request_id] = time.perf_counter()

    def encode_voice(self, voice: Voice) -> EncodedVoice:
        self.encoded.append(voice)
        return EncodedVoice(voice.transcript, np.ones((len(voice.audio) // 960, 1), np.int32))

    def warm_up(self) -> None:
        if self.gate is not None:
            self.gate.wait(10)
        if self.warm_up_failure is not None:
            raise self.warm_up_failure
        self.num_warmed += 1

    def stats(self) -> EngineStats:
        return EngineStats(
            running=3,
            waiting=4,
            streams=7,
            blocks_used=5,
            cache_bytes=0,
            blocks_total=60,
            vocoder_pending=8,
            steps=900,
            frames=1000,
            preemptions=11,
            vocoder_failure=self.vocoder_failure,
        )

    def close(self) -> None:
        self.num_closed += 1


def scripted(**changes: object) -> FakeEngine:
    """A FakeEngine whose script differs from the default in `changes`."""
    return FakeEngine(replace(Script(), **changes))  # type: ignore[arg-type]


def eventually(condition: Callable[[], bool], *, within_s: float = 30.0) -> bool:
    """Whether `condition` comes true in time."""
    deadline = time.perf_counter() + within_s
    while not condition():
        if time.perf_counter() > deadline:
            return False
        time.sleep(0.005)
    return True
