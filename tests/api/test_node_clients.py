"""Stock clients for Node, against a running server with keys: the `openai` package and the Vercel AI SDK."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from tests.api.fake_engine import eventually
from tests.api.test_live_server import gauge, serve
from tests.api.test_server import ROOT, make_key, migrated

# Kept in pytest's cache folder: only the first run asks the registry.
PACKAGES = {"openai": "6.49.0", "ai": "6.0.326", "@ai-sdk/openai": "3.0.141"}


@dataclass(frozen=True, slots=True)
class World:
    """A running server, a key of it, and a folder in which Node finds the packages."""

    url: str
    key: str
    folder: Path

    def run(self, script: Path, *arguments: str) -> str:
        """What a script prints."""
        # Node looks for packages from where the script lies.
        copy = shutil.copy(script, self.folder)
        environment = {**os.environ, "OPENAI_BASE_URL": self.url + "/v1", "OPENAI_API_KEY": self.key}
        done = subprocess.run(
            ["node", copy, *arguments],
            cwd=self.folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=90,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    def seen_by(self, client: str) -> dict[str, Any]:
        """What tests/api/clients/`client`.mjs saw."""
        script = Path(__file__).parent / "clients" / f"{client}.mjs"
        return dict(json.loads(self.run(script, self.url + "/v1", self.key, str(self.folder))))

    def samples(self, name: str) -> np.ndarray:
        """What a file sounds like; it is speech, and not silence."""
        audio, rate_hz = soundfile.read(self.folder / name, dtype="float32")
        assert rate_hz == 24_000 and 0.01 < np.sqrt(np.mean(audio**2)) < 0.5
        return audio


@pytest.fixture(scope="module")
def node_modules(pytestconfig: pytest.Config) -> Path:
    """The packages, installed."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("Node is not installed: apt-get install -y nodejs npm")
    assert pytestconfig.cache is not None
    folder = pytestconfig.cache.mkdir("node-clients")
    wanted = json.dumps({"private": True, "dependencies": PACKAGES})
    stamp = folder / "installed.json"
    if not stamp.is_file() or stamp.read_text() != wanted:
        (folder / "package.json").write_text(wanted)
        command = ["npm", "install", "--no-audit", "--no-fund", "--ignore-scripts"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)
        if done.returncode:
            pytest.skip(f"npm does not get {', '.join(PACKAGES)}: {done.stderr.strip()[-300:]}")
        stamp.write_text(wanted)
    return folder / "node_modules"


@pytest.fixture(scope="module")
def world(node_modules: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    server_folder, folder = tmp_path_factory.mktemp("server"), tmp_path_factory.mktemp("node")
    (folder / "node_modules").symlink_to(node_modules)
    database = migrated(server_folder)
    key = make_key(database)
    database.close()
    with serve("inline", server_folder) as (url, _):
        yield World(url, key, folder)


@pytest.fixture(scope="module")
def openai_seen(world: World) -> dict[str, Any]:
    return world.seen_by("openai_node")


def test_the_openai_package_hears_speech(world: World, openai_seen: dict[str, Any]) -> None:
    seen = openai_seen
    assert {"lark", "tts-1", "gpt-4o-mini-tts"} <= set(seen["models"])
    assert seen["type"] == "audio/mpeg"
    faster, audio = world.samples("whole.mp3"), world.samples("whole.wav")
    assert 0.6 < len(audio) / 24_000 < 5.0
    assert 0.7 < len(faster) / len(audio) < 0.95
    assert seen["sameResponse"] is True
    assert str(seen["requestId"]).startswith("req_") and seen["chunks"] > 1
    *deltas, last = seen["events"]
    assert last == "speech.audio.done" and set(deltas) == {"speech.audio.delta"}
    assert eventually(lambda: gauge(world.url, "declaim_streams") == 0), "the stream that was left goes on"


def test_the_openai_package_knows_the_errors(openai_seen: dict[str, Any]) -> None:
    wrong_key, wrong_speed, wrong_model = (openai_seen[name] for name in ("wrongKey", "wrongSpeed", "wrongModel"))
    assert (wrong_key["name"], wrong_key["status"], wrong_key["code"]) == (
        "AuthenticationError",
        401,
        "invalid_api_key",
    )
    assert (wrong_speed["name"], wrong_speed["status"], wrong_speed["param"]) == ("BadRequestError", 400, "speed")
    assert (wrong_model["name"], wrong_model["code"]) == ("NotFoundError", "model_not_found")
    assert "nobody" in wrong_model["message"]


def test_the_example_for_node(world: World) -> None:
    printed = world.run(ROOT / "examples" / "openai_client.mjs", "Hello from Node.")
    assert "hello.opus: audio/ogg" in printed and "req_" in printed
    assert (world.folder / "hello.opus").read_bytes().startswith(b"OggS")


def test_the_vercel_ai_sdk(world: World) -> None:
    seen = world.seen_by("vercel_ai_sdk")
    assert (seen["mediaType"], seen["format"], seen["warnings"]) == ("audio/mpeg", "mp3", [])
    assert seen["chosenMediaType"] == "audio/wav" and str(seen["requestId"]).startswith("req_")
    assert 0.6 < len(world.samples("default.mp3")) / 24_000 < 5.0
    assert len(world.samples("chosen.wav")) > 10_000
    assert seen["wrongKey"]["isCallError"] and seen["wrongKey"]["status"] == 401
    assert "API key" in seen["wrongKey"]["message"]
