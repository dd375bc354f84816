"""A database of a benchmark's own that can go away for a while: PostgreSQL where its binaries are here, else SQLite.

Owns the server process or the file, and the way in which it is away. Knows no table.
"""

from __future__ import annotations

import asyncio
import sqlite3
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Protocol

import machine

# A checkout's own tests know how to start a PostgreSQL.
sys.path.append(str(machine.ROOT))
from tests.api.postgres import Postgres, find_binaries

KINDS = ("postgres", "sqlite")


class OwnDatabase(Protocol):
    """One database. kind: one of KINDS. One `away` at a time."""

    kind: str
    url: str

    async def away(self, seconds: float) -> None:
        """Be of no use for so long, and then again as before."""
        ...


class _OwnPostgres:
    """A server that is stopped, with its connections cut, and started again."""

    kind = "postgres"

    def __init__(self, server: Postgres) -> None:
        self._server = server
        self.url = server.new_database("chaos")

    async def away(self, seconds: float) -> None:
        await asyncio.to_thread(self._server.stop)
        try:
            await asyncio.sleep(seconds)
        finally:
            await asyncio.to_thread(self._server.start)


class _OwnSqlite:
    """A file that another process has locked for writing."""

    kind = "sqlite"

    def __init__(self, file: Path) -> None:
        self._file = file
        self.url = f"sqlite:///{file}"

    async def away(self, seconds: float) -> None:
        with closing(sqlite3.connect(self._file, isolation_level=None)) as connection:
            try:
                connection.execute("BEGIN EXCLUSIVE")
            except sqlite3.OperationalError:
                return  # the disk is full: it is of no use already
            await asyncio.sleep(seconds)


def usual_kind() -> str:
    return "sqlite" if find_binaries() is None else "postgres"


@contextmanager
def own_database(kind: str, folder: Path) -> Iterator[OwnDatabase]:
    """Give an empty database that runs. folder: for SQLite's file; PostgreSQL has one of its own.

    Raises: SystemExit where PostgreSQL is asked for and not installed.
    """
    if kind == "sqlite":
        yield _OwnSqlite(folder / "declaim.db")
        return
    binaries = find_binaries()
    if binaries is None:
        raise SystemExit("PostgreSQL is not installed: apt-get install -y postgresql, or use --database sqlite")
    server = Postgres(binaries)
    try:
        server.start()
        yield _OwnPostgres(server)
    finally:
        server.remove()
