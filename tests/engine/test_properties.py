"""The laws of the engine, on a tiny fake family: any schedule, any neighbours, any faults, the same codes and samples.

Bit for bit, in float32 on the CPU.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from declaim.engine import (
    Cancelled,
    Engine,
    EngineConfig,
    Overloaded,
    SamplingParams,
    SequenceFailed,
    SpeechRequest,
    SpeechResult,
    TooLong,
    Voice,
)
from tests.fakes import FAKE_CODEC, FakeCodec, FakeModel, ShuffledVocoder

ROOMY = EngineConfig(device="cpu", dtype="float32", num_blocks=4096, block_size=4)
PROPERTY = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


def make_engine(config: EngineConfig = ROOMY, *, vocoder_seed: int = 0, eos_bias: float = 0.0) -> Engine:
    return Engine(
        FakeModel(eos_bias=eos_bias),
        config,
        make_vocoder=lambda wake: ShuffledVocoder(seed=vocoder_seed, wake=wake),
        model_name="fake",
        load_encoder=FakeCodec,
    )


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


sampling_params = st.builds(
    SamplingParams,
    temperature=st.sampled_from([None, 0.0, 0.7, 1.3]),
    top_k=st.sampled_from([None, 0, 1, 5]),
    top_p=st.sampled_from([None, 0.6]),
    min_p=st.sampled_from([None, 0.0, 0.3]),
    repetition_penalty=st.sampled_from([None, 1.0]),
    guidance_scale=st.sampled_from([None, 1.0, 4.0]),
    seed=st.integers(0, 2**63 - 1),
    max_seconds=st.sampled_from([0.1, 0.7, 1.5, 3.0]),
)
requests = st.builds(
    SpeechRequest,
    text=st.text(alphabet="abc d", min_size=1, max_size=30).filter(str.strip) | st.just("one|two|three"),
    sampling=sampling_params,
)


def alone(request: SpeechRequest) -> SpeechResult:
    with make_engine() as engine:
        (result,) = engine.generate([request], progress=False)
    return result


def assert_same(result: SpeechResult, expected: SpeechResult) -> None:
    assert result.error is None
    assert result.finish_reason == expected.finish_reason
    np.testing.assert_array_equal(result.codes, expected.codes)
    np.testing.assert_array_equal(result.audio, expected.audio)


@dataclass(frozen=True)
class Crowd:
    """Requests, how the engine is squeezed, and when each request comes and goes."""

    requests: list[SpeechRequest]
    max_batch: int
    max_step_positions: int
    num_blocks: int
    block_size: int
    vocoder_seed: int
    pauses_ms: list[int]
    leavers: set[int]


@st.composite
def crowds(draw: st.DrawFn) -> Crowd:
    chosen = draw(st.lists(requests, min_size=2, max_size=6))
    block_size = draw(st.sampled_from([1, 3, 8]))
    # The longest sequence here has 33 + 31 positions in two branches.
    least = 2 * -(-70 // block_size)
    return Crowd(
        requests=chosen,
        max_batch=draw(st.integers(1, 5)),
        max_step_positions=draw(st.sampled_from([2, 7, 64])),
        num_blocks=least + draw(st.integers(0, least)),
        block_size=block_size,
        vocoder_seed=draw(st.integers(0, 1000)),
        pauses_ms=draw(st.lists(st.integers(0, 5), min_size=len(chosen), max_size=len(chosen))),
        leavers=draw(st.sets(st.integers(0, len(chosen) - 1), max_size=2)),
    )


@PROPERTY
@given(crowd=crowds())
def test_any_arrival_batch_blocks_preemption_and_cancellation_give_the_codes_and_samples_of_alone(crowd: Crowd) -> None:
    config = replace(
        ROOMY,
        max_batch=crowd.max_batch,
        max_step_positions=crowd.max_step_positions,
        num_blocks=crowd.num_blocks,
        block_size=crowd.block_size,
    )
    results: dict[int, list[np.ndarray]] = {}
    with make_engine(config, vocoder_seed=crowd.vocoder_seed) as engine:

        def listen(i: int) -> None:
            pieces: list[np.ndarray] = []
            for chunk in engine.stream(crowd.requests[i]):
                pieces.append(chunk.audio)
                if i in crowd.leavers:
                    return
            results[i] = pieces

        threads = []
        for i, pause_ms in enumerate(crowd.pauses_ms):
            time.sleep(pause_ms / 1000)
            threads.append(threading.Thread(target=listen, args=(i,)))
            threads[-1].start()
        for thread in threads:
            thread.join(timeout=60)
            assert not thread.is_alive()
        wait_until_empty(engine)
    for i, request in enumerate(crowd.requests):
        if i not in crowd.leavers:
            np.testing.assert_array_equal(np.concatenate(results[i]), alone(request).audio)


def wait_until_empty(engine: Engine) -> None:
    """Every stream ended, every block free, nothing left at the vocoder."""
    deadline = time.monotonic() + 60
    while (stats := engine.stats()).streams or stats.blocks_used or stats.vocoder_pending:
        assert time.monotonic() < deadline, stats
        time.sleep(0.005)
    engine._scheduler.check_integrity()


@PROPERTY
@given(chosen=st.lists(requests, min_size=1, max_size=8), max_batch=st.integers(1, 8))
def test_a_list_gives_each_request_the_codes_of_alone(chosen: list[SpeechRequest], max_batch: int) -> None:
    with make_engine(replace(ROOMY, max_batch=max_batch, num_blocks=80)) as engine:
        results = engine.generate(chosen, progress=False)
        assert engine.stats().blocks_used == 0
    for request, result in zip(chosen, results, strict=True):
        assert_same(result, alone(request))


def test_a_pool_too_small_for_two_preempts_and_still_gives_the_codes_of_alone() -> None:
    some = [SpeechRequest("abcabcabc", sampling=SamplingParams(seed=i, max_seconds=3.0)) for i in range(6)]
    with make_engine(replace(ROOMY, num_blocks=26, max_batch=6), eos_bias=-100.0) as engine:
        results = engine.generate(some, progress=False)
        assert engine.stats().preemptions > 0
    with make_engine(eos_bias=-100.0) as engine:
        for request, result in zip(some, results, strict=True):
            assert_same(result, engine.generate([request], progress=False)[0])


@PROPERTY
@given(request=requests, first_s=st.floats(0.05, 1.0), max_s=st.floats(0.05, 2.0), cut=st.integers(1, 40))
def test_any_chunk_schedule_gives_the_samples_of_the_whole(
    request: SpeechRequest, first_s: float, max_s: float, cut: int
) -> None:
    expected = alone(request)
    whole = torch.cat([FakeCodec().decode(torch.from_numpy(expected.codes.T[None].astype(np.int64)))[0]])
    with make_engine(replace(ROOMY, first_chunk_s=first_s, max_chunk_s=max_s), vocoder_seed=cut) as engine:
        chunks = list(engine.stream(request))
    audio = np.concatenate([chunk.audio for chunk in chunks])
    np.testing.assert_allclose(audio, expected.audio, atol=1e-6)
    if "|" not in request.text:
        np.testing.assert_allclose(audio, whole.numpy(), atol=1e-6)
    assert [chunk.is_last for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert chunks[-1].finish_reason == expected.finish_reason
    frames = 0
    for chunk in chunks:
        assert chunk.first_frame == frames
        assert len(chunk.audio) == chunk.num_frames * FAKE_CODEC.hop
        frames += chunk.num_frames
    assert frames == len(expected.codes)


def test_a_voice_prompt_is_excluded_from_the_result_and_changes_it() -> None:
    voice = Voice("abc", np.sin(np.arange(8000)).astype(np.float32), sample_rate_hz=8000)
    sampling = SamplingParams(seed=1, max_seconds=1.0)
    with make_engine(eos_bias=-100.0) as engine:
        plain, cloned = engine.generate(
            [SpeechRequest("hello", sampling=sampling), SpeechRequest("hello", voice=voice, sampling=sampling)],
            progress=False,
        )
    assert plain.codes.shape == cloned.codes.shape == (10, FakeCodec.spec.num_codebooks)
    assert (plain.codes != cloned.codes).any()


def test_one_sequences_crash_and_one_sequences_nan_leave_the_others_alone() -> None:
    good = [SpeechRequest("abc", sampling=SamplingParams(seed=i, max_seconds=1.5)) for i in range(4)]
    with make_engine() as engine:
        results = engine.generate(
            [good[0], SpeechRequest("!crash"), *good[1:3], SpeechRequest("!nan"), good[3]], progress=False
        )
        assert engine.stats().blocks_used == 0
    for i in (1, 4):
        assert results[i].finish_reason == "error"
        assert isinstance(results[i].error, SequenceFailed)
    for i, request in zip((0, 2, 3, 5), good, strict=True):
        assert_same(results[i], alone(request))


def test_a_segment_that_fails_ends_its_request_and_no_other() -> None:
    good = SpeechRequest("abc", sampling=SamplingParams(seed=1, max_seconds=1.5))
    with make_engine() as engine:
        results = engine.generate([SpeechRequest("one|two|!nan"), good, SpeechRequest("!crash|one")], progress=False)
        assert engine.stats().blocks_used == 0
    assert [result.finish_reason == "error" for result in results] == [True, False, True]
    assert_same(results[1], alone(good))


def test_a_cancelled_request_frees_its_blocks_and_raises_in_its_stream() -> None:
    with make_engine(replace(ROOMY, max_lead_s=1000.0), eos_bias=-100.0) as engine:
        endless = SpeechRequest("abc", sampling=SamplingParams(max_seconds=20.0), request_id="r1")
        chunks = engine.stream(endless)
        next(chunks)
        assert engine.stats().blocks_used > 0
        engine.cancel("r1")
        with pytest.raises(Cancelled, match="r1"):
            list(chunks)
        wait_until_empty(engine)
        assert len(list(engine.stream(SpeechRequest("abc", sampling=SamplingParams(max_seconds=0.5))))) > 0


def test_more_than_the_queue_holds_is_refused_and_what_was_accepted_is_served() -> None:
    with make_engine(replace(ROOMY, max_batch=1, max_waiting=2), eos_bias=-100.0) as engine:
        sampling = SamplingParams(max_seconds=15.0)
        streams = [engine.stream(SpeechRequest("abc", sampling=sampling)) for _ in range(3)]
        threads = [threading.Thread(target=lambda s=stream: next(s)) for stream in streams]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + 60
        while engine._num_open < 3 and time.monotonic() < deadline:
            time.sleep(0.001)
        with pytest.raises(Overloaded, match="max_waiting 2") as refused:
            next(engine.stream(SpeechRequest("abc", sampling=sampling)))
        assert refused.value.retry_after_s > 0
        for thread in threads:
            thread.join()
        for stream in streams:
            stream.close()
        wait_until_empty(engine)


def test_a_list_longer_than_the_queue_is_served_without_refusal() -> None:
    with make_engine(replace(ROOMY, max_batch=2, max_waiting=1)) as engine:
        results = engine.generate(
            [SpeechRequest("ab", sampling=SamplingParams(seed=1, max_seconds=0.3))] * 12, progress=False
        )
    assert {result.finish_reason for result in results} <= {"stop", "length"}


def test_a_sequence_that_can_never_fit_is_refused_with_what_would() -> None:
    with make_engine(replace(ROOMY, num_blocks=10)) as engine:
        with pytest.raises(TooLong, match="max_seconds"):
            engine.generate([SpeechRequest("abc", sampling=SamplingParams(max_seconds=20.0))], progress=False)
        (result,) = engine.generate([SpeechRequest("abc", sampling=SamplingParams(max_seconds=0.5))], progress=False)
    assert result.error is None


def test_closing_the_engine_ends_running_streams_with_an_error() -> None:
    engine = make_engine(eos_bias=-100.0)
    chunks = engine.stream(SpeechRequest("abc", sampling=SamplingParams(max_seconds=20.0)))
    next(chunks)
    engine.close()
    with pytest.raises(Exception, match="closed"):
        list(chunks)
    with pytest.raises(Exception, match="closed"):
        next(engine.stream(SpeechRequest("abc")))
    engine.close()
