"""The engine of the processes that test_workers.py starts: it counts its streams and does what a text asks for."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from dataclasses import dataclass, replace

from declaim.engine import AudioChunk, EngineStats, SpeechRequest, errors
from tests.api.fake_engine import FakeEngine, Script

_FAILURES: dict[str, type[Exception]] = {**vars(errors), "ZeroDivisionError": ZeroDivisionError}


def make_script(text: str) -> Script:
    """From the JSON on a command line."""
    return replace(Script(), **json.loads(text))


@dataclass(slots=True)
class CountingEngine(FakeEngine):
    """A text "fail: OutOfMemory" raises that error, "long: 400 0.05" is 400 chunks, 0.05 s apart.

    stats().streams counts the streams that are open.
    """

    num_open: int = 0

    async def astream(self, request: SpeechRequest) -> AsyncGenerator[AudioChunk, None]:
        self.num_open += 1
        try:
            if request.text.startswith("fail: "):
                raise _FAILURES[request.text.removeprefix("fail: ")]("too bad: do better")
            asked = self
            if request.text.startswith("long: "):
                num_chunks, delay_s = request.text.split()[1:]
                asked = replace(self, script=Script(num_chunks=int(num_chunks), delay_s=float(delay_s)))
            async for chunk in FakeEngine.astream(asked, request):
                yield chunk
        finally:
            self.num_open -= 1

    def stats(self) -> EngineStats:
        return replace(FakeEngine.stats(self), streams=self.num_open)
