"""The database: one URL, SQLite or PostgreSQL, its schema brought up to date at start.

Owns connections, transactions, the clock that processes share, and migration. Knows no table: those stand beside this
file, one module for each owner. Synchronous: call it from a worker thread, never from an event loop.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import platformdirs
import sqlalchemy as sa
from sqlalchemy import event, exc, orm
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.pool import ConnectionPoolEntry

from declaim.engine.errors import InvalidConfig, Overloaded

_MIGRATIONS = "declaim.api.store:migrations"
# Any constant will do, as long as nobody else's program on the same PostgreSQL takes it.
_ADVISORY_LOCK = 0x6465636C
_BUSY_TIMEOUT_S = 10
_STATEMENT_TIMEOUT_S = 10


class Base(orm.DeclarativeBase):
    """Every table's base; floats are double precision, times are seconds since 1970 in UTC."""

    type_annotation_map = {float: sa.Double, int: sa.BigInteger, bytes: sa.LargeBinary}


class StoreUnavailable(Overloaded):
    """The database cannot be reached, or did not answer in time; the same request may do in a moment.

    Its message may be shown to clients. detail: what is wrong, for the operator alone.
    """

    def __init__(self, detail: str) -> None:
        super().__init__("the server's database does not answer: try again in a moment", retry_after_s=1.0)
        self.detail = detail


def default_url() -> str:
    """A SQLite file in this user's data folder."""
    return f"sqlite:///{platformdirs.user_data_path('declaim') / 'declaim.db'}"


class Database:
    """Connections to one database, safe to use from many threads and from many processes at once.

    url: `sqlite:///PATH` or `postgresql://USER:PASSWORD@HOST/NAME`; None is `default_url()`.
    clock: seconds since 1970 for `now`; None is the database's own clock, which all API hosts share.

    Raises: InvalidConfig for a URL that is neither, or whose driver is not installed.
    """

    def __init__(self, url: str | None = None, *, clock: Callable[[], float] | None = None) -> None:
        self._url = _parse(url or default_url())
        self.is_sqlite = self._url.get_backend_name() == "sqlite"
        self._clock = time.time if clock is None and self.is_sqlite else clock
        try:
            self.engine = _sqlite_engine(self._url) if self.is_sqlite else _postgres_engine(self._url)
        except ModuleNotFoundError as error:
            raise InvalidConfig(
                f"{self} needs the package {error.name}: pip install 'declaim[postgres]', or use sqlite:///PATH"
            ) from error
        self._sessions = orm.sessionmaker(self.engine, expire_on_commit=False)
        self._readers = orm.sessionmaker(
            self.engine.execution_options(declaim_begin="BEGIN"), expire_on_commit=False, autoflush=False
        )

    def __str__(self) -> str:
        """The URL without its password."""
        return self._url.render_as_string(hide_password=True)

    @contextmanager
    def session(self) -> Iterator[orm.Session]:
        """A transaction that may write: commits at the end, rolls back when the block raises.

        On SQLite it holds the file's one write lock from its start, so keep it short.

        Raises: StoreUnavailable.
        """
        with _tells_unavailable(self), self._sessions.begin() as session:
            # A session begins at its first statement, and SQLite's time is read where a statement is written: without
            # this, a writer that waited would go by the time from before its wait.
            session.connection()
            yield session

    @contextmanager
    def reader(self) -> Iterator[orm.Session]:
        """A transaction that only reads; waits for no writer.

        Raises: StoreUnavailable.
        """
        with _tells_unavailable(self), self._readers.begin() as session:
            yield session

    def now(self) -> sa.ColumnElement[float]:
        """The time now as an SQL expression: seconds since 1970, of the clock that every API process shares.

        Within `session` it is never earlier than what was committed before the session got its locks: SQLite's is read
        here, under the file's lock; PostgreSQL reads its own again for a row that changed while FOR UPDATE waited.
        """
        if self._clock is not None:
            return sa.literal(self._clock(), sa.Double)
        return sa.cast(sa.extract("epoch", sa.func.clock_timestamp()), sa.Double)

    def insert_if_absent(self, table: type[Base]) -> sqlite.Insert | postgresql.Insert:
        """An INSERT that leaves rows alone whose primary key is there already: it can be run again."""
        if self.is_sqlite:
            return sqlite.insert(table).on_conflict_do_nothing()
        return postgresql.insert(table).on_conflict_do_nothing()

    def migrate(self) -> None:
        """Bring the schema up to date. Any number of processes may call this at once: one migrates, the others wait.

        Raises: StoreUnavailable. InvalidConfig where the schema is newer than this program.
        """
        # Half a second to import, which no API worker needs.
        from alembic import command
        from alembic.config import Config
        from alembic.migration import MigrationContext
        from alembic.script import ScriptDirectory

        config = Config()
        config.set_main_option("script_location", _MIGRATIONS)
        config.set_main_option("path_separator", "os")
        script = ScriptDirectory.from_config(config)
        with _tells_unavailable(self), self._migrating() as connection:
            current = MigrationContext.configure(connection).get_current_revision()
            if current is not None and current not in {revision.revision for revision in script.walk_revisions()}:
                raise InvalidConfig(
                    f"the schema of {self} is at {current}, which this declaim does not know: "
                    f"a newer one made it; upgrade declaim, or give another database"
                )
            if current != script.get_current_head():
                config.attributes["connection"] = connection
                command.upgrade(config, "head")

    def close(self) -> None:
        """Close every connection; the object can still be used, and then opens new ones."""
        self.engine.dispose()

    @contextmanager
    def _migrating(self) -> Iterator[sa.Connection]:
        """One transaction that no other process's migration shares."""
        if not self.is_sqlite:
            with self.engine.begin() as connection:
                connection.exec_driver_sql("SET LOCAL statement_timeout = 0")
                connection.exec_driver_sql("SET LOCAL lock_timeout = 0")
                connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_ADVISORY_LOCK)))
                yield connection
            return
        path = Path(self._url.database or "")
        # A lock file, since switching to WAL does not wait for SQLite's own locks.
        with open(path.with_name(path.name + ".lock"), "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            with closing(sqlite3.connect(path, timeout=_BUSY_TIMEOUT_S)) as switch:
                switch.execute("PRAGMA journal_mode=WAL")
            with self.engine.begin() as connection:
                yield connection


def _parse(url: str) -> sa.URL:
    try:
        parsed = sa.make_url(url)
    except exc.ArgumentError as error:
        raise InvalidConfig(_bad_url("the database URL cannot be read")) from error
    backend = parsed.get_backend_name()
    if backend == "sqlite" and parsed.database and parsed.database != ":memory:":
        return parsed.set(database=str(Path(parsed.database).expanduser()))
    if backend in ("postgresql", "postgres"):
        return parsed.set(drivername="postgresql+psycopg")
    raise InvalidConfig(_bad_url(f"the database URL is {parsed.render_as_string(hide_password=True)!r}"))


def _bad_url(problem: str) -> str:
    return f"{problem}: give sqlite:///PATH (a file) or postgresql://USER:PASSWORD@HOST/NAME"


def _sqlite_engine(url: sa.URL) -> sa.Engine:
    path = Path(url.database or "")
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    # Made here so that no other user of the machine can read it, whatever the umask.
    os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
    engine = sa.create_engine(url, connect_args={"timeout": _BUSY_TIMEOUT_S})

    @event.listens_for(engine, "connect")
    def set_up(connection: DBAPIConnection, record: ConnectionPoolEntry) -> None:
        if not isinstance(connection, sqlite3.Connection):
            raise TypeError(f"SQLite's driver gave a {type(connection).__name__}")
        # None: SQLAlchemy says when a transaction begins, not the driver, which would begin it too late.
        connection.isolation_level = None
        connection.execute("PRAGMA foreign_keys=ON")
        # With WAL this loses nothing when a process dies; a power cut may cost the last transactions.
        connection.execute("PRAGMA synchronous=NORMAL")

    @event.listens_for(engine, "begin")
    def begin(connection: sa.Connection) -> None:
        # A transaction that reads first and writes later could fail half-way; a writer takes its lock at once.
        connection.exec_driver_sql(connection.get_execution_options().get("declaim_begin", "BEGIN IMMEDIATE"))

    return engine


def _postgres_engine(url: sa.URL) -> sa.Engine:
    options = f"-c statement_timeout={_STATEMENT_TIMEOUT_S}s -c lock_timeout={_BUSY_TIMEOUT_S}s"
    return sa.create_engine(
        url,
        pool_pre_ping=True,  # a connection from before the server's restart is replaced, not handed out
        connect_args={"connect_timeout": 3, "options": options, "application_name": "declaim"},
    )


@contextmanager
def _tells_unavailable(database: Database) -> Iterator[None]:
    try:
        yield
    except (exc.OperationalError, exc.InterfaceError, exc.TimeoutError) as error:
        cause = error.orig if isinstance(error, exc.DBAPIError) else error
        reason = " ".join(str(cause).split())
        detail = f"the database {database} cannot be used ({reason}): check that it runs and that its URL is right"
        raise StoreUnavailable(detail) from error
