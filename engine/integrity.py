"""What is known of a model's files: their hashes, the record kept of them, and what checking them again finds."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from declaim.engine.progress import Progress, ignore_progress

log = logging.getLogger(__name__)

CHUNK_BYTES = 1 << 20
_WHOLE_BYTES = 64 << 20
# In a folder of engine/quantize.py: what it did, each file's SHA-256 included; until it is whole, how far it is.
QUANTIZATION_NAME = "quantization_config.json"
PROGRESS_NAME = "quantization_progress.json"
_RECORD_FORMAT = 1
_RECORD_FOLDER = "declaim"  # beside the hub's own snapshots/, blobs/ and refs/


@dataclass(frozen=True, slots=True)
class Record:
    """What `Hub.pull` knows of a snapshot: each file's size and SHA-256, and the repositories it was pulled with."""

    repo_id: str
    commit: str
    verified_at: str  # ISO 8601, UTC
    parts: tuple[str, ...]
    files: Mapping[str, tuple[int, str]]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What checking a folder found. problems: one line for each bad file; unknown: what could not be checked."""

    folder: Path
    num_files: int
    num_bytes: int
    problems: tuple[str, ...]
    unknown: str | None = None


@dataclass(frozen=True, slots=True)
class FileHash:
    """A file's SHA-256, and its git blob's SHA-1 where that was asked for."""

    sha256: str
    git_sha1: str

    def matches(self, sha256: str | None, git_sha1: str | None) -> bool:
        """Whether it is what the hub lists; a file listed without a hash has its size alone to go by."""
        if sha256 is not None:
            return self.sha256 == sha256
        return git_sha1 is None or self.git_sha1 == git_sha1


def hash_file(path: Path, progress: Progress, *, before: int, total: int, with_git: bool = False) -> FileHash:
    """Hash a file, reporting the stage "verify" from `before` on. Raises: OSError."""
    sha256 = hashlib.sha256()
    git_sha1 = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    done = before
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            sha256.update(chunk)
            if with_git:
                git_sha1.update(chunk)
            done += len(chunk)
            progress("verify", done, total)
    return FileHash(sha256.hexdigest(), git_sha1.hexdigest())


def fingerprint(*folders: Path) -> str:
    """What tells the files in these folders from others: 64 hex digits, in a fraction of the time that loading takes.

    A file of up to 64 MiB counts with all its bytes, a larger one with its size, the time it was written, and its first
    and last MiB: weights that were trained on, or swapped, change it, whatever they are called. Raises: OSError.
    """
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            status = path.stat()
            is_large = status.st_size > _WHOLE_BYTES
            written = status.st_mtime_ns if is_large else 0
            digest.update(f"{path.relative_to(folder).as_posix()}\0{status.st_size}\0{written}\0".encode())
            with path.open("rb") as file:
                if is_large:
                    digest.update(file.read(CHUNK_BYTES))
                    file.seek(-CHUNK_BYTES, 2)
                while chunk := file.read(CHUNK_BYTES):
                    digest.update(chunk)
        digest.update(b"\0")
    return digest.hexdigest()


def check_record(folder: Path, record: Record, progress: Progress = ignore_progress) -> Verdict:
    """Hash a snapshot's files and compare with its record, which then says when that was."""
    total = sum(size for size, _ in record.files.values())
    problems = []
    done = 0
    for name, (size, sha256) in sorted(record.files.items()):
        problem = _compare(folder / name, size, sha256, progress, before=done, total=total)
        if problem is not None:
            problems.append(f"{folder / name} {problem}: `declaim models pull {record.repo_id}` fetches it again")
        done += size
        progress("verify", done, total)
    if not problems:
        write_record(folder, replace(record, verified_at=now()))
    return Verdict(folder, len(record.files), total, tuple(problems))


def check_folder(folder: Path, progress: Progress = ignore_progress) -> Verdict:
    """Check that a folder's JSON files parse and its safetensors files are whole.

    A folder that `declaim quantize` wrote knows the SHA-256 of its files, and every byte is checked.
    """
    hashes, problems = _quantized_hashes(folder)
    kept = {path for path in folder.rglob("*") if path.suffix in (".json", ".safetensors") and path.is_file()}
    paths = sorted(kept | {folder / name for name in hashes if (folder / name).is_file()})
    sizes = [path.stat().st_size for path in paths]
    problems += [
        f"{folder / name} is gone: quantize or copy it again" for name in hashes if not (folder / name).is_file()
    ]
    done = 0
    for path, size in zip(paths, sizes, strict=True):
        sha256 = hashes.get(path.relative_to(folder).as_posix())
        if sha256 is None:
            problem, remedy = _structure_problem(path), "copy or download it again"
        else:
            problem = _compare(path, size, sha256, progress, before=done, total=sum(sizes))
            remedy = "quantize or copy it again"
        if problem is not None:
            problems.append(f"{path} {problem}: {remedy}")
        done += size
        progress("verify", done, sum(sizes))
    if not any(path.suffix == ".safetensors" for path in paths):
        problems.append(f"{folder} holds no safetensors file: name the folder of a model")
    unknown = f"no SHA-256 is recorded for {folder}: only the files' structure was checked, not every byte"
    return Verdict(folder, len(paths), sum(sizes), tuple(problems), None if hashes else unknown)


def half_written(folder: Path) -> str | None:
    """What is wrong with a folder that `declaim quantize` has begun and not finished; None of any other."""
    if not (folder / PROGRESS_NAME).exists():
        return None
    return f"{folder} is half written: run declaim quantize again with the same arguments, it goes on from there"


def _quantized_hashes(folder: Path) -> tuple[dict[str, str], list[str]]:
    """SHA-256 by name of the files that `declaim quantize` wrote into a folder, and what is wrong with that list."""
    unfinished = half_written(folder)
    if unfinished is not None:
        return {}, [unfinished]
    path = folder / QUANTIZATION_NAME
    try:
        hashes = json.loads(path.read_bytes())["sha256"]
        return {str(name): str(sha256) for name, sha256 in hashes.items()}, []
    except FileNotFoundError:
        return {}, []
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return {}, [f"{path} has no list of SHA-256 that can be read ({error!r}): quantize the model again"]


def _structure_problem(path: Path) -> str | None:
    """What is wrong with a JSON or safetensors file, None if nothing is."""
    from safetensors import SafetensorError, safe_open

    try:
        if path.suffix == ".json":
            json.loads(path.read_bytes())
        else:
            with safe_open(path, framework="numpy"):
                pass
    except (SafetensorError, OSError, ValueError) as error:
        return f"({path.stat().st_size} bytes) is cut short or corrupted ({error})"
    return None


def _record_path(snapshot: Path) -> Path:
    return snapshot.parent.parent / _RECORD_FOLDER / f"{snapshot.name}.json"


def read_record(snapshot: Path) -> Record | None:
    """None where there is no record, or none that this version can read."""
    try:
        value: Any = json.loads(_record_path(snapshot).read_bytes())
        if value["format"] != _RECORD_FORMAT:
            return None
        files = {str(name): (int(entry["size"]), str(entry["sha256"])) for name, entry in value["files"].items()}
        parts = tuple(str(part) for part in value["parts"])
        return Record(str(value["repo_id"]), str(value["commit"]), str(value["verified_at"]), parts, files)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def write_record(snapshot: Path, record: Record) -> None:
    value = {
        "format": _RECORD_FORMAT,
        "repo_id": record.repo_id,
        "commit": record.commit,
        "verified_at": record.verified_at,
        "parts": record.parts,
        "files": {name: {"size": size, "sha256": sha256} for name, (size, sha256) in record.files.items()},
    }
    path = _record_path(snapshot)
    try:
        path.parent.mkdir(exist_ok=True)
        fresh = path.with_suffix(".new")
        fresh.write_text(json.dumps(value, indent=1), encoding="utf-8")
        fresh.replace(path)
    except OSError as error:
        log.warning("event=record_not_written path=%s error=%r: `declaim models verify` will know less", path, error)


def now() -> str:
    """The time as records keep it: ISO 8601, UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _compare(path: Path, size: int, sha256: str, progress: Progress, *, before: int, total: int) -> str | None:
    """What is wrong with a file, None if nothing is."""
    try:
        actual = path.stat().st_size
        if actual != size:
            return f"has {actual} bytes instead of {size}"
        if hash_file(path, progress, before=before, total=total).sha256 != sha256:
            return f"does not have the SHA-256 that was recorded ({sha256})"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return None
