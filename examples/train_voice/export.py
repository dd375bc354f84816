"""The trained parts to a folder that the engine loads, with its test vectors and where it comes from."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
from pathlib import Path

import numpy as np
import torch
from codec import Codec
from corpus import WEAK_WORDS

from declaim.engine import Engine, EngineConfig, SamplingParams, SpeechRequest
from declaim.engine.codec.lark import PITCH_UNIT_HZ, noise_keys
from declaim.engine.codec.source_filter import Rows
from declaim.engine.loader import EMBEDDED_FOLDER
from declaim.engine.models.base import PromptSettings
from declaim.engine.models.lark import LarkModel
from declaim.engine.phonemes import LETTER_TO_SOUND_FILE, Phonemizer
from declaim.engine.request import EncodedVoice
from declaim.engine.words import Segment

TEST_SENTENCE = "The birch canoe slid on the smooth planks."
TEST_FRAMES = 90


def export(work: Path, target: Path) -> None:
    """Write config, weights (float16), front end, test vectors and ORIGIN.json into `target`."""
    target.mkdir(parents=True, exist_ok=True)
    for part, folder in (("model", target), ("codec", target / "codec")):
        folder.mkdir(exist_ok=True)
        for name in ("config.json", "model.safetensors"):
            shutil.copyfile(work / part / name, folder / name)
    table = json.loads((EMBEDDED_FOLDER / "frontend.json").read_text(encoding="utf-8"))
    table["weak"] = sorted(WEAK_WORDS)
    (target / "frontend.json").write_text(json.dumps(table, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    if target.resolve() != EMBEDDED_FOLDER.resolve():
        shutil.copyfile(EMBEDDED_FOLDER / LETTER_TO_SOUND_FILE, target / LETTER_TO_SOUND_FILE)
    (target / "ORIGIN.json").write_text(json.dumps(_origin(work), indent=2) + "\n")
    write_vectors(target)


def write_vectors(folder: Path) -> None:
    """The test vectors of an exported folder: what its weights must give, for tests/engine to hold the engine to.

    codec: the sentence's codes, repeated -> audio -> its codes, in float64 of the float16 weights. model: a sentence's
    bytes, durations and greedy codes in float32.
    """
    codec = Codec.load(folder / "codec").double()
    with Engine.from_pretrained(str(folder), config=EngineConfig(device="cpu", dtype="float32")) as engine:
        request = SpeechRequest(TEST_SENTENCE, sampling=SamplingParams(temperature=0.0))
        (result,) = engine.generate([request], progress=False)
        if result.error is not None:
            raise result.error
        model = engine._model
        if not isinstance(model, LarkModel):
            raise TypeError(f"{folder} is no voice of the lark family")
        prompt = model.tokenize(
            Segment(TEST_SENTENCE),
            PromptSettings(
                request.sampling.resolve(engine.spec.sampling.defaults), EncodedVoice.none(codec.shape.num_codebooks)
            ),
        )
        durations_s = model.durations_s(prompt).numpy()
    np.savez(
        folder / "test_vector.npz",
        text_bytes=np.array(prompt.text_ids, np.uint8),
        durations_s=durations_s,
        greedy_codes=result.codes.astype(np.int16),
    )
    spoken = {"text": TEST_SENTENCE, "phonemes": Phonemizer.load(folder).phonemes(TEST_SENTENCE)}
    (folder / "test_vector.json").write_text(json.dumps(spoken, ensure_ascii=False), encoding="utf-8")
    codes = torch.from_numpy(np.resize(result.codes, (TEST_FRAMES, codec.shape.num_codebooks)).astype(np.int64))
    with torch.no_grad():
        said = codec.decoder(*codec.vectors(codes[None]))
        pitch_hz, voiced = PITCH_UNIT_HZ * said.log_pitch.exp(), said.voicing > 0
        rows = Rows(said.harmonic, said.noise, noise_keys(codes.t()[None]), pitch_hz, voiced)
        audio = codec.source_filter()(rows)[0].float()
        encoded = codec.quantize(codec.encoder(codec.log_mel(audio.double()[None]))).codes[0]
    np.savez(
        folder / "codec" / "test_vector.npz",
        codes=codes.t().numpy().astype(np.int16),
        audio=audio.numpy(),
        encoded=encoded.t().numpy().astype(np.int16),
    )


def _origin(work: Path) -> dict[str, object]:
    """Where the weights come from, and under which licences."""
    logs = {}
    for name in ("codec", "model"):
        if (work / f"{name}.jsonl").exists():
            logs[name] = json.loads((work / f"{name}.jsonl").read_text().splitlines()[-1])
    return {
        "made_by": "examples/train_voice of declaim (Apache-2.0)",
        "teacher": f"hibari-tts {importlib.metadata.version('hibari-tts')} (Apache-2.0), voice af_heart",
        "texts": "WordNet 3.0 example sentences (WordNet licence), fortunes (BSD), and sentences made by corpus.py",
        "letter_to_sound": "CMU Pronouncing Dictionary (BSD), by examples/train_letter_to_sound.py",
        "last_steps": logs,
    }
