"""What operators see: metrics of tenants, streams and sockets, the dashboard that shows them, and their table."""

from __future__ import annotations

import asyncio
import json
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from declaim.api.gate import Admission, Caller, OpenGate, Usage
from declaim.api.metrics import GateMetrics, MeteredGate, TenantLabels
from declaim.api.server import ServerOptions, serving_app
from declaim.api.serving import Serving
from declaim.api.settings import ApiSettings
from declaim.api.store.database import Database
from declaim.api.store.tenants import Limits, create_key, set_tenant
from declaim.api.tenant_errors import QuotaExceeded, RateLimited, TooManyStreams
from tests.api.asgi_server import served
from tests.api.fake_engine import FakeEngine, eventually, scripted
from tests.api.test_server import serve

DEPLOY = Path(__file__).parents[2] / "examples" / "deploy"
SPEECH = "/v1/audio/speech"
BODY = {"model": "lark", "input": "Hello.", "response_format": "pcm"}
USAGE = Usage("lark", "default", "pcm", 6, 10, 0.4, 0.4, 0.1, 200, "complete")


@contextmanager
def server(folder: Path, engine: FakeEngine, settings: ApiSettings | None = None) -> Iterator[tuple[str, Database]]:
    """A ready server on this machine with a database of its own; gives HOST:PORT."""
    database = Database(f"sqlite:///{folder}/declaim.db")
    database.migrate()
    serving = Serving(lambda: engine)
    options = ServerOptions(settings or ApiSettings())
    with serving_app(serving, database, options, host="127.0.0.1") as app, served(app.app) as address:
        assert eventually(lambda: serving.stage == "ready")
        yield address, database
    database.close()


@pytest.fixture(autouse=True)
def in_tmp_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))


def scrape(address: str) -> dict[str, float]:
    """Name or name|label|label -> value, labels in the order of their names."""
    families = text_string_to_metric_families(httpx.get(f"http://{address}/metrics").text)
    return {
        "|".join((sample.name, *(sample.labels[label] for label in sorted(sample.labels)))): sample.value
        for family in families
        for sample in family.samples
    }


def make_key(database: Database, tenant: str, limits: Limits) -> dict[str, str]:
    with database.session() as session:
        set_tenant(session, tenant, limits, now=1.0)
        return {"authorization": f"Bearer {create_key(session, tenant, now=1.0)[1]}"}


def say_live(address: str, text: str) -> None:
    with connect(f"ws://{address}/v1/audio/speech/stream") as socket:
        config = {"type": "session.config", "response_format": "pcm", "stream_audio": True}
        for message in (config, {"type": "input.text", "text": text}, {"type": "input.done"}):
            socket.send(json.dumps(message))
        while True:
            message = socket.recv(10)
            if isinstance(message, str) and json.loads(message)["type"] == "session.done":
                return


def test_a_streamed_request_leaves_its_first_audio_its_gaps_and_its_real_time_factor(tmp_path: Path) -> None:
    with server(tmp_path, scripted(num_chunks=4, delay_s=0.05)) as (address, _):
        assert httpx.post(f"http://{address}{SPEECH}", json=BODY).status_code == 200
        assert httpx.post(f"http://{address}{SPEECH}", json={**BODY, "input": ""}).status_code == 400
        values = scrape(address)
    assert values["declaim_ttfa_seconds_count"] == 1
    assert values["declaim_chunk_gap_seconds_count"] == 3
    assert 0.04 * 3 < values["declaim_chunk_gap_seconds_sum"] < 5
    assert values["declaim_real_time_factor_count"] == 1
    assert 0.15 / 0.8 < values["declaim_real_time_factor_sum"] < 5
    assert values["declaim_tenant_requests_total|complete|(open)"] == 1
    assert values["declaim_tenant_characters_total|(open)"] == 6
    assert values["declaim_tenant_audio_seconds_total|(open)"] == pytest.approx(0.8)


def test_tenants_are_counted_by_name_and_their_refusals_by_limit(tmp_path: Path) -> None:
    with server(tmp_path, FakeEngine()) as (address, database):
        url = f"http://{address}{SPEECH}"
        for tenant, limits, refused in (
            ("few", Limits(requests_per_minute=1), "requests"),
            ("short", Limits(chars_per_minute=6), "characters"),
            ("poor", Limits(chars_per_month=6), "quota"),
        ):
            headers = make_key(database, tenant, limits)
            answers = [httpx.post(url, json=BODY, headers=headers).status_code for _ in range(2)]
            assert answers == [200, 429], tenant
            values = scrape(address)
            assert values[f"declaim_rate_limited_total|{refused}"] == 1
            assert values[f"declaim_tenant_requests_total|complete|{tenant}"] == 1
            assert values[f"declaim_tenant_characters_total|{tenant}"] == 6
    assert values["declaim_rate_limited_total|streams"] == 0


@pytest.mark.parametrize(
    ("error", "limit"),
    [
        (TooManyStreams("full", retry_after_s=1.0), "streams"),
        (RateLimited("fast", retry_after_s=1.0, headers={"x-ratelimit-remaining-requests": "0"}), "requests"),
        (RateLimited("long", retry_after_s=None, headers={"x-ratelimit-remaining-requests": "3"}), "characters"),
        (QuotaExceeded("spent"), "quota"),
    ],
)
def test_a_refusal_is_counted_and_passed_on(error: RateLimited | QuotaExceeded, limit: str) -> None:
    class Refusing(OpenGate):
        async def admit(self, caller: Caller, *, request_id: str, chars: int, service_tier: str | None) -> Admission:
            raise error

    metrics = GateMetrics(has_cache=False)
    gate = MeteredGate(Refusing(), metrics, asked_by="live")
    with pytest.raises(type(error), match=str(error)):
        asyncio.run(gate.admit(Caller("acme"), request_id="req_1", chars=6, service_tier=None))
    told = {
        sample.labels["limit"]: sample.value
        for collector in metrics.collectors
        for family in collector.collect()
        for sample in family.samples
        if sample.name == "declaim_rate_limited_total"
    }
    assert told == {"requests": 0, "characters": 0, "streams": 0, "quota": 0, limit: 1}
    assert gate.num_open == 0


def test_an_admission_is_counted_once_however_often_it_is_closed() -> None:
    metrics = GateMetrics(has_cache=True)
    gate = MeteredGate(OpenGate(), metrics, asked_by="http")

    async def two_of_them() -> None:
        for usage in (USAGE, replace(USAGE, is_cached=True)):
            admission = await gate.admit(Caller("acme"), request_id="req_1", chars=6, service_tier="flex")
            assert admission.tier == "flex" and gate.num_open == 1
            admission.close(usage)
            admission.close(usage)
            assert gate.num_open == 0

    asyncio.run(two_of_them())
    told = {
        sample.name: sample.value
        for collector in metrics.collectors
        for family in collector.collect()
        for sample in family.samples
    }
    assert told["declaim_tenant_requests_total"] == 2
    assert told["declaim_cache_misses_total"] == 1 and told["declaim_real_time_factor_count"] == 1


def test_past_the_most_tenants_the_next_ones_share_a_label() -> None:
    labels = TenantLabels(most=2)
    assert [labels.name(tenant) for tenant in ("b", "c", "a", "b", "d", "", "c")] == [
        *("b", "c", "other", "b", "other", "(open)", "c")
    ]


def test_sockets_and_utterances_are_counted(tmp_path: Path) -> None:
    with server(tmp_path, FakeEngine()) as (address, _):
        with connect(f"ws://{address}/v1/speak?encoding=linear16") as socket:
            socket.recv(10)
            assert scrape(address)["declaim_websockets_open"] == 1
        say_live(address, "Good morning.")
        assert eventually(lambda: scrape(address)["declaim_websockets_open"] == 0)
        values = scrape(address)
    assert values["declaim_utterances_total|complete"] == 1 and values["declaim_utterances_in_flight"] == 0
    assert values["declaim_tenant_requests_total|complete|(open)"] == 1
    assert values["declaim_real_time_factor_count"] == 0  # its pace is its writer's


def test_cache_hits_and_misses_are_counted(tmp_path: Path) -> None:
    with server(tmp_path, FakeEngine(), ApiSettings(cache_folder=tmp_path / "cache")) as (address, _):
        for _ in range(3):
            assert httpx.post(f"http://{address}{SPEECH}", json=BODY).status_code == 200
        values = scrape(address)
    assert values["declaim_cached_answers_total"] == 2 and values["declaim_cache_misses_total"] == 1
    assert values["declaim_ttfa_seconds_count"] == 1 and values["declaim_real_time_factor_count"] == 1


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> str:
    """All metrics of a server that has done a bit of everything."""
    folder = tmp_path_factory.mktemp("told")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(folder))
        with server(folder, FakeEngine()) as (address, _):
            httpx.post(f"http://{address}{SPEECH}", json=BODY)
            say_live(address, "Hello.")
            return httpx.get(f"http://{address}/metrics").text


def test_the_dashboard_shows_metrics_that_exist(told: str) -> None:
    board = json.loads((DEPLOY / "grafana" / "declaim.json").read_text())
    assert board["uid"] == "declaim" and board["schemaVersion"] >= 41
    panels = [panel for panel in board["panels"] if panel["type"] != "row"]
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    expressions = [target["expr"] for panel in panels for target in panel["targets"]]
    assert all(panel["datasource"]["uid"] == "prometheus" for panel in panels) and len(expressions) >= len(panels)
    named = set(re.findall(r"declaim_\w+", " ".join(expressions) + board["templating"]["list"][0]["definition"]))
    samples = {sample.name for family in text_string_to_metric_families(told) for sample in family.samples}
    assert named <= samples, named - samples
    taken = [
        (panel["gridPos"]["x"] + x, panel["gridPos"]["y"] + y)
        for panel in board["panels"]
        for x in range(panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["h"])
    ]
    assert len(taken) == len(set(taken)) and max(x for x, _ in taken) < 24


def test_the_table_explains_every_metric_and_no_other(told: str) -> None:
    table = set(re.findall(r"^\| `(declaim_\w+)` \|", (DEPLOY / "README.md").read_text(), re.MULTILINE))
    families = {family.name for family in text_string_to_metric_families(told)}
    assert table == {name for name in families if not name.endswith("_created")}


def test_a_socket_that_says_nothing_does_not_hold_up_a_stop(tmp_path: Path) -> None:
    with serve(tmp_path, "--drain-seconds", "60") as (url, process):
        with connect(f"{url.replace('http', 'ws')}/v1/speak?encoding=linear16") as socket:
            socket.recv(10)
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 0
            with pytest.raises(ConnectionClosed):
                socket.recv(10)
        assert socket.close_code == 1012


def test_an_utterance_that_is_spoken_is_heard_to_its_end_before_a_stop(tmp_path: Path) -> None:
    with serve(tmp_path, "--drain-seconds", "60", num_chunks=15) as (url, process):
        address = url.removeprefix("http://")
        with connect(f"ws://{address}/v1/speak"), connect(f"ws://{address}/v1/speak") as socket:
            socket.recv(10)
            for message in ({"type": "Speak", "text": "Good morning."}, {"type": "Flush"}):
                socket.send(json.dumps(message))
            num_bytes = len(socket.recv(10))
            process.send_signal(signal.SIGTERM)
            while isinstance(message := socket.recv(10), bytes):
                num_bytes += len(message)
            assert json.loads(message)["type"] == "Flushed" and num_bytes == 2 * 15 * 5 * 960
            assert process.wait(20) == 0
