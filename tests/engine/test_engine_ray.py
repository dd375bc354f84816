"""The whole engine with its vocoder in Ray: the same bytes as inline, and a worker's death is not heard."""

from __future__ import annotations

import os
import signal
import threading
import time

import numpy as np
import pytest
from numpy.typing import NDArray

from declaim.engine import Engine, EngineConfig, EngineError, SamplingParams, SpeechRequest
from declaim.engine.vocoder.ray_pool import RayVocoderPool

pytestmark = [pytest.mark.ray]

TEXT = "The boy was there when the sun rose. A rod is used to catch pink salmon, and the source of the huge river."
REQUESTS = [SpeechRequest(f"Number {i}. {TEXT}", sampling=SamplingParams(seed=i)) for i in range(8)]


def stream_all(engine: Engine, *, kill_after: int | None) -> list[NDArray[np.float32]]:
    """Stream all requests at once; after `kill_after` chunks, kill a vocoder worker."""
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
        pool = engine._vocoder
        assert isinstance(pool, RayVocoderPool)
        os.kill(pool.worker_pids()[0], signal.SIGKILL)
    for thread in threads:
        thread.join(timeout=120)
        assert not thread.is_alive()
    assert errors == []
    return [np.concatenate(heard[i]) for i in range(len(REQUESTS))]


@pytest.mark.timeout(300)
def test_a_worker_killed_in_the_middle_of_eight_streams_is_not_heard() -> None:
    config = EngineConfig(vocoder="ray", vocoder_workers=(2, 2), num_threads=1)
    with Engine.from_pretrained("lark", config) as engine:
        undisturbed = stream_all(engine, kill_after=None)
        disturbed = stream_all(engine, kill_after=20)
        assert engine._vocoder.stats().restarts >= 1  # type: ignore[attr-defined]
        deadline = time.monotonic() + 10
        while engine.stats().blocks_used or engine.stats().vocoder_pending:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    for before, after in zip(undisturbed, disturbed, strict=True):
        assert before.tobytes() == after.tobytes()
    with Engine.from_pretrained("lark", EngineConfig(num_threads=1)) as engine:
        inline = stream_all(engine, kill_after=None)
    for expected, audio in zip(inline, undisturbed, strict=True):
        assert expected.tobytes() == audio.tobytes()
