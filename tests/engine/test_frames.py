"""The frame rule against a restatement in plain loops over single codes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from declaim.engine import frames
from declaim.engine.request import ResolvedSampling
from declaim.engine.sequence import Playback, Prompt, Sequence, SequenceInput
from declaim.engine.spec import FrameRule

BOS, EOS, PAD = 1026, 1024, 1025
DIA_DELAY = (0, 8, 9, 10, 11, 12, 13, 14, 15)
DIA = FrameRule(
    delay=DIA_DELAY,
    fill=BOS,
    eos=EOS,
    drain=tuple(tuple(EOS if j == d else PAD if j > d else -1 for d in DIA_DELAY) for j in range(16)),
)
LARK_BOS, LARK_PAD = 1024, 1025
LARK = FrameRule(
    delay=tuple(range(8)),
    fill=LARK_BOS,
    eos=None,
    drain=tuple(tuple(LARK_PAD if d <= j else -1 for d in range(8)) for j in range(7)),
)
SAMPLING = ResolvedSampling(1.0, 0, 1.0, 0.0, 1.0, 1.0, 0, 30.0)


def make_sequence(rule: FrameRule, prompt_frames: NDArray[np.int32], max_frames: int) -> Sequence:
    prompt = Prompt((), 0, 0, prompt_frames, max_frames, 1, 1.0)
    given_ = SequenceInput(0, "r", 0, SAMPLING, prompt, 0.0)
    return Sequence(given_, rule, Playback(paced=False))


def random_codes(seed: int, num_rows: int, num_codebooks: int) -> NDArray[np.int32]:
    return np.random.default_rng(seed).integers(0, 1024, (num_rows, num_codebooks)).astype(np.int32)


def run_to_the_end(sequence: Sequence, drawn: NDArray[np.int32]) -> NDArray[np.int32]:
    """Feed row t of `drawn` as the draw of grid row t. Returns the grid [T, Q]."""
    while not sequence.is_done:
        sequence.append(drawn[sequence.num_rows])
    return np.array(sequence.rows)


def dia_grid(prompt: NDArray[np.int32], drawn: NDArray[np.int32], *, max_new_rows: int) -> list[list[int]]:
    """What the reference decoder makes: forced codes while delay or prompt last, then EOS and PAD by channel."""
    num_prompt = len(prompt)
    grid: list[list[int]] = []
    end: int | None = None
    while end is None or len(grid) < end + 16:
        t = len(grid)
        row = []
        for q, delay in enumerate(DIA_DELAY):
            frame = t - 1 - delay
            if frame < 0:
                row.append(BOS)
            elif frame < num_prompt:
                row.append(int(prompt[frame, q]))
            else:
                row.append(int(drawn[t, q]))
        if t > num_prompt and end is None and (row[0] == EOS or t == num_prompt + max_new_rows - 15):
            end = t
        if end is not None:
            for q, delay in enumerate(DIA_DELAY):
                if t == end + delay:
                    row[q] = EOS
                elif t > end + delay:
                    row[q] = PAD
        grid.append(row)
    return grid


@pytest.mark.parametrize("num_prompt", [0, 1, 3, 14, 15, 16, 40])
@pytest.mark.parametrize("eos_at", [1, 2, 5, 8, 9, 16, 17, 44, 45, 46, None])
def test_dias_grid_is_the_plain_loops_for_every_end_and_prompt(num_prompt: int, eos_at: int | None) -> None:
    max_new_rows = 60
    prompt = random_codes(1, num_prompt, 9)
    drawn = random_codes(2, 200, 9)
    if eos_at is not None:
        drawn[num_prompt + eos_at, 0] = EOS
    sequence = make_sequence(DIA, prompt, max_new_rows - 16)
    grid = run_to_the_end(sequence, drawn)
    assert grid.tolist() == dia_grid(prompt, drawn, max_new_rows=max_new_rows)
    is_stop = eos_at is not None and eos_at <= max_new_rows - 15
    assert sequence.finish_reason == ("stop" if is_stop else "length")


@pytest.mark.parametrize(
    ("eos_at", "rows", "num_frames"), [(5, 21, 4), (20, 36, 19), (2, 18, 1), (1, 17, 0), (None, 61, 44)]
)
def test_dias_lengths_are_those_that_the_reference_was_seen_to_make(
    eos_at: int | None, rows: int, num_frames: int
) -> None:
    drawn = random_codes(3, 200, 9)
    if eos_at is not None:
        drawn[eos_at, 0] = EOS
    sequence = make_sequence(DIA, np.zeros((0, 9), np.int32), 60 - 16)
    run_to_the_end(sequence, drawn)
    assert sequence.num_rows == rows
    assert sequence.max_positions == 60
    assert sequence.num_ready_frames == num_frames
    assert sequence.codes(0, num_frames).shape == (num_frames, 9)


@pytest.mark.parametrize("num_prompt", [0, 2, 22])
def test_frames_are_counted_after_the_prompt(num_prompt: int) -> None:
    drawn = random_codes(4, 200, 9)
    drawn[num_prompt + 30, 0] = EOS
    sequence = make_sequence(DIA, random_codes(5, num_prompt, 9), 100)
    run_to_the_end(sequence, drawn)
    assert sequence.num_ready_frames == 29
    assert sequence.num_rows == num_prompt + 30 + 16


@settings(max_examples=60, deadline=None)
@given(
    which=st.sampled_from([DIA, LARK]),
    num_prompt=st.integers(0, 20),
    num_frames=st.integers(0, 50),
    seed=st.integers(0, 2**32 - 1),
)
def test_undelay_gives_back_the_codes_that_were_delayed(
    which: FrameRule, num_prompt: int, num_frames: int, seed: int
) -> None:
    """Lay any frames out along the delay, feed the rows as draws, and read the frames again, as each becomes whole."""
    if which.eos is None:
        num_prompt, num_frames = 0, num_frames + 1
    everything = random_codes(seed, num_prompt + num_frames, which.num_codebooks)
    drawn = random_codes(seed + 1, num_prompt + num_frames + 40, which.num_codebooks)
    for f in range(num_prompt + num_frames):
        for q, delay in enumerate(which.delay):
            drawn[f + 1 + delay, q] = everything[f, q]
    sequence = make_sequence(which, everything[:num_prompt], 60)
    if which.eos is None:
        sequence.set_num_frames(num_frames)
    else:
        drawn[num_prompt + num_frames + 1, 0] = which.eos
    seen = 0
    while not sequence.is_done:
        sequence.append(drawn[sequence.num_rows])
        ready = sequence.num_ready_frames
        assert ready >= seen
        np.testing.assert_array_equal(sequence.codes(seen, ready), everything[num_prompt + seen : num_prompt + ready])
        seen = ready
    assert seen == num_frames
    np.testing.assert_array_equal(sequence.codes(0, seen), everything[num_prompt:])


@pytest.mark.parametrize("num_frames", [1, 4, 7, 8, 9, 50])
def test_larks_grid_pads_each_codebook_after_its_last_frame(num_frames: int) -> None:
    drawn = random_codes(6, 200, 8)
    sequence = make_sequence(LARK, np.zeros((0, 8), np.int32), 1000)
    sequence.set_num_frames(num_frames)
    grid = run_to_the_end(sequence, drawn)
    assert len(grid) == num_frames + 8
    for t in range(len(grid)):
        for q in range(8):
            frame = t - 1 - q
            expected = LARK_BOS if frame < 0 else LARK_PAD if frame >= num_frames else drawn[t, q]
            assert grid[t, q] == expected, (t, q)
    assert sequence.finish_reason == "stop"
    assert sequence.num_ready_frames == num_frames


def test_a_known_length_is_cut_to_what_the_request_allows() -> None:
    sequence = make_sequence(LARK, np.zeros((0, 8), np.int32), 10)
    sequence.set_num_frames(11)
    run_to_the_end(sequence, random_codes(7, 40, 8))
    assert sequence.num_ready_frames == 10
    assert sequence.finish_reason == "length"


def test_forced_rows_hold_nothing_free_until_the_first_draw() -> None:
    prompt = random_codes(8, 5, 9)
    rows = frames.forced_rows(DIA, prompt)
    assert rows.shape == (5 + 1 + 15, 9)
    assert (rows[:6] != frames.FREE).all()
    assert (rows[6, 0], rows[6, 1]) == (frames.FREE, BOS)
    assert (rows[20] == [frames.FREE] * 8 + [prompt[4, 8]]).all()


def test_an_end_code_on_another_codebook_or_in_a_family_without_one_ends_nothing() -> None:
    drawn = np.full(9, EOS, np.int32)
    assert frames.draws_end(DIA, drawn)
    drawn[0] = 3
    assert not frames.draws_end(DIA, drawn)
    assert not frames.draws_end(LARK, np.full(8, EOS, np.int32))
    assert frames.draws_end(DIA, np.array([[EOS] * 9, [3] * 9])).tolist() == [True, False]


@pytest.mark.parametrize(("num_rows", "ready"), [(1, 0), (16, 0), (17, 1), (40, 24)])
def test_a_frame_is_ready_once_its_last_codebook_has_its_row(num_rows: int, ready: int) -> None:
    assert frames.num_ready_frames(DIA, num_rows, num_prompt_frames=0, end_row=None) == ready
    assert frames.num_ready_frames(DIA, num_rows + 7, num_prompt_frames=7, end_row=None) == ready
