"""What clients that exist rely on, one test for each quirk: a change here breaks somebody's client.

The clients: the openai packages, Open WebUI, LiveKit, pipecat, Home Assistant, SillyTavern, wyoming_openai, Vercel's AI
SDK. All in process, on an engine that speaks a sine.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import wave
from pathlib import Path
from typing import Any

import httpx
import pytest

from declaim.api.app import create_app
from declaim.api.encode import MEDIA_TYPES, to_s16
from declaim.api.server import ServedApp, ServerOptions, make_server
from declaim.api.serving import Serving
from declaim.api.settings import ApiSettings
from declaim.api.store.database import Database
from declaim.api.voices import VoiceStore, build_voices_router
from tests.api.fake_engine import FakeEngine, eventually, scripted
from tests.api.fake_gate import KEY, FakeGate
from tests.api.live import serving_at
from tests.api.test_app import BODY, SPEECH, app_of, ask, speak

OPENAI_VOICES = "alloy ash ballad coral echo fable onyx nova sage shimmer verse marin cedar".split()
MODELS = ["lark", "tts-1", "tts-1-hd", "gpt-4o-mini-tts", "gpt-4o-mini-tts-2025-12-15"]


def without_format(**changes: Any) -> httpx.Response:
    body = {"model": "tts-1", "input": "Hello.", "voice": "alloy", **changes}
    return ask(app_of(FakeEngine()), "POST", SPEECH, json=body)


def app_with(engine: FakeEngine, **settings: Any) -> Any:
    serving = Serving(lambda: engine)
    serving.start()
    assert eventually(lambda: serving.stage == "ready")
    return create_app(serving, settings=ApiSettings(**settings))


def events_of(response: httpx.Response) -> list[dict[str, Any]]:
    blocks = response.text.split("\n\n")
    assert blocks.pop() == ""
    assert all(block.startswith("data: ") and "\n" not in block for block in blocks)
    return [json.loads(block[6:]) for block in blocks]


# 1. All names always resolve.


@pytest.mark.parametrize("voice", OPENAI_VOICES)
def test_quirk_01_all_13_openai_voices_are_there(voice: str) -> None:
    engine = FakeEngine()
    assert speak(engine, voice=voice).status_code == speak(engine, voice={"id": voice}).status_code == 200


@pytest.mark.parametrize("model", MODELS)
def test_quirk_01_openai_models_are_aliases_that_speak_and_are_listed(model: str) -> None:
    app = app_of(FakeEngine())
    assert ask(app, "POST", SPEECH, json={**BODY, "model": model}).status_code == 200
    assert ask(app, "GET", f"/v1/models/{model}").json()["id"] == model
    assert model in [card["id"] for card in ask(app, "GET", "/v1/models").json()["data"]]
    assert model in [card["id"] for card in ask(app, "GET", "/v1/audio/models").json()["models"]]


# 2. Absent, null, unknown and odd fields.


@pytest.mark.parametrize("response_format", ["absent", None])
def test_quirk_02_a_missing_response_format_is_mp3(response_format: str | None) -> None:
    changes = {} if response_format == "absent" else {"response_format": response_format}
    response = without_format(**changes)
    assert response.headers["content-type"] == "audio/mpeg"
    # Vercel's SDK reads the type from the first bytes.
    assert response.content[0] == 0xFF and response.content[1] & 0xE0 == 0xE0


def test_quirk_02_nulls_everywhere_are_the_same_as_nothing() -> None:
    optional = "voice instructions response_format speed stream_format stream sample_rate audio_format word_timestamps"
    optional += " service_tier language normalize ref_audio ref_text seed temperature top_p top_k min_p guidance_scale"
    optional += " repetition_penalty max_seconds emotion speaking_rate pitch_std fmax quality"
    with_nulls = without_format(**dict.fromkeys(optional.split()))
    assert with_nulls.status_code == 200 and with_nulls.content == without_format().content


def test_quirk_02_unknown_fields_are_ignored_unless_the_server_is_strict() -> None:
    extras = {"user": "me", "volume_multiplier": 2, "normalization_options": {"normalize": True}, "lang_code": "a"}
    assert speak(FakeEngine(), **extras).status_code == 200
    response = ask(app_with(FakeEngine(), strict=True), "POST", SPEECH, json={**BODY, "user": "me"})
    assert response.status_code == 400 and response.json()["error"]["param"] == "user"
    assert ask(app_with(FakeEngine(), strict=True), "POST", SPEECH, json={**BODY, "seed": 1}).status_code == 200


@pytest.mark.parametrize("instructions", ["None", "", "Speak like a pirate, with joy.", "x" * 4096])
def test_quirk_02_instructions_of_any_kind_break_nothing(instructions: str) -> None:
    engine = FakeEngine()
    assert speak(engine, instructions=instructions).status_code == 200
    assert engine.requests[0].text == "Hello." and not engine.requests[0].controls


# 3. Paths.


@pytest.mark.parametrize("path", ["/v1/audio/speech", "/audio/speech", "/v1/audio/speech/", "/audio/speech/"])
def test_quirk_03_v1_may_be_left_out_and_a_slash_added_without_a_redirect(path: str) -> None:
    response = ask(app_of(FakeEngine()), "POST", path, json=BODY)
    assert response.status_code == 200 and not response.history


@pytest.mark.parametrize("path", ["/models", "/audio/models/", "/v1/models/", "/models/tts-1"])
def test_quirk_03_listings_answer_with_and_without_v1(path: str) -> None:
    assert ask(app_of(FakeEngine()), "GET", path).status_code == 200


@pytest.mark.parametrize("path", ["/v1/readyz", "/readyz", "/v1/test", "/test"])
def test_quirk_03_probes_for_other_servers_find_none(path: str) -> None:
    """wyoming_openai takes a server that answers these for LocalAI or Kokoro, and then talks to it as such."""
    assert ask(app_of(FakeEngine()), "GET", path).status_code == 404


# 4. Keys.


@pytest.mark.parametrize("header", ["Bearer ", "Bearer", "Bearer anything", ""])
def test_quirk_04_an_empty_key_works_on_an_open_server(header: str) -> None:
    app = app_of(FakeEngine())
    assert ask(app, "POST", SPEECH, json=BODY, headers={"authorization": header}).status_code == 200


@pytest.mark.parametrize("path", ["/v1/models", "/v1/audio/models", "/audio/voices"])
def test_quirk_04_listings_are_public_where_the_operator_says_so(tmp_path: Path, path: str) -> None:
    """Open WebUI probes them without its key."""
    serving, gate = Serving(FakeEngine), FakeGate()
    serving.start()
    assert eventually(lambda: serving.stage == "ready")
    database = Database(f"sqlite:///{tmp_path}/declaim.db")
    database.migrate()
    voices = VoiceStore(serving.engine_for_accepted, database)
    for is_public, status in ((True, 200), (False, 401)):
        routers = [build_voices_router(voices, gate, check_open=serving.engine, lists_publicly=is_public)]
        settings = ApiSettings(public_listings=is_public)
        app = create_app(serving, gate=gate, voices=voices, settings=settings, routers=routers)
        assert ask(app, "GET", path).status_code == status
        assert ask(app, "POST", SPEECH, json=BODY).status_code == 401
    voices.close()
    database.close()


# 5. LiveKit asks every model but OpenAI's for events.


def test_quirk_05_livekits_request_gets_events_that_its_parser_takes() -> None:
    engine = FakeEngine()
    livekit = {"input": "Hello.", "model": "lark", "voice": "ash", "speed": 1.0, "response_format": "mp3"}
    app = app_of(engine)
    response = ask(app, "POST", SPEECH, json={**livekit, "stream_format": "sse"})
    assert response.headers["content-type"].startswith("text/event-stream")
    events = events_of(response)
    assert {event["type"] for event in events} == {"speech.audio.delta", "speech.audio.done"}
    heard = b"".join(base64.b64decode(event["audio"], validate=True) for event in events[:-1])
    assert heard == ask(app, "POST", SPEECH, json=livekit).content
    assert {"input_tokens", "output_tokens", "total_tokens"} <= set(events[-1]["usage"])
    assert max(map(len, response.text.split("\n"))) < 64 * 1024


@pytest.mark.parametrize("response_format", MEDIA_TYPES)
def test_quirk_05_events_and_plain_bytes_are_the_same_audio(response_format: str) -> None:
    for engine in (scripted(num_chunks=12), scripted(num_chunks=1)):
        plain = speak(engine, response_format=response_format).content
        events = events_of(speak(engine, response_format=response_format, stream_format="sse"))
        assert b"".join(base64.b64decode(event.get("audio", "")) for event in events) == plain


def test_quirk_05_events_come_whatever_the_client_accepts() -> None:
    headers = {"accept": "application/octet-stream", "accept-encoding": "gzip, deflate"}
    response = ask(app_of(FakeEngine()), "POST", SPEECH, json={**BODY, "stream_format": "sse"}, headers=headers)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert "content-encoding" not in response.headers


# 6. Types.


@pytest.mark.parametrize(
    ("response_format", "media_type", "magic"),
    [
        ("mp3", "audio/mpeg", b"\xff"),
        ("opus", "audio/ogg", b"OggS"),
        ("aac", "audio/aac", b"\xff\xf1"),
        ("flac", "audio/flac", b"fLaC"),
        ("wav", "audio/wav", b"RIFF"),
        ("pcm", "audio/pcm", b""),
    ],
)
def test_quirk_06_the_content_type_says_what_the_bytes_are(response_format: str, media_type: str, magic: bytes) -> None:
    response = speak(FakeEngine(), response_format=response_format)
    assert response.headers["content-type"] == media_type and response.content.startswith(magic)


# 7. Samples.


@pytest.mark.parametrize("sample_rate_hz", [24_000, 44_100, 16_000])
def test_quirk_07_pcm_pieces_never_cut_a_sample(sample_rate_hz: int) -> None:
    engine = scripted(num_chunks=9, frames_per_chunk=1, sample_rate_hz=sample_rate_hz, delay_s=0.02)
    with serving_at(lambda: engine) as (url, _):
        with httpx.stream("POST", url + SPEECH, json=BODY) as response:
            sizes = [len(part) for part in response.iter_raw()]
    assert len(sizes) > 1 and all(size % 2 == 0 for size in sizes)


def test_quirk_07_a_streamed_wav_begins_with_a_header_that_wave_reads() -> None:
    """wyoming_openai gives the first 2048 bytes to Python's wave: sizes of 0, or a chunk before data, would click."""
    data = speak(FakeEngine(), response_format="wav").content
    with wave.open(io.BytesIO(data[:2048])) as reader:
        assert (reader.getframerate(), reader.getsampwidth(), reader.getnchannels()) == (24_000, 2, 1)
        assert reader.readframes(100) == data[44:244]


# 8. Time.


def test_quirk_08_no_header_is_sent_before_there_is_audio() -> None:
    engine = scripted(first_delay_s=0.3, num_chunks=2)
    with serving_at(lambda: engine) as (url, _), httpx.stream("POST", url + SPEECH, json=BODY) as response:
        assert int(response.headers["openai-processing-ms"]) >= 290


def test_quirk_08_silence_in_a_stream_of_events_is_bridged_by_comments() -> None:
    engine = scripted(num_chunks=2, delay_s=0.5)
    app = app_with(engine, keepalive_s=0.1)
    response = ask(app, "POST", SPEECH, json={**BODY, "stream_format": "sse"})
    blocks = response.text.split("\n\n")
    assert blocks.count(": keepalive") >= 2
    audio = [json.loads(block[6:]) for block in blocks if block.startswith("data: ")]
    assert [event["type"] for event in audio] == ["speech.audio.delta"] * 2 + ["speech.audio.done"]


def test_quirk_08_connections_are_kept_for_longer_than_clients_pool_them() -> None:
    """LiveKit's client keeps one for 120 s: closed earlier, its next request would fail now and then."""
    serving = Serving(FakeEngine)
    served = ServedApp(create_app(serving), lambda: None)
    assert make_server(served, serving, ServerOptions(ApiSettings())).config.timeout_keep_alive > 120


# 9. Hanging up. How fast it ends the engine's work is in test_streaming.


def test_quirk_09_who_hangs_up_ends_the_work_and_pays_for_what_was_sent() -> None:
    engine, gate = scripted(num_chunks=500, delay_s=0.02), FakeGate()
    with serving_at(lambda: engine, gate=gate) as (url, _):
        with httpx.stream("POST", url + SPEECH, json=BODY, headers=KEY) as response:
            next(response.iter_raw())
        assert eventually(lambda: len(gate.usages) == 1 and len(engine.cancelled) == 1)
    (usage,) = gate.usages
    assert usage.outcome == "client_gone" and gate.num_open == 0
    assert 0.2 <= usage.delivered_s <= usage.generated_s < 50.0 and usage.chars == len("Hello.")


# 10. Greetings.


@pytest.mark.parametrize("path", ["/", "/v1", "/v1/"])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_quirk_10_the_root_answers_whoever_warms_up_a_connection(method: str, path: str) -> None:
    response = ask(app_of(FakeEngine()), method, path)
    assert response.status_code == 200 and response.headers["content-type"] == "application/json"
    assert (response.json()["name"] == "declaim") if method == "GET" else response.content == b""


# 11. Text.


@pytest.mark.parametrize("text", ["...", "!", "🙂🎉", " ", "\n\t", "—", "*"])
def test_quirk_11_text_without_a_word_is_a_short_silence(text: str) -> None:
    engine = FakeEngine()
    response = speak(engine, input=text)
    assert response.status_code == 200
    assert response.content == bytes(round(0.2 * 24_000) * 2)
    assert engine.requests == []


def test_quirk_11_only_empty_text_is_refused() -> None:
    response = speak(FakeEngine(), input="")
    assert response.status_code == 400 and response.json()["error"]["param"] == "input"


@pytest.mark.parametrize("text", ["# **Bold** `code`", "naïve café 你好", "5", "a\x00b", "x" * 4096])
def test_quirk_11_markdown_emoji_and_any_script_reach_the_engine_as_they_are(text: str) -> None:
    engine = FakeEngine()
    assert speak(engine, input=text).status_code == 200
    assert engine.requests[0].text == text


# Lengths, errors and headers.


@pytest.mark.parametrize("response_format", MEDIA_TYPES)
def test_quirk_what_is_whole_before_it_is_sent_has_its_length(response_format: str) -> None:
    for changes, engine in (({"stream": False}, scripted(num_chunks=5)), ({}, scripted(num_chunks=1))):
        response = speak(engine, response_format=response_format, **changes)
        assert int(response.headers["content-length"]) == len(response.content)
        assert response.headers["x-finish-reason"] == "stop"
        if response_format == "wav":
            with wave.open(io.BytesIO(response.content)) as reader:
                assert reader.getnframes() == len(engine.audio())


@pytest.mark.parametrize("value", [True, None])
def test_quirk_a_stream_has_no_length(value: bool | None) -> None:
    assert "content-length" not in speak(FakeEngine(), stream=value).headers


def test_quirk_every_answer_has_the_headers_that_sdks_read() -> None:
    app = app_of(FakeEngine())
    for response in (
        ask(app, "POST", SPEECH, json=BODY),
        ask(app, "POST", SPEECH, json={}),
        ask(app, "GET", "/nowhere"),
        ask(app, "GET", "/v1/models"),
    ):
        assert response.headers["x-request-id"].startswith("req_")
        assert response.headers["openai-version"] == "2020-10-01"
        assert response.headers["openai-processing-ms"].isdecimal()


def test_quirk_a_browser_may_call_from_the_origins_it_was_told() -> None:
    app = app_with(FakeEngine(), cors_origins=("https://app.example",))
    asked = "authorization,content-type,x-stainless-os,x-stainless-retry-count"
    headers = {"origin": "https://app.example", "access-control-request-method": "POST"}
    preflight = ask(app, "OPTIONS", SPEECH, headers={**headers, "access-control-request-headers": asked})
    assert preflight.status_code == 200
    assert set(asked.split(",")) <= set(preflight.headers["access-control-allow-headers"].replace(" ", "").split(","))
    answer = ask(app, "POST", SPEECH, json=BODY, headers={"origin": "https://app.example"})
    assert answer.headers["access-control-allow-origin"] == "https://app.example"
    assert "x-request-id" in answer.headers["access-control-expose-headers"]
    elsewhere = ask(app, "POST", SPEECH, json=BODY, headers={"origin": "https://other.example"})
    assert "access-control-allow-origin" not in elsewhere.headers


def test_quirk_home_assistants_formats_all_answer() -> None:
    home_assistant = {"instructions": "None", "speed": 1.0, "voice": "marin", "model": "gpt-4o-mini-tts"}
    engine = FakeEngine()
    for response_format in MEDIA_TYPES:
        assert speak(engine, **home_assistant, response_format=response_format).status_code == 200


def test_quirk_pipecat_frames_the_first_second_at_once() -> None:
    """It reads half a second at a time: what is there must come without waiting for more."""
    engine = scripted(num_chunks=4, frames_per_chunk=25)
    with serving_at(lambda: engine) as (url, _):

        async def first_half_second() -> bytes:
            async with httpx.AsyncClient(base_url=url, timeout=10) as client:
                async with client.stream("POST", SPEECH, json=BODY) as response:
                    return await anext(response.aiter_bytes(24_000))

        assert asyncio.run(first_half_second()) == to_s16(engine.audio())[:12_000].tobytes()
