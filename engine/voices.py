"""Reference audio: what a caller sends to be imitated, checked, brought to the codec's rate and encoded.

Owns every check on reference audio and the resampler. Never keeps a voice, never chooses one, and needs no
torch until a codec is called.
"""

from __future__ import annotations

import io
import math
from numbers import Integral
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from declaim.engine.errors import InvalidRequest
from declaim.engine.request import Voice

if TYPE_CHECKING:
    from declaim.engine.codec.base import Codec

MIN_REFERENCE_S = 1.0
MAX_REFERENCE_S = 30.0
MIN_RATE_HZ = 8_000
MAX_RATE_HZ = 192_000
MAX_CHANNELS = 8

_SILENCE_DBFS = -60.0
# Full scale is 1. Lossy decoders overshoot it a little; integers that were cast and not scaled do so by far.
_MAX_PEAK = 16.0

# The resampler's low pass: zero crossings each side, Kaiser's beta (stop band below -100 dB), the middle of
# the transition as a share of the lower Nyquist frequency, and how finely the kernel is tabulated: read by
# linear interpolation it is right to 2e-6.
_ZERO_CROSSINGS = 48
_TABLE_STEPS = 1024  # for each zero crossing
_KAISER_BETA = 10.0
_ROLLOFF = 0.94


def _invalid(message: str) -> InvalidRequest:
    return InvalidRequest(f"reference audio {message}", param="voice")


def prepare_reference(
    audio: NDArray[np.floating],
    sample_rate_hz: int,
    *,
    target_rate_hz: int,
    min_s: float = MIN_REFERENCE_S,
    max_s: float = MAX_REFERENCE_S,
) -> NDArray[np.float32]:
    """Check reference audio, mix its channels to one and resample it.

    audio: float [S] or [S, num_channels], full scale 1; not modified.
    Returns float32 [ceil(S * target_rate_hz / sample_rate_hz)].

    Raises: InvalidRequest (param "voice").
    """
    _check_rate(sample_rate_hz)
    _check_shape(audio, int(sample_rate_hz), min_s=min_s, max_s=max_s)
    if not np.isfinite(audio).all():
        raise _invalid("holds NaN or infinity: send finite samples, full scale at 1.0")
    # Checked before mixing: opposite channels must not hide samples out of range.
    peak = float(np.abs(audio).max())
    if peak > _MAX_PEAK:
        raise _invalid(
            f"peaks at {peak:g}, full scale is 1.0 and at most {_MAX_PEAK:g} is taken: divide 16-bit samples by 32768"
        )
    mono = audio.astype(np.float64) if audio.ndim == 1 else audio.mean(axis=1, dtype=np.float64)
    mono_peak = float(np.abs(mono).max())
    if mono_peak < 10.0 ** (_SILENCE_DBFS / 20.0):
        level = f"{20.0 * math.log10(mono_peak):.0f} dBFS" if mono_peak > 0.0 else "digital silence"
        raise _invalid(
            f"is silent (peak {level} after mixing to mono, at least {_SILENCE_DBFS:.0f} dBFS is needed): "
            f"record it louder"
        )
    return resample(mono, int(sample_rate_hz), target_rate_hz=target_rate_hz).astype(np.float32)


def _check_rate(sample_rate_hz: object) -> None:
    # Integral takes numpy's integers too; a bool is one, and no rate.
    whole = isinstance(sample_rate_hz, Integral) and not isinstance(sample_rate_hz, bool)
    if not whole or not MIN_RATE_HZ <= int(sample_rate_hz) <= MAX_RATE_HZ:  # type: ignore[call-overload]
        raise _invalid(
            f"has a sample rate of {sample_rate_hz!r} Hz: it must be an integer from {MIN_RATE_HZ} to {MAX_RATE_HZ}"
        )


def _check_shape(audio: object, sample_rate_hz: int, *, min_s: float, max_s: float) -> None:
    if not isinstance(audio, np.ndarray) or audio.dtype.kind != "f":
        kind = audio.dtype if isinstance(audio, np.ndarray) else type(audio).__name__
        raise _invalid(f"is {kind}: it must be a numpy array of floats, full scale at 1.0")
    if audio.ndim not in (1, 2):
        raise _invalid(f"has {audio.ndim} dimensions: it must be [num_samples] or [num_samples, channels]")
    if audio.size == 0:
        raise _invalid(f"is empty: send {min_s:g} to {max_s:g} s")
    if audio.ndim == 2 and audio.shape[1] > MAX_CHANNELS:
        raise _invalid(
            f"has {audio.shape[1]} channels, at most {MAX_CHANNELS} are taken: the shape is [num_samples, num_channels]"
        )
    _check_length(len(audio), sample_rate_hz, min_s=min_s, max_s=max_s)


def _check_length(num_samples: int, sample_rate_hz: int, *, min_s: float, max_s: float) -> None:
    seconds = num_samples / sample_rate_hz
    if seconds < min_s:
        raise _invalid(f"is {seconds:.2f} s long, at least {min_s:g} s is needed: send a longer recording")
    if seconds > max_s:
        raise _invalid(f"is {seconds:.2f} s long, at most {max_s:g} s is taken: cut it")


def resample(audio: NDArray[np.float64], rate_hz: int, *, target_rate_hz: int) -> NDArray[np.float64]:
    """Resample [S] to [ceil(S * target_rate_hz / rate_hz)] by a polyphase windowed sinc.

    Beyond its ends the audio is zero. Output n lies at input position n * down / up; outputs that share n
    modulo up share one filter, made when its turn comes, so memory does not grow with the ratio's terms.
    """
    if rate_hz == target_rate_hz:
        return audio.copy()
    common = math.gcd(rate_hz, target_rate_hz)
    up, down = target_rate_hz // common, rate_hz // common
    num_outputs = -(-len(audio) * up // down)
    cutoff = _ROLLOFF * min(1.0, up / down)  # 1 is the input's Nyquist frequency
    reach = math.ceil(_ZERO_CROSSINGS / cutoff)
    padded = np.pad(audio, reach)
    windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * reach + 1)
    taps = np.arange(-reach, reach + 1)
    crossings = np.linspace(0.0, _ZERO_CROSSINGS, _ZERO_CROSSINGS * _TABLE_STEPS + 1)
    table = np.sinc(crossings) * np.i0(_KAISER_BETA * np.sqrt(1.0 - (crossings / _ZERO_CROSSINGS) ** 2))
    output = np.empty(num_outputs)
    for phase in range(min(up, num_outputs)):
        first, fraction = divmod(phase * down, up)
        kernel = np.interp(np.abs(taps - fraction / up) * cutoff, crossings, table, right=0.0)
        kernel /= kernel.sum()
        count = -(-(num_outputs - phase) // up)
        output[phase::up] = windows[first : first + (count - 1) * down + 1 : down] @ kernel
    return output


def read_audio_bytes(data: bytes) -> tuple[NDArray[np.float32], int]:
    """Decode an audio file held in memory (WAV, FLAC, MP3, Ogg and what else libsndfile knows).

    Returns float32 [S] or [S, num_channels], full scale 1, and its sample rate in Hz. No more is decoded of a
    file than the longest reference and one sample, whatever its header says.

    Raises: InvalidRequest (param "voice").
    """
    import soundfile

    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            rate = int(file.samplerate)
            _check_rate(rate)
            if file.channels > MAX_CHANNELS:
                raise _invalid(f"has {file.channels} channels, at most {MAX_CHANNELS} are taken: mix it down")
            limit = math.floor(MAX_REFERENCE_S * rate)
            audio = np.asarray(file.read(frames=min(int(file.frames), limit + 1), dtype="float32"), np.float32)
    except soundfile.SoundFileError as error:
        raise _invalid(f"({len(data)} bytes) cannot be decoded ({error}): send a WAV, FLAC, MP3 or Ogg file") from error
    _check_length(len(audio), rate, min_s=0.0, max_s=MAX_REFERENCE_S)
    return audio, rate


def encode_voice(
    codec: Codec, voice: Voice, *, min_s: float = MIN_REFERENCE_S, max_s: float = MAX_REFERENCE_S
) -> NDArray[np.int32]:
    """Check a voice's audio and encode it: int32 [num_frames, num_codebooks].

    The last frame is padded with silence.

    Raises: InvalidRequest (param "voice"); ModelLoadError if the codec was loaded without its encoder.
    """
    import torch

    target = codec.spec.sample_rate_hz
    audio = prepare_reference(voice.audio, voice.sample_rate_hz, target_rate_hz=target, min_s=min_s, max_s=max_s)
    codes = codec.encode(torch.from_numpy(audio).to(codec.device))
    return np.ascontiguousarray(codes.t().cpu().numpy(), dtype=np.int32)
