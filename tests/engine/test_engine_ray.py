"""The whole engine with its vocoder in Ray: the same bytes as inline; neither a worker's death nor Ray's is heard."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable

import numpy as np
import psutil
import pytest
from numpy.typing import NDArray

from declaim.engine import Engine, EngineConfig, EngineError, SamplingParams, SpeechRequest
from declaim.engine.vocoder import ray_pool
from declaim.engine.vocoder.ray_pool import RayPoolOptions, RayVocoderPool

pytestmark = [pytest.mark.ray]

TEXT = "The boy was there when the sun rose. A rod is used to catch pink salmon, and the source of the huge river."
REQUESTS = [SpeechRequest(f"Number {i}. {TEXT}", sampling=SamplingParams(seed=i)) for i in range(8)]


def pool_of(engine: Engine) -> RayVocoderPool:
    pool = engine._vocoder
    assert isinstance(pool, RayVocoderPool)
    return pool


def stream_all(
    engine: Engine, *, kill_after: int | None = None, kill: Callable[[], None] | None = None
) -> list[NDArray[np.float32]]:
    """Stream all requests at once; after `kill_after` chunks, kill a vocoder worker, or what `kill` does."""
    heard: dict[int, list[NDArray[np.float32]]] = {i: [] for i in range(len(REQUESTS))}
    errors: list[BaseException] = []
    num_chunks = threading.Semaphore(0)

    def listen(i: int) -> None:
        try:
            for chunk in engine.stream(REQUESTS[i]):
                heard[i].append(chunk.audio)
                num_chunks.release()
        except EngineError as error:
            errors.append(error)

    threads = [threading.Thread(target=listen, args=(i,)) for i in range(len(REQUESTS))]
    for thread in threads:
        thread.start()
    if kill_after is not None:
        for _ in range(kill_after):
            assert num_chunks.acquire(timeout=60)
        (kill or (lambda: os.kill(pool_of(engine).worker_pids()[0], signal.SIGKILL)))()
    for thread in threads:
        thread.join(timeout=120)
        assert not thread.is_alive()
    assert errors == []
    return [np.concatenate(heard[i]) for i in range(len(REQUESTS))]


def wait_until(condition: Callable[[], bool], *, timeout_s: float) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "what the test waits for did not happen"
        time.sleep(0.01)


@pytest.mark.timeout(300)
def test_a_worker_killed_in_the_middle_of_eight_streams_is_not_heard() -> None:
    config = EngineConfig(vocoder="ray", vocoder_workers=(2, 2), num_threads=1)
    with Engine.from_pretrained("lark", config) as engine:
        undisturbed = stream_all(engine)
        disturbed = stream_all(engine, kill_after=20)
        assert pool_of(engine).stats().restarts >= 1
        wait_until(lambda: not (engine.stats().blocks_used or engine.stats().vocoder_pending), timeout_s=10)
    for before, after in zip(undisturbed, disturbed, strict=True):
        assert before.tobytes() == after.tobytes()
    with Engine.from_pretrained("lark", EngineConfig(num_threads=1)) as engine:
        inline = stream_all(engine)
    for expected, audio in zip(inline, undisturbed, strict=True):
        assert expected.tobytes() == audio.tobytes()


@pytest.mark.timeout(300)
def test_rays_own_death_in_the_middle_of_streams_is_not_heard_and_another_ray_is_started(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    start, num_starts = ray_pool._start_local_ray, 0

    def start_at_the_third_try(options: RayPoolOptions) -> None:
        nonlocal num_starts
        num_starts += 1
        if num_starts == 2:
            raise Exception("The current node timed out during startup.")  # as Ray does
        start(options)

    monkeypatch.setattr(ray_pool, "_start_local_ray", start_at_the_third_try)

    def kill(name: str) -> None:
        (process,) = (child for child in psutil.Process().children() if child.name() == name)
        process.kill()

    with Engine.from_pretrained("lark", EngineConfig(num_threads=1)) as engine:
        inline = stream_all(engine)
    with Engine.from_pretrained("lark", EngineConfig(vocoder="ray", vocoder_workers=(1, 1), num_threads=1)) as engine:
        pool = pool_of(engine)
        for name in ("raylet", "gcs_server"):
            before = pool.worker_pids()
            disturbed = stream_all(engine, kill_after=20, kill=lambda: kill(name))  # noqa: B023
            for expected, audio in zip(inline, disturbed, strict=True):
                assert expected.tobytes() == audio.tobytes()
            wait_until(lambda: pool.worker_pids() not in ([], before), timeout_s=100)  # noqa: B023
        assert (pool.stats().restarts, num_starts) == (2, 4)
        assert not any(thread.name == "declaim-vocoder-stand-in" for thread in threading.enumerate())
        assert stream_all(engine)[0].tobytes() == inline[0].tobytes()
    assert not [child for child in psutil.Process().children() if child.name() in ("raylet", "gcs_server")]


@pytest.mark.timeout(300)
def test_where_another_ray_neither_starts_nor_fails_this_process_decodes_on_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    is_over = threading.Event()

    def wait_for_a_gcs(options: RayPoolOptions) -> None:
        is_over.wait(200)
        raise EngineError("the test is over")

    config = EngineConfig(vocoder="ray", vocoder_workers=(1, 1), num_threads=1)
    with caplog.at_level("ERROR", "declaim.engine.vocoder.ray_pool"), Engine.from_pretrained("lark", config) as engine:
        undisturbed = stream_all(engine)
        monkeypatch.setattr(ray_pool, "_JOIN_TIMEOUT_S", 0.5)
        monkeypatch.setattr(ray_pool, "_start_local_ray", wait_for_a_gcs)
        (raylet,) = (child for child in psutil.Process().children() if child.name() == "raylet")
        raylet.kill()
        wait_until(lambda: "event=ray_stuck decodes_here=True" in caplog.text, timeout_s=60)
        for expected, audio in zip(undisturbed, stream_all(engine), strict=True):
            assert expected.tobytes() == audio.tobytes()
        is_over.set()
