"""Two tenants of one whole server: what one has, made or asked for is nothing that the other can tell."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from fastapi.testclient import TestClient

from declaim.api.server import ServerOptions, serving_app
from declaim.api.serving import Serving
from declaim.api.settings import ApiSettings
from declaim.api.store.database import Database
from declaim.api.store.tenants import Limits, create_key, set_tenant
from tests.api.fake_engine import FakeEngine, eventually, scripted

SPEECH = "/v1/audio/speech"
VOICES = "/v1/audio/voices"
CONSENTS = "/v1/audio/voice_consents"
USAGE = "/v1/organization/usage/audio_speeches"
TENANTS = ("acme", "rival")


class World:
    """A server with a cache and two tenants, limited alike."""

    def __init__(self, client: TestClient, engine: FakeEngine, keys: dict[str, str]) -> None:
        self.client = client
        self.engine = engine
        self._keys = keys

    def ask(self, tenant: str, method: str, path: str, **options: Any) -> Any:
        return self.client.request(method, path, headers={"authorization": f"Bearer {self._keys[tenant]}"}, **options)

    def speak(self, tenant: str, text: str = "Hello there.", **fields: object) -> Any:
        return self.ask(tenant, "POST", SPEECH, json={"model": "lark", "input": text, "seed": 7, **fields})

    def add_voice(self, tenant: str, name: str) -> str:
        consent = self._upload(tenant, CONSENTS, "recording", name=name, language="en-US")
        return self._upload(tenant, VOICES, "audio_sample", name=name, transcript="some words", consent=consent)

    def _upload(self, tenant: str, path: str, field: str, **fields: str) -> str:
        answer = self.ask(tenant, "POST", path, data=fields, files={field: ("a.wav", recording())})
        assert answer.status_code == 200, answer.text
        return str(answer.json()["id"])

    def usage(self, tenant: str) -> tuple[int, int]:
        """Requests and characters that the tenant is told of."""
        answer = self.ask(tenant, "GET", USAGE, params={"start_time": int(time.time()) - 3600})
        results = [result for bucket in answer.json()["data"] for result in bucket["results"]]
        return (
            sum(result["num_model_requests"] for result in results),
            sum(result["characters"] for result in results),
        )


def recording() -> bytes:
    """Two seconds of a tone that swells and fades."""
    times = np.arange(2 * 24_000) / 24_000
    file = io.BytesIO()
    audio = 0.3 * np.sin(2 * np.pi * 180 * times) * np.sin(2 * np.pi * 3 * times) ** 2
    soundfile.write(file, audio.astype(np.float32), 24_000, format="WAV")
    return file.getvalue()


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    database = Database(f"sqlite:///{tmp_path}/declaim.db")
    database.migrate()
    keys = {}
    with database.session() as session:
        for tenant in TENANTS:
            set_tenant(session, tenant, Limits(requests_per_minute=100), now=1.0)
            keys[tenant] = create_key(session, tenant, now=1.0)[1]
    engine = scripted()
    serving = Serving(lambda: engine)
    options = ServerOptions(ApiSettings(cache_folder=tmp_path / "cache"))
    with serving_app(serving, database, options, host="127.0.0.1") as served, TestClient(served.app) as client:
        assert eventually(lambda: serving.stage == "ready", within_s=30.0)
        yield World(client, engine, keys)
    database.close()


def test_a_voice_is_listed_named_spoken_and_deleted_by_its_owner_alone(world: World) -> None:
    voice_id = world.add_voice("acme", "boss")
    assert "boss" in world.ask("acme", "GET", VOICES).text
    assert "boss" not in world.ask("rival", "GET", VOICES).text
    for method in ("GET", "DELETE"):
        assert world.ask("rival", method, f"{VOICES}/{voice_id}").status_code == 404
    for name in ("boss", voice_id):
        refused = world.speak("rival", voice=name)
        assert refused.status_code == 400
        # Word for word what is said of a name that nobody has.
        other = name[:-1] + "x"
        assert refused.text == world.speak("rival", voice=other).text.replace(other, name)
    assert world.speak("acme", voice="boss").status_code == 200


def test_two_voices_of_one_name_are_two(world: World) -> None:
    ids = {tenant: world.add_voice(tenant, "boss") for tenant in TENANTS}
    assert world.ask("rival", "DELETE", f"{VOICES}/{ids['rival']}").status_code == 200
    assert world.speak("acme", voice="boss").status_code == 200
    assert world.speak("rival", voice="boss").status_code == 400


def test_an_answer_kept_for_one_is_spoken_anew_for_the_other(world: World) -> None:
    for _ in range(2):
        assert world.speak("acme").status_code == 200
    assert [request.tenant for request in world.engine.requests] == ["acme"]
    assert world.speak("rival").status_code == 200
    assert [request.tenant for request in world.engine.requests] == ["acme", "rival"]


def test_usage_and_limits_are_each_ones_own(world: World) -> None:
    for i in range(3):
        assert world.speak("acme", f"Number {i}.").status_code == 200
    answer = world.speak("rival", "One.")
    assert answer.headers["x-ratelimit-remaining-requests"] == "99"
    assert eventually(lambda: world.usage("acme") == (3, 27), within_s=30.0)
    assert eventually(lambda: world.usage("rival") == (1, 4), within_s=30.0)
