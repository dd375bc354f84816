"""Fair shares: the virtual times alone, and tenants that compete in a loop of the scheduler's steps."""

from __future__ import annotations

from collections import Counter
from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from declaim.engine.blocks import BlockPool
from declaim.engine.fairness import FairShares
from declaim.engine.request import ResolvedSampling
from declaim.engine.scheduler import FLEX_PATIENCE_S, Scheduler, SchedulerLimits
from declaim.engine.sequence import Playback, Prompt, Sequence, SequenceInput
from declaim.engine.spec import FrameRule

RULE = FrameRule(delay=(0,), fill=9, eos=8, drain=((8,),))
SAMPLING = ResolvedSampling(1.0, 0, 1.0, 0.0, 1.0, 1.0, 0, 30.0)
DRAWN = np.array([1], dtype=np.int32)
STEP_S, FRAME_S, FIRST_CHUNK = 0.02, 0.02, 4


class Engine:
    """The scheduler in a loop: every step takes `STEP_S`, and a drawn frame is heard in chunks of four."""

    def __init__(self, *, max_batch: int = 8, num_blocks: int = 10_000) -> None:
        self.scheduler = Scheduler(
            RULE, BlockPool(num_blocks), BlockPool(0), limits=SchedulerLimits(4, max_batch, 4096, max_lead_s=8.0)
        )
        self.now = 0.0
        self.frames: Counter[str] = Counter()  # drawn, by tenant
        self.first_audio_s: dict[int, float] = {}  # after arrival
        self.num_added = 0

    def add(
        self,
        tenant: str,
        *,
        num_frames: int = 100_000,
        weight: float = 1.0,
        tier: Literal["priority", "default", "flex"] = "default",
        paced: bool = True,
        num_prompt: int = 0,
    ) -> Sequence:
        prompt = Prompt((), 0, 0, np.zeros((num_prompt, 1), np.int32), num_frames, 1, 1.0)
        given = SequenceInput(self.num_added, "r", 0, SAMPLING, prompt, self.now, tenant, weight, tier)
        sequence = Sequence(given, RULE, Playback(paced))
        self.num_added += 1
        self.scheduler.add(sequence)
        return sequence

    def step(self, count: int = 1) -> None:
        for _ in range(count):
            batch = self.scheduler.schedule(self.now)
            self.scheduler.launch(batch)
            self.now += STEP_S
            for entry in batch.entries:
                self._draw(entry.sequence)
            self.scheduler.commit(batch, np.tile(DRAWN, (len(batch.drawing), 1)))
            self.scheduler.check_integrity()

    def _draw(self, sequence: Sequence) -> None:
        given, playback = sequence.given, sequence.playback
        self.frames[given.tenant] += 1
        if playback.paced and sequence.num_rows % FIRST_CHUNK == 0:
            if playback.first_audio_at is None:
                playback.first_audio_at = self.now
                self.first_audio_s[sequence.sequence_id] = self.now - given.arrived_at
            playback.delivered_s += FIRST_CHUNK * FRAME_S


@pytest.mark.parametrize("paced", [True, False])
@pytest.mark.parametrize("weights", [{"a": 1.0, "b": 1.0}, {"a": 1.0, "b": 2.0, "c": 5.0}, {"a": 0.5, "b": 0.1}])
def test_under_saturation_frames_follow_the_weights(weights: dict[str, float], paced: bool) -> None:
    engine = Engine(max_batch=8)
    for tenant, weight in weights.items():
        for _ in range(40):
            engine.add(tenant, weight=weight, paced=paced)
    engine.step(400)
    total, share = sum(engine.frames.values()), sum(weights.values())
    assert total == 400 * 8, "no place is empty while somebody waits"
    for tenant, weight in weights.items():
        assert engine.frames[tenant] / total == pytest.approx(weight / share, rel=0.1)


def test_shares_follow_the_weights_with_short_requests_that_come_and_go() -> None:
    engine = Engine(max_batch=8)
    weights = {"a": 1.0, "b": 3.0}
    for _ in range(600):
        num_waiting = Counter(sequence.given.tenant for sequence in engine.scheduler.sequences())
        for tenant, weight in weights.items():
            for i in range(20 - num_waiting[tenant]):
                engine.add(tenant, weight=weight, num_frames=10 + i % 30)
        engine.step()
    assert engine.frames["b"] / engine.frames["a"] == pytest.approx(3.0, rel=0.1)


def test_one_tenant_alone_gets_everything() -> None:
    engine = Engine(max_batch=8)
    for _ in range(20):
        engine.add("a", weight=0.1)
    engine.step(50)
    assert engine.frames == {"a": 400}


def test_what_a_tenant_leaves_of_its_share_goes_to_the_others() -> None:
    engine = Engine(max_batch=8)
    engine.add("a", weight=100.0)
    for _ in range(20):
        engine.add("b")
    engine.step(100)
    assert engine.frames == {"a": 100, "b": 700}


@pytest.mark.parametrize("busy_before", [True, False])
def test_a_tenant_that_was_idle_or_modest_has_no_credit(busy_before: bool) -> None:
    """`b` waited, or asked for one place where it might have had four, for a thousand steps: it gets its half now."""
    engine = Engine(max_batch=8)
    for _ in range(20):
        engine.add("a")
    if busy_before:
        engine.add("b")
    engine.step(1000)
    before = Counter(engine.frames)
    for _ in range(20):
        engine.add("b")
    engine.step(50)
    assert engine.frames["a"] - before["a"] == pytest.approx(200, rel=0.1)


def test_what_was_used_while_nobody_waited_is_not_held_against_anybody() -> None:
    engine = Engine(max_batch=8)
    for _ in range(7):
        engine.add("a")
    engine.add("b")
    engine.step(1000)
    before = Counter(engine.frames)
    for tenant in "ab":
        for _ in range(20):
            engine.add(tenant)
    engine.step(50)
    assert engine.frames["a"] - before["a"] == pytest.approx(200, rel=0.1)


def test_a_flood_does_not_delay_the_first_audio_of_a_quiet_tenant() -> None:
    engine = Engine(max_batch=8)
    for _ in range(200):
        engine.add("flood", num_frames=200)
    engine.step(40)
    for _ in range(10):
        quiet = engine.add("quiet", num_frames=40)
        engine.step(60)
        assert quiet.is_done
        assert engine.first_audio_s[quiet.sequence_id] == pytest.approx(FIRST_CHUNK * STEP_S)


def test_a_quiet_tenant_takes_the_blocks_of_what_the_flood_is_not_playing() -> None:
    """The flood's eight sequences hold all the blocks, and need no more for a while; two of them are heard already."""
    engine = Engine(max_batch=8, num_blocks=8 * 9)
    flood = [engine.add("flood", num_prompt=32) for _ in range(8)]
    engine.step(1)
    for sequence in flood[:2]:
        sequence.playback.first_audio_at, sequence.playback.delivered_s = engine.now, 3.0
    quiet = engine.add("quiet", num_prompt=20, num_frames=1)
    engine.step(2)
    assert quiet.is_done and quiet.num_preemptions == 0
    assert [sequence.num_preemptions for sequence in flood] == [0] * 7 + [1]


def test_two_tenants_that_hold_their_shares_take_nothing_from_each_other() -> None:
    engine = Engine(max_batch=8, num_blocks=8 * 6)
    for tenant in "abab":
        engine.add(tenant, num_prompt=40, num_frames=4)
    engine.add("a", num_prompt=40, num_frames=4)
    engine.add("b", num_prompt=40, num_frames=4)
    while engine.scheduler.num_running + engine.scheduler.num_waiting:
        engine.step()
    assert engine.scheduler.num_preemptions == 0


def test_a_tenant_held_to_its_share_keeps_what_it_plays_from_running_dry() -> None:
    """Four places for a flood that has four streams playing: they stay in time, its new requests wait."""
    engine = Engine(max_batch=8)
    playing = [engine.add("flood") for _ in range(4)]
    for _ in range(8):
        engine.add("other")
    engine.step(20)
    for _ in range(100):
        engine.add("flood")
    engine.step(100)
    assert all(sequence.playback.lead_s(engine.now) >= -FRAME_S * FIRST_CHUNK for sequence in playing)


def test_priority_goes_first_and_flex_last() -> None:
    engine = Engine(max_batch=2)
    flex = engine.add("a", tier="flex")
    default = engine.add("b")
    priority = engine.add("c", tier="priority", num_frames=3)
    engine.step(3)
    assert (flex.num_rows, default.num_rows, priority.num_rows) == (1, 4, 4)
    engine.step(4)
    assert flex.num_rows > 1, "there is room again"


def test_flex_waits_no_longer_than_its_patience_then_shares() -> None:
    engine = Engine(max_batch=2)
    flex = engine.add("a", tier="flex", paced=False)
    for _ in range(8):
        engine.add("b", paced=False)
    engine.step(int(FLEX_PATIENCE_S / STEP_S) - 1)
    assert flex.num_rows == 1
    engine.step(101)
    assert flex.num_rows == pytest.approx(101, abs=2)


def test_yielding_streams_let_flex_go_first() -> None:
    engine = Engine(max_batch=1)
    ahead = engine.add("a", tier="priority")
    engine.step(1)
    ahead.playback.first_audio_at, ahead.playback.delivered_s = engine.now, 60.0
    flex = engine.add("b", tier="flex", num_frames=5)
    engine.step(6)
    assert flex.is_done


tenants = st.builds(
    dict,
    tenant=st.sampled_from("abc"),
    weight=st.sampled_from([0.1, 1.0, 7.0]),
    tier=st.sampled_from(["priority", "default", "flex"]),
    paced=st.booleans(),
    num_frames=st.integers(1, 20),
    num_prompt=st.integers(0, 12),
)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(crowd=st.lists(tenants, min_size=1, max_size=10), spare=st.integers(0, 12), max_batch=st.integers(1, 5))
def test_any_crowd_of_tenants_finishes_and_no_step_is_idle(
    crowd: list[dict[str, object]], spare: int, max_batch: int
) -> None:
    """33 positions at most, nine blocks of four: the pool holds the longest alone and a little more."""
    engine = Engine(max_batch=max_batch, num_blocks=9 + spare)
    for i, options in enumerate(crowd):
        engine.scheduler.check_fits(engine.add(**options))  # type: ignore[arg-type]
        if i % 3 == 2:
            engine.step(5)
    for _ in range(2000):
        if not engine.scheduler.num_running + engine.scheduler.num_waiting:
            break
        before = sum(engine.frames.values())
        engine.step()
        assert sum(engine.frames.values()) > before
    assert engine.scheduler.num_running == engine.scheduler.num_waiting == engine.scheduler.num_blocks_used == 0


def test_the_next_place_goes_to_the_least_virtual_time() -> None:
    shares = FairShares()
    taken = []
    for item in shares.in_turn({"a": [1, 2, 3, 4], "b": [10, 20]}):
        taken.append(item)
        shares.charge("b" if item >= 10 else "a", 1.0 if item >= 10 else 2.0)
    assert taken == [1, 10, 2, 3, 20, 4]


def test_what_is_left_costs_nothing_and_the_queue_goes_on() -> None:
    shares = FairShares()
    assert list(shares.in_turn({"a": [1, 2], "b": [], "c": [3]})) == [1, 2, 3]
    assert shares.time("a") == 0.0


def test_after_a_step_time_starts_at_the_least_of_those_who_wait() -> None:
    shares = FairShares()
    for tenant, count in (("a", 3), ("b", 5), ("c", 9)):
        for _ in range(count):
            shares.charge(tenant, 1.0)
    shares.settle(["b", "c"])
    assert [shares.time(tenant) for tenant in "abcd"] == [5.0, 5.0, 9.0, 5.0]
    shares.settle([])
    assert [shares.time(tenant) for tenant in "abcd"] == [0.0, 0.0, 0.0, 0.0]
