"""Voices through HTTP: what a client uploads, what it gets, and what it can never see."""

from __future__ import annotations

import asyncio
import io
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import av
import httpx
import numpy as np
import openai
import pytest
import soundfile
from fastapi import FastAPI
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from declaim.api.errors import ApiError, install_error_handlers
from declaim.api.gate import Admission, Caller, OpenGate
from declaim.api.store.database import Database
from declaim.api.store.voices import VoiceTables
from declaim.api.uploads import MAX_RECORDING_BYTES, container_of, read_recording
from declaim.api.voices import OPENAI_VOICES, VoiceLimits, VoiceStore, build_voices_router
from declaim.engine.errors import InvalidRequest, VoiceNotFound
from declaim.engine.request import EncodedVoice, Voice
from declaim.engine.spec import ModelSpec
from tests.api.asgi_server import served
from tests.api.fake_engine import eventually, make_spec

RATE_HZ = 24_000


def speech(seconds: float = 2.0, *, rate_hz: int = RATE_HZ, gain: float = 0.5) -> NDArray[np.float32]:
    times = np.arange(round(seconds * rate_hz)) / rate_hz
    return (gain * np.sin(2 * np.pi * 220.0 * times) * (0.6 + 0.4 * np.sin(2 * np.pi * 3 * times))).astype(np.float32)


def file_of(audio: NDArray[np.float32], format: str = "WAV", *, rate_hz: int = RATE_HZ) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, audio, rate_hz, format=format)
    return buffer.getvalue()


def container_file(audio: NDArray[np.float32], format: str, codec: str, *, rate_hz: int = 48_000) -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=format) as container:
        stream = container.add_stream(codec, rate=rate_hz)
        stream.layout = "mono"
        frame = av.AudioFrame.from_ndarray((audio * 32767).astype(np.int16).reshape(1, -1), "s16", "mono")
        frame.sample_rate = rate_hz
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            container.mux(packet)
    return buffer.getvalue()


@dataclass(slots=True)
class FakeEncoder:
    """Encodes a voice as its length in frames; `gate` holds an encoding up."""

    model_name: str = "fake"
    spec: ModelSpec = field(default_factory=lambda: make_spec(RATE_HZ))
    num_codebooks: int = 3
    embeds: bool = True
    gate: threading.Event | None = None
    encoded: list[Voice] = field(default_factory=list)
    threads: set[str] = field(default_factory=set)

    def encode_voice(self, voice: Voice) -> EncodedVoice:
        self.threads.add(threading.current_thread().name)
        if self.gate is not None:
            self.gate.wait(10)
        self.encoded.append(voice)
        num_frames = len(voice.audio) * 25 // voice.sample_rate_hz
        codes = np.arange(num_frames * self.num_codebooks, dtype=np.int32).reshape(num_frames, -1)
        return EncodedVoice(voice.transcript, codes, np.linspace(0, 1, 8, dtype=np.float32) if self.embeds else None)


class KeyNames(OpenGate):
    """A gate where a key is the name of its tenant; "wrong" is nobody's."""

    async def authenticate(self, credential: str | None) -> Caller:
        if credential in (None, "wrong"):
            raise ApiError("no such key", status=401, type="invalid_request_error", code="invalid_api_key")
        return Caller(tenant=credential)

    async def admit(self, caller: Caller, *, request_id: str, chars: int, service_tier: str | None) -> Admission:
        raise AssertionError("voices are not speech")


@dataclass(slots=True)
class World:
    """A server's voices, and two tenants' clients."""

    client: TestClient
    store: VoiceStore
    engine: FakeEncoder
    database: Database

    def consent(self, tenant: str = "acme") -> str:
        response = self.client.post(
            "/v1/audio/voice_consents",
            headers=key(tenant),
            data={"name": "Anna's consent", "language": "en-US"},
            files={"recording": ("../../etc/passwd", file_of(speech(1.5, gain=0.3)))},
        )
        assert response.status_code == 200, response.text
        return str(response.json()["id"])

    def upload(self, sample: bytes, tenant: str = "acme", name: str = "Anna", **fields: str) -> httpx.Response:
        data = {"name": name, "transcript": "hello there", **fields}
        return self.client.post(
            "/v1/audio/voices", headers=key(tenant), data=data, files={"audio_sample": ("a.wav", sample)}
        )

    def voice(self, tenant: str = "acme", name: str = "Anna") -> str:
        response = self.upload(file_of(speech()), tenant, name, consent=self.consent(tenant))
        assert response.status_code == 200, response.text
        return str(response.json()["id"])


def key(tenant: str) -> dict[str, str]:
    return {"authorization": f"Bearer {tenant}"}


@contextmanager
def world_at(path: Path, engine: FakeEncoder | None = None, **limits: object) -> Iterator[World]:
    engine = engine or FakeEncoder()
    database = Database(f"sqlite:///{path}/declaim.db")
    database.migrate()
    store = VoiceStore(lambda: engine, database, limits=replace(VoiceLimits(), **limits))  # type: ignore[arg-type]
    app = FastAPI(redirect_slashes=False)
    install_error_handlers(app)
    app.include_router(build_voices_router(store, KeyNames(), check_open=lambda: engine, lists_publicly=True))
    try:
        with TestClient(app, raise_server_exceptions=False) as client:
            yield World(client, store, engine, database)
    finally:
        store.close()
        database.close()


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with world_at(tmp_path) as made:
        yield made


def error_of(response: httpx.Response, status: int) -> dict[str, str]:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return dict(error)


def test_the_list_has_the_shape_that_every_client_reads(world: World) -> None:
    made = world.voice()
    body = world.client.get("/v1/audio/voices", headers=key("acme")).json()
    assert body["object"] == "list" and body["data"] == body["voices"] and body["has_more"] is False
    assert {"alloy", "default", *OPENAI_VOICES} <= {voice["id"] for voice in body["voices"]}
    assert all({"id", "voice_id", "name", "object", "created_at", "type"} <= set(voice) for voice in body["voices"])
    (own,) = [voice for voice in body["voices"] if voice["type"] != "builtin"]
    assert (own["id"], own["name"], own["type"]) == (made, "Anna", "audio_sample")


def test_open_webui_lists_the_models_own_voices_without_a_key(world: World) -> None:
    world.voice()
    body = world.client.get("/v1/audio/voices").json()
    assert {voice["type"] for voice in body["voices"]} == {"builtin"}
    assert all(voice["id"] and voice["name"] for voice in body["voices"])
    error_of(world.client.get("/v1/audio/voices", headers=key("wrong")), 401)


def test_a_voice_is_made_resolved_and_deleted(world: World) -> None:
    made = world.voice()
    assert world.client.get(f"/v1/audio/voices/{made}", headers=key("acme")).json()["name"] == "Anna"
    by_id, by_name = (asyncio.run(world.store.resolve("acme", name)) for name in (made, "Anna"))
    assert isinstance(by_id, EncodedVoice) and isinstance(by_name, EncodedVoice)
    assert by_id.codes.shape == (50, 3) and by_id.transcript == "hello there" and by_id.embedding is not None
    np.testing.assert_array_equal(by_id.codes, by_name.codes)
    deleted = world.client.delete(f"/v1/audio/voices/{made}", headers=key("acme"))
    assert deleted.json() == {"id": made, "object": "audio.voice.deleted", "deleted": True}
    error_of(world.client.delete(f"/v1/audio/voices/{made}", headers=key("acme")), 404)
    error_of(world.client.get(f"/v1/audio/voices/{made}", headers=key("acme")), 404)
    with pytest.raises(VoiceNotFound, match="use one of default, alloy"):
        asyncio.run(world.store.resolve("acme", made))


def test_deleting_leaves_no_sample_in_the_database_files(world: World, tmp_path: Path) -> None:
    made = world.voice()
    voice = VoiceTables(world.database).find_voice("acme", made)
    assert voice is not None
    flac = VoiceTables(world.database).audio(voice)
    assert flac is not None
    needle = flac[5000:5400]

    def is_on_disk() -> bool:
        return any(needle in path.read_bytes() for path in tmp_path.iterdir() if path.is_file())

    assert is_on_disk()
    world.client.delete(f"/v1/audio/voices/{made}", headers=key("acme"))
    assert not is_on_disk()


def test_another_tenants_voice_is_the_same_as_none(world: World) -> None:
    made, consent = world.voice("acme"), world.consent("acme")
    unknown = "voice_" + "0" * 24
    for method in ("GET", "DELETE"):
        theirs, none = (
            world.client.request(method, f"/v1/audio/voices/{each}", headers=key("rival")) for each in (made, unknown)
        )
        assert error_of(theirs, 404)["message"].replace(made, unknown) == error_of(none, 404)["message"]
        error_of(world.client.request(method, f"/v1/audio/voice_consents/{consent}", headers=key("rival")), 404)
    error_of(world.client.post(f"/v1/audio/voice_consents/{consent}", headers=key("rival"), json={"name": "x"}), 404)
    error_of(world.upload(file_of(speech()), "rival", consent=consent), 404)
    assert world.client.get("/v1/audio/voice_consents", headers=key("rival")).json()["data"] == []
    listed = world.client.get("/v1/audio/voices", headers=key("rival")).json()["voices"]
    assert made not in {voice["id"] for voice in listed}
    for name in (made, "Anna"):
        with pytest.raises(VoiceNotFound) as refused:
            asyncio.run(world.store.resolve("rival", name))
        assert "Anna" not in str(refused.value).replace("'Anna'", "")
    assert world.client.get(f"/v1/audio/voices/{made}", headers=key("acme")).status_code == 200


def test_voices_outlive_the_server_and_are_not_encoded_again(tmp_path: Path) -> None:
    with world_at(tmp_path) as before:
        made = before.voice()
        first = asyncio.run(before.store.resolve("acme", made))
    with world_at(tmp_path) as after:
        second = asyncio.run(after.store.resolve("acme", made))
        assert after.engine.encoded == []
    assert isinstance(first, EncodedVoice) and isinstance(second, EncodedVoice)
    np.testing.assert_array_equal(first.codes, second.codes)


def test_a_voice_stored_before_the_speaker_encoder_gets_its_embedding_once(tmp_path: Path) -> None:
    def is_embedded(world: World) -> bool:
        voice = asyncio.run(world.store.resolve("acme", made))
        assert isinstance(voice, EncodedVoice) and voice.codes.shape == (50, 3)
        return voice.embedding is not None

    with world_at(tmp_path, FakeEncoder(embeds=False)) as before:
        made = before.voice()
        assert not is_embedded(before) and len(before.engine.encoded) == 1
    spec = replace(make_spec(RATE_HZ), embeds_voices=True)
    with world_at(tmp_path, FakeEncoder(spec=spec)) as installed:
        assert is_embedded(installed) and is_embedded(installed)
        assert len(installed.engine.encoded) == 1
    with world_at(tmp_path, FakeEncoder(spec=spec)) as after:
        assert is_embedded(after) and after.engine.encoded == []
    with world_at(tmp_path, FakeEncoder(embeds=False)) as removed:
        assert is_embedded(removed) and removed.engine.encoded == []


def test_a_voice_needs_a_transcript_only_where_no_speaker_encoder_knows_it(tmp_path: Path) -> None:
    with world_at(tmp_path) as without:
        refused = without.upload(file_of(speech()), consent=without.consent(), transcript="")
        assert error_of(refused, 400)["param"] == "transcript" and without.engine.encoded == []
    spec = replace(make_spec(RATE_HZ), embeds_voices=True)
    with world_at(tmp_path, FakeEncoder(spec=spec)) as world:
        made = world.upload(file_of(speech()), consent=world.consent(), transcript="")
        assert made.status_code == 200, made.text
        voice = asyncio.run(world.store.resolve("acme", made.json()["id"]))
        assert isinstance(voice, EncodedVoice) and voice.embedding is not None and voice.transcript == ""


def test_another_model_encodes_the_stored_sample_once(tmp_path: Path) -> None:
    with world_at(tmp_path) as before:
        made = before.voice()
    other = FakeEncoder(model_name="other", num_codebooks=5)
    with world_at(tmp_path, other) as after:

        async def both() -> list[EncodedVoice | str | None]:
            return await asyncio.gather(*(after.store.resolve("acme", made) for _ in range(2)))

        voices = asyncio.run(both())
        assert all(isinstance(voice, EncodedVoice) and voice.codes.shape == (50, 5) for voice in voices)
        assert len(other.encoded) == 1
        np.testing.assert_allclose(other.encoded[0].audio, speech(), atol=1e-4)
        assert other.encoded[0].transcript == "hello there"
    mute = FakeEncoder(model_name="mute", spec=replace(make_spec(RATE_HZ), supports_voice_prompt=False))
    with world_at(tmp_path, mute) as without:
        with pytest.raises(InvalidRequest, match="cannot imitate another"):
            asyncio.run(without.store.resolve("acme", made))
        assert (
            "cannot imitate" in error_of(without.upload(file_of(speech()), consent=without.consent()), 400)["message"]
        )


def test_openais_names_mean_the_models_own_voices(world: World) -> None:
    assert [asyncio.run(world.store.resolve("acme", name)) for name in (None, "alloy", "cedar", "fake")] == [None] * 4
    world.engine.spec = replace(world.engine.spec, voices=("lark", "wren"))
    assert [asyncio.run(world.store.resolve("acme", name)) for name in ("alloy", "ash", "ballad", "wren")] == [
        "lark",
        "wren",
        "lark",
        "wren",
    ]
    error_of(world.upload(file_of(speech()), name="alloy", consent=world.consent()), 400)


@pytest.mark.parametrize("name", ["\x00", "voice_\u0000", "../../etc/passwd", "x" * 5000, "🙂", "a\nb"])
def test_no_name_that_a_client_invents_is_more_than_unknown(world: World, name: str) -> None:
    with pytest.raises(VoiceNotFound):
        asyncio.run(world.store.resolve("acme", name))
    for path in ("voices", "voice_consents"):
        url = f"/v1/audio/{path}/{quote(name, safe='')}"
        assert world.client.get(url, headers=key("acme")).status_code == 404


@pytest.mark.parametrize(
    "data",
    [
        file_of(speech(), "WAV"),
        file_of(speech(), "FLAC"),
        file_of(speech(), "OGG"),
        file_of(speech(), "MP3"),
        container_file(speech(rate_hz=48_000), "mp4", "aac"),
        container_file(speech(rate_hz=48_000), "webm", "libopus"),
        container_file(speech(rate_hz=48_000), "adts", "aac"),
        container_file(speech(rate_hz=48_000), "ogg", "libopus"),
    ],
    ids=["wav", "flac", "vorbis", "mp3", "m4a", "webm", "adts", "opus"],
)
def test_every_container_that_openai_takes_is_read_by_its_content(data: bytes) -> None:
    recording = read_recording(data, param="audio_sample")
    assert len(recording.audio) / recording.sample_rate_hz == pytest.approx(2.0, abs=0.11)
    reference = speech(rate_hz=recording.sample_rate_hz)
    power = np.sqrt(np.mean(recording.audio**2)) / np.sqrt(np.mean(reference**2))
    assert power == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "0 bytes"),
        (b"MZ" + bytes(5000), "no audio file"),
        (b"PK\x03\x04" + bytes(5000), "no audio file"),
        (b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n", "no audio file"),
        (file_of(speech())[:60], "s is needed"),
        (file_of(speech(), "FLAC")[:600], "cannot be decoded"),
        (container_file(speech(rate_hz=48_000), "mp4", "aac")[:2000], "cannot be decoded"),
        (b"\x1a\x45\xdf\xa3" + bytes(4000), "cannot be decoded"),
        (b"\xff\xfb" + bytes(4000), "cannot be decoded"),
        (file_of(speech(0.5)), "at least 1 s"),
        (file_of(speech(31.0)), "at most 30 s"),
        (container_file(speech(40.0, rate_hz=48_000), "mp4", "aac"), "at most 30 s"),
        (file_of(speech(gain=1e-5)), "silent"),
        (file_of(np.clip(speech(gain=8.0), -1, 1)), "clipped"),
    ],
)
def test_a_bad_recording_is_refused_with_its_reason(world: World, data: bytes, said: str) -> None:
    error = error_of(world.upload(data, consent=world.consent()), 400)
    assert said in error["message"] and error["param"] == "audio_sample"
    assert world.client.get("/v1/audio/voices", headers=key("acme")).json()["data"][-1]["type"] == "builtin"


def test_a_bomb_is_not_unpacked(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A FLAC file of an hour of silence is small; no more than 30 s of it is decoded."""
    bomb = file_of(np.zeros(3600 * 8000, np.int16), "FLAC", rate_hz=8000)
    assert len(bomb) < MAX_RECORDING_BYTES // 10
    num_frames = []
    read = soundfile.SoundFile.read

    def counted(file: soundfile.SoundFile, *args: Any, **fields: Any) -> Any:
        audio = read(file, *args, **fields)
        num_frames.append(len(audio))
        return audio

    consent = world.consent()
    monkeypatch.setattr(soundfile.SoundFile, "read", counted)
    assert "at most 30 s" in error_of(world.upload(bomb, consent=consent), 400)["message"]
    assert sum(num_frames) <= 31 * 8000


def test_a_body_is_measured_while_it_is_read(world: World) -> None:
    head = (
        b'--b\r\nContent-Disposition: form-data; name="name"\r\n\r\nx\r\n'
        b'--b\r\nContent-Disposition: form-data; name="audio_sample"; filename="x"\r\n\r\n'
    )
    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        yield head
        while sent < 20 << 20:
            sent += 1 << 20
            yield bytes(1 << 20)

    headers = {**key("acme"), "content-type": "multipart/form-data; boundary=b"}
    error_of(world.client.post("/v1/audio/voices", headers=headers, content=endless()), 413)
    too_large = file_of(speech())[:44] + bytes(MAX_RECORDING_BYTES)
    error_of(world.upload(too_large, consent=world.consent()), 413)


@pytest.mark.parametrize(
    ("content_type", "body", "status"),
    [
        ("application/json", b"{}", 415),
        ("", b"", 415),
        ("multipart/form-data", b"x", 400),
        ("multipart/form-data; boundary=b", b"", 400),
        ("multipart/form-data; boundary=b", b"--b--\r\n", 400),
        ("multipart/form-data; boundary=b", b"\x00\xff" * 400, 400),
        (
            "multipart/form-data; boundary=b; charset=klingon",
            b'--b\r\nContent-Disposition: form-data; name="name"\r\n\r\nx\r\n--b--\r\n',
            400,
        ),
        (
            "multipart/form-data; boundary=b",
            b'--b\r\nContent-Disposition: form-data; name="name"\r\n\r\n' + b"x" * 40_000 + b"\r\n--b--\r\n",
            400,
        ),
    ],
)
def test_a_body_that_is_no_form_is_refused(world: World, content_type: str, body: bytes, status: int) -> None:
    headers = {**key("acme"), "content-type": content_type}
    error_of(world.client.post("/v1/audio/voices", headers=headers, content=body), status)


@pytest.fixture(scope="module")
def lax(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with world_at(tmp_path_factory.mktemp("lax"), requires_consent=False, max_voices=10_000) as made:
        yield made


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_no_upload_is_a_server_error(lax: World, data: st.DataObject) -> None:
    whole = data.draw(st.sampled_from(FUZZED))
    cut = data.draw(st.integers(0, len(whole)))
    noise = data.draw(st.binary(max_size=40))
    at = data.draw(st.integers(0, min(len(whole), 400)))
    mangled = whole[:at] + noise + whole[at + len(noise) : cut]
    name = data.draw(st.just("Anna") | st.text(max_size=80))
    response = lax.upload(mangled, name=name)
    assert response.status_code in (200, 400), response.text


FUZZED = [
    file_of(speech(1.1)),
    file_of(speech(1.1), "FLAC"),
    file_of(speech(1.1), "OGG"),
    file_of(speech(1.1), "MP3"),
    container_file(speech(1.1, rate_hz=48_000), "mp4", "aac"),
    container_file(speech(1.1, rate_hz=48_000), "webm", "libopus"),
]


def test_a_consent_is_needed_kept_renamed_and_deleted(world: World) -> None:
    error = error_of(world.upload(file_of(speech())), 400)
    assert (error["param"], error["code"]) == ("consent", "missing_required_parameter")
    error_of(world.upload(file_of(speech()), consent="cons_" + "0" * 24), 404)
    ids = [world.consent() for _ in range(3)]
    first = world.client.get("/v1/audio/voice_consents?limit=2", headers=key("acme")).json()
    assert [each["id"] for each in first["data"]] == ids[:0:-1]
    assert first["has_more"] and (first["first_id"], first["last_id"]) == (ids[2], ids[1])
    rest = world.client.get(f"/v1/audio/voice_consents?after={ids[1]}", headers=key("acme")).json()
    assert [each["id"] for each in rest["data"]] == ids[:1] and not rest["has_more"]
    renamed = world.client.post(f"/v1/audio/voice_consents/{ids[0]}", headers=key("acme"), json={"name": "New"})
    assert renamed.json()["name"] == "New"
    assert world.client.get(f"/v1/audio/voice_consents/{ids[0]}", headers=key("acme")).json() == renamed.json()
    deleted = world.client.delete(f"/v1/audio/voice_consents/{ids[0]}", headers=key("acme"))
    assert deleted.json() == {"id": ids[0], "object": "audio.voice_consent", "deleted": True}
    error_of(world.client.delete(f"/v1/audio/voice_consents/{ids[0]}", headers=key("acme")), 404)


def test_a_model_that_continues_a_sample_must_know_its_words(world: World) -> None:
    error = error_of(world.upload(file_of(speech()), consent=world.consent(), transcript=" "), 400)
    assert error["param"] == "transcript"


def test_a_tenant_reaches_its_limit_and_another_does_not(tmp_path: Path) -> None:
    with world_at(tmp_path, max_voices=2, requires_consent=False) as world:
        assert [world.upload(file_of(speech())).status_code for _ in range(3)] == [200, 200, 403]
        assert world.upload(file_of(speech()), "rival").status_code == 200


def test_one_tenants_uploads_wait_for_their_turn_off_the_event_loop(tmp_path: Path) -> None:
    engine = FakeEncoder(gate=threading.Event())
    with world_at(tmp_path, engine, requires_consent=False, max_uploads_per_tenant=1) as world:
        statuses: list[int] = []
        upload: Callable[[], None] = lambda: statuses.append(world.upload(file_of(speech())).status_code)  # noqa: E731
        thread = threading.Thread(target=upload)
        thread.start()
        assert eventually(lambda: bool(engine.threads))
        # The loop answers while a voice is being encoded.
        assert world.client.get("/v1/audio/voices", headers=key("rival")).status_code == 200
        error = world.upload(file_of(speech()))
        assert error_of(error, 503)["code"] == "server_is_overloaded" and error.headers["retry-after"] == "2"
        assert engine.gate is not None
        engine.gate.set()
        thread.join(10)
        assert statuses == [200]
        assert engine.threads == {"declaim-voices_0"}
        assert world.upload(file_of(speech())).status_code == 200


def test_the_openai_client_makes_and_deletes_a_voice(world: World) -> None:
    with served(world.client.app) as address, openai.OpenAI(api_key="acme", base_url=f"http://{address}/v1") as client:
        consent = client.audio.voice_consents.create(
            name="Anna", language="en-US", recording=("c.wav", file_of(speech()), "audio/wav")
        )
        voice = client.audio.voices.create(
            name="Anna",
            consent=consent.id,
            audio_sample=("s.mp3", file_of(speech(), "MP3"), "audio/mpeg"),
            extra_body={"transcript": "hello there"},
        )
        assert voice.id.startswith("voice_") and voice.object == "audio.voice"
        assert [each.id for each in client.audio.voice_consents.list()] == [consent.id]
        assert client.audio.voices.delete(voice.id).deleted
        assert client.audio.voice_consents.delete(consent.id).deleted


def test_a_refusal_is_seen_by_a_client_that_is_still_sending(world: World) -> None:
    with served(world.client.app) as address:
        for tenant, content_type, status in (
            ("wrong", "multipart/form-data; boundary=b", 401),
            ("acme", "text/plain", 415),
        ):
            response = httpx.post(
                f"http://{address}/v1/audio/voices",
                headers={**key(tenant), "content-type": content_type},
                content=bytes(12 << 20),
            )
            error_of(response, status)


def test_containers_are_known_by_their_first_bytes() -> None:
    assert container_of(b"RIFF\x00\x00\x00\x00AVI LIST") is None
    assert container_of(b"") is None and container_of(b"\xff") is None
