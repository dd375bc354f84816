"""One request's audio as encoded parts, made by the engine or taken from the cache.

Owns the way from AudioChunk to bytes, and the sharing of one generation by identical requests that run at the same
time. Never frames a part for HTTP, never knows a caller.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from concurrent.futures import Executor
from contextlib import aclosing
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from declaim.api.cache import ResultCache, StoredSpeech
from declaim.api.pipeline import AudioPipeline, in_worker
from declaim.api.serving import SpeechEngine
from declaim.engine.errors import DeclaimError
from declaim.engine.joints import Joint
from declaim.engine.request import AudioChunk, FinishReason, SpeechRequest, Word

_SILENCE_S = 0.2


@dataclass(frozen=True, slots=True)
class Rendering:
    """How a request's audio becomes bytes. tempo: of playback, 1.0 where the model paces itself."""

    response_format: str
    sample_rate_hz: int | None
    tempo: float


@dataclass(frozen=True, slots=True)
class Part:
    """Consecutive bytes of one answer, often none while an encoder waits for more.

    words: those that begin in it, timed as they are heard. audio_s: its audio as it is heard; generated_s: as the
    engine made it, 0 where it did not. finish_reason: on the last part only.
    """

    data: bytes
    words: tuple[Word, ...]
    num_frames: int
    audio_s: float
    generated_s: float
    finish_reason: FinishReason | None

    def joined(self, other: Part) -> Part:
        """This part and the one that follows it, as one."""
        return Part(
            self.data + other.data,
            self.words + other.words,
            self.num_frames + other.num_frames,
            self.audio_s + other.audio_s,
            self.generated_s + other.generated_s,
            other.finish_reason,
        )


class PartStream(Protocol):
    """The parts of one answer, in order; an async generator is one."""

    def __anext__(self) -> Awaitable[Part]: ...

    def aclose(self) -> Awaitable[None]:
        """End the work behind it, finished or not; idempotent."""
        ...


def is_speakable(text: str) -> bool:
    """Whether there is a letter or a digit. Agents send bare punctuation and emoji: those are a short silence."""
    return any(character.isalnum() for character in text)


async def render(
    engine: SpeechEngine, request: SpeechRequest, how: Rendering, workers: Executor, *, joint: Joint | None = None
) -> AsyncGenerator[Part, None]:
    """Speak a request; closing the generator cancels it. joint: how it follows on another request's audio.

    Raises: what `Engine.astream` raises.
    """
    joint = joint or Joint(engine.spec.codec.sample_rate_hz, is_first=True, is_last=True)
    chunks = engine.astream(request) if is_speakable(request.text) else _silence(engine, request)
    pipeline: AudioPipeline | None = None
    waiting: list[Word] = []
    async with aclosing(chunks):
        try:
            async for chunk in chunks:
                if pipeline is None:
                    rate_hz = chunk.sample_rate_hz
                    pipeline = await in_worker(workers, lambda rate_hz=rate_hz: _pipeline(how, rate_hz))
                audio = joint.feed(chunk.audio, is_end=chunk.is_last)
                waiting += chunk.words
                words, waiting = (waiting, []) if joint.has_begun else ([], waiting)
                data = await in_worker(workers, _encode, pipeline, audio, chunk.is_last)
                if chunk.is_last:
                    await anext(chunks, None)  # the engine's own end: what is closed before it counts as cancelled
                yield Part(
                    data=data,
                    words=tuple(_heard(word, joint, how.tempo) for word in words),
                    num_frames=chunk.num_frames,
                    audio_s=len(audio) / chunk.sample_rate_hz / how.tempo,
                    generated_s=len(chunk.audio) / chunk.sample_rate_hz,
                    finish_reason=chunk.finish_reason or "stop" if chunk.is_last else None,
                )
        finally:
            if pipeline is not None:
                pipeline.close()


def _pipeline(how: Rendering, source_rate_hz: int) -> AudioPipeline:
    return AudioPipeline(
        how.response_format, source_rate_hz=source_rate_hz, speed=how.tempo, sample_rate_hz=how.sample_rate_hz
    )


def _encode(pipeline: AudioPipeline, audio: NDArray[np.float32], is_last: bool) -> bytes:
    data = pipeline.feed(audio)
    return data + pipeline.finish() if is_last else data


def _heard(word: Word, joint: Joint, tempo: float) -> Word:
    return Word(word.text, joint.heard_s(word.start_s) / tempo, joint.heard_s(word.end_s) / tempo)


async def _silence(engine: SpeechEngine, request: SpeechRequest) -> AsyncGenerator[AudioChunk, None]:
    rate_hz = engine.spec.codec.sample_rate_hz
    yield AudioChunk(
        request_id=request.request_id or "",
        audio=np.zeros(round(_SILENCE_S * rate_hz), np.float32),
        first_frame=0,
        num_frames=0,
        sample_rate_hz=rate_hz,
        is_last=True,
        finish_reason="stop",
    )


class _SharedRender:
    """One generation, heard by every identical request from its first part on; it ends when nobody listens.

    It runs as fast as the engine goes and keeps all its parts: memory of one answer, not of one for each listener.
    """

    def __init__(self, parts: PartStream, keep: Callable[[list[Part]], Awaitable[None]]) -> None:
        """keep: what is done with all the parts at the end, before the task ends."""
        self.parts: list[Part] = []
        self.changed = asyncio.Event()  # set, and replaced, at every change
        self.failure: DeclaimError | None = None
        self.is_complete = False
        self.num_listeners = 0
        self._source = parts
        self._keep = keep
        self.task = asyncio.create_task(self._run())

    @property
    def is_open(self) -> bool:
        """Whether one more may listen: it was neither given up nor failed."""
        return self.failure is None and not self.task.cancelling() and (self.is_complete or not self.task.done())

    async def _run(self) -> None:
        try:
            async with aclosing(self._source):
                while (part := await anext(self._source, None)) is not None:
                    self.parts.append(part)
                    self._wake()
            self.is_complete = True
        except DeclaimError as error:
            self.failure = error
        finally:
            self._wake()
        if self.is_complete:
            await self._keep(self.parts)

    def _wake(self) -> None:
        self.changed.set()
        self.changed = asyncio.Event()


class _Listener:
    """One request's place at a shared generation, held from the moment it is made."""

    def __init__(self, shared: _SharedRender) -> None:
        self._shared = shared
        self._index = 0
        self._is_closed = False
        shared.num_listeners += 1

    async def __anext__(self) -> Part:
        shared = self._shared
        while self._index == len(shared.parts):
            if shared.is_complete:
                raise StopAsyncIteration
            if shared.failure is not None:
                raise shared.failure
            if shared.task.done():
                shared.task.result()
            await shared.changed.wait()
        self._index += 1
        return shared.parts[self._index - 1]

    async def aclose(self) -> None:
        shared = self._shared
        if self._is_closed:
            return
        self._is_closed = True
        shared.num_listeners -= 1
        if shared.num_listeners == 0 and not shared.is_complete and not shared.task.done():
            shared.task.cancel()
            await asyncio.wait({shared.task})


class _Replay:
    """A stored answer as its one part."""

    def __init__(self, stored: StoredSpeech) -> None:
        self._part: Part | None = Part(
            stored.data, stored.words, stored.num_frames, stored.audio_s, 0.0, stored.finish_reason
        )

    async def __anext__(self) -> Part:
        part, self._part = self._part, None
        if part is None:
            raise StopAsyncIteration
        return part

    async def aclose(self) -> None:
        """There is nothing to end."""


class Renders:
    """Where answers come from: the cache, an identical request that runs, or the engine.

    Without a cache every request is spoken for itself, no faster than its client reads.
    """

    def __init__(self, cache: ResultCache | None) -> None:
        self._cache = cache
        self._running: dict[str, _SharedRender] = {}

    async def open(self, key: Callable[[], str], start: Callable[[], PartStream]) -> tuple[PartStream, bool]:
        """An answer's parts, and whether they cost the engine nothing.

        key: names the answer (`cache_key`), asked for only if there is a cache. start: begins to speak.
        """
        cache = self._cache
        if cache is None:
            return start(), False
        name = key()
        if (running := self._listen(name)) is not None:
            return running, True
        stored = await asyncio.to_thread(cache.read, name)
        if stored is not None:
            return _Replay(stored), True
        if (running := self._listen(name)) is not None:  # begun while the disk was read
            return running, True

        async def keep(parts: list[Part]) -> None:
            await asyncio.to_thread(_store, cache, name, parts)

        shared = _SharedRender(start(), keep)
        self._running[name] = shared
        shared.task.add_done_callback(lambda _: self._forget(name, shared))
        return _Listener(shared), False

    def _listen(self, name: str) -> PartStream | None:
        shared = self._running.get(name)
        if shared is None or not shared.is_open:
            return None
        if not shared.is_complete:
            return _Listener(shared)
        return _Replay(_joined(shared.parts)) if shared.parts else None

    def _forget(self, name: str, shared: _SharedRender) -> None:
        if self._running.get(name) is shared:
            del self._running[name]


def _joined(parts: list[Part]) -> StoredSpeech:
    return StoredSpeech(
        data=b"".join(part.data for part in parts),
        words=tuple(word for part in parts for word in part.words),
        num_frames=sum(part.num_frames for part in parts),
        audio_s=sum(part.audio_s for part in parts),
        finish_reason=parts[-1].finish_reason or "stop",
    )


def _store(cache: ResultCache, name: str, parts: list[Part]) -> None:
    if parts and parts[-1].finish_reason in ("stop", "length"):
        cache.write(name, _joined(parts))
