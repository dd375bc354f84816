"""Answers kept on disk, to be given again for the same model, voice, text, parameters and seed.

Owns a folder, bounded by size: what was not asked for longest goes first. A file's name is the hash of everything that
decides the answer, the tenant included, so no tenant ever reads another's. Every file carries a checksum that is
compared before it is used. A disk that fails costs a request nothing but the cache. Synchronous: call it from a worker
thread.

A request without a seed asks for any take, so an earlier take is an answer to it. The model is known by its name and by
its files: other weights in the same folder are another model.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import threading
import time
import uuid
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

from declaim.engine.request import EncodedVoice, FinishReason, SpeechRequest, Voice, Word
from declaim.engine.spec import ModelSpec

logger = logging.getLogger(__name__)

_SUFFIX = ".speech"
_CHECKSUM_BYTES = 32
# A file still without its name after so long was left by a crash.
_UNFINISHED_S = 3600


@dataclass(frozen=True, slots=True)
class StoredSpeech:
    """A whole answer. data: the encoded audio; audio_s: how long it is heard."""

    data: bytes
    words: tuple[Word, ...]
    num_frames: int
    audio_s: float
    finish_reason: FinishReason


def cache_key(request: SpeechRequest, *, model_name: str, fingerprint: str, spec: ModelSpec, rendering: object) -> str:
    """The name of an answer: 64 hex digits. fingerprint: of the model's files. rendering: whatever decides its bytes
    beyond the request; has a repr."""
    sampling = dataclasses.asdict(request.sampling)
    parts = {
        "tenant": request.tenant,
        "model": model_name,
        "fingerprint": fingerprint,
        "spec": repr(spec),
        "text": request.text,
        "voice": _voice_identity(request.voice),
        "sampling": sampling,
        "speed": request.speed,
        "language": request.language,
        "normalize": request.normalize,
        "lexicon": dict(request.lexicon),
        "controls": dict(request.controls),
        "word_timestamps": request.word_timestamps,
        "rendering": repr(rendering),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _voice_identity(voice: Voice | EncodedVoice | str | None) -> str | None:
    """A voice by its content, so that a name given to another recording is another voice."""
    if voice is None or isinstance(voice, str):
        return None if voice is None else f"name {voice}"
    digest = hashlib.sha256(voice.transcript.encode("utf-8", "surrogatepass"))
    arrays = (voice.audio,) if isinstance(voice, Voice) else (voice.codes, voice.embedding)
    for array in arrays:
        if array is not None:
            digest.update(f"{array.shape} {array.dtype}".encode() + array.tobytes())
    return f"content {digest.hexdigest()}"


class ResultCache:
    """The folder. Any number of threads may use one, and processes may share it: each bounds what it knows of."""

    def __init__(self, folder: Path, *, max_bytes: int) -> None:
        """Makes the folder and lists what is in it. Raises: OSError where it cannot be made or read."""
        self._folder = folder
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._sizes: OrderedDict[str, int] = OrderedDict()  # the least recently used first
        self._num_bytes = 0
        folder.mkdir(parents=True, exist_ok=True)
        self._list()

    @property
    def num_bytes(self) -> int:
        """What the answers take on disk."""
        return self._num_bytes

    def read(self, key: str) -> StoredSpeech | None:
        """An answer, None where there is none or where its file was damaged: that one is deleted."""
        path = self._path(key)
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            self._drop(key)
            return None
        except OSError as error:
            logger.warning("event=cache_read_failed error=%r", str(error))
            return None
        stored = _unpack(content)
        if stored is None:
            logger.warning("event=cache_damaged file=%s", path.name)
            self._drop(key)
            self._unlink(path)
            return None
        self._touch(key, len(content))
        return stored

    def write(self, key: str, stored: StoredSpeech) -> None:
        """Keep an answer, and let older ones go. Never raises for what the disk does."""
        content = _pack(stored)
        if len(content) > self._max_bytes:
            return
        path = self._path(key)
        unfinished = path.with_name(f"{key}.{uuid.uuid4().hex}")
        try:
            self._make_room(len(content))
            path.parent.mkdir(exist_ok=True)
            unfinished.write_bytes(content)
            os.replace(unfinished, path)
        except OSError as error:
            logger.warning("event=cache_write_failed error=%r", str(error))
            self._unlink(unfinished)
            return
        self._touch(key, len(content))

    def _path(self, key: str) -> Path:
        return self._folder / key[:2] / (key + _SUFFIX)

    def _list(self) -> None:
        found = []
        for path in self._folder.glob("??/*"):
            try:
                status = path.stat()
            except FileNotFoundError:
                continue  # another process let it go
            if path.suffix == _SUFFIX:
                found.append((status.st_mtime, path.stem, status.st_size))
            elif status.st_mtime < time.time() - _UNFINISHED_S:
                self._unlink(path)
        for _, key, size in sorted(found):
            self._touch(key, size, on_disk=False)
        self._make_room(0)

    def _touch(self, key: str, size: int, *, on_disk: bool = True) -> None:
        """Count an answer as the one used last; a restart learns it from the file's time."""
        with self._lock:
            self._num_bytes += size - self._sizes.pop(key, 0)
            self._sizes[key] = size
        if on_disk:
            try:
                os.utime(self._path(key))
            except OSError:
                return  # its turn to go comes earlier after a restart, no more

    def _drop(self, key: str) -> None:
        with self._lock:
            self._num_bytes -= self._sizes.pop(key, 0)

    def _make_room(self, size: int) -> None:
        while True:
            with self._lock:
                if not self._sizes or self._num_bytes + size <= self._max_bytes:
                    return
                key, old = self._sizes.popitem(last=False)
                self._num_bytes -= old
            self._unlink(self._path(key))

    @staticmethod
    def _unlink(path: Path) -> None:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            logger.warning("event=cache_delete_failed error=%r", str(error))


def _pack(stored: StoredSpeech) -> bytes:
    """A checksum, one line of JSON, the audio."""
    about = {
        "words": [[word.text, word.start_s, word.end_s] for word in stored.words],
        "num_frames": stored.num_frames,
        "audio_s": stored.audio_s,
        "finish_reason": stored.finish_reason,
    }
    body = json.dumps(about).encode() + b"\n" + stored.data
    return hashlib.sha256(body).digest() + body


def _unpack(content: bytes) -> StoredSpeech | None:
    """What `_pack` made, None for anything else."""
    body = content[_CHECKSUM_BYTES:]
    if hashlib.sha256(body).digest() != content[:_CHECKSUM_BYTES]:
        return None
    line, _, data = body.partition(b"\n")
    about = json.loads(line)
    return StoredSpeech(
        data=data,
        words=tuple(Word(text, start_s, end_s) for text, start_s, end_s in about["words"]),
        num_frames=about["num_frames"],
        audio_s=about["audio_s"],
        finish_reason=about["finish_reason"],
    )
