"""One engine for several processes: requests go to it, and audio comes back, in frames over one socket a process.

Owns both ends and what is written between them. `RemoteEngine` is the engine as a process without one sees it;
`EngineServer` speaks for the engine where it lives. A request holds credits for a few chunks and gets one back for each
that is taken from it, so that a client who does not read makes neither process grow. A socket that breaks ends the
requests that came over it, at both ends, at once.

A frame: two lengths in bytes (uint32, network order), a JSON object, and raw little-endian arrays, which the object
describes. What the engine's side is sent is data alone. The model's spec, which only the engine's side sends, is
pickled.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import json
import logging
import math
import pickle
import socket
import struct
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import aclosing
from functools import partial
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from declaim.api.serving import Serving, SpeechEngine
from declaim.engine import AudioChunk, EngineStats, SpeechRequest, errors
from declaim.engine.errors import DeclaimError, EngineClosed, InvalidRequest, Overloaded
from declaim.engine.request import EncodedVoice, SamplingParams, Voice, Word
from declaim.engine.spec import ModelSpec

logger = logging.getLogger(__name__)

Order = Literal["drain", "stop"]
T = TypeVar("T")
Header = dict[str, Any]

# Chunks of one request on their way: enough that the engine's side never waits for an answer.
WINDOW = 4
_LENGTHS = struct.Struct("!II")
_MAX_HEADER_BYTES = 64 << 20
_MAX_ARRAY_BYTES = 512 << 20
_PROGRESS_S = 0.1
_DTYPES = ("float32", "float64", "int32")


class BadFrame(Exception):
    """What came is not what the other side would send."""


class FrameSocket:
    """Frames over a connected socket; any number of tasks may send."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def open(cls, connected: socket.socket) -> FrameSocket:
        """Take over a stream socket."""
        return cls(*await asyncio.open_unix_connection(sock=connected))

    async def read(self) -> tuple[Header, bytes] | None:
        """The next object and the bytes after it; None when the other side is gone. Raises: BadFrame."""
        try:
            header_bytes, payload_bytes = _LENGTHS.unpack(await self._reader.readexactly(_LENGTHS.size))
            if header_bytes > _MAX_HEADER_BYTES or payload_bytes > _MAX_ARRAY_BYTES:
                raise BadFrame(f"a frame of {header_bytes} and {payload_bytes} bytes")
            header = await self._reader.readexactly(header_bytes)
            payload = await self._reader.readexactly(payload_bytes)
        except (asyncio.IncompleteReadError, ConnectionError):
            return None
        fields = json.loads(header)
        if not isinstance(fields, dict):
            raise BadFrame("a frame without an object")
        return fields, payload

    def post(self, header: Mapping[str, object], payload: bytes = b"") -> None:
        """Send without waiting: for what is small and seldom. No effect where the other side is gone."""
        if not self._writer.is_closing():
            data = json.dumps(header, separators=(",", ":")).encode()
            self._writer.write(b"".join((_LENGTHS.pack(len(data), len(payload)), data, payload)))

    async def send(self, header: Mapping[str, object], payload: bytes = b"") -> None:
        """Send, and wait while the other side reads nothing. Raises: EngineClosed where it is gone."""
        self.post(header, payload)
        try:
            await self._writer.drain()
        except ConnectionError:
            raise _lost() from None

    def close(self) -> None:
        """Close it; idempotent."""
        self._writer.close()


# The end without an engine.


class EngineLink:
    """A process' way to the engine of another one: reads what comes, and hands it to those who wait for it."""

    def __init__(
        self,
        frames: FrameSocket,
        *,
        on_progress: Callable[[str, int, int], None],
        on_order: Callable[[Order], None],
    ) -> None:
        """on_progress: how far the engine is loaded. on_order: what the engine's process wants this one to do; "stop"
        too when it is gone."""
        self.ready: Future[RemoteEngine] = Future()  # for any thread; EngineClosed where the engine's process is gone
        self._frames = frames
        self._on_progress = on_progress
        self._on_order = on_order
        self._loop = asyncio.get_running_loop()
        self._ids = itertools.count()
        self._inboxes: dict[int, asyncio.Queue[tuple[Header, bytes] | None]] = {}
        self._is_lost = False

    async def run(self) -> None:
        """Read until the other side is gone."""
        try:
            while (frame := await self._frames.read()) is not None:
                self._take(*frame)
        finally:
            self._is_lost = True
            for inbox in self._inboxes.values():
                inbox.put_nowait(None)
            if not self.ready.done():
                self.ready.set_exception(_lost())
            self._frames.close()
            self._on_order("stop")

    def _take(self, header: Header, payload: bytes) -> None:
        match header["kind"]:
            case "progress":
                self._on_progress(header["stage"], header["done"], header["total"])
            case "ready":
                model_name, fingerprint, spec = pickle.loads(payload)
                self.ready.set_result(RemoteEngine(self, model_name, fingerprint, spec))
            case "drain" | "stop":
                self._on_order(header["kind"])
            case _ if header["id"] in self._inboxes:  # else it was cancelled meanwhile
                self._inboxes[header["id"]].put_nowait((header, payload))

    async def stream(self, header: Header, payload: bytes) -> AsyncGenerator[tuple[Header, bytes], None]:
        """What the engine's side answers to one message, up to its end; closing the generator cancels the work.

        Raises: DeclaimError as the engine raised it, RuntimeError where that was none, EngineClosed where the other
        side is gone.
        """
        if self._is_lost:
            raise _lost()
        number = next(self._ids)
        inbox = self._inboxes[number] = asyncio.Queue()
        has_ended = False
        try:
            await self._frames.send({**header, "id": number}, payload)
            while True:
                frame = await inbox.get()
                has_ended = frame is None or frame[0]["kind"] in ("end", "error")
                if frame is None:
                    raise _lost()
                if frame[0]["kind"] == "error":
                    raise _read_error(frame[0])
                if has_ended:
                    return
                yield frame
                self._frames.post({"kind": "credit", "id": number})
        finally:
            del self._inboxes[number]
            if not has_ended:
                self._frames.post({"kind": "cancel", "id": number})

    async def ask(self, header: Header, payload: bytes = b"") -> tuple[Header, bytes]:
        """The one answer to a message. Raises: as `stream`."""
        async with aclosing(self.stream(header, payload)) as answers:
            answer = await anext(answers)
            await anext(answers, None)
        return answer

    def wait(self, work: Coroutine[Any, Any, T]) -> T:
        """Run on the link's event loop, from any other thread."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()


class RemoteEngine:
    """Implements SpeechEngine for a process without an engine; its owner warms it up and closes it.

    `astream` belongs to the event loop of its link, all other methods to any other thread.
    """

    def __init__(self, link: EngineLink, model_name: str, fingerprint: str, spec: ModelSpec) -> None:
        self.model_name = model_name
        self.fingerprint = fingerprint
        self.spec = spec
        self._link = link

    async def astream(self, request: SpeechRequest) -> AsyncGenerator[AudioChunk, None]:
        """Chunks of one request; closing the generator cancels the request.

        Raises: as `EngineLink.stream`.
        """
        fields, payload = _write_request(request)
        header = {"kind": "speak", "window": WINDOW, "request": fields}
        async with aclosing(self._link.stream(header, payload)) as frames:
            async for chunk_header, audio in frames:
                yield _read_chunk(chunk_header, audio)

    def stream(self, request: SpeechRequest) -> Iterator[AudioChunk]:
        """`astream` for a thread."""
        chunks = self.astream(request)

        async def next_chunk() -> AudioChunk | None:
            return await anext(chunks, None)

        async def end() -> None:
            await chunks.aclose()

        try:
            while (chunk := self._link.wait(next_chunk())) is not None:
                yield chunk
        finally:
            self._link.wait(end())

    def encode_voice(self, voice: Voice) -> EncodedVoice:
        """Encode reference audio, where the engine is. Raises: InvalidRequest."""
        fields, payload = _write_voice(voice)
        answer, arrays = self._link.wait(self._link.ask({"kind": "encode", "voice": fields}, payload))
        encoded = _read_voice(answer["voice"], arrays)
        if not isinstance(encoded, EncodedVoice):
            raise BadFrame("a voice that is not encoded")
        return encoded

    def stats(self) -> EngineStats:
        answer, _ = self._link.wait(self._link.ask({"kind": "stats"}))
        return EngineStats(**answer["stats"])

    def warm_up(self) -> None:
        """Its owner did."""

    def close(self) -> None:
        """Its owner does."""


# The end with the engine.


class EngineServer:
    """Serves an engine, from when it is warm, to any number of processes; lives in one event loop."""

    def __init__(self, serving: Serving) -> None:
        self._serving = serving
        self._clients: set[_EngineClient] = set()

    @property
    def num_requests(self) -> int:
        """What is being done for all of them."""
        return sum(client.num_jobs for client in self._clients)

    async def serve(self, connected: socket.socket) -> None:
        """Serve one process over a socket that leads to it, until that is gone. All that it asked for has ended then.

        Cancelled, it ends the same.
        """
        client = _EngineClient(self._serving, await FrameSocket.open(connected))
        self._clients.add(client)
        try:
            await client.run()
        finally:
            self._clients.discard(client)

    def order(self, order: Order) -> None:
        """Tell all processes to end: "drain" lets them finish what runs, "stop" does not wait for long."""
        for client in self._clients:
            client.order(order)


@dataclasses.dataclass(frozen=True, slots=True)
class _Job:
    """One message's work. credits: chunks that may still be sent."""

    task: asyncio.Task[None]
    credits: asyncio.Semaphore


class _EngineClient:
    """One process that is served."""

    def __init__(self, serving: Serving, frames: FrameSocket) -> None:
        self._serving = serving
        self._frames = frames
        self._jobs: dict[int, _Job] = {}

    @property
    def num_jobs(self) -> int:
        return len(self._jobs)

    def order(self, order: Order) -> None:
        self._frames.post({"kind": order})

    async def run(self) -> None:
        greeting = asyncio.create_task(self._greet())
        try:
            while (frame := await self._frames.read()) is not None:
                self._take(*frame)
        except (BadFrame, ValueError, KeyError, TypeError) as error:
            logger.error("event=bad_frame error=%r", error)
        finally:
            # First: a chunk that waits for a reader which is gone must not hold up its task.
            self._frames.close()
            tasks = [greeting, *(job.task for job in self._jobs.values())]
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

    async def _greet(self) -> None:
        """Tell how far the engine is, until it is ready."""
        told: tuple[str, int] | None = None
        while (engine := self._serving.warm_engine) is None:
            if (progress := self._serving.progress()) != told:
                told = progress
                self._frames.post({"kind": "progress", "stage": progress[0], "done": progress[1], "total": 100})
            await asyncio.sleep(_PROGRESS_S)
        self._frames.post({"kind": "ready"}, pickle.dumps((engine.model_name, engine.fingerprint, engine.spec)))

    def _take(self, header: Header, payload: bytes) -> None:
        """Raises: BadFrame, ValueError, KeyError or TypeError for what no process of ours sends."""
        number = _typed(header, "id", int)
        match header["kind"]:
            case "credit":
                if number in self._jobs:
                    self._jobs[number].credits.release()
            case "cancel":
                if number in self._jobs:
                    self._jobs[number].task.cancel()
            case "speak":
                credits = asyncio.Semaphore(_typed(header, "window", int))
                request = _read_request(_typed(header, "request", dict), payload)
                self._begin(number, self._speak(number, request, credits), credits)
            case "encode":
                voice = _read_voice(_typed(header, "voice", dict), payload)
                if not isinstance(voice, Voice):
                    raise BadFrame("a voice without audio")
                self._begin(number, self._encode(number, voice))
            case "stats":
                self._begin(number, self._tell_stats(number))
            case kind:
                raise BadFrame(f"a frame of kind {kind!r}")

    def _begin(self, number: int, work: Coroutine[Any, Any, None], credits: asyncio.Semaphore | None = None) -> None:
        if number in self._jobs:
            work.close()
            raise BadFrame(f"the number {number} a second time")
        task = asyncio.create_task(work)
        self._jobs[number] = _Job(task, credits or asyncio.Semaphore(0))
        task.add_done_callback(partial(self._ended, number))

    def _ended(self, number: int, task: asyncio.Task[None]) -> None:
        del self._jobs[number]
        if task.cancelled():
            return
        error = task.exception()
        if error is None:
            self._frames.post({"kind": "end", "id": number})
            return
        if not isinstance(error, DeclaimError):
            logger.error("event=engine_raised", exc_info=error)
        self._frames.post({"kind": "error", "id": number, **_write_error(error)})

    def _engine(self) -> SpeechEngine:
        engine = self._serving.warm_engine
        if engine is None:
            raise EngineClosed("the engine was closed: try again, another one will answer")
        return engine

    async def _speak(self, number: int, request: SpeechRequest, credits: asyncio.Semaphore) -> None:
        async with aclosing(self._engine().astream(request)) as chunks:
            async for chunk in chunks:
                await credits.acquire()
                header, audio = _write_chunk(chunk)
                await self._frames.send({"kind": "chunk", "id": number, **header}, audio)

    async def _encode(self, number: int, voice: Voice) -> None:
        fields, payload = _write_voice(await asyncio.to_thread(self._engine().encode_voice, voice))
        await self._frames.send({"kind": "voice", "id": number, "voice": fields}, payload)

    async def _tell_stats(self, number: int) -> None:
        stats = self._engine().stats()
        self._frames.post({"kind": "stats", "id": number, "stats": dataclasses.asdict(stats)})


# What is written between them.


def _lost() -> EngineClosed:
    return EngineClosed("the engine's process is gone: try again, another one will answer")


def _typed(fields: Mapping[str, Any], name: str, kind: type[T]) -> T:
    """A field that must be of one type, no subtype. Raises: BadFrame, KeyError."""
    value = fields[name]
    if type(value) is not kind:
        raise BadFrame(f"{name} is a {type(value).__name__}, not a {kind.__name__}")
    return value


def _optional(fields: Mapping[str, Any], name: str, kind: type[T]) -> T | None:
    return None if fields[name] is None else _typed(fields, name, kind)


def _write_arrays(arrays: Sequence[NDArray[Any]]) -> tuple[list[object], bytes]:
    """What describes arrays, and their bytes one after the other."""
    described: list[object] = [[array.dtype.name, list(array.shape)] for array in arrays]
    return described, b"".join(array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes() for array in arrays)


def _read_arrays(described: Sequence[Any], payload: bytes) -> list[NDArray[Any]]:
    """Raises: BadFrame, ValueError, TypeError."""
    arrays: list[NDArray[Any]] = []
    offset = 0
    for name, shape in described:
        if name not in _DTYPES or not all(type(size) is int and size >= 0 for size in shape):
            raise BadFrame(f"an array of {name!r} and shape {shape!r}")
        dtype = np.dtype(name).newbyteorder("<")
        count = math.prod(shape)
        array = np.frombuffer(payload, dtype, count, offset) if count else np.zeros(0, dtype)
        arrays.append(array.astype(np.dtype(name), copy=False).reshape(shape))
        offset += count * dtype.itemsize
    if offset != len(payload):
        raise BadFrame(f"{len(payload)} bytes for arrays of {offset}")
    return arrays


def _write_voice(voice: Voice | EncodedVoice | str | None) -> tuple[Header, bytes]:
    if voice is None or isinstance(voice, str):
        return {"kind": "own", "name": voice}, b""
    if isinstance(voice, Voice):
        described, payload = _write_arrays([voice.audio])
        fields = {"kind": "voice", "transcript": voice.transcript, "sample_rate_hz": voice.sample_rate_hz}
        return {**fields, "arrays": described}, payload
    parts = [voice.codes] if voice.embedding is None else [voice.codes, voice.embedding]
    described, payload = _write_arrays(parts)
    return {"kind": "encoded", "transcript": voice.transcript, "arrays": described}, payload


def _read_voice(fields: Header, payload: bytes) -> Voice | EncodedVoice | str | None:
    """Raises: BadFrame, ValueError, KeyError, TypeError."""
    if fields["kind"] == "own":
        return _optional(fields, "name", str)
    transcript = _typed(fields, "transcript", str)
    first, *others = _read_arrays(_typed(fields, "arrays", list), payload)
    if fields["kind"] == "voice" and not others:
        return Voice(transcript, first, _typed(fields, "sample_rate_hz", int))
    if fields["kind"] == "encoded" and len(others) <= 1:
        return EncodedVoice(transcript, first, *others)
    raise BadFrame(f"a voice of kind {fields['kind']!r} with {1 + len(others)} arrays")


def _write_request(request: SpeechRequest) -> tuple[Header, bytes]:
    voice, payload = _write_voice(request.voice)
    fields = {field.name: getattr(request, field.name) for field in dataclasses.fields(request)}
    return {
        **fields,
        "voice": voice,
        "sampling": dataclasses.asdict(request.sampling),
        "lexicon": dict(request.lexicon),
        "controls": dict(request.controls),
    }, payload


def _read_request(fields: Header, payload: bytes) -> SpeechRequest:
    """Raises: BadFrame, ValueError, KeyError, TypeError. What SpeechRequest checks itself is checked by it."""
    if fields.keys() != {field.name for field in dataclasses.fields(SpeechRequest)}:
        raise BadFrame(f"a request of {sorted(fields)}")
    lexicon = _typed(fields, "lexicon", dict)
    if not all(type(said) is str for said in lexicon.values()):
        raise BadFrame("a lexicon that says no words")
    controls = {
        name: tuple(map(float, value)) if isinstance(value, list) else value
        for name, value in _typed(fields, "controls", dict).items()
    }
    if not all(type(value) in (int, float, str, tuple) for value in controls.values()):
        raise BadFrame("a control that is neither a number nor a word")
    try:
        return SpeechRequest(
            text=_typed(fields, "text", str),
            voice=_read_voice(_typed(fields, "voice", dict), payload),
            sampling=SamplingParams(**_typed(fields, "sampling", dict)),
            speed=fields["speed"],
            request_id=_optional(fields, "request_id", str),
            language=_optional(fields, "language", str),
            normalize=_typed(fields, "normalize", bool),
            lexicon=lexicon,
            controls=controls,
            word_timestamps=_typed(fields, "word_timestamps", bool),
            tenant=_typed(fields, "tenant", str),
            weight=fields["weight"],
            tier=fields["tier"],
            continues=_typed(fields, "continues", bool),
        )
    except InvalidRequest as error:
        raise BadFrame(f"a request that no process of ours makes: {error}") from error


def _write_chunk(chunk: AudioChunk) -> tuple[Header, bytes]:
    return {
        "request_id": chunk.request_id,
        "first_frame": chunk.first_frame,
        "num_frames": chunk.num_frames,
        "sample_rate_hz": chunk.sample_rate_hz,
        "is_last": chunk.is_last,
        "finish_reason": chunk.finish_reason,
        "words": [[word.text, word.start_s, word.end_s] for word in chunk.words],
    }, chunk.audio.astype("<f4", copy=False).tobytes()


def _read_chunk(header: Header, audio: bytes) -> AudioChunk:
    return AudioChunk(
        request_id=header["request_id"],
        audio=np.frombuffer(audio, "<f4").astype(np.float32, copy=False),
        first_frame=header["first_frame"],
        num_frames=header["num_frames"],
        sample_rate_hz=header["sample_rate_hz"],
        is_last=header["is_last"],
        finish_reason=header["finish_reason"],
        words=tuple(Word(*word) for word in header["words"]),
    )


def _write_error(error: BaseException) -> Header:
    """An error by the class of the engine's tree that it is or comes from; None is a fault in the engine."""
    names = [kind.__name__ for kind in type(error).__mro__ if kind.__module__ == errors.__name__]
    return {
        "class": names[0] if names else None,
        "message": str(error),
        "param": error.param if isinstance(error, InvalidRequest) else None,
        "retry_after_s": error.retry_after_s if isinstance(error, Overloaded) else None,
    }


def _read_error(header: Header) -> Exception:
    if header["class"] is None:
        return RuntimeError(f"the engine failed, and its process' log says why: {header['message']}")
    kind: type[DeclaimError] = getattr(errors, header["class"])
    if issubclass(kind, InvalidRequest):
        return kind(header["message"], param=header["param"])
    if issubclass(kind, Overloaded):
        return kind(header["message"], retry_after_s=header["retry_after_s"])
    return kind(header["message"])
