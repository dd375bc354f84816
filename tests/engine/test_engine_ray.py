"""The whole engine with its vocoder in Ray: the same bytes as inline; neither a worker's death nor Ray's is heard."""

from __future__ import annotations

import logging
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
from declaim.engine.vocoder.ray_pool import RayVocoderPool

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
def test_a_worker_killed_in_the_middle_of_eight_streams_is_not_heard(inline: list[NDArray[np.float32]]) -> None:
    config = EngineConfig(vocoder="ray", vocoder_workers=(2, 2), num_threads=1)
    with Engine.from_pretrained("lark", config) as engine:
        undisturbed = stream_all(engine)
        disturbed = stream_all(engine, kill_after=20)
        assert pool_of(engine).stats().restarts >= 1
        wait_until(lambda: not (engine.stats().blocks_used or engine.stats().vocoder_pending), timeout_s=10)
    check_heard(inline, undisturbed)
    check_heard(inline, disturbed)


def ray_processes(name: str) -> list[psutil.Process]:
    """Of this process' Ray: raylet, gcs_server."""
    return [child for child in psutil.Process().children(recursive=True) if child.name() == name]


def kill(name: str) -> None:
    (process,) = ray_processes(name)
    process.kill()


@pytest.fixture(scope="module")
def inline() -> list[NDArray[np.float32]]:
    with Engine.from_pretrained("lark", EngineConfig(num_threads=1)) as engine:
        return stream_all(engine)


def check_heard(inline: list[NDArray[np.float32]], heard: list[NDArray[np.float32]]) -> None:
    for expected, audio in zip(inline, heard, strict=True):
        assert expected.tobytes() == audio.tobytes()


@pytest.mark.timeout(300)
def test_rays_own_death_in_the_middle_of_streams_is_not_heard_and_another_ray_is_started(
    inline: list[NDArray[np.float32]],
) -> None:
    with Engine.from_pretrained("lark", EngineConfig(vocoder="ray", vocoder_workers=(1, 1), num_threads=1)) as engine:
        pool = pool_of(engine)
        for name in ("raylet", "gcs_server"):
            before = pool.worker_pids()
            check_heard(inline, stream_all(engine, kill_after=20, kill=lambda: kill(name)))  # noqa: B023
            wait_until(lambda: pool.worker_pids() not in ([], before), timeout_s=100)  # noqa: B023
        assert pool.stats().restarts == 2
        assert not any(thread.name == "declaim-vocoder-stand-in" for thread in threading.enumerate())
        check_heard(inline, stream_all(engine))
    assert not ray_processes("raylet") + ray_processes("gcs_server")


class KillsAtOnce(logging.Handler):
    """Kills Ray's control service the moment the pool has joined, `times` times: no worker has been started yet, and
    what starts one waits for that service."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.times = times

    def emit(self, record: logging.LogRecord) -> None:
        if self.times and record.getMessage().startswith("event=ray_joined"):
            self.times -= 1
            kill("gcs_server")


@pytest.mark.timeout(300)
def test_ray_that_dies_each_time_that_it_was_joined_is_not_heard_and_the_workers_come_back(
    inline: list[NDArray[np.float32]],
) -> None:
    killer = KillsAtOnce(2)
    logger = logging.getLogger("declaim.engine.vocoder.ray_pool")
    level = logger.level
    logger.setLevel(logging.INFO)
    with Engine.from_pretrained("lark", EngineConfig(vocoder="ray", vocoder_workers=(1, 1), num_threads=1)) as engine:
        pool = pool_of(engine)
        before = pool.worker_pids()
        logger.addHandler(killer)
        try:
            check_heard(inline, stream_all(engine, kill_after=20, kill=lambda: kill("gcs_server")))
            while killer.times:
                check_heard(inline, stream_all(engine))
            check_heard(inline, stream_all(engine))
            wait_until(lambda: pool.worker_pids() not in ([], before), timeout_s=60)
            check_heard(inline, stream_all(engine))
        finally:
            logger.removeHandler(killer)
            logger.setLevel(level)
        assert pool.failure is None
    assert not ray_processes("raylet") + ray_processes("gcs_server")
