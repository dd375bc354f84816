"""A PostgreSQL of the tests' own: in a temporary folder, on a Unix socket there, by the user postgres under root."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from tests.api.fake_engine import eventually


def find_binaries() -> Path | None:
    """The folder with initdb and postgres; Debian keeps them out of PATH."""
    found = shutil.which("initdb")
    folders = (
        [Path(found).resolve().parent] if found else sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    )
    return next((folder for folder in folders if (folder / "initdb").exists()), None)


class Postgres:
    """One server; it can be stopped and started again."""

    def __init__(self, binaries: Path) -> None:
        self._binaries = binaries
        self._folder = Path(tempfile.mkdtemp(prefix="declaim-pg-", dir="/tmp"))
        # PostgreSQL refuses to run as root.
        self._as_user: dict[str, Any] = {}
        if os.getuid() == 0:
            shutil.chown(self._folder, "postgres", "postgres")
            self._as_user = {"user": "postgres", "group": "postgres", "extra_groups": []}
        self._process: subprocess.Popen[bytes] | None = None
        self._run("initdb", "-D", f"{self._folder}/data", "-A", "trust", "-U", "declaim", "--no-sync")

    def start(self) -> None:
        options = ("-c", "listen_addresses=", "-c", "fsync=off", "-c", "shared_buffers=16MB")
        command = [self._binaries / "postgres", "-D", f"{self._folder}/data", "-k", str(self._folder), *options]
        log = (self._folder / "log").open("ab")
        with log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, cwd="/", **self._as_user)
        if not eventually(self._is_up, within_s=30):
            raise TimeoutError((self._folder / "log").read_text())

    def stop(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGINT)  # "fast": open connections are cut
            self._process.wait(30)
            self._process = None

    def new_database(self, name: str, *, template: str = "template1") -> str:
        """A copy of a database that nobody uses, by default an empty one; gives its URL."""
        self._run("createdb", "-h", str(self._folder), "-U", "declaim", "-T", template, name)
        return f"postgresql://declaim@/{name}?host={self._folder}"

    def remove(self) -> None:
        self.stop()
        shutil.rmtree(self._folder)

    def _is_up(self) -> bool:
        command = [self._binaries / "pg_isready", "-q", "-h", str(self._folder), "-U", "declaim", "-d", "postgres"]
        return subprocess.run(command, check=False).returncode == 0

    def _run(self, program: str, *arguments: str) -> None:
        command = [str(self._binaries / program), *arguments]
        subprocess.run(command, check=True, capture_output=True, cwd="/", **self._as_user)
