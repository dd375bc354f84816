"""The usage ledger: what a crash, a restart of the database, or a slow disk may cost."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from declaim.api.ledger import Ledger, default_spill_folder
from declaim.api.store.database import Database
from declaim.api.store.usage import UsageRow
from tests.api.children import PROCESSES, USAGE, record, write_usage
from tests.api.fake_engine import eventually
from tests.api.postgres import Postgres

AWAY = "postgresql://nobody@127.0.0.1:1/x"


@contextmanager
def ledger_of(database: Database, folder: Path, **options: Any) -> Iterator[Ledger]:
    ledger = Ledger(database, spill_folder=folder, **options)
    try:
        yield ledger
    finally:
        ledger.close()


def ids(database: Database) -> set[str]:
    with database.reader() as session:
        return set(session.scalars(sa.select(UsageRow.id)))


def test_a_row_is_in_the_database_within_half_a_second_and_complete(database: Database, tmp_path: Path) -> None:
    row = record("acme", key_id="key_1", at=12.5)
    with ledger_of(database, tmp_path) as ledger:
        ledger.write(row)
        assert eventually(lambda: ids(database) == {row.id}, within_s=1.5)
    with database.reader() as session:
        stored = session.scalars(sa.select(UsageRow)).one()
        assert {name: getattr(stored, name) for name in row.__slots__} == {
            name: getattr(row, name) for name in row.__slots__
        }


def test_closing_writes_everything_that_waits(database: Database, tmp_path: Path) -> None:
    rows = [record() for _ in range(1200)]
    with ledger_of(database, tmp_path, interval_s=60.0) as ledger:
        for row in rows:
            ledger.write(row)
    assert ids(database) == {row.id for row in rows}
    assert (ledger.num_lost, ledger.num_waiting) == (0, 0)


def test_flush_waits_until_what_was_written_is_stored(database: Database, tmp_path: Path) -> None:
    with ledger_of(database, tmp_path) as ledger:
        row = record()
        ledger.write(row)
        assert ledger.flush()
        assert ids(database) == {row.id}


@pytest.mark.parametrize("at_once", [False, True])
def test_a_process_killed_loses_at_most_its_last_second(
    database: Database, database_url: str, tmp_path: Path, at_once: bool
) -> None:
    journal = tmp_path / "journal"
    child = PROCESSES.Process(target=write_usage, args=(database_url, tmp_path, journal, 0.0 if at_once else 0.01))
    child.start()
    assert eventually(lambda: len(ids(database)) > 20, within_s=30)
    time.sleep(0.3)
    killed_at = time.time()
    child.kill()
    child.join()
    lines = [line.split() for line in journal.read_text().splitlines()]
    written = {line[0]: float(line[1]) for line in lines if len(line) == 2}
    stored = ids(database)
    lost = [row_id for row_id in written if row_id not in stored]
    assert all(written[row_id] > killed_at - 3.0 for row_id in lost)  # 1 s where the machine is not busy otherwise
    assert list(lost) == list(written)[len(written) - len(lost) :], "a row was lost before one that was stored"
    assert len(written) > len(lost)


def test_rows_that_come_while_the_database_is_away_wait_in_a_file_and_are_stored_once(
    postgres: Postgres, tmp_path: Path
) -> None:
    database = Database(postgres.new_database("ledger_restart"))
    database.migrate()
    before, meanwhile, after = (record() for _ in range(3))
    with closing(database), ledger_of(database, tmp_path, interval_s=0.05) as ledger:
        ledger.write(before)
        assert ledger.flush()
        postgres.stop()
        try:
            ledger.write(meanwhile)
            assert eventually(lambda: any(meanwhile.id in path.read_text() for path in tmp_path.glob("usage-*.jsonl")))
        finally:
            postgres.start()
        ledger.write(after)
        assert eventually(lambda: ids(database) == {before.id, meanwhile.id, after.id}, within_s=10)
        assert eventually(lambda: not list(tmp_path.glob("usage-*.jsonl")))
        assert ledger.num_lost == 0


def test_the_file_of_a_process_that_died_is_imported_by_the_next_one(database: Database, tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    child = PROCESSES.Process(target=write_usage, args=(AWAY, tmp_path, journal, 0.01))
    child.start()
    assert eventually(lambda: any(path.stat().st_size > 2000 for path in tmp_path.glob("usage-*.jsonl")), within_s=30)
    with ledger_of(database, tmp_path) as living:
        # Its process lives, so its file is left alone.
        living.write(record())
        assert living.flush()
        assert len(list(tmp_path.glob("usage-*.jsonl"))) == 1
    child.kill()
    child.join()
    (file,) = tmp_path.glob("usage-*.jsonl")
    spilled = file.read_text().count("\n")
    file.write_text(file.read_text() + '{"id": "torn')
    with ledger_of(database, tmp_path) as ledger:
        assert eventually(lambda: len(ids(database)) == spilled + 1)
        assert eventually(lambda: not file.exists())
        assert ledger.num_lost == 1


def test_what_is_closed_while_the_database_is_away_is_imported_at_the_next_start(
    database: Database, tmp_path: Path
) -> None:
    row = record()
    with ledger_of(Database(AWAY), tmp_path) as ledger:
        ledger.write(row)
    assert len(list(tmp_path.glob("usage-*.jsonl"))) == 1
    for _ in range(2):
        with ledger_of(database, tmp_path):
            assert eventually(lambda: ids(database) == {row.id})
    assert not list(tmp_path.glob("usage-*.jsonl"))


def test_importing_a_row_twice_stores_it_once(database: Database, tmp_path: Path) -> None:
    """A connection may break after the database has committed and before we know."""
    row = record()
    with ledger_of(database, tmp_path) as ledger:
        for _ in range(2):
            ledger.write(row)
            assert ledger.flush()
    assert ids(database) == {row.id}


def test_a_database_that_hangs_blocks_no_request_and_memory_is_bounded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    database = Database(f"sqlite:///{tmp_path}/declaim.db")
    database.migrate()
    hog = sqlite3.connect(tmp_path / "declaim.db", isolation_level=None)
    with closing(database), closing(hog), ledger_of(database, tmp_path, max_waiting=100) as ledger:
        hog.execute("BEGIN IMMEDIATE")
        ledger.write(record())
        assert eventually(lambda: ledger._num_writing == 1)
        began = time.perf_counter()
        for _ in range(300):
            ledger.write(record())
        assert time.perf_counter() - began < 4.0, "they waited for the database, which lets them for 5 s"
        assert (ledger.num_waiting, ledger.num_lost) == (101, 200)
        assert "usage_lost rows=1 why=too many rows wait" in caplog.text
        hog.execute("ROLLBACK")
        assert ledger.flush()
        assert len(ids(database)) == 101


def test_the_spill_file_is_bounded(tmp_path: Path) -> None:
    with ledger_of(Database(AWAY), tmp_path, interval_s=0.01, max_spill_bytes=1000) as ledger:
        for _ in range(20):
            ledger.write(record())
            assert ledger.flush()
        assert ledger.num_lost > 10
    (file,) = tmp_path.glob("usage-*.jsonl")
    assert file.stat().st_size < 2000


def test_a_folder_that_cannot_be_written_costs_rows_and_not_the_server(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with ledger_of(Database(AWAY), tmp_path / "file", interval_s=0.01) as ledger:
        ledger.write(record())
        assert ledger.flush()
        assert ledger.num_lost == 1


def test_text_that_a_database_refuses_is_made_storable(database: Database, tmp_path: Path) -> None:
    odd = replace(USAGE, voice="a\x00b\ud800c", model="m" * 1000)
    with ledger_of(database, tmp_path) as ledger:
        ledger.write(record(usage=odd))
    with database.reader() as session:
        assert session.execute(sa.select(UsageRow.voice, UsageRow.model)).one() == ("a\ufffdb?c", "m" * 200)
    assert ledger.num_lost == 0


def test_one_row_that_the_database_refuses_does_not_take_others_with_it(database: Database, tmp_path: Path) -> None:
    good = [record() for _ in range(5)]
    bad = replace(record(), model=None)  # type: ignore[arg-type]
    with ledger_of(database, tmp_path) as ledger:
        for row in (*good[:2], bad, *good[2:]):
            ledger.write(row)
    assert ids(database) == {row.id for row in good}
    assert ledger.num_lost == 1


def test_rows_from_many_threads_all_arrive(database: Database, tmp_path: Path) -> None:
    rows = [[record() for _ in range(200)] for _ in range(8)]
    with ledger_of(database, tmp_path, interval_s=0.01) as ledger:
        threads = [threading.Thread(target=lambda part=part: [ledger.write(row) for row in part]) for part in rows]  # type: ignore[misc]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert ids(database) == {row.id for part in rows for row in part}


def test_the_default_spill_folder_survives_a_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert default_spill_folder() == tmp_path / "declaim" / "usage"
