"""Training that gives way: while a file exists, it sleeps.

On a machine that others share, `touch` the file that TRAIN_VOICE_PAUSE names to have the cores for a while.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

_VARIABLE = "TRAIN_VOICE_PAUSE"


def wait_while_paused() -> None:
    """Returns at once unless the environment names a file that exists."""
    name = os.environ.get(_VARIABLE)
    while name and Path(name).exists():
        time.sleep(1.0)
