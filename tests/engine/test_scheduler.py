"""The scheduler, driven by hand: plain sequences, a clock that is a number, and no tensor anywhere."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from declaim.engine.batch import Batch
from declaim.engine.blocks import BlockPool
from declaim.engine.errors import TooLong
from declaim.engine.request import ResolvedSampling
from declaim.engine.scheduler import Scheduler, SchedulerLimits
from declaim.engine.sequence import Playback, Prompt, Sequence, SequenceInput
from declaim.engine.spec import FrameRule

RULE = FrameRule(delay=(0, 1), fill=9, eos=8, drain=((8, -1), (8, 8)))
SAMPLING = ResolvedSampling(1.0, 0, 1.0, 0.0, 1.0, 1.0, 0, 30.0)
DRAWN = np.array([1, 2], dtype=np.int32)


def make_sequence(
    sequence_id: int,
    *,
    num_frames: int = 10,
    num_prompt: int = 0,
    prefix_len: int = 0,
    cross_len: int = 0,
    num_branches: int = 1,
    playback: Playback | None = None,
    segment: int = 0,
    arrived_at: float = 0.0,
    rule: FrameRule = RULE,
) -> Sequence:
    prompt = Prompt((), prefix_len, cross_len, np.zeros((num_prompt, 2), np.int32), num_frames, num_branches, 1.0)
    return Sequence(
        SequenceInput(sequence_id, f"r{sequence_id}", segment, SAMPLING, prompt, arrived_at),
        rule,
        playback or Playback(paced=False),
    )


def listener(lead_s: float | None, *, now: float = 0.0) -> Playback:
    """Somebody who listens: before the first audio (None), or with so many seconds in hand at `now`."""
    if lead_s is None:
        return Playback(paced=True)
    return Playback(paced=True, first_audio_at=now, delivered_s=lead_s)


def make_scheduler(
    num_blocks: int = 1000,
    *,
    rule: FrameRule = RULE,
    num_cross_blocks: int = 100,
    block_size: int = 4,
    max_batch: int = 8,
    max_step_positions: int = 64,
    max_lead_s: float = 8.0,
    scan_block: int = 1,
) -> Scheduler:
    return Scheduler(
        rule,
        BlockPool(num_blocks),
        BlockPool(num_cross_blocks),
        limits=SchedulerLimits(block_size, max_batch, max_step_positions, max_lead_s, scan_block=scan_block),
    )


def drawn_by(batch: Batch) -> NDArray[np.int32]:
    return np.tile(DRAWN, (len(batch.drawing), 1))


@dataclass
class Driver:
    """Runs steps and checks at each one what must always hold."""

    scheduler: Scheduler
    limits: SchedulerLimits
    steps: list[dict[int, int]] = field(default_factory=list)  # positions by sequence id, in the order of the entries

    @classmethod
    def of(cls, scheduler: Scheduler) -> Driver:
        return cls(scheduler, scheduler._limits)

    def step(self, now: float = 0.0) -> Batch:
        batch = self.scheduler.schedule(now)
        self.check(batch)
        self.scheduler.launch(batch)
        self.scheduler.commit(batch, drawn_by(batch))
        self.scheduler.check_integrity()
        self.steps.append({entry.sequence.sequence_id: entry.num_positions for entry in batch.entries})
        return batch

    def check(self, batch: Batch) -> None:
        entries = batch.entries
        assert len({entry.sequence.sequence_id for entry in entries}) == len(entries) <= self.limits.max_batch
        cost = sum(entry.num_positions * entry.sequence.num_branches for entry in entries)
        scan_block = self.limits.scan_block
        beyond = 0 if scan_block == 1 else scan_block * max((e.sequence.num_branches for e in entries), default=0)
        assert cost <= self.limits.max_step_positions + beyond
        owned: list[int] = []
        for entry in entries:
            sequence = entry.sequence
            assert 1 <= entry.num_positions <= sequence.num_pending
            assert len(sequence.block_tables) == sequence.num_branches
            for table in sequence.block_tables:
                # Every branch has room for the step: guidance branches are never apart.
                assert len(table) * self.limits.block_size >= sequence.num_cached + entry.num_positions
        for sequence in self.scheduler.sequences():
            owned += [block for table in sequence.block_tables for block in table]
        assert len(set(owned)) == len(owned)

    def run_out(self, *, max_steps: int = 100_000) -> None:
        """Step until nothing is left."""
        for _ in range(max_steps):
            if not self.scheduler.num_running and not self.scheduler.num_waiting:
                assert self.scheduler.num_blocks_used == 0
                return
            assert self.step().entries, "a step ran nobody although somebody is there"
        raise AssertionError(f"not done after {max_steps} steps")


def ids(batch: Batch) -> list[int]:
    return [entry.sequence.sequence_id for entry in batch.entries]


def test_streams_without_audio_go_first_then_the_driest_then_those_nobody_listens_to() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_sequence(0))
    scheduler.add(make_sequence(1, playback=listener(7.0)))
    scheduler.add(make_sequence(2, playback=listener(None), arrived_at=2.0))
    scheduler.add(make_sequence(3, playback=listener(1.0)))
    scheduler.add(make_sequence(4, playback=listener(None), arrived_at=1.0))
    scheduler.add(make_sequence(5, playback=listener(-1.0)))
    scheduler.add(make_sequence(6, arrived_at=-1.0))
    assert ids(scheduler.schedule(0.0)) == [4, 2, 5, 3, 1, 6, 0]


def test_later_segments_of_a_request_come_after_its_first() -> None:
    scheduler = make_scheduler()
    playback = listener(None)
    for segment in (2, 1, 0):
        scheduler.add(make_sequence(segment, playback=playback, segment=segment))
    scheduler.add(make_sequence(9, playback=listener(3.0)))
    assert ids(scheduler.schedule(0.0)) == [0, 1, 9, 2]


def test_a_lead_shrinks_as_time_passes() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_sequence(0, playback=listener(5.0, now=0.0)))
    scheduler.add(make_sequence(1, playback=listener(3.0, now=10.0)))
    assert ids(scheduler.schedule(10.0)) == [0, 1]


def test_a_stream_far_ahead_yields_to_any_other_and_runs_when_it_is_alone() -> None:
    driver = Driver.of(make_scheduler())
    ahead = make_sequence(0, playback=listener(8.5))
    driver.scheduler.add(ahead)
    assert ids(driver.step()) == [0]
    driver.scheduler.add(make_sequence(1, num_frames=2))
    for _ in range(4):
        assert ids(driver.step()) == [1]
    assert ids(driver.step()) == [0]
    driver.scheduler.add(make_sequence(2, num_frames=30))
    assert ids(driver.step()) == [2]
    assert ids(driver.step(now=0.6)) == [0, 2], "its lead has fallen below the limit"


def test_streams_far_ahead_give_their_blocks_to_one_that_waits() -> None:
    driver = Driver.of(make_scheduler(num_blocks=6))
    ahead = make_sequence(0, num_frames=20, playback=listener(None))
    driver.scheduler.add(ahead)
    for _ in range(17):
        driver.step()
    ahead.playback.first_audio_at, ahead.playback.delivered_s = 0.0, 100.0
    driver.scheduler.add(make_sequence(1, num_frames=3, num_prompt=8))
    assert ids(driver.step()) == [1]
    assert ahead.num_preemptions == 1
    driver.run_out()


def test_a_listener_takes_the_place_of_what_nobody_listens_to() -> None:
    driver = Driver.of(make_scheduler(max_batch=2))
    for i in range(4):
        driver.scheduler.add(make_sequence(i, num_frames=20))
    assert ids(driver.step()) == [0, 1]
    driver.scheduler.add(make_sequence(9, num_frames=2, playback=listener(None)))
    for _ in range(4):
        assert ids(driver.step()) == [9, 0]
    assert ids(driver.step()) == [0, 1], "what waited goes on with the blocks it had"
    assert driver.scheduler.num_preemptions == 0


def test_a_listener_takes_the_blocks_of_what_nobody_listens_to() -> None:
    driver = Driver.of(make_scheduler(num_blocks=5))
    driver.scheduler.add(make_sequence(0, num_frames=15))
    for _ in range(15):
        driver.step()
    driver.scheduler.add(make_sequence(1, num_frames=3, num_prompt=8, playback=listener(None)))
    assert ids(driver.step()) == [1]
    assert driver.scheduler.num_preemptions == 1
    driver.run_out()


def test_the_far_segments_of_a_long_text_leave_places_to_others() -> None:
    driver = Driver.of(make_scheduler(max_batch=4))
    long_text = listener(1.0)
    for i in range(12):
        driver.scheduler.add(make_sequence(i, num_frames=40, playback=long_text, segment=i))
    assert ids(driver.step()) == [0, 1, 2, 3]
    driver.scheduler.add(make_sequence(20, num_frames=4, playback=listener(None)))
    assert ids(driver.step()) == [20, 0, 1, 2]


def test_those_admitted_in_one_step_do_not_count_on_the_same_blocks() -> None:
    driver = Driver.of(make_scheduler(num_blocks=6))
    for i in range(3):
        driver.scheduler.add(make_sequence(i, num_frames=2, num_prompt=9))
    assert ids(driver.step()) == [0, 1]
    assert driver.scheduler.num_waiting == 1
    assert driver.scheduler.num_preemptions == 0
    driver.run_out()


def test_a_sequence_joins_at_the_next_step_and_leaves_the_step_it_is_done() -> None:
    driver = Driver.of(make_scheduler())
    short, long = make_sequence(0, num_frames=1), make_sequence(1, num_frames=6)
    driver.scheduler.add(long)
    assert ids(driver.step()) == [1]
    driver.scheduler.add(short)
    for _ in range(short.max_positions):
        assert sorted(ids(driver.step())) == [0, 1]
    assert short.is_done
    assert driver.scheduler.num_running == 1
    assert driver.scheduler.num_blocks_used == sum(len(table) for table in long.block_tables)
    assert ids(driver.step()) == [1]


def test_a_place_that_becomes_free_is_taken_at_the_next_step() -> None:
    driver = Driver.of(make_scheduler(max_batch=2))
    for i in range(4):
        driver.scheduler.add(make_sequence(i, num_frames=1 + i))
    driver.run_out()
    steps_of = [sum(i in step for step in driver.steps) for i in range(4)]
    assert steps_of == [3, 4, 5, 6]
    assert len(driver.steps) == 3 + 1 + 6, "the last starts when the second leaves, after four steps"


def test_a_long_prompt_never_delays_a_decoder_and_takes_the_rest_of_every_step() -> None:
    driver = Driver.of(make_scheduler(max_step_positions=64))
    for i in range(5):
        driver.scheduler.add(make_sequence(i, num_frames=200))
    driver.step()
    driver.scheduler.add(make_sequence(9, num_prompt=999, num_frames=50, playback=listener(None)))
    prefill_steps = 0
    while True:
        batch = driver.step()
        positions = driver.steps[-1]
        assert all(positions[i] == 1 for i in range(5))
        assert batch.entries[0].sequence.sequence_id == 9
        prefill_steps += 1
        if prefill_steps * 59 >= 1000:
            break
        assert positions[9] == 59
        assert not batch.entries[0].draws
    assert driver.steps[-1][9] == 1000 - 59 * 16
    assert driver.step().entries[0].num_positions == 1


def test_a_step_too_small_for_everybody_runs_the_most_urgent_first_even_before_its_first_draw() -> None:
    """Six decoders of two branches would fill a step of eight positions on their own."""
    driver = Driver.of(make_scheduler(max_step_positions=8))
    for i in range(6):
        driver.scheduler.add(make_sequence(i, num_branches=2, num_frames=50))
    driver.step()
    assert ids(driver.step()) == [0, 1, 2, 3]
    driver.scheduler.add(make_sequence(9, num_branches=2, num_prompt=5, playback=listener(None)))
    for _ in range(6):
        assert ids(driver.step()) == [9, 0, 1, 2]
    (newest,) = (sequence for sequence in driver.scheduler.sequences() if sequence.sequence_id == 9)
    assert newest.num_rows == 7


def test_both_branches_of_a_guided_sequence_are_counted_and_held() -> None:
    driver = Driver.of(make_scheduler(max_step_positions=7))
    guided = make_sequence(0, num_branches=2, num_prompt=9)
    driver.scheduler.add(guided)
    for expected in (3, 3, 3, 1):
        driver.step()
        assert driver.steps[-1] == {0: expected}
        assert len(guided.block_tables[0]) == len(guided.block_tables[1])
    assert not set(guided.block_tables[0]) & set(guided.block_tables[1])


def test_the_least_urgent_is_preempted_and_starts_again_with_all_it_had() -> None:
    driver = Driver.of(make_scheduler(num_blocks=8))
    urgent = make_sequence(0, num_frames=24, playback=listener(None))
    middle = make_sequence(1, num_frames=24, playback=listener(1.0))
    last = make_sequence(2, num_frames=24)
    for sequence in (last, middle, urgent):
        driver.scheduler.add(sequence)
    while not driver.scheduler.num_preemptions:
        driver.step()
    assert (urgent.num_preemptions, middle.num_preemptions, last.num_preemptions) == (0, 0, 1)
    assert last.num_cached == 0
    assert not last.is_admitted
    rows = list(last.rows)
    driver.run_out()
    np.testing.assert_array_equal(last.rows[: len(rows)], rows)
    assert urgent.num_preemptions == 0
    first_steps = [next(i for i, step in reversed(list(enumerate(driver.steps))) if k in step) for k in range(3)]
    assert first_steps[0] <= first_steps[1] <= first_steps[2]


@dataclass(frozen=True)
class Plan:
    num_frames: int
    num_prompt: int
    prefix_len: int
    cross_len: int
    num_branches: int
    lead_s: float | None
    is_paced: bool
    arrives_at_step: int
    leaves_at_step: int | None
    ends_at_row: int | None

    def draws(self, row: int) -> NDArray[np.int32]:
        return np.array([RULE.eos if row == self.ends_at_row else row % 7, self.num_frames % 7], dtype=np.int32)


plans = st.builds(
    Plan,
    num_frames=st.integers(1, 20),
    num_prompt=st.integers(0, 12),
    prefix_len=st.integers(0, 9),
    cross_len=st.integers(0, 9),
    num_branches=st.integers(1, 2),
    lead_s=st.none() | st.floats(-5, 20),
    is_paced=st.booleans(),
    arrives_at_step=st.integers(0, 30),
    leaves_at_step=st.none() | st.integers(0, 40),
    ends_at_row=st.none() | st.integers(2, 30),
)


def sequence_of(plan: Plan, sequence_id: int, *, rule: FrameRule = RULE) -> Sequence:
    return make_sequence(
        sequence_id,
        rule=rule,
        num_frames=plan.num_frames,
        num_prompt=plan.num_prompt,
        prefix_len=plan.prefix_len,
        cross_len=plan.cross_len,
        num_branches=plan.num_branches,
        playback=listener(plan.lead_s) if plan.is_paced else None,
        arrived_at=float(plan.arrives_at_step),
    )


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    crowd=st.lists(plans, min_size=1, max_size=8),
    block_size=st.integers(1, 8),
    max_batch=st.integers(1, 6),
    max_step_positions=st.integers(2, 40),
    spare_blocks=st.integers(0, 30),
)
def test_everything_finishes_with_any_number_of_blocks_that_fits_each_alone(
    crowd: list[Plan], block_size: int, max_batch: int, max_step_positions: int, spare_blocks: int
) -> None:
    """Arrivals, cancellations and moving clocks included; the most urgent running sequence moves at every step."""
    sequences = [sequence_of(plan, i) for i, plan in enumerate(crowd)]
    least = max(-(-sequence.max_positions // block_size) * sequence.num_branches for sequence in sequences)
    scheduler = make_scheduler(
        least + spare_blocks,
        num_cross_blocks=-(-9 // block_size),
        block_size=block_size,
        max_batch=max_batch,
        max_step_positions=max_step_positions,
    )
    driver = Driver.of(scheduler)
    for step in range(41):
        for plan, sequence in zip(crowd, sequences, strict=True):
            if plan.arrives_at_step == step:
                scheduler.check_fits(sequence)
                scheduler.add(sequence)
            if plan.leaves_at_step == step:
                scheduler.remove(sequence)
                scheduler.check_integrity()
                assert sequence.block_tables == sequence.cross_blocks == []
        assert_the_most_urgent_moves(driver, now=step * 0.1)
    for _ in range(2000):
        if not scheduler.num_running and not scheduler.num_waiting:
            break
        assert_the_most_urgent_moves(driver, now=4.0)
    assert scheduler.num_running == scheduler.num_waiting == scheduler.num_blocks_used == 0
    for plan, sequence in zip(crowd, sequences, strict=True):
        assert sequence.is_done or plan.leaves_at_step is not None


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    crowd=st.lists(plans, min_size=1, max_size=8),
    block_size=st.integers(1, 8),
    max_batch=st.integers(1, 6),
    max_step_positions=st.integers(2, 40),
    spare_blocks=st.integers(0, 30),
    rule=st.sampled_from([RULE, replace(RULE, drain=())]),
)
def test_committing_a_step_late_gives_every_sequence_the_same_rows_in_the_same_order(
    crowd: list[Plan], block_size: int, max_batch: int, max_step_positions: int, spare_blocks: int, rule: FrameRule
) -> None:
    """As beside a GPU: the next step is planned and launched before the codes of the last one are known."""
    sequences = [sequence_of(plan, i, rule=rule) for i, plan in enumerate(crowd)]
    least = max(-(-sequence.max_positions // block_size) * sequence.num_branches for sequence in sequences)
    scheduler = make_scheduler(
        least + spare_blocks,
        rule=rule,
        num_cross_blocks=-(-9 // block_size),
        block_size=block_size,
        max_batch=max_batch,
        max_step_positions=max_step_positions,
    )
    driver = Driver.of(scheduler)
    for sequence in sequences:
        scheduler.add(sequence)
    gone, finished = set(), list[int]()
    launched: Batch | None = None
    for step in range(3000):
        if not (scheduler.num_running or scheduler.num_waiting or launched):
            break
        for plan, sequence in zip(crowd, sequences, strict=True):
            if plan.leaves_at_step == step:
                scheduler.remove(sequence)
                gone.add(sequence.sequence_id)
        batch = scheduler.schedule(step * 0.1)
        driver.check(batch)
        for entry in batch.entries:
            # A row in flight can be fed to the very next step alone, and only by itself.
            assert entry.sequence.num_in_flight <= (entry.num_positions == 1)
        assert batch.entries or launched, "nobody runs and nobody is on the way, although somebody is there"
        scheduler.launch(batch)
        if launched is not None:
            drawn = [crowd[entry.sequence.sequence_id].draws(entry.sequence.num_rows) for entry in launched.drawing]
            done = scheduler.commit(launched, np.array(drawn, dtype=np.int32).reshape(-1, rule.num_codebooks))
            assert all(sequence.is_done for sequence in done)
            finished += [sequence.sequence_id for sequence in done]
            scheduler.check_integrity()
        launched = batch if batch.entries else None
    assert scheduler.num_running == scheduler.num_waiting == scheduler.num_blocks_used == 0
    for plan, sequence in zip(crowd, sequences, strict=True):
        if sequence.sequence_id in gone:
            continue
        alone = sequence_of(plan, sequence.sequence_id, rule=rule)
        while not alone.is_done:
            alone.append(plan.draws(alone.num_rows))
        assert finished.count(sequence.sequence_id) == 1
        assert sequence.is_done and sequence.num_in_flight == 0
        assert np.array_equal(sequence.rows, alone.rows)


def assert_the_most_urgent_moves(driver: Driver, *, now: float) -> None:
    is_anybody_there = driver.scheduler.num_running + driver.scheduler.num_waiting > 0
    batch = driver.step(now)
    assert bool(batch.entries) == is_anybody_there
    admitted = [sequence for sequence in driver.scheduler.sequences() if sequence.is_admitted]
    running = {id(sequence): sequence for sequence in (*admitted, *(entry.sequence for entry in batch.entries))}
    if batch.entries:
        most_urgent = min(running.values(), key=lambda sequence: rank(sequence, now, max_lead_s=8.0))
        assert batch.entries[0].sequence is most_urgent


def rank(sequence: Sequence, now: float, *, max_lead_s: float) -> tuple[int, float, float, int]:
    """The order among one tenant's sequences, said again without memory of earlier steps."""
    playback, given = sequence.playback, sequence.given
    if not playback.paced:
        return (2, given.arrived_at, given.segment, given.sequence_id)
    if playback.first_audio_at is None and given.segment == playback.segment:
        return (0, given.arrived_at, given.segment, given.sequence_id)
    slack_s = playback.lead_s(now) + 2.0 * (given.segment - playback.segment)
    return (3 if slack_s > max_lead_s else 1, slack_s, given.segment, given.sequence_id)


def test_a_cancelled_sequence_frees_its_blocks_wherever_it_is() -> None:
    driver = Driver.of(make_scheduler(max_batch=1))
    running, waiting = make_sequence(0, num_branches=2, cross_len=5), make_sequence(1)
    driver.scheduler.add(running)
    driver.scheduler.add(waiting)
    driver.step()
    assert driver.scheduler.num_blocks_used == 2 + 2
    driver.scheduler.remove(waiting)
    driver.scheduler.remove(running)
    driver.scheduler.remove(running)
    assert driver.scheduler.num_running == driver.scheduler.num_waiting == driver.scheduler.num_blocks_used == 0
    assert driver.scheduler.schedule(0.0).entries == ()


def test_a_leak_is_found() -> None:
    scheduler = make_scheduler()
    sequence = make_sequence(0)
    scheduler.add(sequence)
    scheduler.schedule(0.0)
    scheduler.check_integrity()
    sequence.block_tables[0].pop()
    with pytest.raises(RuntimeError, match="leaked"):
        scheduler.check_integrity()


def test_a_sequence_that_can_never_fit_is_refused_with_the_numbers_and_the_remedy() -> None:
    scheduler = make_scheduler(10, num_cross_blocks=2, max_step_positions=2)
    scheduler.check_fits(make_sequence(0, num_frames=37, cross_len=8, num_branches=1))
    # 37 frames take rows 0 .. 39, of which the last is never fed back: 39 positions, ten blocks of four.
    with pytest.raises(TooLong, match=r"41 positions in 1 branches \(11 blocks\), and the cache has 10: lower max_s"):
        scheduler.check_fits(make_sequence(0, num_frames=39))
    with pytest.raises(TooLong, match=r"in 2 branches .* turn guidance off, or start the engine with more memory_gb"):
        scheduler.check_fits(make_sequence(0, num_frames=30, num_branches=2))
    with pytest.raises(TooLong, match=r"9 positions \(3 blocks\) of cross-attention cache, which has 2: shorten the"):
        scheduler.check_fits(make_sequence(0, cross_len=9))
    with pytest.raises(TooLong, match="a step of 2 positions cannot hold 3 branches: raise max_step_positions"):
        scheduler.check_fits(make_sequence(0, num_frames=1, num_branches=3))


@pytest.mark.parametrize("num_running", [256, 512])
def test_scheduling_256_of_the_running_sequences_takes_less_than_before_ranks_were_kept(num_running: int) -> None:
    """50 us if all run and 90 if half have to wait, on a busy machine; before ranks were kept it was 700 and more."""
    scheduler = make_scheduler(100_000, max_batch=256, max_step_positions=512, max_lead_s=1000.0)
    driver = Driver.of(scheduler)
    for i in range(num_running):
        scheduler.add(make_sequence(i, num_frames=5000, playback=listener(float(i % 7))))
    driver.step()
    times = []
    for _ in range(60):
        begin = time.perf_counter()
        batch = scheduler.schedule(1.0)
        times.append(time.perf_counter() - begin)
        assert len(batch.entries) == 256
        scheduler.launch(batch)
        scheduler.commit(batch, drawn_by(batch))
    assert min(times) < 6e-4, times


@pytest.mark.parametrize("max_step_positions", [8, 20, 33, 64, 300])
@pytest.mark.parametrize("num_branches", [1, 2])
def test_a_prompt_is_never_cut_between_the_positions_of_a_block_and_always_comes_to_its_end(
    max_step_positions: int, num_branches: int
) -> None:
    """Also where the others leave less room than a block has, and where it is computed again."""
    scheduler = make_scheduler(
        num_blocks=26 * num_branches, max_batch=4, max_step_positions=max_step_positions, scan_block=16
    )
    sequences = [
        make_sequence(i, prefix_len=prefix_len, num_frames=12, num_branches=num_branches)
        for i, prefix_len in enumerate((3, 15, 16, 40, 50, 31))
    ]
    for sequence in sequences:
        scheduler.add(sequence)
    driver, num_cuts = Driver.of(scheduler), 0
    for _ in range(600):
        if not (scheduler.num_running or scheduler.num_waiting):
            break
        for entry in driver.step().entries:
            num_cached = entry.sequence.num_cached
            if 0 < num_cached < entry.sequence.num_blocked(16):
                assert num_cached % 16 == 0
                num_cuts += 1
    assert all(sequence.is_done for sequence in sequences)
    assert scheduler.num_preemptions > 0
    assert bool(num_cuts) == (max_step_positions < 300)
