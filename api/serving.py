"""What a server serves: one engine, and how far it has come.

Owns the thread that loads and warms up the engine while the server already listens, and the engine's end.
Never touches a request.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from typing import Literal, Protocol

from declaim.api.errors import NotReady
from declaim.engine import AudioChunk, DeclaimError, EngineStats, SpeechRequest
from declaim.engine.request import EncodedVoice, Voice
from declaim.engine.spec import ModelSpec

logger = logging.getLogger(__name__)

Stage = Literal["starting", "loading", "warming_up", "ready", "draining", "failed", "closed"]
_JOIN_S = 5.0


class SpeechEngine(Protocol):
    """The part of declaim.engine.Engine that the api layer uses; tests bring a fake."""

    @property
    def model_name(self) -> str: ...

    @property
    def fingerprint(self) -> str:
        """What tells its files from those of another model of the same name."""
        ...

    @property
    def spec(self) -> ModelSpec: ...

    def stream(self, request: SpeechRequest) -> Iterator[AudioChunk]: ...

    def astream(self, request: SpeechRequest) -> AsyncGenerator[AudioChunk, None]:
        """Chunks of one request; closing the generator cancels the request."""
        ...

    def encode_voice(self, voice: Voice) -> EncodedVoice:
        """Encode reference audio, once for the same audio; takes CPU time. Raises: InvalidRequest."""
        ...

    def warm_up(self) -> None: ...

    def stats(self) -> EngineStats: ...

    def close(self) -> None: ...


class Serving:
    """Loads one engine in a thread of its own and hands it out once a real request has gone through it.

    load: makes the engine; called once, in the thread. on_failure: called in that thread when loading failed,
    after `stage` and `failure` were set.
    """

    def __init__(self, load: Callable[[], SpeechEngine], *, on_failure: Callable[[], None] | None = None) -> None:
        self._load = load
        self._on_failure = on_failure
        self._lock = threading.Lock()
        self._engine: SpeechEngine | None = None
        self._stage: Stage = "starting"
        self._failure: str | None = None
        self._work: tuple[str, int, int] | None = None  # the loading stage last reported, done, total
        # A daemon: a server told to stop must not wait for a checkpoint to be read or fetched.
        self._thread = threading.Thread(target=self._run, name="declaim-load", daemon=True)

    @property
    def stage(self) -> Stage:
        return self._stage

    @property
    def failure(self) -> str | None:
        """Why the engine could not be loaded; set exactly when `stage` is "failed"."""
        return self._failure

    def report(self, stage: str, done: int, total: int) -> None:
        """A `Progress` for whoever loads: what /ready tells until the engine is ready. Any thread."""
        if self._work is None or self._work[0] != stage:
            logger.info("event=stage stage=%s total=%d", stage, total)
        self._work = (stage, done, total)

    def progress(self) -> tuple[str, int]:
        """What is being done, and how many percent of it are: the work last reported, else `stage` itself."""
        if self._stage not in ("loading", "warming_up") or self._work is None:
            return self._stage, 100 if self._stage in ("ready", "draining") else 0
        work, done, total = self._work
        return work, 100 * done // total if total > 0 else 0

    def start(self) -> None:
        """Begin to load; returns at once."""
        self._thread.start()

    def engine(self) -> SpeechEngine:
        """The engine, for new work. Raises: NotReady before it is warm, after it failed, while draining and closed."""
        engine = self._engine
        if self._stage == "draining":
            raise NotReady("The server is stopping and takes no new work: try again, another one will answer")
        if self._stage != "ready" or engine is None:
            raise NotReady(f"The model is not ready ({self._stage}): try again when GET /ready answers 200")
        return engine

    def engine_for_accepted(self) -> SpeechEngine:
        """The engine, for what was accepted while it was ready: draining, it still serves that. Raises: NotReady."""
        return self.warm_engine or self.engine()

    @property
    def warm_engine(self) -> SpeechEngine | None:
        """The engine while it works, for new requests or only for those that run."""
        return self._engine if self._stage in ("ready", "draining") else None

    def drain(self) -> None:
        """Refuse new work from now on; what runs goes on. Any thread, a signal handler too."""
        if self._stage == "ready":
            self._stage = "draining"

    def close(self) -> None:
        """Close the engine, loaded or still loading; blocks, idempotent."""
        with self._lock:
            if self._stage != "failed":
                self._stage = "closed"
            engine, self._engine = self._engine, None
        if engine is not None:
            engine.close()
        if self._thread.is_alive():
            self._thread.join(_JOIN_S)

    def _run(self) -> None:
        began = time.perf_counter()
        try:
            self._advance("loading")
            engine = self._load()
            if not self._adopt(engine):
                engine.close()
                return
            engine.warm_up()
            if self._advance("ready"):
                load_s = time.perf_counter() - began
                logger.info("event=ready model=%s load_s=%.1f", engine.model_name, load_s)
        except DeclaimError as error:
            self._fail(str(error))
        finally:
            # Whatever else ended the thread prints its own traceback; the server must still learn of it.
            if self._stage in ("loading", "warming_up"):
                self._fail("the model could not be loaded; the traceback in the log has the cause")

    def _adopt(self, engine: SpeechEngine) -> bool:
        with self._lock:
            if self._stage == "closed":
                return False
            self._engine = engine
            self._stage = "warming_up"
            self._work = None
            return True

    def _advance(self, stage: Stage) -> bool:
        with self._lock:
            if self._stage == "closed":
                return False
            self._stage = stage
            return True

    def _fail(self, message: str) -> None:
        with self._lock:
            if self._stage == "closed":
                return
            self._stage, self._failure = "failed", message
        logger.error("event=load_failed error=%r", message)
        if self._on_failure is not None:
            self._on_failure()
