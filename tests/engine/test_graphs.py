"""The device's copy of a sequence's state moves on as the host's does, for every family's frame rule."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from declaim.engine.graphs import Seats
from declaim.engine.request import ResolvedSampling
from declaim.engine.sequence import Playback, Prompt, Sequence, SequenceInput
from declaim.engine.spec import FrameRule, ModelSpec
from tests.fakes import FakeModel

DIA_DELAY = (0, 2, 3, 5)
EOS, PAD, FILL = 10, 11, 12
RULES = {
    "dia": FrameRule(
        delay=DIA_DELAY,
        fill=FILL,
        eos=EOS,
        drain=tuple(tuple(EOS if j == d else PAD if j > d else -1 for d in DIA_DELAY) for j in range(6)),
    ),
    "no drain": FrameRule(delay=(0, 0, 0, 0), fill=FILL, eos=EOS, drain=()),
    "known length": FrameRule(
        delay=(0, 1, 2, 3),
        fill=FILL,
        eos=None,
        drain=tuple(tuple(PAD if d <= j else -1 for d in range(4)) for j in range(3)),
    ),
}


def spec_of(rule: FrameRule) -> ModelSpec:
    return dataclasses.replace(FakeModel().spec, rule=rule)


def make_sequence(i: int, rule: FrameRule, *, num_prompt: int, max_frames: int, sampling: ResolvedSampling) -> Sequence:
    frames = np.arange(num_prompt * 4, dtype=np.int32).reshape(num_prompt, 4) % EOS
    prompt = Prompt((1, 2), 3, 0, frames, max_frames, num_branches=2, speed=1.0)
    return Sequence(SequenceInput(i, "r", 0, sampling, prompt, 0.0), rule, Playback(paced=False))


@pytest.mark.parametrize("name", RULES)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_seats_hold_the_rows_that_the_sequences_do(name: str, data: st.DataObject) -> None:
    rule = RULES[name]
    model = FakeModel()
    sampling = ResolvedSampling(1.0, 0, 1.0, 0.0, 1.0, 1.0, 0, 30.0)
    seats = Seats(spec_of(rule), 5, device=model.device, dtype=model.dtype)
    sequences = [
        make_sequence(
            i,
            rule,
            num_prompt=data.draw(st.integers(0, 4)),
            max_frames=data.draw(st.integers(1, 8)),
            sampling=sampling,
        )
        for i in range(3)
    ]
    if rule.eos is None:
        for sequence in sequences:
            sequence.set_num_frames(data.draw(st.integers(1, 9)))
    where = [4, 0, 2]
    for seat, sequence in zip(where, sequences, strict=True):
        seats.take(seat, sequence, None)
    random = np.random.default_rng(data.draw(st.integers(0, 1000)))
    for _ in range(30):
        moving = [i for i, sequence in enumerate(sequences) if not sequence.is_done and random.random() < 0.8]
        if not moving:
            continue
        drawn = random.integers(0, EOS + 1, (len(moving) + 1, 4)).astype(np.int32)
        lanes = torch.tensor([where[i] for i in moving] + [seats.nobody])
        seats.advance(lanes, torch.from_numpy(drawn), eos=rule.eos, eos_codebook=rule.eos_codebook)
        for i, codes in zip(moving, drawn, strict=False):
            sequences[i].append(codes)
        for seat, sequence in zip(where, sequences, strict=True):
            if sequence.is_done:
                continue
            newest = sequence.rows[-1]
            assert seats.last[seat].tolist() == newest.tolist()
            window = seats.history.shape[1]
            past = sequence.grid(max(0, sequence.num_rows - window), sequence.num_rows)
            assert seats.history[seat, window - len(past) :].tolist() == past.tolist()
