"""The database: migrations, several processes at once, what is said when it is away."""

from __future__ import annotations

import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from declaim.api.store import lexicons, tenants, usage, voices
from declaim.api.store.database import Base, Database, StoreUnavailable, default_url
from declaim.engine.errors import InvalidConfig
from tests.api.children import PROCESSES, migrate
from tests.api.fake_engine import eventually

MODULES = (lexicons, tenants, usage, voices)  # imported so that their tables are known


def test_the_migrations_make_the_tables_that_the_code_knows(database: Database) -> None:
    with database.engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, Base.metadata) == []


def test_migrating_again_changes_nothing_and_keeps_the_rows(database: Database) -> None:
    with database.session() as session:
        tenants.set_tenant(session, "acme", tenants.Limits(), now=1.0)
    database.migrate()
    with database.reader() as session:
        assert session.get(tenants.Tenant, "acme") is not None


def test_processes_that_start_at_once_migrate_once(empty_url: str) -> None:
    started = [PROCESSES.Process(target=migrate, args=(empty_url,)) for _ in range(4)]
    for process in started:
        process.start()
    for process in started:
        process.join(60)
    assert [process.exitcode for process in started] == [0] * 4


def test_a_schema_from_the_future_is_left_alone(database: Database) -> None:
    with database.session() as session:
        session.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(InvalidConfig, match=r"9999.*newer.*upgrade declaim"):
        database.migrate()


def test_a_transaction_that_fails_leaves_nothing(database: Database) -> None:
    with pytest.raises(ZeroDivisionError), database.session() as session:
        tenants.set_tenant(session, "acme", tenants.Limits(), now=1.0)
        1 / 0  # noqa: B018
    with database.reader() as session:
        assert session.get(tenants.Tenant, "acme") is None


def test_a_reader_does_not_wait_for_a_writer(database: Database) -> None:
    with database.session() as writer, database.reader() as reader:
        tenants.set_tenant(writer, "acme", tenants.Limits(), now=1.0)
        assert reader.get(tenants.Tenant, "acme") is None


def test_a_writer_that_waited_goes_by_the_time_after_its_wait(tmp_path: Path) -> None:
    time_now = 10.0
    database = Database(f"sqlite:///{tmp_path}/declaim.db", clock=lambda: time_now)
    statements: list[str] = []

    def read_time() -> float | None:
        with database.session() as session:
            return session.scalar(sa.select(database.now()))

    with ThreadPoolExecutor(1) as others:
        with database.session():
            sa.event.listen(database.engine, "before_cursor_execute", lambda *event: statements.append(event[2]))
            later = others.submit(read_time)
            assert eventually(lambda: "BEGIN IMMEDIATE" in statements)
            time_now = 20.0
        assert later.result(10) == 20.0
    database.close()


@pytest.mark.parametrize("url", ["mysql://u:secret@h/d", "sqlite://", "sqlite:///:memory:", "nonsense secret"])
def test_other_urls_are_refused_with_what_to_give(url: str) -> None:
    with pytest.raises(InvalidConfig, match=r"give sqlite:///PATH .* or postgresql://") as caught:
        Database(url)
    assert "secret" not in str(caught.value)


def test_a_database_that_is_away_is_told_to_the_operator_and_not_to_clients() -> None:
    away = Database("postgres://nobody:secret@127.0.0.1:1/x")
    with pytest.raises(StoreUnavailable, match="does not answer: try again") as caught, away.reader() as session:
        session.execute(sa.select(1))
    assert "127.0.0.1" in caught.value.detail and "secret" not in caught.value.detail
    assert "127.0.0.1" not in str(caught.value)
    assert caught.value.retry_after_s > 0


def test_the_file_is_its_owners_alone(tmp_path: Path) -> None:
    Database(f"sqlite:///{tmp_path}/data/declaim.db").close()
    assert stat.S_IMODE((tmp_path / "data" / "declaim.db").stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "data").stat().st_mode) == 0o700


def test_the_default_lies_in_the_users_data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert default_url() == f"sqlite:///{tmp_path}/declaim/declaim.db"


def test_rows_written_by_hand_cannot_break_a_server(database: Database) -> None:
    row = {"id": "x", "created_at": 0.0, "weight": 1.0, "tiers": "default"}
    for column, value in (("requests_per_minute", 0), ("max_streams", -1), ("weight", 0.0)):
        with pytest.raises(sa.exc.IntegrityError), database.session() as session:
            session.execute(sa.insert(tenants.Tenant).values(**{**row, column: value}))
