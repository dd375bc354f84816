"""Bands on Slaney's mel scale: linear to 1 kHz (15 mel), logarithmic above (27 mel a factor of 6.4).

Source: M. Slaney, Auditory Toolbox, 1998.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray


def slaney_edges_hz(num_mels: int, *, fmin: float, fmax: float) -> NDArray[np.float64]:
    """float64 [num_mels + 2]: band k rises from edge k to its centre, edge k + 1, and falls to edge k + 2."""
    linear_hz, break_hz, break_mel, log_step = 200.0 / 3.0, 1000.0, 15.0, math.log(6.4) / 27.0

    def to_mel(hz: float) -> float:
        return hz / linear_hz if hz < break_hz else break_mel + math.log(hz / break_hz) / log_step

    mels = np.linspace(to_mel(fmin), to_mel(fmax), num_mels + 2)
    above = break_hz * np.exp(log_step * np.maximum(mels - break_mel, 0.0))
    edges: NDArray[np.float64] = np.where(mels < break_mel, mels * linear_hz, above)
    return edges


def slaney_mel_filters(sample_rate_hz: int, n_fft: int, *, num_mels: int, fmin: float, fmax: float) -> torch.Tensor:
    """Triangular filters, each of unit area: float32 [n_fft / 2 + 1, num_mels]."""
    edges_hz = slaney_edges_hz(num_mels, fmin=fmin, fmax=fmax)
    bins_hz = np.arange(n_fft // 2 + 1) * (sample_rate_hz / n_fft)
    low, centre, high = edges_hz[:-2], edges_hz[1:-1], edges_hz[2:]
    rising = (bins_hz[:, None] - low) / (centre - low)
    falling = (high - bins_hz[:, None]) / (high - centre)
    filters = np.maximum(0.0, np.minimum(rising, falling)) * (2.0 / (high - low))
    return torch.from_numpy(filters.astype(np.float32))
