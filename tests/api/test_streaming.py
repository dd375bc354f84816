"""What only a real server shows: audio while it is made, cut bodies, clients that hang up, a bounded stop."""

from __future__ import annotations

import asyncio
import io
import logging
import threading
import time

import httpx
import numpy as np
import openai
import pytest
import soundfile

from declaim.api.encode import to_s16
from declaim.engine import Overloaded, SequenceFailed
from tests.api.fake_engine import FakeEngine, eventually, scripted
from tests.api.live import serving_at

SPEECH = "/v1/audio/speech"
BODY = {"model": "lark", "input": "Hello.", "response_format": "pcm"}


def test_the_first_bytes_come_long_before_the_last() -> None:
    engine = scripted(num_chunks=6, delay_s=0.3)
    with serving_at(lambda: engine) as (url, _):
        times, data = [], b""
        with httpx.stream("POST", url + SPEECH, json=BODY) as response:
            assert response.headers["transfer-encoding"] == "chunked"
            for part in response.iter_raw():
                times.append(time.perf_counter())
                data += part
    assert data == to_s16(engine.audio()).tobytes()
    assert times[-1] - times[0] > 0.5 and len(times) >= 3  # 1.5 s and 6, on a machine that does nothing else


def test_a_stream_that_fails_midway_is_cut_and_not_ended(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    engine = scripted(fail_after=2, failure=SequenceFailed("fell over at step 9"))
    with serving_at(lambda: engine) as (url, _):
        data = b""
        with httpx.stream("POST", url + SPEECH, json=BODY) as response:
            assert response.status_code == 200
            with pytest.raises(httpx.RemoteProtocolError, match="without sending complete message body"):
                for part in response.iter_raw():
                    data += part
    assert data == to_s16(engine.audio()).tobytes()[: 2 * 5 * 960 * 2]
    (line,) = [record.getMessage() for record in caplog.records if "event=request" in record.getMessage()]
    assert "status=200 outcome=cut" in line and "fell over at step 9" in line
    assert "Traceback" not in caplog.text


def test_events_of_a_failed_stream_name_the_error_before_the_cut() -> None:
    engine = scripted(fail_after=1, failure=SequenceFailed("fell over"))
    with serving_at(lambda: engine) as (url, _):
        text = ""
        with httpx.stream("POST", url + SPEECH, json={**BODY, "stream_format": "sse"}) as response:
            with pytest.raises(httpx.RemoteProtocolError):
                for part in response.iter_text():
                    text += part
    assert '"type":"error","error":{"message":"fell over","type":"server_error"' in text
    assert "speech.audio.done" not in text


def openai_client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=url + "/v1", api_key="unused")


async def hang_up(url: str, engine: FakeEngine, *, after_parts: int) -> float:
    """Start a request, read that many parts, close the connection; returns when. Without any, once it is spoken."""
    async with httpx.AsyncClient() as client:
        if after_parts == 0:
            task = asyncio.create_task(client.post(url + SPEECH, json=BODY))
            assert await asyncio.to_thread(eventually, lambda: len(engine.requests) == 1)
            task.cancel()
            await asyncio.wait({task})
        else:
            async with client.stream("POST", url + SPEECH, json=BODY) as response:
                parts = response.aiter_raw()
                for _ in range(after_parts):
                    await anext(parts)
                await response.aclose()
    return time.perf_counter()


@pytest.mark.parametrize(("after_parts", "first_delay_s"), [(0, 30.0), (2, 0.0)])
def test_a_client_that_hangs_up_ends_the_engines_work_at_once(after_parts: int, first_delay_s: float) -> None:
    """Which would go on for half a minute."""
    engine = scripted(num_chunks=500, first_delay_s=first_delay_s, delay_s=30.0 if after_parts == 0 else 0.05)
    with serving_at(lambda: engine) as (url, _):
        left = asyncio.run(hang_up(url, engine, after_parts=after_parts))
        assert eventually(lambda: len(engine.cancelled) == 1, within_s=10)
        (cancelled,) = engine.cancelled.values()
        assert cancelled - left < 5
        metrics = httpx.get(url + "/metrics").text
        status = 499 if after_parts == 0 else 200
        assert f'declaim_requests_total{{outcome="client_gone",status="{status}"}} 1.0' in metrics
        assert "declaim_requests_in_flight 0.0" in metrics


def test_a_client_that_hangs_up_while_it_sends_reaches_no_engine() -> None:
    engine = FakeEngine()
    with serving_at(lambda: engine) as (url, _):
        host, port = url.removeprefix("http://").split(":")

        async def go() -> None:
            _, writer = await asyncio.open_connection(host, int(port))
            head = f"POST {SPEECH} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            writer.write((head + "content-length: 1000\r\n\r\n{").encode())
            await writer.drain()
            await asyncio.sleep(0.05)
            writer.close()
            await writer.wait_closed()

        asyncio.run(go())
        gone = 'declaim_requests_total{outcome="client_gone",status="499"} 1.0'
        assert eventually(lambda: gone in httpx.get(url + "/metrics").text)
    assert engine.requests == []


def test_of_32_clients_8_hang_up_and_24_hear_everything() -> None:
    engine = scripted(num_chunks=8, delay_s=0.03)
    expected = to_s16(engine.audio()).tobytes()

    async def listen(url: str) -> bytes:
        async with httpx.AsyncClient(timeout=20) as client:
            return (await client.post(url + SPEECH, json=BODY)).content

    async def go(url: str) -> list[bytes]:
        tasks = [listen(url) for _ in range(24)]
        leavers = [hang_up(url, engine, after_parts=1) for _ in range(8)]
        results = await asyncio.gather(*tasks, *leavers)
        return [result for result in results if isinstance(result, bytes)]

    with serving_at(lambda: engine) as (url, _):
        heard = asyncio.run(go(url))
        assert eventually(lambda: len(engine.cancelled) == 8)
    assert heard == [expected] * 24
    assert len(engine.finished) == 24
    assert {*engine.finished, *engine.cancelled} == {request.request_id for request in engine.requests}


def test_a_slow_reader_holds_the_engine_back() -> None:
    engine = scripted(num_chunks=2000, frames_per_chunk=25)  # 96 MB, far more than sockets buffer
    with serving_at(lambda: engine) as (url, _):
        with httpx.stream("POST", url + SPEECH, json=BODY, timeout=20) as response:
            next(response.iter_raw(chunk_size=1000))
            time.sleep(0.3)
            assert engine.finished == []
        assert eventually(lambda: len(engine.cancelled) == 1)


def test_a_body_too_large_is_answered_and_not_reset() -> None:
    with serving_at(FakeEngine) as (url, _):
        big = b'{"input":"' + b"x" * (18 << 20) + b'"}'
        response = httpx.post(url + SPEECH, content=big, headers={"content-type": "application/json"})
        assert response.status_code == 413
        assert response.json()["error"]["code"] == "request_too_large"


def test_the_server_listens_before_the_model_is_there() -> None:
    may_load = threading.Event()

    def load() -> FakeEngine:
        may_load.wait(60)
        return FakeEngine()

    with serving_at(load, wait_ready=False) as (url, _):
        assert httpx.get(url + "/health").status_code == 200
        assert httpx.get(url + "/ready").status_code == 503
        assert httpx.post(url + SPEECH, json=BODY).headers["retry-after"] == "5"
        may_load.set()
        assert eventually(lambda: httpx.get(url + "/ready").status_code == 200)
        assert httpx.post(url + SPEECH, json=BODY).status_code == 200


def test_a_stop_lets_a_short_stream_end() -> None:
    engine = scripted(num_chunks=6, delay_s=0.1)
    with serving_at(lambda: engine) as (url, server):
        with httpx.stream("POST", url + SPEECH, json=BODY) as response:
            server.should_exit = True
            data = b"".join(response.iter_raw())
    assert data == to_s16(engine.audio()).tobytes()
    assert engine.num_closed == 1


def test_a_stop_cancels_a_long_stream_in_time(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    engine = scripted(num_chunks=1000, delay_s=0.1)
    began = time.perf_counter()
    with serving_at(lambda: engine, drain_s=1) as (url, server):
        with httpx.stream("POST", url + SPEECH, json=BODY) as response:
            server.should_exit = True
            with pytest.raises(httpx.RemoteProtocolError):
                for _ in response.iter_raw():
                    pass
    assert time.perf_counter() - began < 50, "all of it takes 100 s"
    assert len(engine.cancelled) == 1 and engine.num_closed == 1
    assert "outcome=stopped" in caplog.text and "Traceback" not in caplog.text


def test_the_openai_client_writes_a_whole_wav() -> None:
    engine = scripted(sample_rate_hz=44_100)
    with serving_at(lambda: engine) as (url, _):
        client = openai_client(url)
        with client:
            assert [model.id for model in client.models.list()][:2] == ["lark", "tts-1"]
            assert client.models.retrieve("tts-1").id == "tts-1"
            speech = client.audio.speech.create(
                model="tts-1", voice="alloy", input="Hello.", response_format="wav", extra_body={"seed": 3}
            )
            samples, rate_hz = soundfile.read(io.BytesIO(speech.content))
            assert (rate_hz, len(samples)) == (24_000, 14_400)
            assert engine.requests[0].sampling.seed == 3
            with pytest.raises(openai.BadRequestError) as refused:
                client.audio.speech.create(model="tts-1", voice="alloy", input="")
            assert refused.value.param == "input" and refused.value.code == "invalid_value"
            assert refused.value.request_id is not None
            with pytest.raises(openai.NotFoundError):
                client.models.retrieve("whisper-1")


def test_the_openai_client_streams() -> None:
    engine = scripted(num_chunks=5, delay_s=0.3)
    with serving_at(lambda: engine) as (url, _), openai_client(url) as client:
        with client.audio.speech.with_streaming_response.create(
            model="lark", voice="alloy", input="Hello.", response_format="pcm"
        ) as response:
            parts = response.iter_bytes()
            data = next(parts)
            first_s = time.perf_counter()
            data += b"".join(parts)
            last_s = time.perf_counter()
    assert last_s - first_s > 0.4  # 1.2 s, on a machine that does nothing else
    assert np.array_equal(np.frombuffer(data, "<i2"), to_s16(engine.audio()))


def test_the_openai_client_retries_an_overloaded_server_when_told() -> None:
    engine = scripted(refuse=Overloaded("the queue is full", retry_after_s=0.05))
    with serving_at(lambda: engine) as (url, _), openai_client(url) as client:
        with pytest.raises(openai.InternalServerError) as refused:
            client.audio.speech.create(model="lark", voice="alloy", input="Hello.", response_format="wav")
    assert refused.value.code == "server_is_overloaded"
    assert len(engine.requests) == 3
