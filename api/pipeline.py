"""From the model's samples to the bytes that a client gets: resample, stretch, encode.

Owns the order of the three and how much is encoded at once. Its methods take CPU time: call them in a worker
thread (`in_worker`), one at a time, never on the event loop nor in the engine's thread.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from declaim.api.encode import API_RATE_HZ, MEDIA_TYPES, Resampler, make_encoder, rates_of, to_s16
from declaim.api.tempo import Tempo
from declaim.engine.errors import InvalidRequest

T = TypeVar("T")

# An encoder's call costs as much for 20 ms as for 80 ms of audio; the first one does not wait.
_MIN_BATCH_S = 0.08


class AudioPipeline:
    """One response's audio on its way out; used once. Every cut of the same audio gives the same pcm and wav bytes."""

    def __init__(
        self, response_format: str, *, source_rate_hz: int, speed: float = 1.0, sample_rate_hz: int | None = None
    ) -> None:
        """speed: the tempo of playback, 1.0 when the model paces itself. sample_rate_hz: None is the API's.

        Raises: InvalidRequest for a format or a rate that is not served.
        """
        rate_hz = check_rate(response_format, sample_rate_hz)
        self.media_type = MEDIA_TYPES[response_format]
        self._resampler = None if source_rate_hz == rate_hz else Resampler(source_rate_hz, rate_hz)
        self._tempo = None if speed == 1.0 else Tempo(speed, sample_rate_hz=rate_hz)
        self._encoder = make_encoder(response_format, rate_hz)
        self._min_batch = round(_MIN_BATCH_S * source_rate_hz)
        self._held: list[NDArray[np.float32]] = []
        self._is_begun = False

    def feed(self, audio: NDArray[np.float32]) -> bytes:
        """Take the model's next samples, float32 [S]; return the bytes they allow, often none."""
        self._held.append(audio)
        if self._is_begun and sum(map(len, self._held)) < self._min_batch:
            return b""
        data = self._encoder.encode(to_s16(self._stretch(self._resample(self._take()))))
        self._is_begun = self._is_begun or bool(data)
        return data

    def finish(self) -> bytes:
        """Everything that was held back; the encoder is closed. Call it once, after the last `feed`."""
        pieces = [self._resample(self._take())]
        if self._resampler is not None:
            pieces.append(self._resampler.finish())
        stretched = [self._stretch(np.concatenate(pieces))]
        if self._tempo is not None:
            stretched.append(self._tempo.finish())
        data = self._encoder.encode(to_s16(np.concatenate(stretched))) + self._encoder.finish()
        self._encoder.close()
        return data

    def close(self) -> None:
        """Free the encoder, finished or not; idempotent."""
        self._encoder.close()

    def _take(self) -> NDArray[np.float32]:
        held, self._held = self._held, []
        return np.concatenate(held) if held else np.zeros(0, np.float32)

    def _resample(self, audio: NDArray[np.float32]) -> NDArray[np.float32]:
        return audio if self._resampler is None else self._resampler.push(audio)

    def _stretch(self, audio: NDArray[np.float32]) -> NDArray[np.float32]:
        return audio if self._tempo is None else self._tempo.push(audio)


def check_rate(response_format: str, sample_rate_hz: int | None) -> int:
    """The sample rate to encode at. Raises: InvalidRequest for a format or a rate that is not served."""
    if response_format not in MEDIA_TYPES:
        served = ", ".join(MEDIA_TYPES)
        raise InvalidRequest(
            f"response_format '{response_format}' is not served: use one of {served}", param="response_format"
        )
    if sample_rate_hz is None:
        return API_RATE_HZ
    if sample_rate_hz not in rates_of(response_format):
        rates = ", ".join(map(str, rates_of(response_format)))
        raise InvalidRequest(
            f"sample_rate is {sample_rate_hz}: {response_format} is made at {rates} Hz", param="sample_rate"
        )
    return sample_rate_hz


async def in_worker(workers: Executor, call: Callable[..., T], *arguments: object) -> T:
    """Run a call in a worker thread. Cancelled, it still waits for the thread: nothing it uses may be freed earlier."""
    future = asyncio.get_running_loop().run_in_executor(workers, call, *arguments)
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        await asyncio.wait({future})
        raise
