"""What of a process's memory is alive. Metrics of the C heap and of Python's, for whoever asks whether anything leaks.

The system's figure (`process_resident_memory_bytes`) rises without a leak: with each page of the KV cache that is
written for the first time, and with freed memory that malloc keeps. These two do not.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector


class _Mallinfo2(ctypes.Structure):
    """glibc's `struct mallinfo2` (malloc.h, since 2.33)."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        )
    ]


class HeapCollector(Collector):
    """Asks malloc and Python at each scrape; where malloc is not glibc's, only Python."""

    def __init__(self) -> None:
        self._mallinfo2 = getattr(ctypes.CDLL(None), "mallinfo2", None)
        if self._mallinfo2 is not None:
            self._mallinfo2.restype = _Mallinfo2

    def collect(self) -> Iterator[Metric]:
        if self._mallinfo2 is not None:
            told = self._mallinfo2()
            yield GaugeMetricFamily(
                "declaim_heap_used_bytes", "What malloc has handed out", told.uordblks + told.hblkhd
            )
            yield GaugeMetricFamily("declaim_heap_free_bytes", "What malloc keeps for later", told.fordblks)
        yield GaugeMetricFamily("declaim_python_blocks", "Blocks of Python's own heap in use", sys.getallocatedblocks())
