"""Tenants' pronunciations: kept, given to speech and live text, changed by anybody's process, and nobody else's."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import typer
from typer.testing import CliRunner
from websockets.sync.client import connect

from declaim.api.admin_cli import open_store
from declaim.api.lexicon import LEXICON_PATH, MAX_CACHED_TENANTS, LexiconStore
from declaim.api.lexicon_cli import build_lexicon_cli
from declaim.api.server import ServerOptions, serving_app
from declaim.api.serving import Serving
from declaim.api.settings import ApiSettings
from declaim.api.store.database import Database, StoreUnavailable
from declaim.api.store.lexicons import LexiconTables
from declaim.api.store.tenants import Limits, create_key, set_tenant
from declaim.engine.errors import InvalidRequest
from declaim.engine.lexicon import MAX_ENTRIES
from tests.api.asgi_server import served
from tests.api.fake_engine import FakeEngine, eventually
from tests.api.test_app import BODY, SPEECH, check_error

SQL = {"SQL": "sequel"}


@dataclass(slots=True)
class World:
    """A whole server with two tenants, and what its engine was asked."""

    address: str
    keys: dict[str, str]
    engine: FakeEngine
    seed: int = 0  # of this test's answers in the cache

    def lexicon(self, tenant: str, method: str = "GET", **options: Any) -> httpx.Response:
        return httpx.request(method, f"http://{self.address}{LEXICON_PATH}", headers=self.key(tenant), **options)

    def entries(self, tenant: str) -> dict[str, str]:
        response = self.lexicon(tenant)
        assert response.status_code == 200 and response.json()["object"] == "audio.lexicon"
        return dict(response.json()["entries"])

    def speak(self, tenant: str) -> bytes:
        """The audio; `engine.requests` says what was asked."""
        response = httpx.post(
            f"http://{self.address}{SPEECH}", json={**BODY, "seed": self.seed}, headers=self.key(tenant)
        )
        assert response.status_code == 200, response.text
        return response.content

    def key(self, tenant: str) -> dict[str, str]:
        return {"authorization": f"Bearer {self.keys[tenant]}"}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, migrated_file: Path) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("lexicon")
    patch = pytest.MonkeyPatch()
    patch.setenv("XDG_STATE_HOME", str(folder))
    (folder / "declaim.db").write_bytes(migrated_file.read_bytes())
    database = Database(f"sqlite:///{folder}/declaim.db")
    keys = {}
    with database.session() as session:
        for tenant in ("acme", "other"):
            set_tenant(session, tenant, Limits(), now=1.0)
            keys[tenant] = create_key(session, tenant, name="", now=1.0)[1]
    engine = FakeEngine()
    serving = Serving(lambda: engine)
    options = ServerOptions(ApiSettings(cache_folder=folder / "cache"))
    with serving_app(serving, database, options, host="127.0.0.1") as app, served(app.app) as address:
        assert eventually(lambda: serving.stage == "ready")
        yield World(address, keys, engine)
    database.close()
    patch.undo()


@pytest.fixture
def world(shared: World) -> World:
    shared.engine.requests.clear()
    shared.seed += 1
    for tenant in shared.keys:
        assert shared.lexicon(tenant, "DELETE").status_code == 200
    return shared


def test_an_entry_is_said_from_the_next_request_on_and_to_its_tenant_alone(world: World) -> None:
    assert world.lexicon("acme", "PUT", json={"entries": SQL}).json()["entries"] == SQL
    for tenant in ("acme", "other"):
        world.speak(tenant)
    assert [dict(request.lexicon) for request in world.engine.requests] == [SQL, {}]
    assert world.entries("acme") == SQL and world.entries("other") == {}
    assert world.lexicon("other", "DELETE").status_code == 200
    assert world.entries("acme") == SQL


def test_a_cached_answer_is_of_the_pronunciations_of_its_time(world: World) -> None:
    world.speak("acme")
    world.lexicon("acme", "PATCH", json={"entries": SQL})
    world.speak("acme")
    world.lexicon("acme", "DELETE")
    world.speak("acme")  # the first one's answer
    assert [dict(request.lexicon) for request in world.engine.requests] == [{}, SQL]


def test_live_text_is_said_by_the_same_entries(world: World) -> None:
    world.lexicon("acme", "PUT", json={"entries": SQL})
    for tenant, path in (("acme", "/v1/audio/speech/stream"), ("other", "/v1/audio/speech/stream")):
        with connect(f"ws://{world.address}{path}", additional_headers=world.key(tenant)) as socket:
            for message in ({"type": "session.config"}, {"type": "input.text", "text": "SQL."}, {"type": "input.done"}):
                socket.send(json.dumps(message))
            while isinstance(message := socket.recv(10), bytes) or json.loads(message)["type"] != "session.done":
                pass
    with connect(f"ws://{world.address}/v1/speak", additional_headers=world.key("acme")) as socket:
        socket.send(json.dumps({"type": "Speak", "text": "SQL."}))
        socket.send(json.dumps({"type": "Flush"}))
        while isinstance(message := socket.recv(10), bytes) or json.loads(message)["type"] != "Flushed":
            pass
    assert [dict(request.lexicon) for request in world.engine.requests] == [SQL, {}, SQL]


def test_put_replaces_patch_changes_and_delete_takes_all(world: World) -> None:
    world.lexicon("acme", "PUT", json={"entries": {"SQL": "sequel", "GIF": "jif"}})
    changed = world.lexicon("acme", "PATCH", json={"entries": {"gif": "ghif", "k8s": "kubernetes", "sql": None}})
    assert changed.json() == {"object": "audio.lexicon", "entries": {"gif": "ghif", "k8s": "kubernetes"}}
    document = world.lexicon("acme").json()
    assert world.lexicon("acme", "PUT", json=document).json() == document  # what is read can be written
    assert world.lexicon("acme", "PUT", json={"entries": SQL}).json()["entries"] == SQL
    assert world.lexicon("acme", "DELETE").json()["entries"] == {} == world.entries("acme")
    assert httpx.get(f"http://{world.address}/audio/lexicon/", headers=world.key("acme")).status_code == 200


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({}, "entries", "Missing"),
        ([], None, "cannot be read"),
        ({"entries": {"SQL": 5}}, "entries", "'SQL'"),
        ({"entries": {"SQL": "x" * 401}}, "entries", "401 characters.*limit is 400"),
        ({"entries": {f"w{i}": "x" for i in range(MAX_ENTRIES + 1)}}, "entries", f"limit is {MAX_ENTRIES}"),
        ({"entries": {"a\x00b": "x"}}, "entries", "control characters"),
        ({"entries": {"a": "x", "A": "y"}}, "entries", "two things"),
    ],
)
@pytest.mark.parametrize("method", ["PUT", "PATCH"])
def test_what_cannot_be_an_entry_is_refused_and_changes_nothing(
    world: World, method: str, body: object, param: str | None, words: str
) -> None:
    world.lexicon("acme", "PUT", json={"entries": SQL})
    response = world.lexicon("acme", method, json=body)
    code = {"Missing": "missing_required_parameter", "cannot be read": None}.get(words, "invalid_value")
    message = check_error(response, 400, type="invalid_request_error", code=code, param=param)
    assert re.search(words, message)
    assert world.entries("acme") == SQL


def test_null_takes_an_entry_out_only_where_entries_are_changed(world: World) -> None:
    assert world.lexicon("acme", "PUT", json={"entries": {"SQL": None}}).status_code == 400


@pytest.mark.parametrize("method", ["GET", "PUT", "PATCH", "DELETE"])
def test_without_a_key_there_is_no_lexicon(world: World, method: str) -> None:
    response = httpx.request(method, f"http://{world.address}{LEXICON_PATH}")
    check_error(response, 401, type="invalid_request_error", code="invalid_api_key", param=None)


def test_entries_are_kept_sorted_and_one_for_each_term(database: Database) -> None:
    tables = LexiconTables(database)
    tables.change("acme", {"b": "bee", "A": "ay"})
    tables.change("other", {"a": "not yours"})
    assert list(tables.change("acme", {"B": "be", "a": "ay", "c": None}).items()) == [("a", "ay"), ("B", "be")]
    with pytest.raises(InvalidRequest, match="limit is"):
        tables.change("acme", {f"w{i}": "x" for i in range(MAX_ENTRIES - 1)})  # with those that are there
    assert tables.entries("acme") == {"a": "ay", "B": "be"} and tables.entries("other") == {"a": "not yours"}
    assert tables.replace("acme", {}) == {} != tables.entries("other")


def test_another_processs_entries_are_seen_when_the_cache_is_over(database: Database) -> None:
    now = [0.0]
    ours, theirs = LexiconStore(database, cache_s=3.0, clock=lambda: now[0]), LexiconStore(database)

    async def go() -> None:
        assert await ours.entries("acme") == {}
        await theirs.replace("acme", SQL)
        assert await ours.entries("acme") == {} and await ours.read("acme") == SQL
        now[0] = 3.0
        assert await ours.entries("acme") == SQL
        for index in range(MAX_CACHED_TENANTS + 5):
            await ours.entries(f"tenant-{index}")
        assert len(ours._cached) == MAX_CACHED_TENANTS

    asyncio.run(go())


def test_while_the_database_is_away_what_was_known_is_said(
    database: Database, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = [0.0]
    store = LexiconStore(database, clock=lambda: now[0])

    def fail(_: LexiconTables, tenant: str) -> dict[str, str]:
        raise StoreUnavailable("it is away")

    async def go() -> None:
        await store.replace("acme", SQL)
        assert await store.entries("acme") == SQL
        monkeypatch.setattr(LexiconTables, "entries", fail)
        now[0] = 10.0
        assert await store.entries("acme") == SQL
        with pytest.raises(StoreUnavailable):
            await store.entries("other")

    asyncio.run(go())
    assert "it is away" in caplog.text


def declaim(url: str, *arguments: str) -> tuple[int, str, str]:
    app = typer.Typer()
    app.add_typer(build_lexicon_cli(open_store), name="lexicon")
    result = CliRunner().invoke(app, ["lexicon", *arguments], env={"DECLAIM_DATABASE_URL": url, "COLUMNS": "80"})
    return result.exit_code, result.stdout, result.stderr


def test_an_operator_sets_lists_loads_and_removes_entries(
    database: Database, database_url: str, tmp_path: Path
) -> None:
    with database.session() as session:
        set_tenant(session, "acme", Limits(), now=1.0)
    file = tmp_path / "words.json"
    file.write_text('{"GIF": "jif", "k8s": "kubernetes"}')
    assert declaim(database_url, "set", "SQL", "sequel", "--tenant", "acme")[0] == 0
    assert declaim(database_url, "load", str(file), "--tenant", "acme")[2].endswith("now there are 3\n")
    assert declaim(database_url, "remove", "gif", "--tenant", "acme")[0] == 0
    code, out, _ = declaim(database_url, "list", "--tenant", "acme", "--format", "csv")
    assert (code, out) == (0, "written,said\nk8s,kubernetes\nSQL,sequel\n")
    assert declaim(database_url, "load", str(file), "--replace", "--tenant", "acme")[2].endswith("now there are 2\n")
    assert LexiconTables(database).entries("acme") == {"GIF": "jif", "k8s": "kubernetes"}
    assert LexiconTables(database).entries("") == {}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["list", "--tenant", "nobody"], "no tenant nobody: `declaim tenants list`"),
        (["remove", "SQL"], "no entry for 'SQL'"),
        (["set", "SQL", " "], "says nothing for 'SQL'"),
        (["load", "/nowhere.json"], "/nowhere.json cannot be read"),
        (["load", "/dev/null"], "/dev/null cannot be read"),
    ],
)
def test_a_mistake_of_the_operator_is_told_in_a_line(
    tmp_path: Path, migrated_file: Path, arguments: list[str], words: str
) -> None:
    (tmp_path / "declaim.db").write_bytes(migrated_file.read_bytes())
    code, out, told = declaim(f"sqlite:///{tmp_path}/declaim.db", *arguments)
    assert (code, out) == (2, "") and words in told and told.count("\n") == 1


def test_requests_at_once_read_once_and_one_after_a_write_what_was_written(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = LexiconStore(database, cache_s=60.0)
    may_end, read, num_reads = threading.Event(), LexiconTables.entries, 0

    def slow(tables: LexiconTables, tenant: str) -> dict[str, str]:
        nonlocal num_reads
        entries = read(tables, tenant)
        num_reads += 1
        may_end.wait(30)
        return entries

    monkeypatch.setattr(LexiconTables, "entries", slow)

    async def run() -> None:
        early = [asyncio.create_task(store.entries("acme")) for _ in range(20)]
        assert await asyncio.to_thread(eventually, lambda: num_reads == 1)
        early.pop(0).cancel()  # who hangs up costs the others nothing
        await store.replace("acme", SQL)
        late = asyncio.create_task(store.entries("acme"))
        assert await asyncio.to_thread(eventually, lambda: num_reads == 2)
        may_end.set()
        assert [dict(entries) for entries in await asyncio.gather(*early)] == [{}] * 19
        assert dict(await late) == dict(await store.entries("acme")) == SQL

    asyncio.run(run())
    assert num_reads == 2
