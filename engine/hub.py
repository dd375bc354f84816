"""Models in the Hugging Face cache: fetched, resumed, checked by SHA-256, listed, removed.

Owns what huggingface_hub leaves open: a large file goes on where it broke off (version 2 of it starts again), every
byte is hashed, and the hashes are recorded beside the snapshot. The cache keeps the hub's documented layout, so other
tools find the same files. Knows repositories and files, never model families.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import logging
import re
import shutil
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from declaim.engine.errors import ModelLoadError, ModelNotFound
from declaim.engine.integrity import (
    CHUNK_BYTES,
    Record,
    Verdict,
    check_folder,
    check_record,
    hash_file,
    now,
    read_record,
    write_record,
)
from declaim.engine.progress import Progress, ignore_progress

log = logging.getLogger(__name__)

RETRY_WAITS_S = (0.5, 1.0, 2.0, 4.0)  # after each connection in a row that brought nothing


class HubUnreachable(ModelNotFound):
    """The hub did not answer, or is not to be asked: a copy in the cache may still do."""


@dataclass(frozen=True, slots=True)
class HubFile:
    """One file of a repository. sha256 is known for large files (LFS), git_sha1 (of the git blob) for the others."""

    path: str
    size: int
    sha256: str | None
    git_sha1: str | None


@dataclass(frozen=True, slots=True)
class HubRepo:
    """A repository at one commit, and those of its files that are wanted."""

    repo_id: str
    commit: str
    files: tuple[HubFile, ...]

    @property
    def num_bytes(self) -> int:
        return sum(file.size for file in self.files)

    def only(self, paths: Collection[str]) -> HubRepo:
        """The same repository with fewer files wanted."""
        return replace(self, files=tuple(file for file in self.files if file.path in paths))


@dataclass(frozen=True, slots=True)
class CachedRepo:
    """A repository's newest snapshot in the cache. num_bytes: all its snapshots; record: None if never pulled."""

    repo_id: str
    folder: Path
    num_bytes: int
    record: Record | None

    @property
    def parts(self) -> tuple[str, ...]:
        """The repositories it was pulled with."""
        return self.record.parts if self.record is not None else ()


@dataclass(frozen=True, slots=True)
class Hub:
    """A hub (its endpoint) and a cache folder; by default those that HF_ENDPOINT, HF_HOME and HF_HUB_CACHE name."""

    endpoint: str = field(default_factory=lambda: _constants().ENDPOINT)
    cache: Path = field(default_factory=lambda: Path(_constants().HF_HUB_CACHE))

    # What the hub has.

    def list_files(self, repo_id: str) -> HubRepo:
        """Ask the hub for a repository's newest commit and all its files, with sizes and hashes.

        Raises: ModelNotFound (HubUnreachable where the hub did not answer).
        """
        from huggingface_hub import HfApi, constants

        with self._errors(repo_id):
            info = HfApi(endpoint=self.endpoint).model_info(
                repo_id, files_metadata=True, timeout=constants.HF_HUB_ETAG_TIMEOUT
            )
        files = tuple(
            HubFile(
                path=entry.rfilename,
                size=entry.size or 0,
                sha256=entry.lfs.sha256 if entry.lfs is not None else None,
                git_sha1=entry.blob_id if entry.lfs is None else None,
            )
            for entry in info.siblings or ()
        )
        repo = HubRepo(repo_id, info.sha or "", files)
        if not _is_safe(repo):
            raise ModelNotFound(f"what {self.endpoint} lists of {repo_id!r} is not a repository: check HF_ENDPOINT")
        return repo

    def fetch_small(self, repo: HubRepo) -> Path:
        """Fetch a repository's wanted files through huggingface_hub. Returns the snapshot's folder.

        The cache's `refs` still name the former commit, so what is not whole yet is never taken for a model.
        Raises: ModelNotFound, ModelLoadError.
        """
        return self._snapshot(repo, revision=repo.commit)

    # What the cache has.

    def cached_folder(self, repo_id: str, *, holding: Sequence[str] = ("config.json",)) -> Path | None:
        """The newest snapshot whose pull was finished, without asking the hub; None if there is none, or without one
        of the files `holding`."""
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        try:
            found = [try_to_load_from_cache(repo_id, name, cache_dir=self.cache) for name in holding]
        except HFValidationError:
            return None
        if not found or not all(isinstance(path, str) for path in found):
            return None
        return Path(str(found[0])).parents[holding[0].count("/")]

    def folder(self, repo: HubRepo) -> Path:
        """Where a repository's snapshot is, or would be."""
        return self._repo_path(repo) / "snapshots" / repo.commit

    def is_complete(self, repo: HubRepo) -> bool:
        """Whether the newest snapshot in the cache is this one, with every wanted file at its size."""
        folder = self.folder(repo)
        newest = self.cached_folder(repo.repo_id, holding=[file.path for file in repo.files])
        return newest == folder and all((folder / file.path).stat().st_size == file.size for file in repo.files)

    def missing(self, repo: HubRepo) -> list[HubFile]:
        """The wanted files that the cache lacks, or has at another size."""
        return [file for file in repo.files if self._find(repo, file) is None]

    def cached_repos(self) -> list[CachedRepo]:
        """Every model repository in the cache, by name."""
        from huggingface_hub import scan_cache_dir
        from huggingface_hub.errors import CacheNotFound

        try:
            repos = scan_cache_dir(self.cache).repos
        except CacheNotFound:
            return []
        found = []
        for repo in repos:
            if repo.repo_type != "model" or not repo.revisions:
                continue
            newest = max(repo.revisions, key=lambda revision: ("main" in revision.refs, revision.last_modified))
            record = read_record(newest.snapshot_path)
            found.append(CachedRepo(repo.repo_id, newest.snapshot_path, repo.size_on_disk, record))
        return sorted(found, key=lambda repo: repo.repo_id)

    def removable(self, repo_id: str) -> list[CachedRepo]:
        """A model's repository, and those pulled with it that no other pulled model uses. Raises: ModelNotFound."""
        repos = {repo.repo_id: repo for repo in self.cached_repos()}
        if repo_id not in repos:
            there = ", ".join(repos) or "it holds no models"
            raise ModelNotFound(f"{repo_id!r} is not in {self.cache} ({there}): `declaim models list` shows what is")
        used = {part for repo in repos.values() if repo.repo_id != repo_id for part in repo.parts}
        alone = [part for part in repos[repo_id].parts if part in repos and part not in used]
        return [repos[name] for name in (repo_id, *alone)]

    def remove(self, repos: Sequence[CachedRepo]) -> None:
        """Delete repositories from the cache, with all their snapshots and records."""
        from huggingface_hub import scan_cache_dir

        doomed = {repo.repo_id for repo in repos}
        info = scan_cache_dir(self.cache)
        commits = [
            revision.commit_hash
            for repo in info.repos
            if repo.repo_type == "model" and repo.repo_id in doomed
            for revision in repo.revisions
        ]
        info.delete_revisions(*commits).execute()

    # Fetching and checking.

    def pull(self, repos: Sequence[HubRepo], progress: Progress = ignore_progress) -> tuple[Path, ...]:
        """Bring every wanted file into the cache, check all of them, and record their SHA-256.

        What is there already is hashed first, and fetched again where it does not match. The first repository is the
        model's; the others are its parts. Returns the snapshots' folders.
        Raises: ModelNotFound, ModelLoadError (disk full, connection lost, a file that does not match its hash).
        """
        hashes = self._check_cached(repos, progress)
        wanted = [(repo, file) for repo in repos for file in self.missing(repo)]
        self._check_room(wanted)
        total = sum(file.size for _, file in wanted)
        done = 0
        for repo, file in wanted:
            if file.sha256 is not None:
                progress("download", done, total)
                self._download(repo, file, file.sha256, before=done, total=total, progress=progress)
                hashes[repo.repo_id, file.path] = file.sha256
                done += file.size
        folders = [self._snapshot(repo, revision=None) for repo in repos]
        if wanted:
            progress("download", total, total)
        for repo, folder in zip(repos, folders, strict=True):
            for file in repo.files:
                if (repo.repo_id, file.path) not in hashes:
                    hashes[repo.repo_id, file.path] = self._check_fetched(repo, file, folder / file.path)
        for repo, folder in zip(repos, folders, strict=True):
            others = tuple(other.repo_id for other in repos[1:]) if repo is repos[0] else ()
            files = {file.path: (file.size, hashes[repo.repo_id, file.path]) for file in repo.files}
            write_record(folder, Record(repo.repo_id, repo.commit, now(), others, files))
        return tuple(folders)

    def verify(self, repo: CachedRepo, progress: Progress = ignore_progress) -> Verdict:
        """Hash a pulled repository's files again and compare with its record."""
        if repo.record is not None:
            return check_record(repo.folder, repo.record, progress)
        unknown = (
            f"{repo.repo_id} was not pulled by declaim, so no SHA-256 is recorded: only the files' structure was"
            f" checked; `declaim models pull {repo.repo_id}` compares with the hub"
        )
        return replace(check_folder(repo.folder, progress), unknown=unknown)

    def _check_cached(self, repos: Sequence[HubRepo], progress: Progress) -> dict[tuple[str, str], str]:
        """Hash what the cache has; take out what does not match. Returns SHA-256 by (repo_id, path)."""
        found = []
        for repo in repos:
            for file in repo.files:
                path = self._find(repo, file)
                if path is not None:
                    found.append((repo, file, path))
                else:
                    _unlink_with_blob(self.folder(repo) / file.path)
        total = sum(file.size for _, file, _ in found)
        done = 0
        hashes = {}
        for repo, file, path in found:
            hashed = hash_file(path, progress, before=done, total=total, with_git=file.sha256 is None)
            done += file.size
            if hashed.matches(file.sha256, file.git_sha1):
                hashes[repo.repo_id, file.path] = hashed.sha256
            else:
                log.warning("event=bad_file path=%s: it does not match the hub's hash, and is fetched again", path)
                _unlink_with_blob(path)
        return hashes

    def _check_room(self, wanted: Sequence[tuple[HubRepo, HubFile]]) -> None:
        needed = 0
        for repo, file in wanted:
            part = self._part_path(repo, file.sha256) if file.sha256 is not None else None
            needed += file.size - (part.stat().st_size if part is not None and part.is_file() else 0)
        self.cache.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.cache).free
        if needed > free:
            raise ModelLoadError(_disk_full(self.cache, needed=needed, free=free))

    def _check_fetched(self, repo: HubRepo, file: HubFile, path: Path) -> str:
        hashed = hash_file(path, ignore_progress, before=0, total=file.size, with_git=True)
        if not hashed.matches(file.sha256, file.git_sha1):
            _unlink_with_blob(path)
            raise ModelLoadError(self._mismatch(repo, file))
        return hashed.sha256

    def _mismatch(self, repo: HubRepo, file: HubFile) -> str:
        return (
            f"{file.path} of {repo.repo_id} does not match the hash that {self.endpoint} lists, and was removed: run"
            " the same command again; if it happens again, that server has a damaged copy (HF_ENDPOINT names another)"
        )

    def _snapshot(self, repo: HubRepo, *, revision: str | None) -> Path:
        from huggingface_hub import snapshot_download

        with self._errors(repo.repo_id):
            folder = snapshot_download(
                repo.repo_id,
                revision=revision,
                allow_patterns=[glob.escape(file.path) for file in repo.files],
                cache_dir=self.cache,
                endpoint=self.endpoint,
                tqdm_class=_silent_bar(),
            )
        if Path(folder).name != repo.commit:
            raise ModelLoadError(f"{repo.repo_id} changed on the hub while it was fetched: run the same command again")
        return Path(folder)

    def _repo_path(self, repo: HubRepo) -> Path:
        return self.cache / f"models--{repo.repo_id.replace('/', '--')}"

    def _part_path(self, repo: HubRepo, sha256: str) -> Path:
        """Where a large file grows; huggingface_hub counts and prunes files of this name."""
        return self._repo_path(repo) / "blobs" / f"{sha256}.incomplete"

    def _find(self, repo: HubRepo, file: HubFile) -> Path | None:
        """The file's place in the cache, if it is there at its full size."""
        places = [self.folder(repo) / file.path]
        if file.sha256 is not None:
            places.append(self._repo_path(repo) / "blobs" / file.sha256)
        return next((path for path in places if path.is_file() and path.stat().st_size == file.size), None)

    def _download(
        self, repo: HubRepo, file: HubFile, sha256: str, *, before: int, total: int, progress: Progress
    ) -> None:
        """Bring a large file's blob into the cache, from where an earlier attempt broke off. Raises: ModelLoadError."""
        from filelock import FileLock

        blob = self._repo_path(repo) / "blobs" / sha256
        part = self._part_path(repo, sha256)
        lock = self.cache / ".locks" / self._repo_path(repo).name / f"{sha256}.lock"  # huggingface_hub's own
        for folder in (blob.parent, lock.parent):
            folder.mkdir(parents=True, exist_ok=True)
        with FileLock(lock):
            if blob.is_file() and blob.stat().st_size == file.size:
                return  # another process was waited for, and brought it
            digest, have = _hash_part(part, at_most=file.size)
            try:
                with part.open("ab", buffering=0) as out:
                    for chunk in self._stream(repo, file, have):
                        out.write(chunk)
                        digest.update(chunk)
                        have += len(chunk)
                        progress("download", before + have, total)
            except OSError as error:
                raise self._write_error(error, part, needed=total - before - have) from error
            if digest.hexdigest() != sha256:
                part.unlink()
                raise ModelLoadError(self._mismatch(repo, file))
            part.replace(blob)

    def _stream(self, repo: HubRepo, file: HubFile, start: int) -> Iterator[bytes]:
        """The file's bytes from `start`, over as many connections as it takes. Raises: ModelLoadError."""
        have = start
        num_idle = 0
        while have < file.size:
            reason = "the connection closed early"
            before = have
            try:
                for chunk in self._stream_once(repo, file, have):
                    have += len(chunk)
                    yield chunk
            except _transport_error() as error:
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            if have >= file.size:
                return
            num_idle = 0 if have > before else num_idle + 1
            if num_idle > len(RETRY_WAITS_S):
                raise ModelLoadError(
                    f"fetching {file.path} of {repo.repo_id} from {self.endpoint} broke off at {have} of {file.size}"
                    f" bytes ({reason}): run the same command again, it goes on from there"
                )
            log.warning("event=download_resumed file=%s at=%d of=%d reason=%r", file.path, have, file.size, reason)
            time.sleep(RETRY_WAITS_S[max(num_idle - 1, 0)])

    def _stream_once(self, repo: HubRepo, file: HubFile, start: int) -> Iterator[bytes]:
        """One connection's bytes, beginning at `start` whatever the server sends."""
        from huggingface_hub import constants, get_session, get_token, hf_hub_url

        url = hf_hub_url(repo.repo_id, file.path, revision=repo.commit, endpoint=self.endpoint)
        headers = {"accept-encoding": "identity"}
        token = None if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN else get_token()
        if token is not None:
            headers["authorization"] = f"Bearer {token}"
        if start:
            headers["range"] = f"bytes={start}-"
        timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
        with get_session().stream("GET", url, headers=headers, follow_redirects=True, timeout=timeout) as response:
            if response.status_code in (401, 403):
                raise ModelNotFound(_gated(repo.repo_id, self.endpoint))
            response.raise_for_status()
            skip = start if response.status_code == 200 else 0  # a server without ranges sends all of it
            left = file.size - start
            for chunk in response.iter_bytes():
                fresh = chunk[skip:][:left]
                skip = max(0, skip - len(chunk))
                left -= len(fresh)
                if fresh:
                    yield fresh

    @contextlib.contextmanager
    def _errors(self, repo_id: str) -> Iterator[None]:
        """Turn huggingface_hub's errors into one line each."""
        from huggingface_hub.errors import (
            GatedRepoError,
            HfHubHTTPError,
            HFValidationError,
            LocalEntryNotFoundError,
            OfflineModeIsEnabled,
            RepositoryNotFoundError,
        )

        remedy = "check the name and the network, or name a folder that holds the model"
        try:
            yield
        except HFValidationError as error:
            raise ModelNotFound(f"no folder {repo_id!r} here, and it is not a hub id: {remedy}") from error
        except GatedRepoError as error:
            raise ModelNotFound(_gated(repo_id, self.endpoint)) from error
        except RepositoryNotFoundError as error:
            raise ModelNotFound(
                f"no folder {repo_id!r} here, and {self.endpoint} has no such repository, or a private one: check the"
                " name, or set HF_TOKEN"
            ) from error
        except (OfflineModeIsEnabled, LocalEntryNotFoundError, HfHubHTTPError, _transport_error()) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise HubUnreachable(
                f"no folder {repo_id!r} here, and {self.endpoint} did not give it ({reason}): {remedy}; HF_ENDPOINT"
                " names another hub"
            ) from error
        except OSError as error:
            raise self._write_error(error, self.cache, needed=None) from error

    def _write_error(self, error: OSError, path: Path, *, needed: int | None) -> ModelLoadError:
        """What to say of a failure to write below the cache, where `needed` more bytes were to go."""
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            return ModelLoadError(f"{path} cannot be written ({error.strerror or error}): check it, and run again")
        return ModelLoadError(_disk_full(self.cache, needed=needed, free=shutil.disk_usage(self.cache).free))


def _hash_part(part: Path, *, at_most: int) -> tuple[hashlib._Hash, int]:
    """The SHA-256 so far of a file that is being fetched, and its length. One longer than `at_most` is deleted."""
    digest = hashlib.sha256()
    if not part.is_file():
        return digest, 0
    if part.stat().st_size > at_most:
        part.unlink()
        return digest, 0
    with part.open("rb") as earlier:
        while chunk := earlier.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest, part.stat().st_size


def _is_safe(repo: HubRepo) -> bool:
    """Whether names that become paths in the cache are what a hub gives: a mirror may send anything."""
    paths = (PurePosixPath(file.path) for file in repo.files)
    hashes = (file.sha256 for file in repo.files if file.sha256 is not None)
    return (
        re.fullmatch(r"[0-9a-f]{40}", repo.commit) is not None
        and all(re.fullmatch(r"[0-9a-f]{64}", sha256) for sha256 in hashes)
        and not any(path.is_absolute() or ".." in path.parts for path in paths)
    )


def _unlink_with_blob(path: Path) -> None:
    """Delete a snapshot's file and the blob it points to."""
    if path.is_symlink():
        (path.parent / path.readlink()).unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def _disk_full(folder: Path, *, needed: int | None, free: int) -> str:
    amount = "more bytes are" if needed is None else f"{needed} more bytes are"
    return (
        f"the disk is full: {amount} needed in {folder}, and {free} are free there: make room, or set HF_HUB_CACHE to a"
        " folder on another disk; running the same command again goes on from here"
    )


def _gated(repo_id: str, endpoint: str) -> str:
    return f"{repo_id} is gated: accept its terms at {endpoint}/{repo_id} and set HF_TOKEN to a token of that account"


def _constants() -> Any:
    from huggingface_hub import constants

    return constants


def _transport_error() -> type[Exception]:
    """The base of what a connection raises: of httpx under huggingface_hub 1, of httpx2 under 2."""
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    error: type[Exception] = HTTPError
    return error


def _silent_bar() -> Any:
    """A bar that shows nothing: this package reports its own progress."""
    from tqdm.auto import tqdm

    class SilentBar(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **options: Any) -> None:
            options.pop("name", None)
            super().__init__(*args, **(options | {"disable": True}))

    return SilentBar
