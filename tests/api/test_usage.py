"""OpenAI's usage endpoint: its shape, its pages, and that nobody sees another's rows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from openai.types.admin.organization import UsageAudioSpeechesResponse

from declaim.api.errors import install_error_handlers
from declaim.api.gate import OpenGate
from declaim.api.keys import KeyGate
from declaim.api.ledger import Ledger
from declaim.api.store.database import Database
from declaim.api.store.tenants import Limits, create_key, set_tenant
from declaim.api.usage import build_usage_router
from tests.api.children import USAGE, record

PATH = "/v1/organization/usage/audio_speeches"
DAY = 86_400
MONDAY = 20_000 * DAY  # 00:00 UTC


@pytest.fixture
def keys(database: Database, tmp_path: Path) -> dict[str, str]:
    """Two tenants with a key each, and rows: acme on Monday noon, Monday evening and Wednesday, rival on Monday."""
    made: dict[str, str] = {}
    with database.session() as session:
        for tenant in ("acme", "rival"):
            set_tenant(session, tenant, Limits(), now=0.0)
            row, made[tenant] = create_key(session, tenant, now=0.0)
            made[f"{tenant} id"] = row.id
    ledger = Ledger(database, spill_folder=tmp_path)
    acme, other = made["acme id"], replace(USAGE, model="dia", chars=7)
    for written in (
        record("acme", key_id=acme, at=MONDAY + 0.5 * DAY),
        record("acme", key_id=acme, at=MONDAY + 0.75 * DAY, usage=other),
        record("acme", key_id="key_other", at=MONDAY + 2.25 * DAY),
        record("acme", key_id=acme, at=MONDAY + 0.5 * DAY, usage=replace(USAGE, status=500)),
        record("rival", key_id=made["rival id"], at=MONDAY + 0.5 * DAY, usage=replace(USAGE, chars=999)),
        record("", at=MONDAY + 0.5 * DAY, usage=replace(USAGE, chars=5)),
    ):
        ledger.write(written)
    ledger.close()
    return made


@contextmanager
def serving(database: Database, folder: Path) -> Iterator[TestClient]:
    gate = KeyGate(database, ledger=Ledger(database, spill_folder=folder))
    app = FastAPI()
    install_error_handlers(app)
    app.include_router(build_usage_router(gate, database))
    try:
        with TestClient(app) as client:
            yield client
    finally:
        gate.close()


@pytest.fixture
def client(database: Database, tmp_path: Path) -> Iterator[TestClient]:
    with serving(database, tmp_path) as opened:
        yield opened


def ask(client: TestClient, key: str, **query: Any) -> Any:
    answer = client.get(PATH, params=query, headers={"authorization": f"Bearer {key}"})
    assert answer.status_code == 200, answer.text
    UsageAudioSpeechesResponse.model_validate(answer.json())
    return answer.json()


def sums(page: Any) -> list[list[tuple[int, int]]]:
    return [[(r["characters"], r["num_model_requests"]) for r in bucket["results"]] for bucket in page["data"]]


def test_buckets_are_days_and_failures_of_ours_are_left_out(client: TestClient, keys: dict[str, str]) -> None:
    page = ask(client, keys["acme"], start_time=MONDAY, end_time=MONDAY + 3 * DAY)
    assert page["object"] == "page" and page["has_more"] is False and page["next_page"] is None
    assert sums(page) == [[(17, 2)], [], [(10, 1)]]
    assert page["data"][0] == {
        "object": "bucket",
        "start_time": MONDAY,
        "end_time": MONDAY + DAY,
        "results": [
            {
                "object": "organization.usage.audio_speeches.result",
                "characters": 17,
                "num_model_requests": 2,
                "audio_seconds": 3.0,
                "project_id": None,
                "user_id": None,
                "api_key_id": None,
                "model": None,
            }
        ],
    }


def test_no_tenant_sees_anothers_rows_whatever_it_asks_for(client: TestClient, keys: dict[str, str]) -> None:
    whole = {"start_time": MONDAY, "end_time": MONDAY + DAY}
    assert sums(ask(client, keys["rival"], **whole)) == [[(999, 1)]]
    for attempt in (
        {"project_ids[]": ["acme"]},
        {"project_ids": "acme"},
        {"api_key_ids[]": [keys["acme id"]]},
        {"api_key_ids": keys["acme id"]},
        {"project_ids[]": ["acme' OR '1'='1"]},
        {"user_ids[]": ["anybody"]},
        {"project_ids": ""},
        {"models": "\x00"},
    ):
        assert sums(ask(client, keys["rival"], **whole, **attempt)) == [[]]
    grouped = ask(client, keys["rival"], **whole, **{"group_by[]": ["project_id", "api_key_id"]})
    (result,) = grouped["data"][0]["results"]
    assert (result["project_id"], result["api_key_id"]) == ("rival", keys["rival id"])


def test_groups_and_filters(client: TestClient, keys: dict[str, str]) -> None:
    whole = {"start_time": MONDAY, "end_time": MONDAY + 3 * DAY}
    for name in ("group_by", "group_by[]"):
        page = ask(client, keys["acme"], **whole, **{name: ["model", "user_id", "project_id"]})
        results = [(r["model"], r["project_id"], r["user_id"], r["characters"]) for r in page["data"][0]["results"]]
        assert results == [("dia", "acme", None, 7), ("lark", "acme", None, 10)]
    assert sums(ask(client, keys["acme"], **whole, models="dia")) == [[(7, 1)], [], []]
    assert sums(ask(client, keys["acme"], **whole, **{"api_key_ids[]": [keys["acme id"]]})) == [[(17, 2)], [], []]


def test_pages_follow_one_another_and_make_the_whole(client: TestClient, keys: dict[str, str]) -> None:
    query = {"start_time": MONDAY + 100, "end_time": MONDAY + 3 * DAY - 100, "bucket_width": "1h", "limit": 7}
    buckets: list[Any] = []
    page: Any = ask(client, keys["acme"], **query)
    while page["has_more"]:
        buckets += page["data"]
        page = ask(client, keys["acme"], **query, page=page["next_page"])
    buckets += page["data"]
    assert [bucket["start_time"] for bucket in buckets] == list(range(MONDAY, MONDAY + 3 * DAY, 3600))
    assert sum(r["characters"] for bucket in buckets for r in bucket["results"]) == 27


def test_what_lies_before_start_time_or_at_end_time_is_not_counted(client: TestClient, keys: dict[str, str]) -> None:
    noon, evening = MONDAY + DAY // 2, MONDAY + 3 * DAY // 4
    assert sums(ask(client, keys["acme"], start_time=noon, end_time=evening)) == [[(10, 1)]]
    assert sums(ask(client, keys["acme"], start_time=noon + 1, end_time=evening + 1)) == [[(7, 1)]]


def test_pages_have_openais_default_sizes(client: TestClient, keys: dict[str, str]) -> None:
    for width, size in (("1m", 60), ("1h", 24), ("1d", 7)):
        assert len(ask(client, keys["acme"], start_time=MONDAY, bucket_width=width)["data"]) == size


@pytest.mark.parametrize(
    "query, param",
    [
        ({"limit": 32}, "limit"),
        ({"end_time": MONDAY}, "end_time"),
        ({"page": "page_x"}, "page"),
        ({"page": "page_LTE"}, "page"),
        ({"page": "page_MQ"}, "page"),
        ({"group_by": "voice"}, "group_by"),
        ({"models": ["m"] * 101}, "models"),
    ],
)
def test_a_query_that_is_wrong_is_a_400_that_names_the_parameter(
    client: TestClient, keys: dict[str, str], query: dict[str, Any], param: str
) -> None:
    headers = {"authorization": f"Bearer {keys['acme']}"}
    answer = client.get(PATH, params={"start_time": MONDAY, **query}, headers=headers)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


def test_without_a_key_it_is_a_401(client: TestClient) -> None:
    answer = client.get(PATH, params={"start_time": 0})
    assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")


def test_on_an_open_server_everybody_sees_what_was_used_without_a_key(database: Database, keys: dict[str, str]) -> None:
    app = FastAPI()
    app.include_router(build_usage_router(OpenGate(), database))
    with TestClient(app) as client:
        assert sums(ask(client, "", start_time=MONDAY, end_time=MONDAY + DAY)) == [[(5, 1)]]


def test_the_openai_client_reads_it(client: TestClient, keys: dict[str, str]) -> None:
    sdk = openai.OpenAI(admin_api_key=keys["acme"], base_url="http://testserver/v1", http_client=client)  # type: ignore[arg-type]
    page = sdk.admin.organization.usage.audio_speeches(
        start_time=MONDAY, end_time=MONDAY + DAY, group_by=["model"], models=["lark", "dia"]
    )
    results = page.data[0].results
    assert [(getattr(r, "model", None), getattr(r, "characters", None)) for r in results] == [("dia", 7), ("lark", 10)]
