"""The teacher: phonemes to speech with the length of every phoneme, in the voices made of one.

hibari-tts (Apache-2.0, one American voice in its wheel) returns spectra and a pitch curve for each 12.5 ms; a small
synthesiser in the package makes the waveform of them. Scaling the pitch and stretching the frequency axis between the
two gives other voices that are as clean as the first.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from hibari import Hibari, dsp
from numpy.typing import NDArray

from declaim.engine.codec.mel import slaney_mel_filters
from declaim.engine.codec.source_filter import Timbre

SAMPLE_RATE_HZ = 24_000
UNIT_S = 0.025  # the teacher's durations are whole numbers of this
UNIT_SAMPLES = 600
SILENCE_UNITS = 2  # of leading silence that are kept: the teacher makes 0.3 s of it, which a listener waits for

_DURATIONS = "/Clip_output_0"  # the node that holds each phoneme's number of units
_BINS, _FRAMES_PER_S, _ROWS_PER_S, NUM_BANDS = 601, 80, 100, 80
_LEAST_PITCH_HZ = 40.0  # below, the teacher's synthesiser makes no pulses
_HEARD = 0.5  # log-magnitude of the loudest band from which pulses are heard: elsewhere their phase may begin anew
_FLOOR = -8.0  # of log-magnitudes
# Noise of the teacher's third part, which has phases of its own, that remains where something is voiced.
_NOISE_WHERE_VOICED = 0.5


SPEAKERS = (
    Timbre("lark"),
    Timbre("rook", pitch=0.58, warp=0.85, gain=0.5),
    Timbre("wren", pitch=1.25, warp=1.12, gain=0.65),
)


@dataclass(frozen=True, slots=True, eq=False)
class Speech:
    """audio: float32 [S], full scale 1; durations_s: float32 [L], one for the start, each phoneme, and the end.

    What the audio was made of, a hundred rows a second, as the codec's decoder is to say it: bands: float16
    [R, 2 * NUM_BANDS], log-magnitudes of pulses and of noise; pitch_hz: float32 [R], 0 where no pulses are heard.
    """

    audio: NDArray[np.float32]
    durations_s: NDArray[np.float32]
    bands: NDArray[np.float16]
    pitch_hz: NDArray[np.float32]


class Teacher:
    """Loads the wheel's network once; one thread."""

    def __init__(self) -> None:
        self._hibari = Hibari()
        self._session = _with_durations(Path(self._hibari.model_path))
        self._vocab: dict[str, int] = self._hibari.vocab
        filters = slaney_mel_filters(
            SAMPLE_RATE_HZ, 2 * (_BINS - 1), num_mels=NUM_BANDS, fmin=0, fmax=SAMPLE_RATE_HZ / 2
        ).numpy()
        self._bands = (filters / filters.sum(0)).T  # [NUM_BANDS, 601]: means over bins

    def knows(self, phonemes: str) -> bool:
        return all(symbol in self._vocab for symbol in phonemes)

    def speak(self, phonemes: str, speaker: Timbre = SPEAKERS[0], *, seed: int = 0) -> Speech:
        """Speak a string of phonemes; `seed` fixes the breath noise. Leading silence is cut to 50 ms."""
        ids = [0, *(self._vocab[symbol] for symbol in phonemes if symbol in self._vocab), 0]
        inputs = {"ids": np.asarray([ids], np.int64), "speed": np.ones(1, np.float32)}
        *parts, units = self._session.run(None, inputs)
        lh, th, ln, lr, phi, f0 = (part[0] for part in parts)
        units = units.reshape(-1).astype(np.int64)
        if speaker.warp != 1.0:
            lh, th, ln, lr, phi = (_stretched(part, speaker.warp) for part in (lh, th, ln, lr, phi))
        f0 = speaker.pitch * f0
        audio = speaker.gain * dsp.synth(lh, th, ln, lr, phi, f0, np.random.default_rng(seed))
        cut = max(0, int(units[0]) - SILENCE_UNITS)
        units[0] -= cut
        audio = np.clip(audio[cut * UNIT_SAMPLES :], -1.0, 1.0).astype(np.float32)
        bands, pitch_hz = self._rows(lh, ln, lr, f0, first_s=cut * UNIT_S, num_samples=len(audio))
        bands += np.float16(np.log(speaker.gain))
        return Speech(audio, units.astype(np.float32) * UNIT_S, bands, pitch_hz)

    def _rows(
        self,
        harmonic: NDArray[np.float32],
        noise: NDArray[np.float32],
        free: NDArray[np.float32],
        pitch_hz: NDArray[np.float32],
        *,
        first_s: float,
        num_samples: int,
    ) -> tuple[NDArray[np.float16], NDArray[np.float32]]:
        """The teacher's frames, log-magnitudes [601, F], in bands and at the rows' times; see `Speech`."""
        num_rows = -(-num_samples * _ROWS_PER_S // SAMPLE_RATE_HZ)
        at = np.minimum((first_s + np.arange(num_rows) / _ROWS_PER_S) * _FRAMES_PER_S, len(pitch_hz) - 1)
        has_pitch = pitch_hz > _LEAST_PITCH_HZ
        harmonic_bands = self._bands @ np.maximum(harmonic, _FLOOR)
        voiced = has_pitch & (harmonic_bands.max(0) > _HEARD)
        # The third part has phases that fit each other; drawn at random its windows half cancel out.
        share = np.where(voiced, _NOISE_WHERE_VOICED, 1.0) ** 2
        power = 2 * np.exp(2 * noise) + share * np.exp(2 * free)
        # And with windows of 300 samples' step in place of 240 they do so less.
        noise_bands = self._bands @ np.maximum(np.log(power) / 2, _FLOOR) + np.log(300 / 240) / 2
        bands = np.concatenate([_between(harmonic_bands, at), _between(noise_bands, at)]).T
        known = np.flatnonzero(has_pitch)
        everywhere = np.interp(np.arange(len(pitch_hz)), known, pitch_hz[known]) if len(known) else 0 * pitch_hz
        pitch = np.where(voiced[np.round(at).astype(int)], _between(everywhere, at), 0.0)
        return bands.astype(np.float16), pitch.astype(np.float32)


def _with_durations(path: Path) -> onnxruntime.InferenceSession:
    model = onnx.load(str(path))
    model.graph.output.append(onnx.helper.make_tensor_value_info(_DURATIONS, onnx.TensorProto.FLOAT, None))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    with tempfile.NamedTemporaryFile(suffix=".onnx") as file:
        onnx.save(model, file.name)
        return onnxruntime.InferenceSession(file.name, options, providers=["CPUExecutionProvider"])


def _stretched(spectrum: NDArray[np.float32], warp: float) -> NDArray[np.float32]:
    """[601, F]: bin k becomes bin k * warp. Nearest bins, because phases have no mean; the last one is repeated."""
    source = np.minimum(np.round(np.arange(_BINS) / warp), _BINS - 1).astype(np.int64)
    return np.ascontiguousarray(spectrum[source])


def _between(values: NDArray[np.float32], at: NDArray[np.float64]) -> NDArray[np.float32]:
    """[..., F] at the places `at` [R], on the line between the two frames beside each: [..., R]."""
    before = np.floor(at).astype(int)
    share = (at - before).astype(np.float32)
    after = np.minimum(before + 1, values.shape[-1] - 1)
    between: NDArray[np.float32] = values[..., before] * (1 - share) + values[..., after] * share
    return between
