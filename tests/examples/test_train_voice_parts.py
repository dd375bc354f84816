"""Parts of the voice's recipe that a toy run does not show: who is learned, when a run ends, that judges can judge."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("hibari", reason="the recipe's teacher is not installed: pip install declaim[train]")
pytest.importorskip("onnx", reason="the recipe's teacher is not installed: pip install declaim[train]")
sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "train_voice"))

import checkpoints
from code_model import ModelShape
from data import Utterance, shard_path, write_shard
from encode import codes_path, write_codes
from losses import discriminator_loss, discriminators, is_verdict
from train_codec import learning_rate
from train_model import read_sentences


def test_the_learning_rate_rises_soon_and_falls_to_a_fiftieth() -> None:
    rates = [learning_rate(i / 1000, 1.0) for i in range(1001)]
    assert rates[0] == pytest.approx(0.02)
    assert max(rates) == rates[20] == 1.0
    assert all(b < a for a, b in zip(rates[20:], rates[21:], strict=False))
    assert rates[-1] == pytest.approx(0.02)


def test_a_run_ends_by_the_clock_which_goes_on_where_it_was_cut_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(checkpoints.time, "monotonic", lambda: now)
    layer = torch.nn.Linear(1, 1)
    run = checkpoints.Run(tmp_path, "toy", {"layer": layer})
    assert run.progress(steps=1000, minutes=2.0) == 0.0
    now += 61.0
    run.finish_step({}, steps=1000, minutes=2.0)  # saves: a minute has passed
    assert run.progress(steps=1000, minutes=2.0) == pytest.approx(61 / 120)

    now += 5000.0  # cut off for long, which does not count
    again = checkpoints.Run(tmp_path, "toy", {"layer": layer})
    assert again.step == 1
    assert again.progress(steps=1000, minutes=2.0) == pytest.approx(61 / 120)
    assert again.progress(steps=1, minutes=2.0) == 1.0
    now += 60.0
    again.finish_step({}, steps=1000, minutes=2.0)
    assert again.progress(steps=1000, minutes=2.0) > 1.0


@pytest.mark.parametrize("level", [0.02, 0.1])
def test_every_layer_of_every_judge_hears_speech_at_its_level(level: float) -> None:
    """Weights that lose the level leave verdicts that do not depend on the audio, and nothing is ever learned."""
    torch.manual_seed(0)
    noise = torch.randn(1, 6_000) * level
    for judges in discriminators().values():
        for judge in judges:
            with torch.no_grad():
                features = judge(noise)
            assert min(float(f.abs().mean()) for f in features if not is_verdict(f)) > 0.05
            assert max(float(f.abs().mean()) for f in features if is_verdict(f)) < 0.5


def test_a_judge_learns_to_tell_two_sounds_apart() -> None:
    torch.manual_seed(0)
    real, made = torch.sin(torch.arange(6_000) / 20)[None] * 0.05, torch.randn(1, 6_000) * 0.05
    judge = discriminators()["period"][0]
    optimizer = torch.optim.AdamW(judge.parameters(), lr=5e-4, betas=(0.8, 0.99))
    for _ in range(20):
        loss = discriminator_loss(judge(real), judge(made))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.3  # 0.5: no idea


def test_speakers_beyond_those_asked_for_are_not_learned(tmp_path: Path) -> None:
    def spoken(speaker: int) -> Utterance:
        return Utterance(
            speaker,
            text_ids=np.array([1, 40, 3], np.uint8),
            durations_s=np.full(3, 0.2, np.float32),
            audio=np.zeros(14_400, np.int16),
            bands=np.zeros((60, 160), np.float16),
            pitch_hz=np.zeros(60, np.float32),
            held_out=False,
        )

    shard = write_shard(shard_path(tmp_path, 0), [spoken(speaker) for speaker in (0, 1, 2, 1)])
    write_codes(codes_path(tmp_path / "codes", shard), [np.zeros((15, 8), np.int16)] * 4)
    shape = ModelShape(("lark", "rook"))
    sentences = read_sentences(shard, tmp_path / "codes", shape, held_out=False)
    assert [sentence.speaker for sentence in sentences] == [0, 1, 1]
    assert [sentence.text_ids[0] for sentence in sentences] == [1, 253, 253]
