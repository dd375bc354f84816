"""The chunk planner: the same cuts whenever it is asked."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from declaim.engine.chunks import ChunkPlanner, ChunkPolicy, Cut
from declaim.engine.spec import CodecSpec


def codec(left: int, right: int) -> CodecSpec:
    return CodecSpec(24000, 480, left=left, right=right, num_codebooks=8, codebook_size=1024)


policies = st.builds(lambda first, more: ChunkPolicy(first, first + more), st.integers(1, 20), st.integers(0, 90))
codecs = st.builds(codec, st.integers(0, 12), st.integers(0, 12))


def all_at_once(policy: ChunkPolicy, spec: CodecSpec, num_frames: int) -> list[Cut]:
    return ChunkPlanner(policy, spec).ready(num_frames, is_done=True)


@given(policy=policies, spec=codecs, num_frames=st.integers(0, 300), data=st.data())
def test_any_schedule_of_calls_gives_the_same_cuts(
    policy: ChunkPolicy, spec: CodecSpec, num_frames: int, data: st.DataObject
) -> None:
    calls = sorted(data.draw(st.lists(st.integers(0, num_frames), max_size=30)))
    planner = ChunkPlanner(policy, spec)
    cuts: list[Cut] = []
    for num_ready in calls:
        new = planner.ready(num_ready, is_done=False)
        assert all(cut.context_last <= num_ready and not cut.is_last for cut in new)
        cuts += new
    cuts += planner.ready(num_frames, is_done=True)
    assert cuts == all_at_once(policy, spec, num_frames)
    assert planner.is_finished
    assert planner.ready(num_frames, is_done=True) == []


@given(policy=policies, spec=codecs, num_frames=st.integers(0, 300))
def test_cuts_tile_the_frames_and_each_has_its_whole_context(
    policy: ChunkPolicy, spec: CodecSpec, num_frames: int
) -> None:
    cuts = all_at_once(policy, spec, num_frames)
    assert [cut.index for cut in cuts] == list(range(len(cuts)))
    assert [cut.is_last for cut in cuts] == [False] * (len(cuts) - 1) + [True]
    edge = 0
    for cut in cuts:
        assert cut.first == edge
        edge = cut.last
        assert cut.context_first == max(0, cut.first - spec.left)
        assert cut.context_last == min(num_frames, cut.last + spec.right)
        if not cut.is_last:
            assert cut.last - cut.first == policy.length(cut.index)
    assert edge == num_frames
    assert num_frames == 0 or cuts[-1].last > cuts[-1].first


@given(policy=policies, spec=codecs, num_frames=st.integers(1, 300))
def test_a_window_is_cut_in_the_call_that_brings_its_last_needed_frame(
    policy: ChunkPolicy, spec: CodecSpec, num_frames: int
) -> None:
    planner = ChunkPlanner(policy, spec)
    for num_ready in range(num_frames + 1):
        for cut in planner.ready(num_ready, is_done=False):
            assert num_ready == cut.last + max(1, spec.right)


def test_no_frame_gives_one_empty_last_cut() -> None:
    planner = ChunkPlanner(ChunkPolicy(4, 16), codec(10, 10))
    assert planner.ready(0, is_done=False) == []
    assert planner.ready(0, is_done=True) == [Cut(0, 0, 0, 0, 0, is_last=True)]
    assert planner.is_finished


def test_frames_that_end_with_a_window_leave_no_empty_window_behind() -> None:
    cuts = all_at_once(ChunkPolicy(4, 16), codec(0, 0), 4 + 4 + 8)
    assert [(cut.first, cut.last, cut.is_last) for cut in cuts] == [(0, 4, False), (4, 8, False), (8, 16, True)]


def test_windows_double_in_pairs_up_to_the_largest() -> None:
    policy = ChunkPolicy(3, 40)
    assert [policy.length(i) for i in range(10)] == [3, 3, 6, 6, 12, 12, 24, 24, 40, 40]
    assert policy.length(10**6) == 40


@pytest.mark.parametrize("right", [0, 4, 10])
def test_a_stream_made_half_again_as_fast_as_it_plays_never_runs_dry(right: int) -> None:
    """In frames: played one a tick from the first window on, made 1.5 a tick, decoded in no time."""
    planner, speed = ChunkPlanner(ChunkPolicy(4, 32), codec(0, right)), 1.5
    cuts = [cut for made in range(1000) for cut in planner.ready(made, is_done=False)]
    came_at = [(cut.last + max(1, right)) / speed for cut in cuts]
    played_out_at = [came_at[0] + cut.last for cut in cuts]
    assert len(cuts) > 30
    assert all(came <= played_out + 1e-9 for came, played_out in zip(came_at[1:], played_out_at, strict=False))


@pytest.mark.parametrize(
    ("first_s", "max_s", "expected"),
    [(0.16, 1.28, ChunkPolicy(8, 64)), (0.001, 0.002, ChunkPolicy(1, 1)), (2.0, 1.0, ChunkPolicy(100, 100))],
)
def test_seconds_become_frames(first_s: float, max_s: float, expected: ChunkPolicy) -> None:
    assert ChunkPolicy.from_seconds(codec(0, 0), first_s=first_s, max_s=max_s) == expected
