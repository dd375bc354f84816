"""Dia against transformers: the same greedy codes, alone and in a crowd, and the same audio."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from transformers import DacModel

from declaim.engine import Engine, EngineConfig, InvalidRequest, SamplingParams, SpeechRequest, TooLong, Voice
from declaim.engine.models.dia import encode_text
from tests.dia_checkpoints import (
    EOS,
    MULTI_QUERY,
    SMALL,
    WIDE,
    DiaSize,
    Reference,
    make_dia,
    quiet_transformers,
    seconds_of,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:`max_length` is ignored:UserWarning"),
]

SIZES = {"small": SMALL, "wide": WIDE, "multi-query": MULTI_QUERY}
TEXTS = ("[S1] Hello there. [S2] Hi!", "[S1] Short é.", "[S2] A rather longer line, with 3 numbers & signs. [S1] Yes?")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("dia")
    return {name: make_dia(folder / name, size, seed=i) for i, (name, size) in enumerate(SIZES.items())}


def greedy(max_new_tokens: int, guidance_scale: float | None) -> SamplingParams:
    return SamplingParams(
        temperature=0.0, guidance_scale=guidance_scale or 1.0, top_k=45, max_seconds=seconds_of(max_new_tokens)
    )


def prompt_audio(num_frames: int, *, seed: int = 0) -> NDArray[np.float32]:
    noise = np.random.default_rng(seed).standard_normal(512 * num_frames - 100) * 0.1
    return noise.astype(np.float32)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("guidance_scale", [3.0, 1.5, None])
def test_greedy_codes_equal_transformers(checkpoints: dict[str, Path], size: str, guidance_scale: float | None) -> None:
    reference = Reference.load(checkpoints[size])
    with Engine.from_pretrained(checkpoints[size]) as engine:
        for text, max_new_tokens in zip(TEXTS, (90, 40, 70), strict=True):
            expected = reference.greedy(text, max_new_tokens=max_new_tokens, guidance_scale=guidance_scale)
            (result,) = engine.generate(
                [SpeechRequest(text, sampling=greedy(max_new_tokens, guidance_scale))], progress=False
            )
            assert result.error is None
            np.testing.assert_array_equal(result.codes, expected)
            if len(expected) == max_new_tokens - 16:
                assert result.finish_reason in ("length", "stop")
            else:
                assert result.finish_reason == "stop"


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("guidance_scale", [3.0, None])
def test_a_voice_prompt_continues_as_in_transformers(
    checkpoints: dict[str, Path], size: str, guidance_scale: float | None
) -> None:
    audio = prompt_audio(95)
    reference = Reference.load(checkpoints[size])
    expected = reference.greedy(
        "[S1] What the prompt says. [S1] And more.", max_new_tokens=60, guidance_scale=guidance_scale, prompt=audio
    )
    with Engine.from_pretrained(checkpoints[size]) as engine:
        engine.add_voice("anna", Voice("[S1] What the prompt says.", audio, 44100))
        for voice in ("anna", Voice("[S1] What the prompt says.", audio, 44100)):
            (result,) = engine.generate(
                [SpeechRequest("[S1] And more.", voice=voice, sampling=greedy(60, guidance_scale))], progress=False
            )
            np.testing.assert_array_equal(result.codes, expected)


def test_sixteen_ragged_requests_with_preemption_equal_transformers(checkpoints: dict[str, Path]) -> None:
    reference = Reference.load(checkpoints["small"])
    audio = prompt_audio(90, seed=3)
    cases = []
    for i in range(16):
        text = TEXTS[i % 3].replace("Hi", f"Hi {i}").replace("é", f"é{i}")
        max_new_tokens = 30 + 9 * i
        prompt = audio if i % 5 == 4 else None
        said = "[S1] Words." if prompt is not None else ""
        expected = reference.greedy(
            f"{said} {text}".strip(), max_new_tokens=max_new_tokens, guidance_scale=3.0, prompt=prompt
        )
        voice = None if prompt is None else Voice(said, prompt, 44100)
        cases.append((SpeechRequest(text, voice=voice, sampling=greedy(max_new_tokens, 3.0)), expected))

    # The longest needs 23 blocks; 40 hold about three of them.
    config = EngineConfig(num_blocks=40, max_batch=16, block_size=16, max_step_positions=48)
    codes: dict[int, NDArray[np.int32]] = {}
    with Engine.from_pretrained(checkpoints["small"], config) as engine:

        def run(i: int) -> None:
            (result,) = engine.generate([cases[i][0]], progress=False)
            codes[i] = result.codes

        threads = [threading.Thread(target=run, args=(i,)) for i in range(16)]
        for thread in threads:
            thread.start()
            time.sleep(0.02)
        for thread in threads:
            thread.join()
        assert engine.stats().preemptions > 0
        assert engine.stats().blocks_used == 0
    for i, (_, expected) in enumerate(cases):
        np.testing.assert_array_equal(codes[i], expected, err_msg=f"request {i}")


def test_audio_equals_the_codec_over_all_codes_whole_and_streamed(checkpoints: dict[str, Path]) -> None:
    request = SpeechRequest(TEXTS[0], sampling=SamplingParams(seed=5, max_seconds=2.0))
    with quiet_transformers():
        dac = DacModel.from_pretrained(checkpoints["wide"] / "codec").eval()
    with Engine.from_pretrained(checkpoints["wide"]) as engine:
        (result,) = engine.generate([request], progress=False)
        streamed = np.concatenate([chunk.audio for chunk in engine.stream(request)])
    with torch.no_grad():
        codes = torch.from_numpy(result.codes.T.astype(np.int64))[None]
        expected = dac.decode(audio_codes=codes).audio_values.flatten().numpy()
    assert len(result.codes) > 60
    np.testing.assert_allclose(result.audio, expected, atol=1e-4)
    np.testing.assert_array_equal(streamed, result.audio)


def test_an_end_drawn_by_the_model_ends_the_audio_as_in_transformers(tmp_path: Path) -> None:
    """The head's row for EOS is made a copy of a likely code's, slightly larger: it wins where that code would."""
    folder = make_dia(tmp_path / "eos", DiaSize(), seed=11)
    weights = load_file(folder / "model.safetensors")
    reference = Reference.load(folder)
    first = reference.greedy(TEXTS[0], max_new_tokens=80, guidance_scale=3.0)
    often = int(np.bincount(first[20:, 0]).argmax())
    weights["logits_dense.weight"][EOS] = weights["logits_dense.weight"][often] * 1.01
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    expected = Reference.load(folder).greedy(TEXTS[0], max_new_tokens=80, guidance_scale=3.0)
    assert 0 < len(expected) < 64
    with Engine.from_pretrained(folder) as engine:
        (result,) = engine.generate([SpeechRequest(TEXTS[0], sampling=greedy(80, 3.0))], progress=False)
    assert result.finish_reason == "stop"
    np.testing.assert_array_equal(result.codes, expected)


def test_sampled_codes_are_the_seeds_alone_and_in_a_crowd(checkpoints: dict[str, Path]) -> None:
    requests = [
        SpeechRequest(TEXTS[i % 3], sampling=SamplingParams(seed=i // 2, max_seconds=0.5 + 0.1 * i, top_k=45 - i))
        for i in range(8)
    ]
    with Engine.from_pretrained(checkpoints["small"], EngineConfig(max_step_positions=7)) as engine:
        together = engine.generate(requests, progress=False)
        for request, result in zip(requests, together, strict=True):
            (alone,) = engine.generate([request], progress=False)
            np.testing.assert_array_equal(result.codes, alone.codes)
    assert (together[0].codes[:20] != together[3].codes[:20]).any()


def test_text_becomes_bytes_and_speaker_tags_become_theirs() -> None:
    assert encode_text("[S1] Aé[S2]") == [1, 32, 65, 195, 169, 2]
    assert encode_text("<pad>") == list(b"<pad>")


@pytest.mark.parametrize(
    ("text", "error"),
    [("", InvalidRequest), ("...!", InvalidRequest), ("\0\x01\x02", InvalidRequest), ("[S1] " + "long " * 50, TooLong)],
)
def test_text_that_cannot_be_spoken_is_refused(
    checkpoints: dict[str, Path], text: str, error: type[InvalidRequest]
) -> None:
    with Engine.from_pretrained(checkpoints["small"]) as engine, pytest.raises(error):
        engine.generate([SpeechRequest(text)], progress=False)


def test_control_bytes_and_special_tokens_in_the_text_are_only_text(checkpoints: dict[str, Path]) -> None:
    sampling = greedy(30, 3.0)
    with Engine.from_pretrained(checkpoints["small"]) as engine:
        clean, dirty, literal = engine.generate(
            [
                SpeechRequest("[S1] Hello you.", sampling=sampling),
                SpeechRequest("[S1] Hello\x00\x01\x02 you.\x07", sampling=sampling),
                SpeechRequest("[S1] Hello <pad> 😀 you.", sampling=sampling),
            ],
            progress=False,
        )
    np.testing.assert_array_equal(clean.codes, dirty.codes)
    assert literal.error is None


@pytest.mark.parametrize(
    ("audio", "rate", "words"),
    [
        (np.zeros(44100, np.float32), 44100, "silent|quiet"),
        (np.full(4410, 0.1, np.float32), 44100, "0.1"),
        (np.full(44100 * 600, 0.1, np.float32), 44100, "600"),
        (np.full(44100, np.nan, np.float32), 44100, "finite"),
        (np.full(44100, 0.1, np.float32), 0, "rate"),
        (np.full(44100, 0.1, np.float32), -16000, "rate"),
        (np.zeros((2, 2, 2), np.float32), 44100, "shape|dimension"),
    ],
)
def test_reference_audio_that_cannot_be_imitated_is_refused_and_the_next_request_served(
    checkpoints: dict[str, Path], audio: NDArray[np.float32], rate: int, words: str
) -> None:
    with Engine.from_pretrained(checkpoints["small"]) as engine:
        with pytest.raises(InvalidRequest, match=words):
            engine.generate([SpeechRequest("[S1] Hi.", voice=Voice("[S1] Words.", audio, rate))], progress=False)
        (result,) = engine.generate([SpeechRequest("[S1] Hi.", sampling=greedy(30, 3.0))], progress=False)
    assert result.error is None


def test_speed_is_refused_with_a_reason(checkpoints: dict[str, Path]) -> None:
    with Engine.from_pretrained(checkpoints["small"]) as engine, pytest.raises(InvalidRequest, match="pace"):
        engine.generate([SpeechRequest("[S1] Hi.", speed=1.5)], progress=False)
