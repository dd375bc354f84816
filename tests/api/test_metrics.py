"""What operators see and set: metrics and their dashboard, how a server stops, logs, and the configuration file."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from typer.testing import CliRunner, Result
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from declaim.api.cli import build_cli
from declaim.api.gate import Admission, Caller, OpenGate, Usage
from declaim.api.logs import JsonFormatter, LogfmtFormatter
from declaim.api.metrics import GateMetrics, MeteredGate, TenantLabels
from declaim.api.server import ServerOptions, serving_app
from declaim.api.serving import Serving
from declaim.api.settings import ApiSettings
from declaim.api.store.database import Database
from declaim.api.store.tenants import Limits, create_key, set_tenant
from declaim.api.tenant_errors import QuotaExceeded, RateLimited, TooManyStreams
from declaim.api.tracing import open_tracing
from declaim.engine import EngineConfig, ModelLoadError
from declaim.engine.progress import Progress
from tests.api.asgi_server import served
from tests.api.fake_engine import FakeEngine, eventually, scripted
from tests.api.server_process import log_of
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


def scrape(address: str, token: str | None = None) -> dict[str, float]:
    """Name or name|label|label -> value, labels in the order of their names."""
    headers = {} if token is None else {"authorization": f"Bearer {token}"}
    families = text_string_to_metric_families(httpx.get(f"http://{address}/metrics", headers=headers).text)
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
    token = "a token of the operator"
    with server(tmp_path, FakeEngine(), ApiSettings(metrics_token=token)) as (address, database):
        url = f"http://{address}{SPEECH}"
        for tenant, limits, refused in (
            ("few", Limits(requests_per_minute=1), "requests"),
            ("short", Limits(chars_per_minute=6), "characters"),
            ("poor", Limits(chars_per_month=6), "quota"),
        ):
            headers = make_key(database, tenant, limits)
            answers = [httpx.post(url, json=BODY, headers=headers).status_code for _ in range(2)]
            assert answers == [200, 429], tenant
            values = scrape(address, token)
            assert values[f"declaim_rate_limited_total|{refused}"] == 1
            assert values[f"declaim_tenant_requests_total|complete|{tenant}"] == 1
            assert values[f"declaim_tenant_characters_total|{tenant}"] == 6
        for other in (None, "another token that is long"):
            told = scrape(address, other)
            assert told["declaim_rate_limited_total|quota"] == 1
            assert not [name for name in told if "poor" in name]
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


def test_an_admission_is_counted_once_however_often_it_is_closed() -> None:
    metrics = GateMetrics(has_cache=True)
    gate = MeteredGate(OpenGate(), metrics, asked_by="http")

    async def two_of_them() -> None:
        for usage in (USAGE, replace(USAGE, is_cached=True)):
            admission = await gate.admit(Caller("acme"), request_id="req_1", chars=6, service_tier="flex")
            assert admission.tier == "flex"
            admission.close(usage)
            admission.close(usage)

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
    assert values["declaim_cache_bytes"] == sum(path.stat().st_size for path in tmp_path.glob("cache/*/*")) > 0


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
    assert table == {name for name in families if name.startswith("declaim_") and not name.endswith("_created")}
    assert {"process_resident_memory_bytes", "process_open_fds"} <= families


def test_sockets_that_say_nothing_are_closed_at_once_and_told_why_while_another_is_heard(tmp_path: Path) -> None:
    """Long before the stream that runs has ended: their clients find another server while this one drains."""
    with serve(tmp_path, "--drain-seconds", "60", num_chunks=50) as (url, process):
        address = url.replace("http", "ws")
        with (
            connect(f"{address}/v1/speak?encoding=linear16") as deepgram,
            connect(f"{address}/v1/audio/speech/stream") as live,
            httpx.stream("POST", url + SPEECH, json=BODY, timeout=20) as response,
        ):
            deepgram.recv(10)
            live.send(json.dumps({"type": "session.config"}))
            parts = response.iter_raw()
            next(parts)
            process.send_signal(signal.SIGTERM)
            for socket in (deepgram, live):
                with pytest.raises(ConnectionClosed) as closed:
                    while True:  # what was said before
                        socket.recv(10)
                assert closed.value.rcvd is not None and closed.value.rcvd.code == 1001
                assert "connect again" in closed.value.rcvd.reason
            assert process.poll() is None and httpx.get(url + "/ready").json()["status"] == "draining"
            with pytest.raises(InvalidStatus) as refused, connect(f"{address}/v1/speak"):
                raise AssertionError("a draining server took a socket")
            assert refused.value.response.status_code == 503
            for _ in parts:
                pass
        assert process.wait(20) == 0


def test_what_a_socket_took_in_is_spoken_before_it_is_closed(tmp_path: Path) -> None:
    """An utterance that is being heard, one that waits for its turn, and one whose text has not ended."""
    with serve(tmp_path, "--drain-seconds", "60", num_chunks=8) as (url, process):
        with connect(f"{url.replace('http', 'ws')}/v1/audio/speech/stream") as socket:
            config = {"type": "session.config", "response_format": "pcm", "stream_audio": True}
            texts = [{"type": "input.text", "text": text} for text in ("One.", "Two.", "Three and")]
            done = {"type": "input.done"}
            for message in (config, texts[0], done, texts[1], done, texts[2]):
                socket.send(json.dumps(message))
            while not isinstance(socket.recv(10), bytes):
                pass
            process.send_signal(signal.SIGTERM)
            messages: list[bytes | str] = []
            with pytest.raises(ConnectionClosed) as closed:
                while True:
                    messages.append(socket.recv(10))
        events = [json.loads(message) for message in messages if isinstance(message, str)]
        assert [event["error"] for event in events if event["type"] == "session.done"] == [False] * 3
        assert [event["sentence_text"] for event in events if event["type"] == "audio.start"] == ["Two.", "Three and"]
        assert closed.value.rcvd is not None and closed.value.rcvd.code == 1001
        assert process.wait(20) == 0


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


LINES = (
    ("event=ready model=lark load_s=0.5", {"event": "ready", "model": "lark", "load_s": 0.5}),
    ("event=cut error='no \"x\" there' rows=3", {"event": "cut", "error": 'no "x" there', "rows": 3}),
    ('ledger_spills rows=12 error="it\'s gone"', {"event": "ledger_spills", "rows": 12, "error": "it's gone"}),
    (
        "event=request request_id=12 code=007 retry=",
        {"event": "request", "request_id": "12", "code": "007", "retry": ""},
    ),
    ("event=request client=it's path='\\x_", {"message": "event=request client=it's path='\\x_"}),
    ("event=request client='\\x'", {"event": "request", "client": "'\\x'"}),
    ("a key was made: name=x", {"message": "a key was made: name=x"}),
)


@pytest.mark.parametrize(("message", "fields"), LINES)
def test_both_log_formats_tell_the_same_fields(message: str, fields: dict[str, object]) -> None:
    record = logging.LogRecord("declaim.api", logging.WARNING, "f.py", 1, "%s", (message,), None)
    stamp = {"time": LogfmtFormatter().format(record).split(" ")[0][5:], "level": "warning", "logger": "declaim.api"}
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", stamp["time"])
    assert json.loads(JsonFormatter().format(record)) == {**stamp, **fields}
    told = re.findall(r'(\w+)=("(?:[^"\\]|\\.)*"|[^\s"=]*)(?: |$)', LogfmtFormatter().format(record))
    unquoted = {name: json.loads(value) if value.startswith('"') else value for name, value in told}
    assert unquoted == {**stamp, **{name: str(value) for name, value in fields.items()}}


def test_a_traceback_is_a_field_in_json_and_follows_in_logfmt() -> None:
    try:
        raise ZeroDivisionError("a bug")
    except ZeroDivisionError:
        record = logging.LogRecord("n", logging.ERROR, "f.py", 1, "it broke", (), sys.exc_info())
    fields = json.loads(JsonFormatter().format(record))
    assert fields["message"] == "it broke" and fields["traceback"].endswith("ZeroDivisionError: a bug")
    first, *rest = LogfmtFormatter().format(record).splitlines()
    assert first.endswith('message="it broke"') and rest[-1] == "ZeroDivisionError: a bug"


@pytest.mark.parametrize("log_format", ["logfmt", "json"])
def test_a_log_names_requests_and_never_a_key_or_a_text(tmp_path: Path, log_format: str) -> None:
    database = Database(f"sqlite:///{tmp_path}/declaim.db")
    database.migrate()
    headers = make_key(database, "acme", Limits())
    database.close()
    key = headers["authorization"].removeprefix("Bearer ")
    secret = "Zanzibar"
    with serve(tmp_path, "--log-format", log_format, "--log-level", "debug") as (url, process):
        ids = []
        for body in (
            {**BODY, "input": secret},
            {**BODY, "input": secret * 1000},
            {**BODY, "input": [secret]},
            {**BODY, "instructions": secret, "speed": 99, "input": secret},
        ):
            answer = httpx.post(f"{url}{SPEECH}?api_key={key}", json=body, headers=headers)
            ids.append(answer.headers["x-request-id"])
        httpx.post(
            url + SPEECH, content=f'{{"input": "{secret}', headers={**headers, "content-type": "application/json"}
        )
        httpx.post(url + SPEECH, json=BODY, headers={"authorization": f"Bearer {secret}"})
        with connect(f"{url.replace('http', 'ws')}/v1/speak?api_key={key}") as socket:
            socket.recv(10)
            for message in ({"type": "Speak", "text": secret}, {"type": "Flush"}):
                socket.send(json.dumps(message))
            while isinstance(socket.recv(10), bytes):
                continue
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
        lines = log_of(tmp_path).read_text().splitlines()
    log = "\n".join(lines)
    assert secret not in log and key not in log and key[-8:] not in log
    assert all(sum(request_id in line for line in lines) == 1 for request_id in ids)
    assert log.count("utterance") == 1
    if log_format == "json":
        requests = [json.loads(line) for line in lines if "event" in json.loads(line)]
        assert {each["request_id"]: each["status"] for each in requests if "status" in each}[ids[0]] == 200


class Stop:
    """Remembers what engine was asked for, and makes none."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, EngineConfig]] = []

    def __call__(self, model: str, config: EngineConfig, progress: Progress) -> FakeEngine:
        self.asked.append((model, config))
        raise ModelLoadError("stop here")


def serve_with(folder: Path, config: str, *flags: str, env: dict[str, str] | None = None) -> tuple[Result, Stop]:
    path = folder / "declaim.toml"
    path.write_text(config)
    factory = Stop()
    runner = CliRunner(env={"DECLAIM_DATABASE_URL": f"sqlite:///{folder}/declaim.db", **(env or {})})
    return runner.invoke(build_cli(factory), ["serve", "--config", str(path), "--port", "0", *flags]), factory


def test_a_flag_goes_before_the_environment_and_that_before_the_file(tmp_path: Path) -> None:
    config = 'model = "dia"\nmax_batch = 5\nmax_waiting = 6\nmemory_gb = 7\neager = true\nvocoder = "inline"\n'
    _, factory = serve_with(tmp_path, config)
    asked = EngineConfig(vocoder="inline", max_batch=5, max_waiting=6, shed="late", memory_gb=7.0, eager=True)
    assert factory.asked == [("dia", asked)]
    env = {"DECLAIM_SERVE_MAX_BATCH": "15", "DECLAIM_SERVE_MAX_WAITING": "16"}
    _, factory = serve_with(tmp_path, config, "--max-batch", "25", env=env)
    assert factory.asked == [("dia", replace(asked, max_batch=25, max_waiting=16))]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("max_bach = 5\nmodel = 'dia'", ["sets max_bach,", "did you mean max_batch?"]),
        ("zz = 1\nqq = 2", ["qq, zz", ": use ", " cache_dir, cache_gb,"]),
        ("[max_batch]\nx = 1", ["max_batch", "give a string, a number, true or false"]),
        ("max_batch = 5 5", ["is not TOML", "max_batch = 8"]),
        ("max_batch = 0", ["max_batch is 0"]),
        ("max_batch = 7.5", ["--max-batch"]),
        ("max_batch = true", ["--max-batch"]),
        ("strict = 'perhaps'", ["--strict"]),
    ],
)
def test_a_file_with_a_mistake_is_refused(tmp_path: Path, config: str, words: list[str]) -> None:
    result, factory = serve_with(tmp_path, config)
    assert result.exit_code == 2 and factory.asked == []
    told = " ".join(result.stderr.split())
    assert all(word in told for word in words), told


def test_a_config_that_is_not_there_is_an_error_that_names_it(tmp_path: Path) -> None:
    result = CliRunner().invoke(build_cli(Stop()), ["serve", "--config", str(tmp_path / "gone.toml")])
    assert result.exit_code == 2 and "gone.toml cannot be read (No such file" in result.stderr


def test_the_sample_config_says_what_holds_without_it(tmp_path: Path) -> None:
    _, with_sample = serve_with(tmp_path, (DEPLOY / "declaim.toml").read_text(), "--no-auth")
    _, without = serve_with(tmp_path, "", "--no-auth")
    assert with_sample.asked == [(model, replace(config, vocoder_workers=(1, 4))) for model, config in without.asked]


class _Collector(BaseHTTPRequestHandler):
    """An OTLP collector that keeps what it is sent in its server's `bodies`."""

    def do_POST(self) -> None:
        self.server.bodies.append((self.path, self.rfile.read(int(self.headers["content-length"]))))  # type: ignore[attr-defined]
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""


def test_a_collector_gets_a_span_of_every_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    with HTTPServer(("127.0.0.1", 0), _Collector) as collector:
        bodies: list[tuple[str, bytes]] = []
        collector.bodies = bodies  # type: ignore[attr-defined]
        threading.Thread(target=collector.serve_forever, daemon=True).start()
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{collector.server_port}")
        with server(tmp_path, FakeEngine()) as (address, _):
            answer = httpx.post(f"http://{address}{SPEECH}", json={**BODY, "input": "Zanzibar"})
            say_live(address, "Zanzibar")
        collector.shutdown()
    assert {path for path, _ in bodies} == {"/v1/traces"} and not any(b"Zanzibar" in data for _, data in bodies)
    sent = [ExportTraceServiceRequest.FromString(data) for _, data in bodies]
    spans = [
        span
        for each in sent
        for resource in each.resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
    ]
    assert len(spans) == 2
    told = {each.key: each.value for each in spans[0].attributes}
    assert told["declaim.request_id"].string_value == answer.headers["x-request-id"]
    assert told["declaim.chars"].int_value == 8 and told["declaim.audio_s"].double_value == pytest.approx(0.6)
    assert told["declaim.outcome"].string_value == "complete" and told["declaim.tenant"].string_value == ""
    (first_audio,) = spans[0].events
    span = spans[0]
    assert span.start_time_unix_nano < first_audio.time_unix_nano <= span.end_time_unix_nano


def test_nothing_is_traced_unless_a_collector_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT", raising=False)
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", raising=False)
    assert open_tracing() is None


def test_without_the_extra_a_server_says_that_it_does_not_trace(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    assert open_tracing() is None
    assert "event=not_traced" in caplog.text and "declaim[otel]" in caplog.text
