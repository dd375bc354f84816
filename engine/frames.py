"""The frame rule: from drawn codes to the rows of the grid, and from rows to frames. numpy and integers only.

Everything here is a function of a `FrameRule` table; nothing knows a model's name or holds state.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from declaim.engine.spec import FrameRule

FREE = -1


def forced_rows(rule: FrameRule, prompt_frames: NDArray[np.int32]) -> NDArray[np.int32]:
    """The codes that are known before anything is drawn.

    prompt_frames: [P, Q]. Returns int32 [P + 1 + max_delay, Q]: `fill` before a codebook's first frame, the prompt's
    codes while they last, FREE where a code will be drawn. Rows 0 .. P hold no FREE.
    """
    num_prompt = len(prompt_frames)
    frame = np.arange(num_prompt + 1 + rule.max_delay)[:, None] - 1 - np.array(rule.delay)
    rows = np.full(frame.shape, FREE, dtype=np.int32)
    rows[frame < 0] = rule.fill
    t, q = np.nonzero((frame >= 0) & (frame < num_prompt))
    rows[t, q] = prompt_frames[frame[t, q], q]
    return rows


def next_row(
    rule: FrameRule, drawn: NDArray[np.int32], row: int, *, end_row: int | None, forced: NDArray[np.int32]
) -> NDArray[np.int32]:
    """The codes of `row`: what was drawn, overwritten by the drain table from `end_row` on and by forced codes.

    drawn: [Q]; forced: from `forced_rows`. Returns a new [Q].
    """
    codes = drawn
    if end_row is not None:
        drain = np.array(rule.drain[row - end_row], dtype=np.int32)
        codes = np.where(drain >= 0, drain, codes)
    if row < len(forced):
        codes = np.where(forced[row] != FREE, forced[row], codes)
    return codes.astype(np.int32)


def draws_end(rule: FrameRule, drawn: NDArray[np.int32]) -> NDArray[np.bool_]:
    """Whether drawn codes end the audio. drawn: [..., Q]. Returns [...]."""
    if rule.eos is None:
        return np.zeros(drawn.shape[:-1], dtype=np.bool_)
    return np.equal(drawn[..., rule.eos_codebook], rule.eos)


def num_ready_frames(rule: FrameRule, num_rows: int, *, num_prompt_frames: int, end_row: int | None) -> int:
    """How many new frames are whole in a grid of `num_rows` rows (the prompt's frames do not count)."""
    ready = num_rows - 1 - rule.max_delay
    if end_row is not None:
        ready = min(ready, end_row - 1)
    return max(0, ready - num_prompt_frames)


def num_rows_for(rule: FrameRule, num_frames: int, *, num_prompt_frames: int) -> int:
    """How many rows a grid has at least when so many new frames are whole."""
    return num_prompt_frames + num_frames + 1 + rule.max_delay


def undelay(rule: FrameRule, rows: NDArray[np.int32]) -> NDArray[np.int32]:
    """The frames in a piece of a grid, whose first row is where the first of them begins.

    rows: [num_frames + max_delay, Q]. Returns [num_frames, Q].
    """
    frames = np.arange(len(rows) - rule.max_delay)[:, None] + np.array(rule.delay)
    codes: NDArray[np.int32] = rows[frames, np.arange(rule.num_codebooks)]
    return codes
