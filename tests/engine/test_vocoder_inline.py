"""The inline vocoder: its order, its bound, and what a bad window costs the others."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from declaim.engine.errors import SequenceFailed
from declaim.engine.vocoder.base import DecodedWindow, Window
from declaim.engine.vocoder.inline import InlineVocoder, decode_windows
from tests.engine.vocoder_fakes import FakeCodec, expected_samples, make_window


class Wakes:
    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> None:
        self.count += 1


def drain(vocoder: InlineVocoder) -> list[DecodedWindow]:
    decoded = []
    while vocoder.num_pending:
        decoded += vocoder.poll()
    return decoded


def key(window: Window | DecodedWindow) -> tuple[int, int]:
    return window.sequence_id, window.index


def test_every_window_comes_back_once_with_the_samples_of_its_own_frames() -> None:
    vocoder = InlineVocoder(FakeCodec(), wake=Wakes())
    windows = [make_window(s, i, num_frames=1 + (s + i) % 3, code=1 + s) for s in range(4) for i in range(3)]
    vocoder.submit(windows)
    decoded = {key(window): window for window in drain(vocoder)}
    assert sorted(decoded) == sorted(key(window) for window in windows)
    for window in windows:
        samples = decoded[key(window)].samples
        assert samples is not None and samples.dtype == np.float32
        np.testing.assert_array_equal(samples, expected_samples(window))


def test_first_windows_of_sequences_go_before_the_others_and_each_kind_keeps_its_order() -> None:
    vocoder = InlineVocoder(FakeCodec(), wake=Wakes(), max_windows_per_poll=1)
    vocoder.submit([make_window(0, 1), make_window(0, 2), make_window(1, 0)])
    assert [key(window) for window in vocoder.poll()] == [(1, 0)]
    vocoder.submit([make_window(2, 0), make_window(1, 1)])
    assert [key(window) for window in drain(vocoder)] == [(2, 0), (0, 1), (0, 2), (1, 1)]


def test_one_poll_decodes_no_more_than_its_bound_and_asks_to_be_called_again() -> None:
    codec, wakes = FakeCodec(), Wakes()
    vocoder = InlineVocoder(codec, wake=wakes, max_windows_per_poll=3)
    vocoder.submit([make_window(0, i) for i in range(5)])
    assert (wakes.count, codec.calls) == (1, [])
    assert len(vocoder.poll()) == 3
    assert (wakes.count, len(codec.calls), vocoder.num_pending) == (2, 3, 2)
    assert len(vocoder.poll()) == 2
    assert (wakes.count, vocoder.num_pending, vocoder.poll()) == (2, 0, [])


def test_a_window_that_cannot_be_decoded_fails_alone() -> None:
    vocoder = InlineVocoder(FakeCodec(), wake=Wakes())
    vocoder.submit([make_window(0, 0), make_window(1, 0, code=16), make_window(2, 0)])
    good, bad, other = vocoder.poll()
    assert good.error is None and other.error is None
    assert bad.samples is None and isinstance(bad.error, SequenceFailed)
    assert "sequence 1" in str(bad.error) and "beyond the codebook" in str(bad.error)


def test_an_accelerator_error_fails_windows_and_does_not_leave_poll() -> None:
    class BrokenDevice(FakeCodec):
        def decode(
            self, codes: torch.Tensor, *, first: int = 0, last: int | None = None, timbre: int = 0
        ) -> torch.Tensor:
            raise torch.AcceleratorError("device-side assert")

    vocoder = InlineVocoder(BrokenDevice(), wake=Wakes())
    vocoder.submit([make_window(0, 0), make_window(1, 0)])
    assert [type(window.error) for window in vocoder.poll()] == [SequenceFailed, SequenceFailed]


def test_a_cancelled_sequence_is_not_decoded_and_its_neighbours_are() -> None:
    codec = FakeCodec()
    vocoder = InlineVocoder(codec, wake=Wakes())
    vocoder.submit([make_window(s, i) for s in range(2) for i in range(2)])
    vocoder.cancel(0)
    assert vocoder.num_pending == 2
    assert [key(window) for window in drain(vocoder)] == [(1, 0), (1, 1)]
    assert len(codec.calls) == 2


def test_a_closed_vocoder_has_nothing_pending_and_closes_again() -> None:
    vocoder = InlineVocoder(FakeCodec(), wake=Wakes())
    vocoder.submit([make_window(0, 0), make_window(0, 1)])
    vocoder.close()
    vocoder.close()
    assert (vocoder.num_pending, vocoder.poll()) == (0, [])


def test_on_the_cpu_each_window_has_a_call_of_its_own() -> None:
    codec = FakeCodec()
    decode_windows(codec, [make_window(s, 0) for s in range(3)])
    assert codec.calls == [(1, 2, 4)] * 3


def test_a_poll_of_no_windows_is_refused_when_the_pool_is_built() -> None:
    with pytest.raises(ValueError, match="max_windows_per_poll is 0"):
        InlineVocoder(FakeCodec(), wake=Wakes(), max_windows_per_poll=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_windows_of_one_length_share_a_call_and_a_bad_one_still_fails_alone() -> None:
    codec = FakeCodec(device="cuda")
    windows = [make_window(s, 0, num_frames=2 + s % 2) for s in range(4)]
    decoded = decode_windows(codec, windows)
    assert codec.calls == [(2, 2, 4), (2, 2, 5)]
    for window, result in zip(windows, decoded, strict=True):
        assert result.samples is not None and key(result) == key(window)
        np.testing.assert_array_equal(result.samples, expected_samples(window))
    decoded = decode_windows(codec, [make_window(0, 0), make_window(1, 0, code=16)])
    assert [type(window.error) for window in decoded] == [type(None), SequenceFailed]
