"""One engine for several processes: what goes over the socket between them, and `declaim serve --api-workers`."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, aclosing, asynccontextmanager, closing
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest
from fastapi.testclient import TestClient

from declaim.api.remote import WINDOW, EngineLink, EngineServer, FrameSocket, RemoteEngine
from declaim.api.server import ServerOptions, serving_app
from declaim.api.serving import Serving
from declaim.api.settings import ApiSettings
from declaim.api.store.database import Database
from declaim.engine import AudioChunk, DeclaimError, EngineError, InvalidRequest, SpeechRequest, errors
from declaim.engine.request import EncodedVoice, SamplingParams, Voice, Word
from tests.api.fake_engine import FakeEngine, eventually, scripted
from tests.api.server_process import is_ready, server_process
from tests.api.worker_engine import CountingEngine

ROOT = Path(__file__).parents[2]


async def comes_true(condition: object, *, within_s: float = 5.0) -> bool:
    return await asyncio.to_thread(eventually, condition, within_s=within_s)  # type: ignore[arg-type]


@dataclasses.dataclass(frozen=True)
class World:
    """Both ends of one socket, in one event loop."""

    engine: FakeEngine
    server: EngineServer
    remote: RemoteEngine
    link: EngineLink
    reading: asyncio.Task[None]
    serving: asyncio.Task[None]
    orders: list[str]


@asynccontextmanager
async def world(engine: FakeEngine) -> AsyncIterator[World]:
    owner = Serving(lambda: engine)
    owner.start()
    server = EngineServer(owner)
    ours, its = socket.socketpair()
    serving = asyncio.create_task(server.serve(ours))
    orders: list[str] = []
    link = EngineLink(await FrameSocket.open(its), on_progress=lambda *_: None, on_order=orders.append)
    reading = asyncio.create_task(link.run())
    try:
        remote = await asyncio.wait_for(asyncio.wrap_future(link.ready), 10)
        yield World(engine, server, remote, link, reading, serving, orders)
    finally:
        reading.cancel()
        await asyncio.wait({reading, serving}, timeout=5)
        assert serving.done()
        await asyncio.to_thread(owner.close)


async def collect(chunks: AsyncGenerator[AudioChunk, None]) -> list[AudioChunk]:
    async with aclosing(chunks):
        return [chunk async for chunk in chunks]


def test_audio_and_words_arrive_bit_by_bit_as_the_engine_made_them() -> None:
    @dataclasses.dataclass(slots=True)
    class Speaking(FakeEngine):
        async def astream(self, request: SpeechRequest) -> AsyncGenerator[AudioChunk, None]:
            async for chunk in FakeEngine.astream(self, request):
                yield dataclasses.replace(chunk, words=(Word("caf\u00e9 \ud800", 0.1, 1 / 3),))

    async def run() -> None:
        async with world(Speaking()) as at:
            heard = await collect(at.remote.astream(SpeechRequest("Hello.", request_id="a")))
            expected = await collect(Speaking().astream(SpeechRequest("Hello.", request_id="a")))
            assert len(heard) == 3
            for chunk, other in zip(heard, expected, strict=True):
                np.testing.assert_array_equal(chunk.audio, other.audio)
                assert chunk.audio.dtype == np.float32
                for field in dataclasses.fields(AudioChunk):
                    if field.name != "audio":
                        assert getattr(chunk, field.name) == getattr(other, field.name)
            assert at.engine.finished == ["a"] and not at.engine.cancelled
            assert at.remote.model_name == "lark" and at.remote.spec == at.engine.spec
            assert at.remote.fingerprint == at.engine.fingerprint == "weights"
            assert repr(at.remote.spec) == repr(at.engine.spec)  # what names the cache's files and voices

    asyncio.run(run())


@pytest.mark.parametrize(
    "voice",
    [
        None,
        "wren",
        EncodedVoice("said", np.arange(12, dtype=np.int32).reshape(4, 3)),
        EncodedVoice("", np.zeros((0, 9), np.int32), np.linspace(0, 1, 5, dtype=np.float32)),
        Voice("said", np.linspace(-1, 1, 20, dtype=np.float32).reshape(10, 2), 16_000),
    ],
    ids=["default", "named", "codes", "embedding", "audio"],
)
def test_the_engine_gets_every_field_of_a_request(voice: Voice | EncodedVoice | str | None) -> None:
    request = SpeechRequest(
        text="na\u00efve \U0001f600 \udc00 five",
        voice=voice,
        sampling=SamplingParams(temperature=0.7, top_k=3, seed=2**62, max_seconds=1.5),
        speed=1.25,
        request_id="req_1",
        language="en",
        normalize=False,
        lexicon={"SQL": "sequel"},
        controls={"emotion": (0.1, 0.2), "rate": 3.0, "style": "calm"},
        word_timestamps=True,
        tenant="acme",
        weight=2.5,
        tier="flex",
    )

    async def run() -> None:
        async with world(scripted()) as at:
            await collect(at.remote.astream(request))
            (seen,) = at.engine.requests
            if not isinstance(voice, Voice | EncodedVoice):
                assert seen == request
                return
            assert dataclasses.replace(seen, voice=None) == dataclasses.replace(request, voice=None)
            assert type(seen.voice) is type(voice)
            for field in dataclasses.fields(voice):
                np.testing.assert_equal(getattr(seen.voice, field.name), getattr(voice, field.name))

    asyncio.run(run())


KINDS = [
    kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, DeclaimError)
]  # all of engine/errors.py


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("after", [None, 2], ids=["refused", "broken_off"])
def test_an_error_of_the_engine_is_the_same_error_at_the_other_end(kind: type[DeclaimError], after: int | None) -> None:
    error = kind("too bad: do better")
    if isinstance(error, InvalidRequest):
        error.param = "voice"
    if isinstance(error, errors.Overloaded):
        error.retry_after_s = 7.5
    engine = scripted(refuse=error) if after is None else scripted(failure=error, fail_after=after)

    async def run() -> None:
        async with world(engine) as at:
            heard = 0
            with pytest.raises(DeclaimError) as raised:
                async for _ in at.remote.astream(SpeechRequest("Hello.")):
                    heard += 1
            assert type(raised.value) is kind and str(raised.value) == str(error)
            assert vars(raised.value) == vars(error)
            assert heard == (after or 0) and at.server.num_requests == 0

    asyncio.run(run())


def test_a_fault_of_the_engine_is_no_error_of_the_caller(caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> None:
        async with world(scripted(refuse=ZeroDivisionError("of all things"))) as at:
            with pytest.raises(RuntimeError, match="the engine failed.*of all things"):
                await collect(at.remote.astream(SpeechRequest("Hello.")))

    asyncio.run(run())
    assert "engine_raised" in caplog.text and "ZeroDivisionError" in caplog.text


def test_a_closed_stream_is_cancelled_in_the_engine_and_its_neighbour_goes_on() -> None:
    async def run() -> None:
        async with world(scripted(num_chunks=20, delay_s=0.01)) as at:
            neighbour = asyncio.create_task(collect(at.remote.astream(SpeechRequest("Hello.", request_id="b"))))
            stream = at.remote.astream(SpeechRequest("Hello.", request_id="a"))
            await anext(stream)
            await stream.aclose()
            assert await comes_true(lambda: "a" in at.engine.cancelled)
            assert len(await neighbour) == 20 and at.engine.finished == ["b"]

    asyncio.run(run())


def test_who_does_not_read_is_sent_no_more_than_the_window() -> None:
    num_made = 0

    @dataclasses.dataclass(slots=True)
    class Counting(FakeEngine):
        async def astream(self, request: SpeechRequest) -> AsyncGenerator[AudioChunk, None]:
            nonlocal num_made
            async for chunk in FakeEngine.astream(self, request):
                num_made += request.request_id == "slow"
                yield chunk

    async def run() -> None:
        async with world(Counting(dataclasses.replace(scripted().script, num_chunks=100))) as at:
            slow = at.remote.astream(SpeechRequest("Hello.", request_id="slow"))
            await anext(slow)
            # A hundred chunks for somebody else over the same socket: time enough for those of the slow one.
            assert len(await collect(at.remote.astream(SpeechRequest("Hello.")))) == 100
            assert num_made == WINDOW + 1  # one more waits in the engine's process for a credit
            assert 1 + len(await collect(slow)) == 100

    asyncio.run(run())


def test_two_hundred_dropped_streams_leave_nothing() -> None:
    async def drop(at: World, index: int) -> None:
        stream = at.remote.astream(SpeechRequest("Hello.", request_id=str(index)))
        for _ in range(index % 5):
            await anext(stream)
        await stream.aclose()

    async def run() -> None:
        async with world(scripted(num_chunks=50, delay_s=0.002)) as at:
            tasks = len(asyncio.all_tasks())
            await asyncio.gather(*(drop(at, index) for index in range(200)))
            assert await comes_true(lambda: at.server.num_requests == 0)
            begun = {request.request_id for request in at.engine.requests}
            assert begun == set(at.engine.cancelled) and not at.engine.finished
            assert len(begun) >= 160  # a stream that nobody asked for a chunk never began
            assert len(asyncio.all_tasks()) == tasks
            gc.collect()
            # By type(): isinstance() asks torch's deprecated names for their class, and they warn.
            queues = [found for found in gc.get_objects() if issubclass(type(found), asyncio.Queue)]
            assert not [queue for queue in queues if not queue.empty()]
            assert len(await collect(at.remote.astream(SpeechRequest("Hello.")))) == 50

    asyncio.run(run())


def test_a_process_that_is_gone_ends_what_the_engine_does_for_it() -> None:
    async def run() -> None:
        async with world(scripted(num_chunks=1000, delay_s=0.01)) as at:
            streams = [at.remote.astream(SpeechRequest("Hello.", request_id=str(index))) for index in range(5)]
            for stream in streams:
                await anext(stream)
            at.reading.cancel()  # closes the socket, as a death does
            assert await comes_true(lambda: len(at.engine.cancelled) == 5)
            await asyncio.wait_for(at.serving, 5)
            assert at.server.num_requests == 0
            for stream in streams:
                with pytest.raises(errors.EngineClosed, match="process is gone"):
                    await collect(stream)

    asyncio.run(run())


def test_an_engine_that_is_gone_ends_every_stream_and_tells_its_process_to_stop() -> None:
    async def run() -> None:
        async with world(scripted(num_chunks=1000, delay_s=0.01)) as at:
            stream = at.remote.astream(SpeechRequest("Hello."))
            await anext(stream)
            at.serving.cancel()
            with pytest.raises(errors.EngineClosed, match="process is gone: try again"):
                await collect(stream)
            await asyncio.wait_for(at.reading, 5)
            assert at.orders == ["stop"]
            with pytest.raises(errors.EngineClosed):
                await collect(at.remote.astream(SpeechRequest("Hello.")))

    asyncio.run(run())


def test_voices_statistics_and_whole_streams_for_threads() -> None:
    recording = Voice("said", np.zeros(9600, np.float32), 24_000)

    async def run() -> None:
        async with world(scripted()) as at:
            assert await asyncio.to_thread(at.remote.stats) == at.engine.stats()
            encoded = await asyncio.to_thread(at.remote.encode_voice, recording)
            assert encoded.transcript == "said" and encoded.codes.shape == (10, 1) and encoded.codes.dtype == np.int32
            np.testing.assert_array_equal(at.engine.encoded[0].audio, recording.audio)
            chunks = await asyncio.to_thread(lambda: list(at.remote.stream(SpeechRequest("Hello."))))
            np.testing.assert_array_equal(np.concatenate([chunk.audio for chunk in chunks]), at.engine.audio())

    asyncio.run(run())


def test_frames_that_no_process_sends_break_the_socket_and_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    async def refused(at: World, header: dict[str, object], payload: bytes = b"") -> None:
        ours, its = socket.socketpair()
        serving = asyncio.create_task(at.server.serve(ours))
        frames = await FrameSocket.open(its)
        await frames.send(header, payload)
        await asyncio.wait_for(serving, 5)
        frames.close()

    async def run() -> None:
        fields = {field.name: None for field in dataclasses.fields(SpeechRequest)}
        own = {"kind": "own", "name": None}
        whole = {**fields, "text": "a", "voice": own, "sampling": {}, "speed": 1, "normalize": True, "lexicon": {}}
        whole |= {"controls": {}, "word_timestamps": False, "tenant": "", "weight": 1, "tier": "default"}
        huge = {"kind": "encoded", "transcript": "", "arrays": [["int32", [1 << 40]]]}
        objects = {"kind": "encoded", "transcript": "", "arrays": [["object", [1]]]}
        async with world(scripted()) as at:
            for request in (
                {},
                {**whole, "tier": "first"},
                {**whole, "text": 7},
                {**whole, "more": 1},
                {**whole, "sampling": {"top_k": 1.5}},
                {**whole, "sampling": {"luck": 1}},
                {**whole, "lexicon": {"a": 1}},
                {**whole, "voice": huge},
                {**whole, "voice": objects},
            ):
                await refused(at, {"kind": "speak", "id": 1, "window": 4, "request": request}, b"12345678")
            await refused(at, {"kind": "open", "id": 1})
            await refused(at, {"kind": "cancel", "id": "1"})
            await refused(at, {"id": 1})
            await refused(at, {"kind": "encode", "id": 1, "voice": own})
            assert caplog.text.count("event=bad_frame") == 13
            assert not at.engine.requests
            assert len(await collect(at.remote.astream(SpeechRequest("Hello.")))) == 3

    asyncio.run(run())


def test_a_process_is_told_how_far_the_engine_is() -> None:
    async def run() -> None:
        owner = Serving(lambda: scripted())  # is not started
        owner.report("reading weights", 30, 60)
        ours, its = socket.socketpair()
        serving = asyncio.create_task(EngineServer(owner).serve(ours))
        told: list[tuple[str, int, int]] = []
        link = EngineLink(
            await FrameSocket.open(its), on_progress=lambda *work: told.append(work), on_order=lambda _: None
        )
        reading = asyncio.create_task(link.run())
        assert await comes_true(lambda: told == [("starting", 0, 100)])
        serving.cancel()
        await asyncio.wait_for(reading, 5)
        with pytest.raises(EngineError, match="process is gone"):
            link.ready.result(0)

    asyncio.run(run())


# The processes.

SERVER = """
import sys
from declaim.api.cli import build_cli
from tests.api.worker_engine import CountingEngine, make_script
build_cli(lambda model, config, progress: CountingEngine(make_script(sys.argv[1])))(sys.argv[2:])
"""
SPEECH = "/v1/audio/speech"


def serve(
    folder: Path, script: Mapping[str, object], *options: str
) -> AbstractContextManager[tuple[str, subprocess.Popen[str]]]:
    """A ready `declaim serve` whose engine follows a script."""
    of_metrics = {"TMPDIR": str(folder)}  # a killed server leaves its metrics there
    return server_process(folder, *options, code=SERVER, arguments=(json.dumps(script),), environment=of_metrics)


def workers_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    children = psutil.Process(process.pid).children()
    return [child for child in children if "declaim.api.workers" in " ".join(child.cmdline())]


def worker_at(process: subprocess.Popen[str], stream: httpx.Response) -> psutil.Process:
    """The worker that holds the other end of a connection."""
    port = stream.extensions["network_stream"].get_extra_info("client_addr")[1]
    (worker,) = [
        worker
        for worker in workers_of(process)
        if any(each.raddr and each.raddr.port == port for each in worker.net_connections(kind="tcp"))
    ]
    return worker


def metric(url: str, name: str) -> float:
    text = httpx.get(url + "/metrics").text
    return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if re.match(rf"{name}[ {{]", line))


def body(response_format: str = "pcm", **fields: object) -> dict[str, object]:
    return {"model": "lark", "input": "Hello.", "response_format": response_format, **fields}


@dataclasses.dataclass
class Two:
    """A server with two workers that tests share; an interrupt ends it."""

    url: str
    process: subprocess.Popen[str]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Two]:
    with serve(tmp_path_factory.mktemp("two"), {}, "--api-workers", "2") as (url, process):
        yield Two(url, process)
        workers = workers_of(process)
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
        assert not any(worker.is_running() for worker in workers)


def answers_of_one(folder: Path, requests: list[dict[str, object]]) -> list[tuple[int, bytes]]:
    """What the application of one process answers, whose engine is in it."""
    database = Database(f"sqlite:///{folder}/declaim.db")
    database.migrate()
    serving = Serving(CountingEngine)
    with (
        closing(database),
        serving_app(serving, database, ServerOptions(ApiSettings()), host="127.0.0.1") as served,
        TestClient(served.app, raise_server_exceptions=False) as client,
    ):
        assert eventually(lambda: serving.stage == "ready")
        answers = [client.post(SPEECH, json=request) for request in requests]
    return [(answer.status_code, answer.content) for answer in answers]


def test_two_processes_answer_with_the_bytes_and_errors_of_one_and_count_together(
    two: Two, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    requests = [body(name) for name in ("pcm", "wav", "mp3", "flac", "aac")]
    requests += [body(input="fail: " + kind.__name__) for kind in KINDS]
    requests += [body(input="fail: ZeroDivisionError"), body(voice="nobody"), {}]
    assert len(workers_of(two.process)) == 2
    before = metric(two.url, "declaim_requests_total")
    answers = []
    for request in requests:
        answer = httpx.post(two.url + SPEECH, json=request, timeout=30)
        answers.append((answer.status_code, answer.content))
    names = ("declaim_requests_total", "declaim_frames_total", "declaim_requests_in_flight")
    scraped = {tuple(metric(two.url, name) for name in names) for _ in range(6)}
    assert scraped == {(before + len(requests), 1000.0, 0.0)}
    assert answers == answers_of_one(tmp_path, requests)
    assert {status for status, _ in answers} == {200, 400, 404, 499, 500, 503}


def test_clients_that_hang_up_leave_nothing(two: Two) -> None:
    url = two.url

    def drop(_: object) -> None:
        with httpx.stream("POST", url + SPEECH, json=body(input="long: 400 0.01"), timeout=20) as response:
            next(response.iter_raw())

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(drop, range(16)))
        assert eventually(lambda: metric(url, "declaim_streams") == 0)
        assert eventually(lambda: metric(url, "declaim_requests_in_flight") == 0)
        everyone = [psutil.Process(two.process.pid), *workers_of(two.process)]
        handles = [each.num_fds() for each in everyone]
        list(pool.map(drop, range(48)))
    assert eventually(lambda: metric(url, "declaim_streams") == 0)
    assert eventually(lambda: metric(url, "declaim_requests_in_flight") == 0)
    assert eventually(lambda: all(each.num_fds() <= most + 2 for each, most in zip(everyone, handles, strict=True)))


def test_a_worker_that_is_killed_ends_its_streams_in_the_engine_and_comes_back(two: Two) -> None:
    url, process = two.url, two.process
    before = {worker.pid for worker in workers_of(process)}
    long = body(input="long: 400 0.05")
    with httpx.Client() as client, client.stream("POST", url + SPEECH, json=long, timeout=20) as response:
        parts = response.iter_raw()
        next(parts)
        assert metric(url, "declaim_streams") == 1
        worker = worker_at(process, response)
        worker.kill()
        assert eventually(lambda: metric(url, "declaim_streams") == 0, within_s=10), "it takes 20 s to its end"
        with pytest.raises(httpx.TransportError):
            for _ in parts:
                pass
    assert eventually(lambda: len({each.pid for each in workers_of(process)} - {worker.pid}) == 2)
    assert len({each.pid for each in workers_of(process)} & before) == 1
    assert eventually(lambda: is_ready(url))
    assert metric(url, "declaim_requests_in_flight") == 0  # the dead one's is not counted


def test_workers_do_not_outlive_the_engines_process(tmp_path: Path) -> None:
    with serve(tmp_path, {}, "--api-workers", "2") as (_, process):
        workers = workers_of(process)
        process.kill()
        assert eventually(lambda: not any(worker.is_running() for worker in workers))


def test_told_to_stop_all_processes_end_their_streams_and_refuse_new_ones(tmp_path: Path) -> None:
    script = {"num_chunks": 50, "delay_s": 0.1}
    with serve(tmp_path, script, "--api-workers", "2") as (url, process):
        workers = workers_of(process)
        with httpx.stream("POST", url + SPEECH, json=body(), timeout=20) as response:
            parts = response.iter_raw()
            data = next(parts)
            process.send_signal(signal.SIGTERM)
            # The worker without a stream is gone at once, and new connections find the other one.
            assert eventually(lambda: sum(worker.is_running() for worker in workers) == 1)
            refused = httpx.post(url + SPEECH, json=body(), timeout=20)
            assert refused.status_code == 503 and int(refused.headers["retry-after"]) >= 1
            data += b"".join(parts)
        assert len(data) == 2 * 50 * 5 * 960
        assert process.wait(20) == 0
        assert not any(worker.is_running() for worker in workers)


def test_a_model_that_cannot_be_loaded_ends_all_processes_and_says_why(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SERVER, '{"no_such_field": 1}', "serve", "--port", "0", "--api-workers", "2"],
        cwd=ROOT,
        env={**os.environ, "DECLAIM_DATABASE_URL": f"sqlite:///{tmp_path}/declaim.db"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert "the model could not be served" in done.stderr and "no_such_field" in done.stderr
