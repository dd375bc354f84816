"""Keep freed memory: on a CPU, page faults on memory that was just given back take a third of a training step."""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4  # mallopt(3)


def keep_freed_memory() -> None:
    """Tell glibc never to use mmap and never to shrink its heap; elsewhere, nothing."""
    if sys.platform.startswith("linux"):
        libc = ctypes.CDLL(None)
        if hasattr(libc, "gnu_get_libc_version"):
            libc.mallopt(_MMAP_MAX, 0)
            libc.mallopt(_TRIM_THRESHOLD, 2**31 - 1)
            libc.mallopt(_TOP_PAD, 2**28)
