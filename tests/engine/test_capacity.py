"""How many listeners an engine takes: judged from step times that are known by hand."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import cast

import numpy as np
import pytest

from declaim.engine import (
    AudioChunk,
    Cancelled,
    Engine,
    EngineClosed,
    EngineConfig,
    Overloaded,
    SamplingParams,
    SpeechRequest,
)
from declaim.engine.capacity import HEADROOM, MAX_WAIT_S, MIN_STEPS, Capacity
from declaim.engine.config import Shed
from declaim.engine.request import Tier
from tests.fakes import FakeModel, ShuffledVocoder

FRAME_S = 0.04


def capacity_of(base_s: float, slope_s: float, *, crowd: int, max_batch: int = 32, noise: float = 0.0) -> Capacity:
    """After 600 steps of 1 to `crowd` sequences."""
    random = np.random.default_rng(0)
    capacity = Capacity(frame_s=FRAME_S, max_batch=max_batch)
    for _ in range(600):
        count = int(random.integers(1, crowd + 1))
        capacity.record(count, (base_s + slope_s * count) * (1 + noise * random.standard_normal()))
    return capacity


def test_a_line_crosses_the_duration_of_a_frame_where_it_does() -> None:
    assert capacity_of(0.010, 0.0011, crowd=20).num_listeners == int((HEADROOM * FRAME_S - 0.010) / 0.0011)
    noisy = capacity_of(0.010, 0.001, crowd=20, noise=0.3).num_listeners
    assert noisy is not None and abs(noisy - (HEADROOM * FRAME_S - 0.010) / 0.001) <= 2


def test_a_batch_that_is_faster_than_needed_serves_more_than_it_holds() -> None:
    assert capacity_of(0.001, 0.0001, crowd=8, max_batch=32).num_listeners == int(32 * HEADROOM * FRAME_S / 0.0042)


def test_a_machine_too_slow_for_one_judges_nobody() -> None:
    assert capacity_of(0.05, 0.001, crowd=8).num_listeners is None


def test_few_steps_or_one_and_the_same_crowd_tell_nothing() -> None:
    capacity = Capacity(frame_s=FRAME_S, max_batch=32)
    for _ in range(10 * MIN_STEPS):
        capacity.record(1, 0.01)
    assert capacity.num_listeners is None
    capacity = Capacity(frame_s=FRAME_S, max_batch=32)
    for i in range(MIN_STEPS - 1):
        capacity.record(1 + i % 8, 0.01)
    assert capacity.num_listeners is None


def test_small_crowds_tell_nothing_of_large_ones() -> None:
    assert capacity_of(0.0, 0.008, crowd=3).num_listeners is None
    assert capacity_of(0.0, 0.008, crowd=4).num_listeners == 2


def test_a_machine_that_becomes_slower_takes_fewer_and_then_more_again() -> None:
    capacity = capacity_of(0.010, 0.001, crowd=20)
    before = capacity.num_listeners
    for slower in (1.5, 1.0):
        for i in range(2000):
            count = 1 + i % 15
            capacity.record(count, slower * (0.010 + 0.001 * count))
        after = capacity.num_listeners
        assert before is not None and after is not None
        assert after < before if slower > 1 else abs(after - before) <= 1


def test_a_flood_that_holds_the_crowd_where_it_is_does_not_open_the_gate() -> None:
    capacity = capacity_of(0.010, 0.001, crowd=20)
    before = capacity.num_listeners
    assert before is not None
    for slower, least, most in ((1.0, before - 1, before + 1), (1.5, 1, before - 2)):
        for _ in range(4000):
            capacity.record(before, slower * (0.010 + 0.001 * before))
        assert capacity.num_listeners is not None and least <= capacity.num_listeners <= most


def crowded(capacity: Capacity, num: int, *, is_full: bool) -> int:
    """How many may wait after so many came."""
    for _ in range(num):
        capacity.record_arrival(is_full=is_full)
    return capacity.num_waiters


def test_as_many_may_wait_as_are_likely_to_have_their_turn_soon() -> None:
    capacity = capacity_of(0.010, 0.0004, crowd=20)
    most = capacity.num_listeners
    assert most is not None and most > 15
    assert capacity.num_waiters == 0  # nobody has left yet: it may be long
    for lasted_s in (1.0, 3.0) * 50:
        capacity.record_listener(lasted_s)
    assert capacity.num_waiters == pytest.approx(MAX_WAIT_S * most / 2.0, abs=1)
    for _ in range(100):
        capacity.record_listener(60.0)
    assert capacity.num_waiters == 0


def test_nobody_may_wait_where_more_come_than_can_be_served() -> None:
    capacity = capacity_of(0.010, 0.0004, crowd=20)
    capacity.record_listener(1.0)
    assert crowded(capacity, 2, is_full=True) > 0
    assert crowded(capacity, 2, is_full=True) == 0
    assert crowded(capacity, 5, is_full=False) > 0


class Bears:
    """An engine's capacity that is what a test says."""

    def __init__(self, num_listeners: int | None, num_waiters: int) -> None:
        self.num_listeners, self.num_waiters = num_listeners, num_waiters

    def record(self, num_sequences: int, took_s: float) -> None:
        """Nothing changes."""

    def record_listener(self, lasted_s: float) -> None:
        """Nothing changes."""

    def record_arrival(self, *, is_full: bool) -> None:
        """Nothing changes."""


@contextmanager
def engine_that_bears(num_listeners: int | None, *, num_waiters: int = 0, shed: Shed = "late") -> Iterator[Engine]:
    config = EngineConfig(device="cpu", dtype="float32", num_blocks=4096, block_size=4, max_batch=16, shed=shed)
    with Engine(
        FakeModel(eos_bias=-100.0),
        config,
        make_vocoder=lambda wake: ShuffledVocoder(seed=0, wake=wake),
        model_name="fake",
    ) as engine:
        engine._capacity = cast("Capacity", Bears(num_listeners, num_waiters))
        yield engine


def ask(engine: Engine, tenant: str = "", *, tier: Tier = "default", continues: bool = False) -> Generator[AudioChunk]:
    """A stream of 25 seconds whose first chunk has come. Raises: Overloaded."""
    sampling = SamplingParams(max_seconds=25.0)
    request = SpeechRequest("abc", sampling=sampling, tenant=tenant, tier=tier, continues=continues)
    stream = engine.stream(request)
    next(stream)
    return stream


def test_a_listener_too_many_is_refused_with_numbers_and_a_remedy_and_let_in_when_one_has_left() -> None:
    with engine_that_bears(2) as engine:
        streams = [ask(engine), ask(engine)]
        with pytest.raises(Overloaded, match=r"2 streams .* can speak 2 as fast .* shed='full'") as refused:
            ask(engine)
        assert refused.value.retry_after_s > 0
        streams.pop().close()
        wait_for(lambda: len(engine._listened_ids) == 1)
        streams.append(ask(engine))
        for stream in streams:
            stream.close()
        wait_for(lambda: len(engine._listened_ids) == 0)


def test_one_may_wait_until_somebody_leaves_and_the_next_is_refused() -> None:
    with engine_that_bears(1, num_waiters=1) as engine, ThreadPoolExecutor(1) as pool:
        first = ask(engine)
        second = pool.submit(ask, engine)
        wait_for(lambda: len(engine._held) == 1)
        assert engine.stats().waiting == 1 and engine.stats().streams == 1
        with pytest.raises(Overloaded):
            ask(engine)
        first.close()
        second.result(10).close()
        wait_for(lambda: len(engine._listened_ids) == 0)
        assert not engine._held and engine.stats().streams == 0


@pytest.mark.parametrize("ending", ["cancel", "close"])
def test_who_waits_for_a_place_is_told_when_the_wait_ends_otherwise(ending: str) -> None:
    with engine_that_bears(1, num_waiters=1) as engine, ThreadPoolExecutor(1) as pool:
        first = ask(engine)
        request = SpeechRequest("abc", request_id="second")
        second = pool.submit(lambda: list(engine.stream(request)))
        wait_for(lambda: len(engine._held) == 1)
        if ending == "cancel":
            engine.cancel("second")
        else:
            engine.close()
        with pytest.raises(Cancelled if ending == "cancel" else EngineClosed):
            second.result(10)
        wait_for(lambda: not engine._held)
        if ending == "cancel":
            wait_for(lambda: len(engine._listened_ids) == 1)
        first.close()


def test_who_hangs_up_while_waiting_frees_the_place_in_line() -> None:
    async def hang_up(engine: Engine) -> None:
        waiting = asyncio.ensure_future(anext(engine.astream(SpeechRequest("abc"))))
        while not engine._held:
            await asyncio.sleep(0.001)
        waiting.cancel()

    with engine_that_bears(1, num_waiters=1) as engine:
        first = ask(engine)
        asyncio.run(hang_up(engine))
        wait_for(lambda: not engine._held and len(engine._listened_ids) == 1)
        assert engine.stats().streams == 1
        first.close()


def test_nobody_waits_for_a_place_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("declaim.engine.engine.MAX_HELD_S", 0.05)
    with engine_that_bears(1, num_waiters=1) as engine:
        first, second = ask(engine), ask(engine)
        assert engine.stats().streams == 2
        first.close()
        second.close()


def test_whom_nobody_listens_to_waits_however_many_listen() -> None:
    with engine_that_bears(1) as engine:
        stream = ask(engine)
        (result,) = engine.generate([SpeechRequest("ab", sampling=SamplingParams(max_seconds=0.3))], progress=False)
        assert result.finish_reason == "length"
        stream.close()


def test_who_has_time_and_whose_speech_has_begun_are_let_in_and_only_the_latter_counts() -> None:
    with engine_that_bears(1) as engine:
        streams = [ask(engine, tier="flex"), ask(engine), ask(engine, continues=True), ask(engine, tier="flex")]
        assert len(engine._listened_ids) == 2
        with pytest.raises(Overloaded):
            ask(engine)
        for stream in streams:
            stream.close()
        wait_for(lambda: not engine._listened_ids and not engine.stats().streams)


@pytest.mark.parametrize(("most", "shed"), [(None, "late"), (1, "full")])
def test_where_nothing_is_known_or_only_a_full_queue_refuses_everybody_is_let_in(most: int | None, shed: Shed) -> None:
    with engine_that_bears(most, shed=shed) as engine:
        streams = [ask(engine) for _ in range(4)]
        for stream in streams:
            stream.close()


def test_a_tenant_below_its_part_is_let_in_beside_one_that_floods() -> None:
    with engine_that_bears(4) as engine:
        streams = [ask(engine, "flood") for _ in range(4)]
        with pytest.raises(Overloaded):
            ask(engine, "flood")
        streams += [ask(engine, "quiet"), ask(engine, "quiet")]
        with pytest.raises(Overloaded):
            ask(engine, "quiet")
        for stream in streams:
            stream.close()


def wait_for(holds: Callable[[], bool]) -> None:
    until = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.001)
