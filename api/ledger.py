"""The usage ledger: what every request took, written behind the requests' backs.

Owns one thread that writes rows in batches, and the spill file that takes them while the database is away: lines of
JSON, imported when it is back, by this process or by one that starts after it died. A row has an id of its own, so
that importing it twice writes it once. Never blocks a request; a crash costs at most the last interval.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import logging
import os
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Self

import platformdirs
from sqlalchemy import exc

from declaim.api.gate import Usage
from declaim.api.store.database import Database, StoreUnavailable
from declaim.api.store.usage import UsageRow
from declaim.engine.request import Tier

logger = logging.getLogger(__name__)

_MAX_TEXT = 200
_BATCH_ROWS = 500
_RETRY_S = 1.0
_SPILL_PATTERN = "usage-*.jsonl"


@dataclass(frozen=True, slots=True)
class UsageRecord:
    """One row of the ledger, as in `UsageRow`."""

    id: str
    at: float
    tenant_id: str
    key_id: str | None
    request_id: str
    model: str
    voice: str
    response_format: str
    tier: str
    chars: int
    frames: int
    generated_s: float
    delivered_s: float
    ttfa_s: float | None
    status: int
    outcome: str
    is_cached: bool

    @classmethod
    def of(cls, usage: Usage, *, tenant: str, key_id: str | None, request_id: str, tier: Tier, at: float) -> Self:
        """A new row, with an id of its own."""
        return cls(
            id=uuid.uuid4().hex,
            at=at,
            tenant_id=tenant,
            key_id=key_id,
            request_id=_storable(request_id),
            model=_storable(usage.model),
            voice=_storable(usage.voice),
            response_format=_storable(usage.response_format),
            tier=tier,
            chars=usage.chars,
            frames=usage.frames,
            generated_s=usage.generated_s,
            delivered_s=usage.delivered_s,
            ttfa_s=usage.ttfa_s,
            status=usage.status,
            outcome=_storable(usage.outcome),
            is_cached=usage.is_cached,
        )


def default_spill_folder() -> Path:
    """A folder of this user's that survives a restart."""
    return platformdirs.user_state_path("declaim") / "usage"


class Ledger:
    """Writes usage rows behind the requests' backs.

    interval_s: how long rows are gathered before they are written, and so what a crash may cost. max_waiting: rows held
    in memory. max_spill_bytes: of the file that takes rows while the database is away. What fits in neither is lost,
    counted and logged.
    """

    def __init__(
        self,
        database: Database,
        *,
        spill_folder: Path | None = None,
        interval_s: float = 0.25,
        max_waiting: int = 50_000,
        max_spill_bytes: int = 256 << 20,
    ) -> None:
        self._database = database
        self._folder = spill_folder or default_spill_folder()
        self._interval_s = interval_s
        self._max_waiting = max_waiting
        self._max_spill_bytes = max_spill_bytes
        self._changed = threading.Condition()
        # guarded by _changed
        self._waiting: list[UsageRecord] = []
        self._num_writing = 0
        self._num_lost = 0
        self._is_closing = False
        # the thread's own
        self._spill: IO[str] | None = None
        self._has_orphans = True
        self._retry_at = 0.0
        self._thread = threading.Thread(target=self._run, name="declaim-ledger", daemon=True)
        self._thread.start()

    def write(self, record: UsageRecord) -> None:
        """Take a row; never blocks, never raises."""
        with self._changed:
            if len(self._waiting) < self._max_waiting and not self._is_closing:
                self._waiting.append(record)
                if len(self._waiting) == 1:
                    self._changed.notify_all()
                return
        self._lose(1, "too many rows wait for the database, or the server is closed")

    @property
    def num_waiting(self) -> int:
        """Rows in memory."""
        return len(self._waiting) + self._num_writing

    @property
    def num_lost(self) -> int:
        """Rows that neither the database nor the spill file took."""
        return self._num_lost

    def flush(self, *, timeout_s: float = 10.0) -> bool:
        """Wait until no row is in memory alone; False if that took too long."""
        with self._changed:
            return self._changed.wait_for(lambda: self.num_waiting == 0, timeout_s)

    def close(self) -> None:
        """Write what waits, to the spill file if the database is away, and stop."""
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        while True:
            is_behind = self._spill is not None or self._has_orphans
            if is_behind and time.monotonic() >= self._retry_at:
                self._catch_up()
                continue
            with self._changed:
                idle_s = max(0.0, self._retry_at - time.monotonic()) if is_behind else None
                self._changed.wait_for(lambda: self._waiting or self._is_closing, idle_s)
                # Rows that come meanwhile go with these.
                self._changed.wait_for(lambda: self._is_closing, self._interval_s if self._waiting else 0.0)
                batch, self._waiting = self._waiting, []
                self._num_writing = len(batch)
                is_last = self._is_closing and not batch
            self._keep(batch)
            with self._changed:
                self._num_writing = 0
                self._changed.notify_all()
            if is_last:
                break
        if self._spill is not None:
            self._catch_up()
        if self._spill is not None:
            # What is in it waits for the next start.
            self._spill.close()

    def _keep(self, batch: Sequence[UsageRecord]) -> None:
        """Into the database, or while that is away straight into the spill file."""
        for first in range(0, len(batch), _BATCH_ROWS):
            rows = [dataclasses.asdict(record) for record in batch[first : first + _BATCH_ROWS]]
            if self._spill is None or time.monotonic() >= self._retry_at:
                try:
                    self._insert(rows)
                    continue
                except StoreUnavailable as error:
                    logger.warning("ledger_spills rows=%d error=%r", len(rows), error.detail)
                    self._retry_at = time.monotonic() + _RETRY_S
            self._write_spill(rows)

    def _insert(self, rows: Sequence[dict[str, Any]]) -> None:
        """Raises: StoreUnavailable; then none of them was written, or their ids will tell."""
        insert = self._database.insert_if_absent(UsageRow)
        try:
            with self._database.session() as session:
                session.execute(insert, rows)
        except StoreUnavailable:
            raise
        except exc.SQLAlchemyError as error:
            # One bad row must not take the others with it.
            if len(rows) == 1:
                self._lose(1, f"the database refuses row {rows[0].get('id')}: {' '.join(str(error).split())[:300]}")
                return
            middle = len(rows) // 2
            self._insert(rows[:middle])
            self._insert(rows[middle:])

    def _write_spill(self, rows: Sequence[dict[str, Any]]) -> None:
        try:
            if self._spill is None:
                self._spill = _open_spill(self._folder)
            if os.fstat(self._spill.fileno()).st_size > self._max_spill_bytes:
                self._lose(len(rows), f"{self._spill.name} has {self._max_spill_bytes} bytes and the database is away")
                return
            self._spill.write("".join(json.dumps(row) + "\n" for row in rows))
            # To the operating system: our death loses nothing of it.
            self._spill.flush()
        except OSError as error:
            self._lose(len(rows), f"{self._folder} cannot be written ({error})")

    def _catch_up(self) -> None:
        """Import what lies in files: ours, and those of processes that died or ended while the database was away."""
        self._retry_at = time.monotonic() + _RETRY_S
        try:
            if self._has_orphans:
                for path in sorted(self._folder.glob(_SPILL_PATTERN)):
                    with _adopted(path) as is_ours:
                        if is_ours:
                            self._import(path)
                            path.unlink()
                self._has_orphans = False
            if self._spill is not None:
                path = Path(self._spill.name)
                self._import(path)
                path.unlink()
                self._spill.close()
                self._spill = None
                logger.info("ledger_caught_up file=%s", path)
        except StoreUnavailable:
            return
        except OSError as error:
            logger.error("ledger_cannot_read_its_files folder=%s error=%r", self._folder, str(error))

    def _import(self, path: Path) -> None:
        """Raises: StoreUnavailable, OSError. Rows that were imported before it was raised are known by their ids."""
        columns = {field.name for field in dataclasses.fields(UsageRecord)}
        rows: list[dict[str, Any]] = []
        with path.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                try:
                    row = json.loads(line)
                except ValueError:
                    row = None
                # The last line of a process that was killed may be torn.
                if not isinstance(row, dict) or row.keys() != columns:
                    self._lose(1, f"{path} has a line that is not a usage row")
                    continue
                rows.append(row)
                if len(rows) == _BATCH_ROWS:
                    self._insert(rows)
                    rows = []
        if rows:
            self._insert(rows)

    def _lose(self, num_rows: int, why: str) -> None:
        with self._changed:
            self._num_lost += num_rows
        logger.error("usage_lost rows=%d why=%s", num_rows, why)


def _storable(text: str) -> str:
    """What every database takes: no NUL, no lone surrogate, not too long."""
    return text[:_MAX_TEXT].replace("\x00", "\ufffd").encode("utf-8", "replace").decode("utf-8")


def _open_spill(folder: Path) -> IO[str]:
    """A new file that no other process takes for an orphan."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    while True:
        path = folder / f"usage-{uuid.uuid4().hex}.jsonl"
        file = path.open("a", encoding="utf-8")
        fcntl.flock(file, fcntl.LOCK_EX)
        # Between the two lines above another process may have adopted it, empty, and deleted it.
        if path.exists():
            return file
        file.close()


@contextmanager
def _adopted(path: Path) -> Iterator[bool]:
    """Hold a dead process's file; False if its process lives."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield path.exists()
    finally:
        os.close(descriptor)
