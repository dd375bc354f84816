"""The HTTP contract, in process: every status, header and body that a client can be given in one piece."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import logging
import re
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import numpy as np
import pytest
import soundfile
from prometheus_client.parser import text_string_to_metric_families
from starlette.types import ASGIApp

from declaim.api.app import create_app
from declaim.api.encode import to_s16
from declaim.api.serving import Serving
from declaim.engine import (
    EngineClosed,
    InvalidRequest,
    ModelLoadError,
    Overloaded,
    SequenceFailed,
    TooLong,
    VocoderLost,
    VoiceNotFound,
)
from tests.api.fake_engine import FakeEngine, eventually, scripted

SPEECH = "/v1/audio/speech"
BODY = {"model": "lark", "input": "Hello.", "response_format": "pcm"}


def app_of(engine: FakeEngine) -> ASGIApp:
    serving = Serving(lambda: engine)
    serving.start()
    assert eventually(lambda: serving.stage == "ready")
    return create_app(serving)


@asynccontextmanager
async def client_of(app: ASGIApp) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client


def ask(app: ASGIApp, method: str, path: str, **options: Any) -> httpx.Response:
    async def go() -> httpx.Response:
        async with client_of(app) as client:
            return await client.request(method, path, **options)

    return asyncio.run(go())


def speak(engine: FakeEngine, **changes: Any) -> httpx.Response:
    return ask(app_of(engine), "POST", SPEECH, json={**BODY, **changes})


def check_error(response: httpx.Response, status: int, *, type: str, code: str | None, param: str | None) -> str:
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    error = body["error"]
    assert (error["type"], error["code"], error["param"]) == (type, code, param)
    assert re.fullmatch(r"req_[0-9a-f]{32}", response.headers["x-request-id"])
    assert int(response.headers["openai-processing-ms"]) >= 0
    return str(error["message"])


def check_invalid(response: httpx.Response, *, param: str | None, code: str | None = "invalid_value") -> str:
    return check_error(response, 400, type="invalid_request_error", code=code, param=param)


def test_pcm_is_the_audio_as_24_khz_s16le() -> None:
    engine = FakeEngine()
    response = speak(engine)
    assert response.status_code == 200
    assert response.content == to_s16(engine.audio()).tobytes()
    assert response.headers["content-type"] == "audio/pcm"
    assert "content-length" not in response.headers
    assert response.headers["x-accel-buffering"] == "no"
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-request-id"] == engine.requests[0].request_id
    assert engine.finished == [engine.requests[0].request_id] and not engine.cancelled


def test_a_44_khz_model_is_resampled_for_pcm_and_wav() -> None:
    pcm = np.frombuffer(speak(scripted(sample_rate_hz=44_100)).content, "<i2")
    assert len(pcm) == 3 * 5 * 960
    response = speak(scripted(sample_rate_hz=44_100), response_format="wav")
    assert response.headers["content-type"] == "audio/wav"
    samples, rate_hz = soundfile.read(io.BytesIO(response.content), dtype="int16")
    assert rate_hz == 24_000
    np.testing.assert_array_equal(samples, pcm)
    at_24_khz = to_s16(FakeEngine().audio())
    # Zeros of the sine lie at chunk borders in both, so away from the ends they are one signal.
    assert np.abs(pcm[200:-200].astype(int) - at_24_khz[200:-200]).max() < 40


def test_events_carry_the_same_bytes_and_the_usage() -> None:
    engine = FakeEngine()
    response = speak(engine, stream_format="sse")
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = response.text.split("\n\n")
    assert lines.pop() == ""
    assert all(line.startswith("data: ") for line in lines)
    events = [json.loads(line[6:]) for line in lines]
    assert [event["type"] for event in events] == ["speech.audio.delta"] * 3 + ["speech.audio.done"]
    audio = b"".join(base64.b64decode(event["audio"]) for event in events[:-1])
    assert audio == to_s16(engine.audio()).tobytes()
    counts = {"input_tokens": 6, "output_tokens": 15, "total_tokens": 21}
    assert events[-1]["usage"] == {**counts, "audio_seconds": 0.6} and events[-1]["finish_reason"] == "stop"


def test_every_field_reaches_the_engine_and_the_unknown_are_ignored() -> None:
    engine = FakeEngine()
    sampling = {
        "seed": 7,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 30,
        "min_p": 0.1,
        "guidance_scale": 3.0,
        "repetition_penalty": 1.2,
        "max_seconds": 4.0,
    }
    response = speak(engine, **sampling, speed=1.5, instructions="None", user="me", stream=True)
    assert response.status_code == 200
    (request,) = engine.requests
    assert (request.text, request.voice, request.speed) == ("Hello.", None, 1.5)
    assert {name: getattr(request.sampling, name) for name in sampling} == sampling


def test_null_is_the_same_as_absent() -> None:
    engine = FakeEngine()
    optional = ["voice", "instructions", "speed", "stream_format", "seed", "temperature", "top_p", "top_k"]
    optional += ["min_p", "guidance_scale", "repetition_penalty", "max_seconds"]
    assert speak(engine, **dict.fromkeys(optional)).status_code == 200
    assert speak(engine).status_code == 200
    with_nulls, without = engine.requests
    assert with_nulls.sampling == without.sampling and with_nulls.speed == without.speed == 1.0


@pytest.mark.parametrize("voice", ["alloy", "cedar", "marin", "default", "lark", {"id": "nova"}, None])
def test_openais_voices_are_the_models_own(voice: object) -> None:
    engine = FakeEngine()
    assert speak(engine, voice=voice).status_code == 200
    assert engine.requests[0].voice is None


@pytest.mark.parametrize("voice", ["nobody", {"id": "voice_1234"}, ""])
def test_another_voice_is_refused_by_name(voice: object) -> None:
    message = check_invalid(speak(FakeEngine(), voice=voice), param="voice")
    assert "default" in message


@pytest.mark.parametrize("model", ["lark", "tts-1", "tts-1-hd", "gpt-4o-mini-tts"])
def test_the_model_answers_to_its_aliases(model: str) -> None:
    assert speak(FakeEngine(), model=model).status_code == 200


def test_another_model_is_not_found() -> None:
    response = speak(FakeEngine(), model="dia")
    message = check_error(response, 404, type="invalid_request_error", code="model_not_found", param=None)
    assert "dia" in message and "lark" in message


@pytest.mark.parametrize("response_format", ["m4a", "MP3", "ogg", ""])
def test_a_format_not_served_is_refused_with_those_that_are(response_format: str) -> None:
    message = check_invalid(speak(FakeEngine(), response_format=response_format), param="response_format")
    assert "mp3, opus, aac, flac, wav, pcm" in message


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("input", ""),
        ("input", 5),
        ("speed", 0.1),
        ("speed", 4.1),
        ("speed", "fast"),
        ("seed", -1),
        ("seed", 1.5),
        ("temperature", -0.1),
        ("top_p", 0),
        ("top_k", -1),
        ("min_p", 1.0),
        ("guidance_scale", 0.5),
        ("repetition_penalty", 0.9),
        ("max_seconds", 0),
        ("stream_format", "ogg"),
        ("voice", 3),
        ("voice", {"name": "x"}),
    ],
)
def test_a_wrong_value_is_refused_under_its_fields_name(field: str, value: object) -> None:
    engine = FakeEngine()
    check_invalid(speak(engine, **{field: value}), param=field)
    assert engine.requests == []


@pytest.mark.parametrize("field", ["model", "input"])
def test_a_required_field_may_be_neither_absent_nor_null(field: str) -> None:
    app = app_of(FakeEngine())
    without = {name: value for name, value in BODY.items() if name != field}
    for body in (without, {**BODY, field: None}):
        response = ask(app, "POST", SPEECH, json=body)
        assert field in check_invalid(response, param=field, code="missing_required_parameter")


def test_input_holds_at_most_4096_characters_not_bytes() -> None:
    assert speak(FakeEngine(), input="é" * 4096).status_code == 200
    response = speak(FakeEngine(), input="e" * 4097)
    message = check_invalid(response, param="input", code="string_above_max_length")
    assert "4097" in message and "4096" in message


@pytest.mark.parametrize("raw", [b"", b"{", b"[1]", b"3", b'{"input": "\xff"}', b'{"input":"\\ud800"}'])
def test_a_body_that_is_no_json_object_is_refused(raw: bytes) -> None:
    headers = {"content-type": "application/json"}
    response = ask(app_of(FakeEngine()), "POST", SPEECH, content=raw, headers=headers)
    check_invalid(response, param=None, code=None)


def test_a_body_of_another_type_is_refused() -> None:
    response = ask(app_of(FakeEngine()), "POST", SPEECH, data={"input": "Hello."})
    message = check_error(response, 415, type="invalid_request_error", code=None, param=None)
    assert "application/json" in message


def test_a_json_type_with_a_charset_or_none_at_all_is_taken() -> None:
    app, raw = app_of(FakeEngine()), json.dumps(BODY).encode()
    for headers in ({"content-type": "Application/JSON; charset=utf-8"}, {}):
        assert ask(app, "POST", SPEECH, content=raw, headers=headers).status_code == 200


def test_a_body_above_16_mib_is_refused_with_or_without_a_length() -> None:
    big = json.dumps({**BODY, "extra": "x" * (16 << 20)}).encode()

    async def parts() -> AsyncIterator[bytes]:
        for start in range(0, len(big), 1_000_000):
            yield big[start : start + 1_000_000]

    headers = {"content-type": "application/json"}
    app = app_of(FakeEngine())
    for content in (big, parts()):
        response = ask(app, "POST", SPEECH, content=content, headers=headers)
        check_error(response, 413, type="invalid_request_error", code="request_too_large", param=None)


def test_unknown_paths_and_methods_get_the_envelope() -> None:
    app = app_of(FakeEngine())
    message = check_error(ask(app, "GET", "/v1/x"), 404, type="invalid_request_error", code=None, param=None)
    assert message == "Invalid URL (GET /v1/x)"
    response = ask(app, "GET", SPEECH)
    check_error(response, 405, type="invalid_request_error", code="method_not_supported", param=None)
    assert response.headers["allow"] == "POST"


@pytest.mark.parametrize(
    ("refusal", "status", "type", "code", "param"),
    [
        (InvalidRequest("text is odd", param="text"), 400, "invalid_request_error", "invalid_value", "input"),
        (TooLong("too long", param="text"), 400, "invalid_request_error", "string_above_max_length", "input"),
        (VoiceNotFound("no", param="voice"), 400, "invalid_request_error", "invalid_value", "voice"),
        (SequenceFailed("fell over"), 500, "server_error", None, None),
        (VocoderLost("no worker"), 500, "server_error", None, None),
        (EngineClosed("closed"), 503, "service_unavailable_error", "server_is_overloaded", None),
    ],
)
def test_an_engines_refusal_before_the_first_audio_has_its_status(
    refusal: Exception, status: int, type: str, code: str | None, param: str | None
) -> None:
    response = speak(scripted(refuse=refusal))
    assert check_error(response, status, type=type, code=code, param=param) == str(refusal)


@pytest.mark.parametrize(("wait_s", "seconds", "milliseconds"), [(2.5, "3", "2500"), (0.15, "1", "150")])
def test_overload_says_when_to_come_back(wait_s: float, seconds: str, milliseconds: str) -> None:
    response = speak(scripted(refuse=Overloaded("the queue is full", retry_after_s=wait_s)))
    check_error(response, 503, type="service_unavailable_error", code="server_is_overloaded", param=None)
    assert (response.headers["retry-after"], response.headers["retry-after-ms"]) == (seconds, milliseconds)


def test_an_unexpected_failure_tells_the_client_no_internals() -> None:
    response = speak(scripted(refuse=RuntimeError("secret at 0x7f")))
    check_error(response, 500, type="server_error", code=None, param=None)
    assert "secret" not in response.text and "Traceback" not in response.text


def test_an_engine_without_audio_is_an_error() -> None:
    check_error(speak(scripted(num_chunks=0)), 500, type="server_error", code=None, param=None)


def test_models_are_the_served_one_and_its_aliases() -> None:
    app = app_of(FakeEngine(model_name="nari-labs/Dia-1.6B"))
    listing = ask(app, "GET", "/v1/models").json()
    names = ["nari-labs/Dia-1.6B", "tts-1", "tts-1-hd", "gpt-4o-mini-tts", "gpt-4o-mini-tts-2025-12-15"]
    assert listing["object"] == "list" and [card["id"] for card in listing["data"]] == names
    for card in listing["data"]:
        assert card["object"] == "model" and isinstance(card["created"], int)
        assert card["root"] == "nari-labs/Dia-1.6B"
        assert ask(app, "GET", f"/v1/models/{card['id']}").json() == card
    response = ask(app, "GET", "/v1/models/nari-labs/other")
    check_error(response, 404, type="invalid_request_error", code="model_not_found", param=None)


def sample_values(text: str) -> dict[str, float]:
    return {
        sample.name + "".join(f"|{sample.labels[label]}" for label in sorted(sample.labels)): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_metrics_count_requests_and_audio_and_read_the_engine() -> None:
    app = app_of(FakeEngine())
    ask(app, "POST", SPEECH, json=BODY)
    ask(app, "POST", SPEECH, json={**BODY, "model": "x"})
    ask(app, "GET", "/health")
    response = ask(app, "GET", "/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    values = sample_values(response.text)
    assert values["declaim_requests_total|complete|200"] == 1
    assert values["declaim_requests_total|answered|404"] == 1
    assert values["declaim_requests_in_flight"] == 0
    assert values["declaim_ttfa_seconds_count"] == 1
    assert values["declaim_audio_seconds_total"] == pytest.approx(0.6)
    assert values["declaim_kv_blocks_used"] == 5 and values["declaim_kv_blocks_total"] == 60
    assert values["declaim_running_sequences"] == 3 and values["declaim_waiting_sequences"] == 4
    assert values["declaim_frames_total"] == 1000


def test_two_servers_in_one_process_count_apart() -> None:
    first, second = app_of(FakeEngine()), app_of(FakeEngine())
    ask(first, "POST", SPEECH, json=BODY)
    assert "declaim_requests_total{" not in ask(second, "GET", "/metrics").text


@pytest.fixture
def slow_load() -> Iterator[tuple[Serving, FakeEngine, threading.Event]]:
    loaded = threading.Event()
    engine = FakeEngine(gate=threading.Event())

    def load() -> FakeEngine:
        loaded.wait(10)
        return engine

    serving = Serving(load)
    yield serving, engine, loaded
    loaded.set()
    if engine.gate is not None:
        engine.gate.set()
    serving.close()


def test_readiness_waits_for_weights_and_a_warm_up(
    slow_load: tuple[Serving, FakeEngine, threading.Event],
) -> None:
    serving, engine, loaded = slow_load
    app = create_app(serving)

    def stage() -> tuple[int, str]:
        response = ask(app, "GET", "/ready")
        return response.status_code, response.json()["status"]

    assert stage() == (503, "starting")
    serving.start()
    assert eventually(lambda: stage() == (503, "loading"))
    response = ask(app, "POST", SPEECH, json=BODY)
    message = check_error(response, 503, type="service_unavailable_error", code="server_is_overloaded", param=None)
    assert "loading" in message and response.headers["retry-after"] == "5"
    assert ask(app, "GET", "/v1/models").status_code == 503
    assert ask(app, "GET", "/health").json() == {"status": "ok"}
    assert "declaim_kv_blocks_used" not in ask(app, "GET", "/metrics").text
    loaded.set()
    assert eventually(lambda: stage() == (503, "warming_up"))
    assert ask(app, "POST", SPEECH, json=BODY).status_code == 503
    assert engine.gate is not None
    engine.gate.set()
    assert eventually(lambda: stage() == (200, "ready"))
    assert engine.num_warmed == 1
    assert ask(app, "POST", SPEECH, json=BODY).status_code == 200
    serving.close()
    assert stage() == (503, "closed") and engine.num_closed == 1


def test_readiness_tells_what_is_being_done_and_how_much_of_it(
    slow_load: tuple[Serving, FakeEngine, threading.Event],
) -> None:
    serving, engine, loaded = slow_load
    app = create_app(serving)

    def told() -> dict[str, Any]:
        return dict(ask(app, "GET", "/ready").json())

    assert told() == {"status": "starting", "stage": "starting", "percent": 0}
    serving.start()
    assert eventually(lambda: told() == {"status": "loading", "stage": "loading", "percent": 0})
    serving.report("download", 199, 1000)
    assert told() == {"status": "loading", "stage": "download", "percent": 19}
    serving.report("read", 0, 0)
    assert told() == {"status": "loading", "stage": "read", "percent": 0}
    loaded.set()
    assert eventually(lambda: told() == {"status": "warming_up", "stage": "warming_up", "percent": 0})
    serving.report("capture", 3, 4)
    assert told() == {"status": "warming_up", "stage": "capture", "percent": 75}
    assert engine.gate is not None
    engine.gate.set()
    assert eventually(lambda: told() == {"status": "ready", "stage": "ready", "percent": 100})
    engine.vocoder_failure = "Ray is gone"
    assert told() == {"status": "failed", "stage": "failed", "percent": 100, "error": "Ray is gone"}
    assert ask(app, "GET", "/ready").status_code == 503


def test_closing_while_the_model_loads_closes_what_comes_of_it(
    slow_load: tuple[Serving, FakeEngine, threading.Event],
) -> None:
    serving, engine, loaded = slow_load
    serving.start()
    closer = threading.Thread(target=serving.close)
    closer.start()
    assert eventually(lambda: serving.stage == "closed")
    loaded.set()
    closer.join(5)
    assert eventually(lambda: engine.num_closed == 1)
    assert engine.num_warmed == 0 and serving.stage == "closed"


@pytest.mark.parametrize("at", ["load", "warm_up"])
def test_a_model_that_cannot_be_loaded_is_reported(at: str, caplog: pytest.LogCaptureFixture) -> None:
    failure = ModelLoadError("model.safetensors is truncated: download it again")
    engine = FakeEngine(warm_up_failure=failure)

    def load() -> FakeEngine:
        if at == "load":
            raise failure
        return engine

    told = threading.Event()
    serving = Serving(load, on_failure=told.set)
    serving.start()
    assert told.wait(5)
    response = ask(create_app(serving), "GET", "/ready")
    assert response.status_code == 503
    assert response.json() == {"status": "failed", "stage": "failed", "percent": 0, "error": str(failure)}
    assert "event=load_failed" in caplog.text
    serving.close()
    assert engine.num_closed == (1 if at == "warm_up" else 0)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_bug_while_loading_is_reported_too() -> None:
    def load() -> FakeEngine:
        raise ZeroDivisionError("a bug")

    serving = Serving(load)
    serving.start()
    assert eventually(lambda: serving.stage == "failed")
    assert serving.failure is not None and "traceback" in serving.failure
    serving.close()


def test_each_speech_request_logs_one_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="declaim.api.access")
    engine = FakeEngine()
    app = app_of(engine)
    odd = {"x-stainless-retry-count": "1", "x-client-request-id": "a b\tc=d"}
    ask(app, "POST", SPEECH, json=BODY, headers=odd)
    ask(app, "POST", SPEECH, json={**BODY, "voice": "x"})
    ask(app, "GET", "/health")
    good, bad = [record.getMessage() for record in caplog.records if record.name == "declaim.api.access"]
    fields = dict(part.split("=", 1) for part in good.split(" "))
    assert fields["request_id"] == engine.requests[0].request_id
    assert (fields["status"], fields["outcome"], fields["chars"]) == ("200", "complete", "6")
    assert fields["audio_s"] == "0.60" and int(fields["ttfa_ms"]) >= 0 and float(fields["rtf"]) > 0
    assert (fields["retry"], fields["client_request_id"]) == ("1", "a_b_c=d")
    assert "status=400" in bad and "no voice 'x'" in bad


def test_the_schema_lists_the_body() -> None:
    schema = ask(app_of(FakeEngine()), "GET", "/openapi.json").json()
    body = schema["paths"][SPEECH]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body["required"] == ["model", "input"] and "guidance_scale" in body["properties"]
