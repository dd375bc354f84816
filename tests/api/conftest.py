"""Databases for the tests: each test its own, in SQLite and in a real PostgreSQL where that is installed."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from declaim.api.store.database import Database
from tests.api.postgres import Postgres, find_binaries


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A running server."""
    binaries = find_binaries()
    if binaries is None:
        pytest.skip("PostgreSQL is not installed: apt-get install -y postgresql")
    server = Postgres(binaries)
    try:
        server.start()
        yield server
    finally:
        server.remove()


@pytest.fixture(scope="session")
def migrated_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SQLite file whose schema is up to date, to be copied: that is faster than migrating."""
    path = tmp_path_factory.mktemp("sqlite") / "template.db"
    _migrate(f"sqlite:///{path}")
    return path


@pytest.fixture(scope="session")
def migrated_postgres(postgres: Postgres) -> Postgres:
    """A server with such a database, called `template`."""
    _migrate(postgres.new_database("template"))
    return postgres


@pytest.fixture(params=["sqlite", "postgres"])
def empty_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A database without a table."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/declaim.db"
    server = request.getfixturevalue("postgres")
    assert isinstance(server, Postgres)
    return server.new_database(f"test_{uuid.uuid4().hex}")


@pytest.fixture(params=["sqlite", "postgres"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A database whose schema is up to date."""
    if request.param == "sqlite":
        shutil.copy(request.getfixturevalue("migrated_file"), tmp_path / "declaim.db")
        return f"sqlite:///{tmp_path}/declaim.db"
    server = request.getfixturevalue("migrated_postgres")
    assert isinstance(server, Postgres)
    return server.new_database(f"test_{uuid.uuid4().hex}", template="template")


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    """The same, opened."""
    opened = Database(database_url)
    try:
        yield opened
    finally:
        opened.close()


def _migrate(url: str) -> None:
    database = Database(url)
    database.migrate()
    database.close()
