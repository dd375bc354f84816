"""What other API processes do in the tests. One server process imports declaim, and every child is forked from it."""

from __future__ import annotations

import multiprocessing
import time
import uuid
from multiprocessing.connection import Connection
from pathlib import Path

from declaim.api.gate import Usage
from declaim.api.ledger import Ledger, UsageRecord
from declaim.api.limiter import SharedLimits
from declaim.api.store.database import Database
from declaim.api.tenant_errors import RateLimited

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload([__name__])

USAGE = Usage(
    model="lark",
    voice="alloy",
    response_format="mp3",
    chars=10,
    frames=50,
    generated_s=2.0,
    delivered_s=1.5,
    ttfa_s=0.1,
    status=200,
    outcome="complete",
)


def migrate(url: str) -> None:
    database = Database(url)
    database.migrate()
    database.close()


def record(tenant: str = "acme", *, usage: Usage = USAGE, key_id: str | None = None, at: float = 1.0) -> UsageRecord:
    request_id = f"req_{uuid.uuid4().hex}"
    return UsageRecord.of(usage, tenant=tenant, key_id=key_id, request_id=request_id, tier="default", at=at)


def flood(url: str, tenant: str, chars: int, duration_s: float, pipe: Connection) -> None:
    """Ask for as much as possible from when the pipe says so; tells how many were let in, and when the last was."""
    database = Database(url)
    limits = SharedLimits(database)
    pipe.send("ready")
    pipe.recv()
    until = time.time() + duration_s
    num_admitted = 0
    last = 0.0
    while time.time() < until:
        try:
            lease = limits.admit(tenant, chars=chars, tier="default").result(10)
        except RateLimited:
            continue
        num_admitted += 1
        last = time.time()
        limits.release(lease)
    limits.close()
    database.close()
    pipe.send((num_admitted, last))


def hold_streams(url: str, tenant: str, num_streams: int, lease_s: float, pipe: Connection) -> None:
    """Take places and keep them until killed."""
    limits = SharedLimits(Database(url), lease_s=lease_s)
    for _ in range(num_streams):
        limits.admit(tenant, chars=1, tier="default").result(10)
    pipe.send("holding")
    pipe.recv()


def write_usage(url: str, folder: Path, journal: Path, interval_s: float) -> None:
    """Write a row every few milliseconds, and into `journal` its id and when it was written, until killed."""
    ledger = Ledger(Database(url), spill_folder=folder)
    with journal.open("w") as file:
        while True:
            row = record()
            ledger.write(row)
            file.write(f"{row.id} {time.time()}\n")
            file.flush()
            time.sleep(interval_s)
