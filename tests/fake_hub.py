"""A hub on this machine: as much of Hugging Face's HTTP API as huggingface_hub asks for, and faults on demand."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

LARGE_SUFFIXES = (".safetensors", ".pth")  # kept by LFS on the real hub, and so listed by their SHA-256


@dataclass
class FakeRepo:
    """One repository of the hub, at one commit: its files by path."""

    files: dict[str, bytes]

    @classmethod
    def of_folder(cls, folder: Path, **changed: bytes | None) -> FakeRepo:
        """A folder's files. changed: files to replace by other contents, or (None) to leave out."""
        files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        files |= {name: content for name, content in changed.items() if content is not None}
        return cls({name: content for name, content in files.items() if changed.get(name, b"") is not None})

    @property
    def commit(self) -> str:
        digest = hashlib.sha1()
        for name, content in sorted(self.files.items()):
            digest.update(name.encode() + b"\0" + content)
        return digest.hexdigest()

    def entry(self, path: str) -> dict[str, Any]:
        content = self.files[path]
        git_sha1 = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        entry = {"size": len(content), "git_sha1": git_sha1}
        if path.endswith(LARGE_SUFFIXES):
            entry["sha256"] = hashlib.sha256(content).hexdigest()
        return entry


@dataclass
class FakeHub:
    """What the server serves, what it does wrong, and what it was asked.

    drops: how many bytes a connection sends of a path before it dies, first connection first. damaged: paths sent
    with a wrong byte. gated: repositories that need a token. with_ranges: whether Range is honoured. stall: if set,
    large files are sent only up to half until the event is set.
    """

    repos: dict[str, FakeRepo]
    url: str = ""
    drops: dict[str, list[int]] = field(default_factory=dict)
    damaged: set[str] = field(default_factory=set)
    gated: set[str] = field(default_factory=set)
    with_ranges: bool = True
    stall: threading.Event | None = None
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)  # method, path, Range

    def downloads(self, suffix: str = "") -> list[tuple[str, str | None]]:
        """Each GET of a file: its path in the repository, and the range asked for."""
        found = []
        for method, path, wanted in self.requests:
            match = re.search(r"/resolve/[^/]+/(.*)", path)
            if method == "GET" and match is not None and match[1].endswith(suffix):
                found.append((match[1], wanted))
        return found


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub  # set by a subclass for each server

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def _answer(self, *, with_body: bool) -> None:
        self.hub.requests.append((self.command, self.path, self.headers.get("range")))
        path = self.path.split("?")[0]
        for name, repo in self.hub.repos.items():
            if name in self.hub.gated and name in path and "authorization" not in self.headers:
                return self._send(403, b"{}", {"X-Error-Code": "GatedRepo"})
            if re.fullmatch(rf"/api/models/{name}(/revision/[^/]+)?", path):
                return self._send_json(self._info(name, repo))
            if re.fullmatch(rf"/api/models/{name}/tree/[^/]+", path):
                return self._send_json(self._tree(repo))
            match = re.fullmatch(rf"/{name}/resolve/(main|{repo.commit})/(.+)", path)
            if match is not None and match[2] in repo.files:
                return self._send_file(repo, match[2], with_body=with_body)
            if match is not None:
                return self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": repo.commit})
        self._send(401, b"{}", {"X-Error-Code": "RepoNotFound"})

    def _info(self, name: str, repo: FakeRepo) -> dict[str, Any]:
        siblings = []
        for path in repo.files:
            entry = repo.entry(path)
            sibling = {"rfilename": path, "size": entry["size"], "blobId": entry["git_sha1"]}
            if "sha256" in entry:
                sibling["lfs"] = {"sha256": entry["sha256"], "size": entry["size"], "pointerSize": 130}
            siblings.append(sibling)
        return {"id": name, "modelId": name, "sha": repo.commit, "private": False, "tags": [], "siblings": siblings}

    def _tree(self, repo: FakeRepo) -> list[dict[str, Any]]:
        tree = []
        for path in repo.files:
            entry = repo.entry(path)
            node = {"type": "file", "path": path, "size": entry["size"], "oid": entry["git_sha1"]}
            if "sha256" in entry:
                node["lfs"] = {"oid": entry["sha256"], "size": entry["size"], "pointerSize": 130}
            tree.append(node)
        return tree

    def _send_file(self, repo: FakeRepo, path: str, *, with_body: bool) -> None:
        content = repo.files[path]
        entry = repo.entry(path)
        if path in self.hub.damaged:
            content = content[:-1] + bytes([content[-1] ^ 1])
        etag = entry.get("sha256", entry["git_sha1"])
        headers = {
            "ETag": f'"{etag}"',
            "X-Linked-Etag": f'"{etag}"',
            "X-Linked-Size": str(len(content)),
            "X-Repo-Commit": repo.commit,
            "Accept-Ranges": "bytes",
        }
        match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("range") or "")
        status, start = 200, 0
        if match is not None and self.hub.with_ranges:
            status, start = 206, int(match[1])
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        body = content[start:]
        drops = self.hub.drops.get(path, [])
        num_sent = drops.pop(0) if drops and with_body else len(body)
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if not with_body:
            return
        if self.hub.stall is not None and path.endswith(LARGE_SUFFIXES):
            half = len(body) // 2
            self.wfile.write(body[:half])
            self.wfile.flush()
            self.hub.stall.wait(20)
            body = body[half:]
        try:
            self.wfile.write(body[:num_sent])
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        if num_sent < len(body):
            self.close_connection = True

    def _send_json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@contextmanager
def serve_hub(repos: dict[str, FakeRepo]) -> Iterator[FakeHub]:
    """A hub that listens on this machine until the block ends."""
    hub = FakeHub(repos)

    class Handler(_Handler):
        pass

    Handler.hub = hub
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        if hub.stall is not None:
            hub.stall.set()
        server.shutdown()
        thread.join()
        server.server_close()
