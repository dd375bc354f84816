"""The voice's recipe in toy sizes: it runs, goes on where it was cut off, and what it exports is what it trained."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "examples" / "train_voice"
for package in ("hibari", "onnx", "matplotlib"):
    pytest.importorskip(package, reason="the recipe's teacher and plots are not installed: pip install declaim[train]")

SENTENCES = """\
The kettle is on and the bread is almost done.
She counted the coins twice.
Rain is expected in the north.
The library opens at ten.
Turn the handle slowly and wait for the green light.
It was quiet in the valley.
"""


def recipe(work: Path, *options: str) -> str:
    """Run the CLI as a user would; its output."""
    sentences = work / "sentences.txt"
    sentences.write_text(SENTENCES)
    command = [sys.executable, str(RECIPE / "recipe.py"), "--tiny", "--sentences", str(sentences), "--work", str(work)]
    environment = {name: value for name, value in os.environ.items() if name != "TRAIN_VOICE_PAUSE"}
    done = subprocess.run(
        [*command, *options], capture_output=True, text=True, env=environment | {"OMP_NUM_THREADS": "1"}, timeout=280
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("voice")
    recipe(folder)
    return folder


def test_the_export_is_loaded_speaks_and_equals_its_vectors(work: Path) -> None:
    from declaim.engine import Engine, SamplingParams, SpeechRequest

    exported = work / "lark"
    spoken = json.loads((exported / "test_vector.json").read_text())["text"]
    with Engine.from_pretrained(str(exported)) as engine:
        assert engine.spec.voices == ("lark", "rook", "wren")
        # The decoder that was trained looks 4 frames ahead, and the engine waits for no more.
        assert engine.spec.codec.right == 4
        request = SpeechRequest(spoken, sampling=SamplingParams(temperature=0.0))
        (result,) = engine.generate([request], progress=False)
    assert result.error is None
    with np.load(exported / "test_vector.npz") as vector:
        np.testing.assert_array_equal(result.codes, vector["greedy_codes"])


def test_the_trained_codec_and_the_engines_agree_and_four_frames_ahead_are_all_it_needs(work: Path) -> None:
    import torch

    from declaim.engine.codec.base import CodecRecipe
    from declaim.engine.codec.lark import LarkCodec

    folder = work / "lark" / "codec"
    codec = LarkCodec.load(CodecRecipe(kind="lark", folder=str(folder)))
    with np.load(folder / "test_vector.npz") as vector:
        codes, expected = torch.from_numpy(vector["codes"].astype(np.int64))[None], torch.from_numpy(vector["audio"])
    whole = codec.decode(codes)[0]
    torch.testing.assert_close(whole, expected, rtol=0.0, atol=1e-4)
    hop, frame = codec.spec.hop, 40
    heard = whole[frame * hop : (frame + 1) * hop]

    def ahead(num_frames: int) -> float:
        decoded = codec.decode(codes[:, :, : frame + 1 + num_frames], first=frame, last=frame + 1)[0]
        return float((decoded - heard).abs().max())

    assert ahead(4) < 1e-8
    assert ahead(3) > 1e-8


def test_losses_are_logged_plotted_and_fall(work: Path) -> None:
    rows = [json.loads(line) for line in (work / "model.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 21))
    assert np.mean([row["codes"] for row in rows[-5:]]) < np.mean([row["codes"] for row in rows[:5]])
    for name in ("codec_losses", "model_losses", "spectrograms"):
        assert (work / "report" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert len(json.loads((work / "report" / "report.json").read_text())["codebook_perplexity"]) == 8


def test_what_is_done_is_not_done_again_and_a_cut_off_run_goes_on(work: Path) -> None:
    kept = {path: path.stat().st_mtime_ns for path in (work / "data").iterdir()}
    (work / "codes" / "shard-00002.npz").unlink()
    printed = recipe(work, "--stage", "data", "encode", "model")
    assert "encoded shard-00002.npz" in printed
    assert "encoded shard-00001.npz" not in printed
    assert {path: path.stat().st_mtime_ns for path in (work / "data").iterdir()} == kept
    assert len((work / "model.jsonl").read_text().splitlines()) == 20


def test_a_missing_text_is_named(tmp_path: Path) -> None:
    command = [sys.executable, str(RECIPE / "recipe.py"), "--sentences", str(tmp_path / "none.txt")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "none.txt" in done.stderr
