"""What speech asks of the gate, the voices and the engine, and what it tells them: words, documents, accounts."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import logging
import random
import threading
import wave
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any

import httpx
import numpy as np
import pytest
import soundfile
from starlette.types import ASGIApp

from declaim.api.app import create_app
from declaim.api.encode import MEDIA_TYPES
from declaim.api.serving import Serving
from declaim.api.settings import ApiSettings
from declaim.api.tenant_errors import RateLimited
from declaim.engine import AudioChunk, Overloaded, SequenceFailed, SpeechRequest
from declaim.engine.request import EncodedVoice, FinishReason, Word
from declaim.engine.spec import ControlSpec, ModelSpec
from tests.api.fake_engine import FakeEngine, eventually, scripted
from tests.api.fake_gate import KEY, FakeGate
from tests.api.live import serving_at
from tests.api.test_app import BODY, SPEECH, ask, check_error, check_invalid, speak
from tests.api.test_quirks import events_of


class Speaker(FakeEngine):
    """Tells two words a chunk, and ends as it is told."""

    reason: FinishReason = "stop"
    supports_speed = True

    @property
    def spec(self) -> ModelSpec:
        return replace(super().spec, supports_speed=self.supports_speed)

    async def astream(self, request: SpeechRequest) -> AsyncGenerator[AudioChunk, None]:
        async for chunk in FakeEngine.astream(self, request):
            begin_s = chunk.first_frame / 25
            words = (Word("Hi<", begin_s, begin_s + 0.1), Word("you.", begin_s + 0.1, begin_s + 0.2))
            yield replace(
                chunk,
                words=words if request.word_timestamps else (),
                finish_reason=self.reason if chunk.is_last else None,
            )


def gated(engine: FakeEngine, gate: FakeGate, **settings: Any) -> ASGIApp:
    serving = Serving(lambda: engine)
    serving.start()
    assert eventually(lambda: serving.stage == "ready")
    return create_app(serving, gate=gate, settings=ApiSettings(**settings))


def test_a_wrong_key_is_a_401_that_says_so_and_reaches_nothing() -> None:
    engine, gate = FakeEngine(), FakeGate()
    for path, method in ((SPEECH, "POST"), ("/v1/models", "GET"), ("/v1/audio/models", "GET")):
        response = ask(gated(engine, gate), method, path, json=BODY)
        check_error(response, 401, type="invalid_request_error", code="invalid_api_key", param=None)
        assert response.headers["www-authenticate"] == "Bearer"
    assert gate.asked == [] and engine.requests == []


def test_listings_are_public_where_the_operator_says_so() -> None:
    app = gated(FakeEngine(), FakeGate(), public_listings=True)
    assert ask(app, "GET", "/v1/models").status_code == ask(app, "GET", "/audio/models").status_code == 200
    assert ask(app, "POST", SPEECH, json=BODY).status_code == 401


def test_a_request_carries_its_tenant_and_its_answer_the_limits() -> None:
    engine, gate = FakeEngine(), FakeGate()
    response = ask(gated(engine, gate), "POST", SPEECH, json={**BODY, "service_tier": "flex"}, headers=KEY)
    assert response.headers["x-ratelimit-limit-requests"] == "60" and response.headers["x-service-tier"] == "flex"
    (request,) = engine.requests
    assert (request.tenant, request.weight, request.tier) == ("acme", 2.0, "flex")
    (usage,) = gate.usages
    assert (usage.model, usage.voice, usage.response_format, usage.chars) == ("lark", "default", "pcm", 6)
    assert (usage.frames, usage.status, usage.outcome, usage.is_cached) == (15, 200, "complete", False)
    assert usage.generated_s == usage.delivered_s == pytest.approx(0.6) and usage.ttfa_s is not None


@pytest.mark.parametrize("field", ["voice", "response_format", "model", "seed", "sample_rate", "stream_format"])
def test_what_is_wrong_in_the_body_is_never_charged(field: str) -> None:
    gate = FakeGate()
    value = -1 if field in ("seed", "sample_rate") else "nonsense"
    assert ask(gated(FakeEngine(), gate), "POST", SPEECH, json={**BODY, field: value}, headers=KEY).status_code >= 400
    assert gate.asked == []


def test_a_refusal_of_the_gate_brings_its_own_answer() -> None:
    engine, gate = FakeEngine(), FakeGate(refusal=RateLimited("too fast: wait", retry_after_s=2.0))
    response = ask(gated(engine, gate), "POST", SPEECH, json=BODY, headers=KEY)
    check_error(response, 429, type="rate_limit_error", code="rate_limit_exceeded", param=None)
    assert response.headers["retry-after"] == "2" and engine.requests == []


@pytest.mark.parametrize(
    ("engine", "status", "outcome"),
    [
        (scripted(refuse=Overloaded("full")), 503, "answered"),
        (scripted(refuse=SequenceFailed("fell over")), 500, "answered"),
        (scripted(num_chunks=0), 500, "answered"),
        (scripted(refuse=RuntimeError("a bug")), 500, "answered"),
        (scripted(fail_after=1, failure=SequenceFailed("fell over")), 200, "cut"),
        (scripted(fail_after=1, failure=RuntimeError("a bug")), 200, "cut"),
    ],
)
def test_every_admission_is_closed_once_whatever_happens(engine: FakeEngine, status: int, outcome: str) -> None:
    gate = FakeGate()
    app = gated(engine, gate)
    with contextlib.suppress(AssertionError):  # httpx asserts that a body has an end; a cut one has none
        ask(app, "POST", SPEECH, json=BODY, headers=KEY)
    (usage,) = gate.usages
    assert (usage.status, usage.outcome, gate.num_open) == (status, outcome, 0)


@pytest.mark.parametrize("reason", ["runaway", "missing", "length"])
def test_why_speech_ended_is_told_counted_and_recorded(reason: FinishReason, caplog: pytest.LogCaptureFixture) -> None:
    engine, gate = Speaker(), FakeGate()
    engine.reason = reason
    app = gated(engine, gate)
    events = events_of(ask(app, "POST", SPEECH, json={**BODY, "stream_format": "sse"}, headers=KEY))
    assert events[-1]["finish_reason"] == reason
    whole = ask(app, "POST", SPEECH, json={**BODY, "stream": False}, headers=KEY)
    assert whole.headers["x-finish-reason"] == reason
    assert f'declaim_speech_finished_total{{reason="{reason}"}} 2.0' in ask(app, "GET", "/metrics").text
    outcome = "complete" if reason == "length" else reason
    assert [usage.outcome for usage in gate.usages] == [outcome, outcome]
    warned = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert any(f"finish_reason={reason}" in record.getMessage() for record in warned) == (reason != "length")


def test_words_come_as_events_before_their_audio() -> None:
    events = events_of(speak(Speaker(), stream_format="sse", word_timestamps=True))
    assert [event["type"] for event in events[:3]] == ["speech.word", "speech.word", "speech.audio.delta"]
    words = [(event["word"], event["start"], event["end"]) for event in events if event["type"] == "speech.word"]
    assert words[:3] == [("Hi<", 0.0, 0.1), ("you.", 0.1, 0.2), ("Hi<", 0.2, 0.3)] and len(words) == 6
    assert "speech.word" not in speak(Speaker(), stream_format="sse").text


def test_speed_is_the_models_where_it_paces_itself_and_the_playbacks_elsewhere() -> None:
    engine = Speaker()
    assert len(speak(engine, speed=2.0).content) == 2 * 14_400 and engine.requests[0].speed == 2.0
    engine = Speaker()
    engine.supports_speed = False
    response = speak(engine, speed=2.0, response_format="json", word_timestamps=True)
    assert engine.requests[0].speed == 1.0
    document = response.json()
    assert document["duration"] == pytest.approx(0.3) and document["words"][1] == {
        "word": "you.",
        "start": 0.05,
        "end": 0.1,
    }
    check_invalid(speak(engine, speed=5), param="speed")


def test_a_json_answer_holds_the_audio_the_words_and_the_usage() -> None:
    response = speak(Speaker(), response_format="json", word_timestamps=True)
    assert response.headers["content-type"] == "application/json"
    document = response.json()
    with wave.open(io.BytesIO(base64.b64decode(document["audio"]))) as reader:
        assert reader.getnframes() == 14_400
    assert document["format"] == "wav" and document["finish_reason"] == "stop" and len(document["words"]) == 6
    assert document["usage"]["output_tokens"] == 15
    mp3 = speak(Speaker(), response_format="json", audio_format="mp3").json()
    assert mp3["words"] is None and base64.b64decode(mp3["audio"])[0] == 0xFF
    check_invalid(speak(Speaker(), response_format="json", audio_format="ogg"), param="audio_format")
    check_invalid(speak(Speaker(), response_format="json", stream_format="sse"), param="stream_format")


def test_captions_are_webvtt_with_what_its_parsers_need_escaped() -> None:
    response = speak(Speaker(), response_format="vtt")
    assert response.headers["content-type"].startswith("text/vtt")
    blocks = response.text.strip().split("\n\n")
    assert blocks[0] == "WEBVTT" and blocks[1] == "00:00:00.000 --> 00:00:00.200\nHi&lt; you." and len(blocks) == 4
    check_invalid(speak(FakeEngine(), response_format="vtt"), param="response_format")


def wav_bytes(seconds: float = 2.0) -> bytes:
    buffer = io.BytesIO()
    times = np.arange(round(seconds * 16_000)) / 16_000
    soundfile.write(buffer, 0.3 * np.sin(2 * np.pi * 200 * times), 16_000, format="WAV")
    return buffer.getvalue()


@pytest.mark.parametrize("prefix", ["", "data:audio/wav;base64,", "data:;base64,"])
def test_reference_audio_in_the_body_is_the_voice(prefix: str) -> None:
    engine = FakeEngine()
    audio = prefix + base64.b64encode(wav_bytes()).decode()
    assert speak(engine, voice="nobody", ref_audio=audio, ref_text="I am me.").status_code == 200
    voice = engine.requests[0].voice
    assert isinstance(voice, EncodedVoice) and voice.transcript == "I am me."
    assert engine.encoded[0].audio.shape == (32_000,)


@pytest.mark.parametrize(
    ("ref_audio", "ref_text", "param"),
    [
        ("https://example.com/a.wav", "x", "ref_audio"),
        ("file:///etc/passwd", "x", "ref_audio"),
        ("data:audio/wav,abc", "x", "ref_audio"),
        ("not base64!", "x", "ref_audio"),
        (base64.b64encode(b"no audio at all").decode(), "x", "ref_audio"),
        (base64.b64encode(wav_bytes(0.2)).decode(), "x", "ref_audio"),
    ],
)
def test_reference_audio_that_cannot_be_used_is_refused(ref_audio: str, ref_text: str, param: str) -> None:
    engine = FakeEngine()
    check_invalid(speak(engine, ref_audio=ref_audio, ref_text=ref_text), param=param)
    assert engine.requests == []


@pytest.mark.parametrize("given", ["ref_audio", "ref_text"])
def test_reference_audio_and_its_text_need_each_other(given: str) -> None:
    value = base64.b64encode(wav_bytes()).decode() if given == "ref_audio" else "I am me."
    missing = {"ref_audio": "ref_text", "ref_text": "ref_audio"}[given]
    engine = FakeEngine()
    check_invalid(speak(engine, **{given: value}), param=missing, code="missing_required_parameter")
    assert engine.encoded == []


def test_reference_audio_needs_no_text_where_a_speaker_encoder_knows_the_voice() -> None:
    class Embedding(FakeEngine):
        @property
        def spec(self) -> ModelSpec:
            return replace(super().spec, embeds_voices=True)

    engine = Embedding()
    assert speak(engine, ref_audio=base64.b64encode(wav_bytes()).decode()).status_code == 200
    voice = engine.requests[0].voice
    assert isinstance(voice, EncodedVoice) and voice.transcript == ""


@pytest.mark.parametrize(
    ("language", "tag"),
    [("en", "en"), ("zh-CN", "zh-cn"), ("pt_BR", "pt-br"), ("German", "de"), ("auto", None), ("", None)],
)
def test_language_and_the_other_extensions_reach_the_engine(language: str, tag: str | None) -> None:
    engine = FakeEngine()
    dials = {"emotion": [0.1, 0.9], "speaking_rate": 15.0, "pitch_std": 20.0, "fmax": 22050, "quality": "high"}
    assert speak(engine, language=language, normalize=False, **dials).status_code == 200
    (request,) = engine.requests
    assert (request.language, request.normalize) == (tag, False)
    assert request.controls == {**dials, "emotion": (0.1, 0.9)}
    check_invalid(speak(engine, language="klingon!"), param="language")


class Dialled(FakeEngine):
    """Has a dial, and acts on words."""

    @property
    def spec(self) -> ModelSpec:
        mood = ControlSpec("weights of two", 0.0, 1.0, None, length=2, names={"glad": (1.0, 0.0)})
        rate = ControlSpec("sounds a second", 1.0, 40.0, (15.0,))
        words = {"gladly": {"emotion": (1.0, 0.0)}, "slowly": {"speaking_rate": (10.0,)}}
        return replace(
            super().spec,
            controls={"emotion": mood, "speaking_rate": rate},
            instructions=words,
            languages=("en-gb", "yue"),
        )


@pytest.mark.parametrize(
    ("body", "controls"),
    [
        ({"instructions": "Gladly, and slowly!"}, {"emotion": (1.0, 0.0), "speaking_rate": (10.0,)}),
        ({"instructions": "slowly", "speaking_rate": 20}, {"speaking_rate": 20}),
        ({"instructions": "not slowly, gladly"}, {"emotion": (1.0, 0.0)}),
        ({"instructions": "Speak like a pirate.", "emotion": "glad"}, {"emotion": "glad"}),
        ({"emotion": [0.5, 1], "speaking_rate": None, "volume": 3}, {"emotion": (0.5, 1)}),
        ({"quality": 3}, {"quality": 3}),
    ],
)
def test_instructions_and_dials_reach_the_engine_and_a_dial_goes_before_a_word(
    body: dict[str, Any], controls: dict[str, Any]
) -> None:
    """A dial of another family is the engine's to refuse."""
    engine = Dialled()
    assert speak(engine, **body).status_code == 200
    assert engine.requests[0].controls == controls


@pytest.mark.parametrize("value", [True, {"glad": 1}, [0.5, None], [[1.0]], [True, 0.0]])
def test_a_dial_that_is_no_number_name_or_list_is_refused(value: object) -> None:
    engine = Dialled()
    message = check_invalid(speak(engine, emotion=value), param="emotion")
    assert "a number, a name or a list of numbers" in message and engine.requests == []


def test_dials_words_and_languages_are_listed_and_documented() -> None:
    app = gated(Dialled(), FakeGate())
    card = ask(app, "GET", "/v1/models/tts-1", headers=KEY).json()
    assert card["controls"]["emotion"] == {
        "description": "weights of two",
        "low": 0.0,
        "high": 1.0,
        "default": None,
        "length": 2,
        "names": ["glad"],
    }
    assert card["controls"]["speaking_rate"]["default"] == [15.0]
    assert (card["instructions"], card["languages"]) == (["gladly", "slowly"], ["en-gb", "yue"])
    taken = ask(app, "GET", "/openapi.json").json()["paths"][SPEECH]["post"]["requestBody"]["content"]
    fields = taken["application/json"]["schema"]["properties"]
    assert "phonemes a second" in fields["speaking_rate"]["description"] and "seed" in fields
    strict = gated(Dialled(), FakeGate(), strict=True)
    assert ask(strict, "POST", SPEECH, json={**BODY, "speaking_rate": 12}, headers=KEY).status_code == 200
    check_invalid(ask(strict, "POST", SPEECH, json={**BODY, "volume": 3}, headers=KEY), param="volume")


def test_longer_input_is_taken_where_the_operator_says_so() -> None:
    app = gated(FakeEngine(), FakeGate(), max_input_chars=5000)
    assert ask(app, "POST", SPEECH, json={**BODY, "input": "e" * 5000}, headers=KEY).status_code == 200
    response = ask(app, "POST", SPEECH, json={**BODY, "input": "e" * 5001}, headers=KEY)
    assert "5000" in check_invalid(response, param="input", code="string_above_max_length")


def test_100_streams_dropped_at_random_points_leave_nothing_open() -> None:
    engine = scripted(num_chunks=25, delay_s=0.01, first_delay_s=0.05)
    draw = random.Random(7)
    gate = FakeGate()

    async def drop(client: httpx.AsyncClient, response_format: str, num_parts: int) -> None:
        body = {**BODY, "response_format": response_format, "stream_format": draw.choice(["sse", "audio"])}
        patience_s = draw.uniform(0.0, 0.5) if num_parts < 0 else 60.0  # some leave before there is an answer
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience_s), client.stream("POST", SPEECH, json=body, headers=KEY) as response:
                parts = response.aiter_raw()
                for _ in range(num_parts):
                    await anext(parts, None)

    async def storm(url: str) -> None:
        async with httpx.AsyncClient(base_url=url, timeout=60) as client:
            formats = draw.choices(list(MEDIA_TYPES), k=100)
            await asyncio.gather(*(drop(client, each, draw.randint(-2, 20)) for each in formats))

    with serving_at(lambda: engine, gate=gate) as (url, server):
        asyncio.run(storm(url))
        num_threads = threading.active_count()
        assert eventually(lambda: gate.num_open == 0 and not server.server_state.tasks)
        ended = {*engine.finished, *engine.cancelled}
        assert ended == {request.request_id for request in engine.requests}
        assert len(engine.finished) + len(engine.cancelled) == len(engine.requests)
        assert len(gate.usages) == len(gate.asked) > 50
        assert "declaim_requests_in_flight 0.0" in httpx.get(url + "/metrics").text
        asyncio.run(storm(url))
        assert eventually(lambda: gate.num_open == 0 and threading.active_count() <= num_threads + 2)
