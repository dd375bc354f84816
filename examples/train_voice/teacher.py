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

SAMPLE_RATE_HZ = 24_000
UNIT_S = 0.025  # the teacher's durations are whole numbers of this
UNIT_SAMPLES = 600
SILENCE_UNITS = 2  # of leading silence that are kept: the teacher makes 0.3 s of it, which a listener waits for

_DURATIONS = "/Clip_output_0"  # the node that holds each phoneme's number of units
_BINS = 601


@dataclass(frozen=True, slots=True)
class Speaker:
    """A voice as factors on the teacher's: of its pitch, its spectrum's frequency axis, and its level."""

    name: str
    pitch: float = 1.0
    warp: float = 1.0
    gain: float = 1.0


SPEAKERS = (
    Speaker("lark"),
    Speaker("rook", pitch=0.58, warp=0.85, gain=0.5),
    Speaker("wren", pitch=1.25, warp=1.12, gain=0.65),
)


@dataclass(frozen=True, slots=True, eq=False)
class Speech:
    """audio: float32 [S], full scale 1; durations_s: float32 [L], one for the start, each phoneme, and the end."""

    audio: NDArray[np.float32]
    durations_s: NDArray[np.float32]


class Teacher:
    """Loads the wheel's network once; one thread."""

    def __init__(self) -> None:
        self._hibari = Hibari()
        self._session = _with_durations(Path(self._hibari.model_path))
        self._vocab: dict[str, int] = self._hibari.vocab

    def knows(self, phonemes: str) -> bool:
        return all(symbol in self._vocab for symbol in phonemes)

    def speak(self, phonemes: str, speaker: Speaker = SPEAKERS[0], *, seed: int = 0) -> Speech:
        """Speak a string of phonemes; `seed` fixes the breath noise. Leading silence is cut to 50 ms."""
        ids = [0, *(self._vocab[symbol] for symbol in phonemes if symbol in self._vocab), 0]
        inputs = {"ids": np.asarray([ids], np.int64), "speed": np.ones(1, np.float32)}
        *parts, units = self._session.run(None, inputs)
        lh, th, ln, lr, phi, f0 = (part[0] for part in parts)
        units = units.reshape(-1).astype(np.int64)
        if speaker.warp != 1.0:
            lh, th, ln, lr, phi = (_stretched(part, speaker.warp) for part in (lh, th, ln, lr, phi))
        audio = speaker.gain * dsp.synth(lh, th, ln, lr, phi, speaker.pitch * f0, np.random.default_rng(seed))
        cut = max(0, int(units[0]) - SILENCE_UNITS)
        units[0] -= cut
        return Speech(
            np.clip(audio[cut * UNIT_SAMPLES :], -1.0, 1.0).astype(np.float32), units.astype(np.float32) * UNIT_S
        )


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
