"""How long work says how far it is: `progress(stage, done, total)`."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called with a stage's name, what is done of it and what there is to do, in bytes or in pieces.

The stages: download, verify, read and quantize (bytes), capture (graphs). Called from the thread that works, often:
it must be cheap and must not raise.
"""


def ignore_progress(stage: str, done: int, total: int) -> None:
    """For callers who do not watch."""
