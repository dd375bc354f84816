"""What an operator types: keys, tenants, usage."""

from __future__ import annotations

import csv
import io
import json
import re
from datetime import UTC, datetime
from pathlib import Path

import pytest
import sqlalchemy as sa
import typer
from typer.testing import CliRunner

from declaim.api.admin_cli import add_admin_commands
from declaim.api.ledger import Ledger
from declaim.api.store.database import Database
from declaim.api.store.tenants import ApiKey, Limits, Tenant, TenantMeter, hash_key, limits_of
from tests.api.children import record

TODAY = datetime(2026, 8, 3, 12, tzinfo=UTC).timestamp()
CREATE = "keys create --tenant acme --rpm 600 --chars-per-minute 60000 --concurrent 20 --weight 2"


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/declaim.db"


def declaim(line: str, url: str | None) -> tuple[int, str, str]:
    """Exit code, stdout and stderr."""
    app = typer.Typer()
    add_admin_commands(app)
    environment = {"DECLAIM_DATABASE_URL": url, "COLUMNS": "80"}
    result = CliRunner().invoke(app, line.split(" "), env=environment)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def limits_in(url: str, tenant: str = "acme") -> Limits:
    database = Database(url)
    with database.reader() as session:
        row = session.get_one(Tenant, tenant)
        limits = limits_of(row)
    database.close()
    return limits


def test_a_key_is_printed_once_and_alone_and_only_its_hash_is_kept(url: str) -> None:
    code, out, told = declaim(CREATE, url)
    assert code == 0
    assert re.fullmatch(r"sk-[A-Za-z0-9_-]{43}\n", out)
    assert "key_" in told and "tenant acme" in told and "600 requests a minute" in told and out.strip() not in told
    database = Database(url)
    with database.reader() as session:
        row = session.scalars(sa.select(ApiKey)).one()
    database.close()
    assert (row.sha256, row.prefix) == (hash_key(out.strip()), out[:10])
    _, listed, _ = declaim("keys list", url)
    assert row.id in listed and f"{out[:10]}..." in listed and out.strip() not in listed


def test_limits_given_with_a_key_become_the_tenants_and_others_stay(url: str) -> None:
    declaim(CREATE, url)
    assert limits_in(url) == Limits(requests_per_minute=600, chars_per_minute=60000, max_streams=20, weight=2.0)
    declaim("keys create --tenant acme --concurrent 0 --tiers priority,default --chars-per-month 5", url)
    assert limits_in(url) == Limits(
        requests_per_minute=600,
        chars_per_minute=60000,
        max_streams=None,
        chars_per_month=5,
        weight=2.0,
        tiers=("priority", "default"),
    )


def test_tenants_are_set_and_listed_with_what_they_used(url: str) -> None:
    assert declaim("tenants set acme --rpm 7", url)[0] == 0
    assert limits_in(url) == Limits(requests_per_minute=7)
    database = Database(url)
    month = datetime.now(UTC).strftime("%Y-%m")
    with database.session() as session:
        session.execute(sa.update(TenantMeter).values(month=month, month_chars=42))
    database.close()
    (row,) = json.loads(declaim("tenants list --format json", url)[1])
    assert (row["tenant"], row["rpm"], row["chars/min"], row["used"], row["keys"]) == ("acme", 7, None, 42, 0)


@pytest.mark.parametrize("how", ["id", "prefix"])
def test_a_key_is_revoked_by_its_id_or_its_first_letters(url: str, how: str) -> None:
    _, key, told = declaim(CREATE, url)
    _, other, _ = declaim("keys create --tenant rival", url)
    named = re.findall(r"key_\w+", told)[0] if how == "id" else f"{key[:10]}..."
    assert declaim(f"keys revoke {named}", url)[0] == 0
    rows = {row["key"]: row["revoked"] for row in json.loads(declaim("keys list --format json", url)[1])}
    assert rows[f"{key[:10]}..."] != "" and rows[f"{other[:10]}..."] == ""


def test_usage_is_added_up_by_what_is_asked_for(url: str, tmp_path: Path) -> None:
    database = Database(url)
    database.migrate()
    ledger = Ledger(database, spill_folder=tmp_path)
    for tenant, at in (("acme", TODAY), ("acme", TODAY + 86_400), ("rival", TODAY), ("", TODAY), ("acme", 0.0)):
        ledger.write(record(tenant, key_id=f"key_{tenant}", at=at))
    ledger.close()
    database.close()
    window = "--since 2026-08-01 --until 2026-08-10"
    _, out, _ = declaim(f"usage {window} --format csv", url)
    assert list(csv.reader(io.StringIO(out))) == [
        ["tenant", "requests", "characters", "audio made s", "audio sent s"],
        ["(open)", "1", "10", "2.0", "1.5"],
        ["acme", "2", "20", "4.0", "3.0"],
        ["rival", "1", "10", "2.0", "1.5"],
    ]
    _, out, _ = declaim(f"usage {window} --tenant (open) --by tenant,key --format csv", url)
    assert out.splitlines()[1:] == ["(open),key_,1,10,2.0,1.5"]
    _, out, _ = declaim(f"usage {window} --tenant acme --by key,model --daily --format json", url)
    days = [(row["day"], row["key"], row["model"], row["characters"]) for row in json.loads(out)]
    assert days == [("2026-08-03", "key_acme", "lark", 10), ("2026-08-04", "key_acme", "lark", 10)]
    _, out, _ = declaim(f"usage {window}", url)
    assert re.search(r"^acme +2 +20 +4.0 +3.0", out, re.M)


@pytest.mark.parametrize(
    "line, told",
    [
        ("keys create --tenant ACME", "the tenant's name is 'ACME': give 1 to 63 of a-z"),
        ("keys create --tenant acme --rpm -1", "requests_per_minute is -1: give 1 to"),
        ("keys create --tenant acme --weight 0", "weight is 0: give 0.01 to 1000"),
        ("tenants set acme --tiers vip", "tiers is 'vip': give some of priority,default,flex"),
        ("keys revoke key_none", "no key has the id or prefix 'key_none': `declaim keys list`"),
        ("usage --since yesterday", "--since is 'yesterday': give 90m, 24h or 7d"),
        ("usage --until 2001-01-01", "--until 2001-01-01 is not after --since 30d"),
        ("usage --by colour", "--by is 'colour': give some of tenant,key,model,voice"),
        ("tenants list --database mysql://x/y", "give sqlite:///PATH"),
    ],
)
def test_what_is_wrong_is_told_in_a_line_with_the_remedy(url: str, line: str, told: str) -> None:
    code, out, error = declaim(line, url)
    assert (code, out) == (2, "")
    assert told in error and error.count("\n") == 1


def test_a_database_that_is_away_is_named_without_its_password(url: str) -> None:
    code, _, error = declaim("keys list --database postgresql://nobody:secret@127.0.0.1:1/x", url)
    assert code == 1 and "127.0.0.1:1/x cannot be used" in error and "secret" not in error


def test_a_refused_command_changes_nothing(url: str) -> None:
    declaim("keys create --tenant acme --tiers vip", url)
    assert json.loads(declaim("tenants list --format json", url)[1]) == []


def test_names_are_shown_as_they_are_even_if_they_look_like_markup(url: str) -> None:
    declaim("keys create --tenant acme --name [bold]x[/bold]", url)
    assert "[bold]x[/bold]" in declaim("keys list", url)[1]
