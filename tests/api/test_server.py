"""A server process: who may come in, how it stops, and what it answers to anything that its own document allows."""

from __future__ import annotations

import signal
import subprocess
from contextlib import AbstractContextManager
from pathlib import Path

import httpx
import pytest

from declaim.api.server import check_open_to, is_loopback
from declaim.api.store.database import Database
from declaim.api.store.tenants import Limits, create_key, set_tenant
from declaim.engine import InvalidConfig
from tests.api.fake_engine import eventually
from tests.api.server_process import server_process

ROOT = Path(__file__).parents[2]
SPEECH = "/v1/audio/speech"
BODY = {"model": "lark", "input": "Hello.", "response_format": "pcm"}
SERVER = """
import sys
from declaim.api.cli import build_cli
from tests.api.fake_engine import scripted
build_cli(lambda model, config, progress: scripted(num_chunks=int(sys.argv[1]), delay_s=0.1))(sys.argv[2:])
"""


def migrated(folder: Path) -> Database:
    database = Database(f"sqlite:///{folder}/declaim.db")
    database.migrate()
    return database


def make_key(database: Database) -> str:
    with database.session() as session:
        set_tenant(session, "acme", Limits(), now=1.0)
        return create_key(session, "acme", now=1.0)[1]


def serve(
    folder: Path, *options: str, num_chunks: int = 3
) -> AbstractContextManager[tuple[str, subprocess.Popen[str]]]:
    """A ready process whose engine takes 0.1 s a chunk."""
    return server_process(folder, *options, code=SERVER, arguments=(str(num_chunks),))


@pytest.mark.parametrize(
    ("host", "local"),
    [("127.0.0.1", True), ("127.8.8.8", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False)],
)
def test_only_this_machines_addresses_are_loopback(host: str, local: bool) -> None:
    assert is_loopback(host) == local and not is_loopback("example.com")


def test_an_address_of_the_world_needs_a_key_or_a_clear_word(tmp_path: Path) -> None:
    database = migrated(tmp_path)
    assert not check_open_to("127.0.0.1", database, is_open=False)
    assert not check_open_to("0.0.0.0", database, is_open=True)
    with pytest.raises(InvalidConfig, match=r"--host 0\.0\.0\.0 .*declaim keys create.* --no-auth"):
        check_open_to("0.0.0.0", database, is_open=False)
    make_key(database)
    assert check_open_to("0.0.0.0", database, is_open=False)
    database.close()


def test_a_server_with_keys_asks_for_them_and_lists_voices_and_usage_to_their_holder(tmp_path: Path) -> None:
    database = migrated(tmp_path)
    headers = {"authorization": f"Bearer {make_key(database)}"}
    database.close()
    with serve(tmp_path, "--host", "0.0.0.0") as (url, process):
        assert httpx.post(url + SPEECH, json=BODY).status_code == 401
        response = httpx.post(url + SPEECH, json=BODY, headers=headers)
        assert response.status_code == 200 and response.headers["openai-organization"] == "acme"
        voices = httpx.get(url + "/audio/voices", headers=headers).json()
        assert {"alloy", "cedar"} <= {voice["name"] for voice in voices["voices"]}
        usage = url + "/v1/organization/usage/audio_speeches?start_time=0&limit=1"
        assert httpx.get(usage).status_code == 401 and httpx.get(usage, headers=headers).status_code == 200
        assert httpx.get(url + "/", headers={"accept": "text/html"}).text.lstrip().startswith("<!")
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0


def test_a_server_told_to_stop_ends_its_streams_and_refuses_new_ones(tmp_path: Path) -> None:
    with serve(tmp_path, num_chunks=20) as (url, process):
        with httpx.stream("POST", url + SPEECH, json=BODY, timeout=20) as response:
            parts = response.iter_raw()
            data = next(parts)
            process.send_signal(signal.SIGTERM)
            assert eventually(lambda: httpx.get(url + "/ready").json()["status"] == "draining")
            refused = httpx.post(url + SPEECH, json=BODY)
            assert refused.status_code == 503 and int(refused.headers["retry-after"]) >= 1
            assert refused.json()["error"]["code"] == "server_is_overloaded"
            form = {"name": (None, "Mia"), "audio_sample": ("mia.wav", b"RIFF" * 1000, "audio/wav")}
            upload = httpx.post(url + "/v1/audio/voices", files=form)
            assert upload.status_code == 503 and "another one will answer" in upload.json()["error"]["message"]
            data += b"".join(parts)
        assert len(data) == 2 * 20 * 5 * 960
        assert process.wait(10) == 0


def test_a_stream_that_takes_too_long_is_cut_at_the_end_of_the_drain(tmp_path: Path) -> None:
    with serve(tmp_path, "--drain-seconds", "0.3", num_chunks=10_000) as (url, process):
        with httpx.stream("POST", url + SPEECH, json=BODY, timeout=20) as response:
            parts = response.iter_raw()
            next(parts)
            process.send_signal(signal.SIGTERM)
            with pytest.raises(httpx.RemoteProtocolError):
                for _ in parts:
                    pass
        assert process.wait(10) == 0


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_whatever_the_document_allows_is_answered_in_the_envelope(tmp_path: Path) -> None:
    """Requests drawn from /openapi.json: never a 5xx, and every error is OpenAI's object."""
    schemathesis = pytest.importorskip("schemathesis")
    from hypothesis import HealthCheck, Phase, given, settings

    with serve(tmp_path, num_chunks=1) as (url, _):
        schema = schemathesis.openapi.from_url(url + "/openapi.json")
        operations = [result.ok() for result in schema.get_all_operations()]
        paths = {operation.path for operation in operations}
        assert {SPEECH, "/v1/models/{model_id}", "/v1/audio/voices", "/v1/audio/voice_consents"} <= paths
        statuses: set[int] = set()
        with httpx.Client(base_url=url, timeout=20) as client:
            for operation in operations:

                @settings(
                    max_examples=15,
                    deadline=None,
                    phases=[Phase.generate],
                    suppress_health_check=list(HealthCheck),
                    derandomize=True,
                    database=None,
                )
                @given(case=operation.as_strategy())
                def check(case: object) -> None:
                    response = case.call(session=None)  # type: ignore[attr-defined]
                    statuses.add(response.status_code)
                    assert response.status_code < 500, response.text
                    if response.status_code >= 400:
                        error = response.json()["error"]
                        assert set(error) == {"message", "type", "param", "code"}
                    assert response.headers["x-request-id"]

                check()
            assert client.get("/ready").status_code == 200
        assert {200, 400} <= statuses
