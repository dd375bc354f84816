"""Speech from a source and two filters: pulses at the pitch through one envelope, noise through the other.

A row every `hop` samples holds the log-magnitudes of both envelopes in mel bands, a pitch and whether there is any.
What a listener hears of phase follows from these: the pulses' filter has minimum phase, which is linear in its
log-magnitudes (Oppenheim and Schafer, Discrete-Time Signal Processing, section 13.4: the cepstrum folded onto its
causal half), and the noise has random phases of constant magnitude. So a network need not learn phases, and cannot get
them wrong. Warping the envelopes' frequency axis and scaling the pitch gives other voices.

The noise has a shorter window than the pulses: harmonics must be told apart, bursts must not be smeared. The pulses'
phase is a sum over time. It begins anew wherever a voiced stretch begins, so that a window needs no more of the past
than the stretch that it begins in. Owns the arithmetic; differentiable in the envelopes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from declaim.engine.codec.mel import slaney_edges_hz

# Phases for the noise, drawn once: any row of noise is a stretch of it.
_NUM_PHASES = 1 << 16
_PHASE_SEED = 1
_TOP_HARMONIC_HZ = 11_000.0
# Below, what is not heard would still pull at the phases of what is.
_PHASE_FLOOR = -6.0
_NEAR_PULSE = 2e-3
_LOW_HZ, _HIGH_HZ = 30.0, 1000.0  # what a pitch may be
_SMOOTH_BANDS = 15  # what a band is contrasted with: the mean of so many around it


@dataclass(frozen=True, slots=True)
class Timbre:
    """A voice as factors on the one that a network speaks: of its pitch, its frequency axis, and its level."""

    name: str
    pitch: float = 1.0
    warp: float = 1.0
    gain: float = 1.0


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """What is said, a row each hop.

    harmonic, noise: natural log-magnitudes in mel bands, [B, N, bands]; of a sinusoid's STFT divided by n_fft / 4, and
    of the noise's STFT. noise_keys: int64 [B, N], any numbers; equal keys give equal noise. These are of the N rows
    that are to be heard alone; pitch_hz, float64 [B, R], and voiced, bool [B, R], of all R rows that are known.
    """

    harmonic: torch.Tensor
    noise: torch.Tensor
    noise_keys: torch.Tensor
    pitch_hz: torch.Tensor
    voiced: torch.Tensor


@dataclass(frozen=True, slots=True, eq=False)
class _Filter:
    """From bands to bins, of one timbre. magnitude, phase: [bands, bins]."""

    magnitude: torch.Tensor
    phase: torch.Tensor


class SourceFilter:
    """Makes samples of rows.

    n_fft, noise_n_fft: windows of pulses and of noise, multiples of hop and no shorter than two. Who learns to come
    near on average says less of formants than there is, and less of a noise that comes and goes. contrast: how much
    what the envelopes do from band to band is stretched (the global variance of Toda and Tokuda, 2007, as one factor);
    unvoiced_gain: what is added to the noise's log-magnitudes where nothing is voiced.
    """

    def __init__(
        self,
        *,
        sample_rate_hz: int,
        n_fft: int,
        noise_n_fft: int,
        hop: int,
        num_bands: int,
        timbres: Sequence[Timbre],
        contrast: float,
        unvoiced_gain: float,
        log_magnitude_clip: float,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._rate, self._n_fft, self._hop, self._clip = sample_rate_hz, n_fft, hop, log_magnitude_clip
        self._timbres, self._unvoiced_gain = tuple(timbres), unvoiced_gain
        stretch = _stretch(num_bands, contrast)
        self._window, self._noise_window = (
            torch.hann_window(length, dtype=torch.float64).to(device, dtype) for length in (n_fft, noise_n_fft)
        )
        self._filters, self._noise_filters = (
            tuple(
                _filter(sample_rate_hz, length, stretch, warp=timbre.warp, device=device, dtype=dtype)
                for timbre in self._timbres
            )
            for length in (n_fft, noise_n_fft)
        )
        draw = torch.Generator().manual_seed(_PHASE_SEED)
        phases = 2 * math.pi * torch.rand(_NUM_PHASES, generator=draw, dtype=torch.float64)
        self._phasors = torch.polar(torch.ones_like(phases), phases).to(device, dtype.to_complex())

    def __call__(self, rows: Rows, *, first: int = 0, timbre: int = 0) -> torch.Tensor:
        """The samples of rows `first` .. `first + N` of those that are known, [B, N * hop].

        Each end of the stretch is taken for the end of all there is; samples more than n_fft / hop rows from it do not
        know the difference.
        """
        voice, filter_ = self._timbres[timbre], self._filters[timbre]
        last = first + rows.harmonic.shape[1]
        pulses = self._pulses(rows.pitch_hz * voice.pitch, rows.voiced, first=first, last=last)
        magnitude = (rows.harmonic @ filter_.magnitude).clamp(max=self._clip).exp()
        phase = rows.harmonic.clamp(min=_PHASE_FLOOR) @ filter_.phase
        response = torch.complex(magnitude * phase.cos(), magnitude * phase.sin())
        spectrum = self._spectrum(pulses.to(magnitude.dtype)) * response
        # A shorter window holds as much less of the same noise.
        share = len(self._noise_window) / self._n_fft
        noise = rows.noise + self._unvoiced_gain * ~rows.voiced[:, first:last, None]
        noise_magnitude = share * (noise @ self._noise_filters[timbre].magnitude).clamp(max=self._clip).exp()
        noise_spectrum = self._noise_phasors(rows.noise_keys, bins=noise_magnitude.shape[2]) * noise_magnitude
        return voice.gain * (self._samples(spectrum, self._window) + self._samples(noise_spectrum, self._noise_window))

    def _pulses(self, pitch_hz: torch.Tensor, voiced: torch.Tensor, *, first: int, last: int) -> torch.Tensor:
        """Every harmonic of the pitch with the same amplitude, zero where nothing is voiced: rows first .. last of
        those known, float32 [B, (last - first) * hop].

        The sum of H cosines in closed form; its phase in float64, since a hundredth of a period of the highest harmonic
        is a tenthousandth of the lowest's. Between two rows the pitch lies on a line, so that what a row adds to the
        phase has a closed form too, and only the samples wanted are computed one by one.
        """
        hop, dtype, device = self._hop, pitch_hz.dtype, pitch_hz.device
        pitch_hz = pitch_hz.clamp(_LOW_HZ, _HIGH_HZ)
        slope = (_next(pitch_hz) - pitch_hz) / hop
        # Periods, times the rate: when a row begins.
        begin = F.pad((pitch_hz * hop + slope * (hop * (hop - 1) / 2)).cumsum(1), (1, 0))[:, :-1]
        # A sample belongs to the row nearest to it, so a voiced stretch begins in the middle of the row before its own.
        middle = (hop + 1) // 2
        at_middle = begin + pitch_hz * (middle + 1) + slope * (middle * (middle + 1) / 2)
        origin = torch.cat([pitch_hz[:, :1], at_middle[:, :-1]], dim=1)
        begins = voiced & ~F.pad(voiced, (1, 0))[:, :-1]
        row = torch.arange(voiced.shape[1], device=device).expand_as(voiced)
        origin = origin.gather(1, torch.where(begins, row, 0).cummax(1).values)

        wanted = slice(first, last)
        sample = torch.arange(hop, device=device)
        is_late = sample >= middle

        def of_nearest(values: torch.Tensor) -> torch.Tensor:
            return torch.where(is_late, _next(values)[:, wanted, None], values[:, wanted, None])

        steps = (sample + 1).to(dtype)
        passed = pitch_hz[:, wanted, None] * steps + slope[:, wanted, None] * (steps * (steps - 1) / 2)
        periods = (begin[:, wanted, None] + passed - of_nearest(origin)) / self._rate
        # Half a period before the first pulse: where the sum of cosines is small.
        phase = (periods + 0.5).frac().mul(2 * math.pi).float()
        hz = pitch_hz[:, wanted, None] + slope[:, wanted, None] * sample
        harmonics = (_TOP_HARMONIC_HZ / hz).floor().float() + 0.5
        sine = 2 * (phase / 2).sin()
        is_pulse = sine.abs() <= _NEAR_PULSE
        pulses = torch.where(is_pulse, harmonics, (harmonics * phase).sin() / torch.where(is_pulse, 1.0, sine)) - 0.5
        return torch.where(of_nearest(voiced), pulses, 0.0).flatten(1)

    def _spectrum(self, samples: torch.Tensor) -> torch.Tensor:
        """[B, R * hop] to [B, R, bins]; a sinusoid of amplitude 1 has magnitude 1."""
        half, batch = self._n_fft // 2, len(samples)
        padded = F.pad(samples, (half, half))
        windows = padded.as_strided(
            (batch, samples.shape[1] // self._hop, self._n_fft), (padded.shape[1], self._hop, 1)
        )
        spectrum: torch.Tensor = torch.fft.rfft(windows * (self._window / (self._n_fft / 4)))
        return spectrum

    def _noise_phasors(self, keys: torch.Tensor, *, bins: int) -> torch.Tensor:
        return self._phasors.unfold(0, bins, 1)[keys.remainder(_NUM_PHASES - bins + 1)]

    def _samples(self, spectrum: torch.Tensor, window: torch.Tensor) -> torch.Tensor:
        """Inverse STFT, centred: [B, R, bins] to [B, R * hop]; the last row stands for the one after it too."""
        n_fft, hop = len(window), self._hop
        segments = torch.fft.irfft(torch.cat([spectrum, spectrum[:, -1:]], dim=1), n_fft) * window
        num_rows, num_pieces = segments.shape[1], n_fft // hop
        pieces = segments.unflatten(2, (num_pieces, hop))
        squares = (window**2).view(num_pieces, hop)
        blocks = pieces.new_zeros(len(pieces), num_rows + num_pieces - 1, hop)
        weight = pieces.new_zeros(num_rows + num_pieces - 1, hop)
        for k in range(num_pieces):
            blocks[:, k : k + num_rows] += pieces[:, :, k]
            weight[k : k + num_rows] += squares[k]
        begin = n_fft // 2
        wanted = slice(begin, begin + (num_rows - 1) * hop)
        samples: torch.Tensor = blocks.flatten(1)[:, wanted] / weight.flatten()[wanted]
        return samples


def _next(values: torch.Tensor) -> torch.Tensor:
    """Of every row [B, R] the one after it, of the last itself."""
    return torch.cat([values[:, 1:], values[:, -1:]], dim=1)


def _stretch(num_bands: int, contrast: float) -> torch.Tensor:
    """float64 [bands, bands]: takes each band `contrast` times as far from the mean of those around it."""
    reach = _SMOOTH_BANDS // 2
    eye = torch.eye(num_bands, dtype=torch.float64)
    means = F.pad(eye[None], (reach, reach), mode="replicate")[0].unfold(1, _SMOOTH_BANDS, 1).mean(2)
    return contrast * eye + (1 - contrast) * means


def _filter(
    sample_rate_hz: int, n_fft: int, stretch: torch.Tensor, *, warp: float, device: torch.device, dtype: torch.dtype
) -> _Filter:
    """A band's log-magnitude stands at its centre, and between two centres a bin's lies on the line between them."""
    num_bands = len(stretch)
    centres = torch.from_numpy(slaney_edges_hz(num_bands, fmin=0.0, fmax=sample_rate_hz / 2))[1:-1]
    hz = (torch.arange(n_fft // 2 + 1, dtype=torch.float64) * (sample_rate_hz / n_fft) / warp).clamp(
        float(centres[0]), float(centres[-1])
    )
    above = torch.searchsorted(centres, hz, right=True).clamp(1, num_bands - 1)
    share = (hz - centres[above - 1]) / (centres[above] - centres[above - 1])
    bins = torch.arange(len(hz))
    magnitude = torch.zeros(len(hz), num_bands, dtype=torch.float64)
    magnitude[bins, above - 1] = 1 - share
    magnitude[bins, above] += share
    magnitude = magnitude @ stretch.t()
    # Of every band's own log-magnitudes: the cepstrum, its negative half folded onto the positive, and back.
    cepstrum = torch.fft.irfft(magnitude, n_fft, dim=0)
    fold = torch.zeros(n_fft, 1, dtype=torch.float64)
    fold[0] = fold[n_fft // 2] = 1.0
    fold[1 : n_fft // 2] = 2.0
    phase = torch.fft.rfft(cepstrum * fold, dim=0).imag
    return _Filter(magnitude.t().contiguous().to(device, dtype), phase.t().contiguous().to(device, dtype))
