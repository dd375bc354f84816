"""`declaim serve` as a user runs it: a process of its own, the embedded voice, the real openai client."""

from __future__ import annotations

import asyncio
import io
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest
import soundfile
from prometheus_client.parser import text_string_to_metric_families

from tests.api.fake_engine import eventually
from tests.api.server_process import log_of, server_process
from tests.api.test_pipeline import decoded

TEXT = "The quick brown fox jumps over the lazy dog, and then it goes home."


@contextmanager
def serve(vocoder: str, folder: Path, *arguments: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """A ready server process that keeps its files in `folder`; stopped by SIGTERM afterwards, unless it has been."""
    options = ("--vocoder", vocoder, "--device", "cpu", *arguments)
    with server_process(folder, *options) as (url, process):
        yield url, process
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    assert "Traceback" not in log_of(folder).read_text()


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serve("inline", tmp_path_factory.mktemp("server")) as (url, _):
        yield url


def gauge(url: str, name: str) -> float:
    families = text_string_to_metric_families(httpx.get(url + "/metrics").text)
    (value,) = [sample.value for family in families for sample in family.samples if sample.name == name]
    return value


def body(**changes: object) -> dict[str, object]:
    return {"model": "lark", "input": TEXT, "voice": "alloy", "response_format": "pcm", "seed": 5, **changes}


def samples_of(pcm: bytes) -> np.ndarray:
    return np.frombuffer(pcm, "<i2").astype(int)


def test_the_openai_client_hears_speech(url: str) -> None:
    with openai.OpenAI(base_url=url + "/v1", api_key="unused") as client:
        speech = client.audio.speech.create(
            model="tts-1", voice="alloy", input=TEXT, response_format="wav", extra_body={"seed": 5}
        )
    audio, rate_hz = soundfile.read(io.BytesIO(speech.content), dtype="float32")
    assert rate_hz == 24_000
    assert 2.0 < len(audio) / rate_hz < 12.0
    assert 0.01 < np.sqrt(np.mean(audio**2)) < 0.5


def test_the_openai_client_gets_mp3_unless_it_asks_otherwise(url: str) -> None:
    with openai.OpenAI(base_url=url + "/v1", api_key="unused") as client:
        speech = client.audio.speech.create(model="tts-1", voice="alloy", input=TEXT, extra_body={"seed": 5})
        with client.audio.speech.with_streaming_response.create(
            model="tts-1", voice="alloy", input=TEXT, response_format="flac", extra_body={"seed": 5}
        ) as response:
            flac = b"".join(response.iter_bytes())
    lossy, rate_hz = soundfile.read(io.BytesIO(speech.content), dtype="float32")
    exact = decoded(flac, "flac")  # libsndfile takes a streamed FLAC, whose header cannot tell its length, for endless
    assert rate_hz == 24_000 and 0 <= len(lossy) - len(exact) <= 0.1 * rate_hz
    size = 1 << (len(lossy) + len(exact)).bit_length()
    cross = np.fft.irfft(np.fft.rfft(lossy, size) * np.conj(np.fft.rfft(exact, size)))
    assert cross[:3000].max() > 0.95 * np.linalg.norm(lossy) * np.linalg.norm(exact)


def test_audio_comes_while_it_is_made(url: str) -> None:
    began, times = time.perf_counter(), []
    with httpx.stream("POST", url + "/v1/audio/speech", json=body(), timeout=60) as response:
        assert response.status_code == 200
        for _ in response.iter_raw():
            times.append(time.perf_counter() - began)
    assert len(times) > 3 and times[0] < 0.5 * times[-1]


def test_neighbours_do_not_change_what_a_request_hears(url: str) -> None:
    alone = samples_of(httpx.post(url + "/v1/audio/speech", json=body(), timeout=60).content)

    async def together() -> list[bytes]:
        async with httpx.AsyncClient(timeout=60) as client:
            bodies = [body(), *(body(seed=seed, input=f"Neighbour {seed}.") for seed in range(4))]
            answers = [client.post(url + "/v1/audio/speech", json=each) for each in bodies]
            return [answer.content for answer in await asyncio.gather(*answers)]

    among, *others = (samples_of(pcm) for pcm in asyncio.run(together()))
    assert all(len(other) > 10_000 for other in others)
    assert len(among) == len(alone) > 40_000
    # Chunks may be cut elsewhere: a sample then differs in its last bit at most.
    assert np.abs(among - alone).max() <= 1


def test_clients_that_hang_up_leave_no_block_behind(url: str) -> None:
    async def leave() -> None:
        async with httpx.AsyncClient(timeout=60) as client:
            async with client.stream("POST", url + "/v1/audio/speech", json=body(input=TEXT * 5)) as response:
                await anext(response.aiter_raw())

    async def storm() -> None:
        await asyncio.gather(*(leave() for _ in range(6)))

    asyncio.run(storm())
    assert eventually(lambda: gauge(url, "declaim_kv_blocks_used") == 0)
    assert gauge(url, "declaim_streams") == 0
    assert gauge(url, "declaim_requests_in_flight") == 0


@pytest.mark.parametrize(("text", "longest_s"), [("...", 0.2), ("🙂", 0.2), (" ", 0.2), ("# **Hello**, `world`!", 5.0)])
def test_text_that_agents_send_by_accident_is_answered(url: str, text: str, longest_s: float) -> None:
    response = httpx.post(url + "/v1/audio/speech", json=body(input=text), timeout=60)
    assert response.status_code == 200, response.text
    assert 0.0 < len(samples_of(response.content)) / 24_000 <= longest_s


@pytest.mark.ray
def test_a_server_with_ray_told_to_stop_ends_its_streams_first(tmp_path: Path) -> None:
    with serve("ray", tmp_path) as (url, process):
        time.sleep(1.5)  # Ray takes SIGTERM while it starts; the server takes it back every second
        with httpx.stream("POST", url + "/v1/audio/speech", json=body(), timeout=60) as response:
            process.send_signal(signal.SIGTERM)
            heard = samples_of(b"".join(response.iter_raw()))
        assert process.wait(20) == 0
    assert len(heard) > 40_000
