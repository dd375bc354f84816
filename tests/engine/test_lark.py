"""The embedded voice: its test vectors, its pace, its length, and that a newcomer hears speech."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from declaim.engine import Engine, EngineConfig, InvalidRequest, SamplingParams, SpeechRequest, TooLong, Voice
from declaim.engine.errors import ModelLoadError, VoiceNotFound
from declaim.engine.loader import EMBEDDED_FOLDER
from declaim.engine.models.base import PromptSettings
from declaim.engine.models.lark import LarkConfig, LarkModel, _all_speakers
from declaim.engine.request import EncodedVoice
from declaim.engine.sequence import Prompt
from declaim.engine.text import TextOptions
from declaim.engine.words import Segment

SENTENCE = json.loads((EMBEDDED_FOLDER / "test_vector.json").read_text())["text"]


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine.from_pretrained() as engine:
        yield engine


def test_bytes_durations_and_greedy_codes_equal_the_test_vector(engine: Engine) -> None:
    vector = np.load(EMBEDDED_FOLDER / "test_vector.npz")
    model = engine._model
    assert isinstance(model, LarkModel)
    prompt = model.tokenize(
        Segment(SENTENCE),
        PromptSettings(SamplingParams().resolve(engine.spec.sampling.defaults), EncodedVoice.none(8)),
    )
    assert list(prompt.text_ids) == vector["text_bytes"].tolist()
    np.testing.assert_allclose(model.durations_s(prompt).numpy(), vector["durations_s"], atol=1e-3)
    (result,) = engine.generate([SpeechRequest(SENTENCE, sampling=SamplingParams(temperature=0.0))], progress=False)
    assert result.finish_reason == "stop"
    np.testing.assert_array_equal(result.codes, vector["greedy_codes"])


def test_the_audio_is_speech_in_level_and_bandwidth(engine: Engine) -> None:
    (result,) = engine.generate([SpeechRequest(SENTENCE, sampling=SamplingParams(seed=1))], progress=False)
    assert result.sample_rate_hz == 24000
    assert 2.0 < result.duration_s < 4.0
    spoken = result.audio[8000:-4000]
    assert 0.02 < np.sqrt(np.mean(spoken**2)) < 0.3
    assert np.abs(result.audio).max() <= 1.0
    power = np.abs(np.fft.rfft(spoken * np.hanning(len(spoken)))) ** 2
    hertz = np.fft.rfftfreq(len(spoken), 1 / 24000)
    voiced = power[(hertz > 80) & (hertz < 4000)].sum() / power.sum()
    assert voiced > 0.8


def test_speed_scales_the_length(engine: Engine) -> None:
    results = engine.generate(
        [SpeechRequest(SENTENCE, speed=speed, sampling=SamplingParams(seed=1)) for speed in (0.5, 1.0, 2.0)],
        progress=False,
    )
    slow, plain, fast = (result.duration_s for result in results)
    assert slow == pytest.approx(2 * plain, abs=0.1)
    assert fast == pytest.approx(plain / 2, abs=0.1)


def test_streamed_equals_whole_and_first_audio_comes_in_a_small_chunk(engine: Engine) -> None:
    request = SpeechRequest(f"{SENTENCE} {SENTENCE} And a third one, at last.", sampling=SamplingParams(seed=2))
    (whole,) = engine.generate([request], progress=False)
    chunks = list(engine.stream(request))
    np.testing.assert_array_equal(np.concatenate([chunk.audio for chunk in chunks]), whole.audio)
    assert len(chunks[0].audio) == 0.16 * 24000
    assert len(chunks) > 5


def test_a_long_text_is_spoken_in_segments_in_order(engine: Engine) -> None:
    text = " ".join(f"This is sentence number {i}." for i in range(12))
    (result,) = engine.generate([SpeechRequest(text, sampling=SamplingParams(seed=3))], progress=False)
    assert result.error is None
    assert 12 < result.duration_s < 40
    # At each of the eleven joints some silence is taken out.
    assert 11 * 0.2 < len(result.codes) * 960 / 24000 - result.duration_s < 11 * 1.0


def test_max_seconds_cuts_the_whole_request(engine: Engine) -> None:
    text = " ".join([SENTENCE] * 4)
    (result,) = engine.generate([SpeechRequest(text, sampling=SamplingParams(seed=1, max_seconds=4.0))], progress=False)
    assert result.finish_reason == "length"
    assert len(result.codes) == 100
    assert 3.0 < result.duration_s <= 4.0  # 4 s less the silence at the joints


def test_codes_of_a_seed_are_the_same_alone_and_among_others(engine: Engine) -> None:
    requests = [
        SpeechRequest(f"{SENTENCE[: 10 + 2 * i]} and so on.", sampling=SamplingParams(seed=i)) for i in range(9)
    ]
    together = engine.generate(requests, progress=False)
    for request, result in zip(requests, together, strict=True):
        (alone,) = engine.generate([request], progress=False)
        np.testing.assert_array_equal(result.codes, alone.codes)


@pytest.mark.parametrize("text", ["1984", "$5.20 at 3:45 pm!", "naïve café", "日本語 ok", "a", "USB-C 😀", "x" * 300])
def test_odd_texts_make_a_sound(engine: Engine, text: str) -> None:
    (result,) = engine.generate([SpeechRequest(text, sampling=SamplingParams(seed=1, max_seconds=6.0))], progress=False)
    assert result.error is None
    assert result.duration_s > 0.1


def test_what_it_cannot_do_it_refuses_with_a_reason(engine: Engine) -> None:
    voice = Voice("words", np.zeros(24000, np.float32), 24000)
    for request, error, words in (
        (SpeechRequest("", sampling=SamplingParams()), InvalidRequest, "empty"),
        (SpeechRequest("?!"), InvalidRequest, "letter"),
        (SpeechRequest("word " * 20_000), TooLong, "20000|20,000"),
        (SpeechRequest("Hi.", voice=voice), InvalidRequest, "one voice"),
        (SpeechRequest("Hi.", voice="nobody"), InvalidRequest, "nobody"),
        (SpeechRequest("Hi.", sampling=SamplingParams(guidance_scale=3.0)), InvalidRequest, "guidance"),
        (SpeechRequest("Hi.", sampling=SamplingParams(max_seconds=0.02)), TooLong, "max_seconds"),
    ):
        with pytest.raises(error, match=words):
            engine.generate([request], progress=False)
    engine.warm_up()


def test_bfloat16_speaks_too() -> None:
    with Engine.from_pretrained(config=EngineConfig(dtype="bfloat16")) as engine:
        (result,) = engine.generate([SpeechRequest("Good morning.", sampling=SamplingParams(seed=1))], progress=False)
    assert result.error is None
    assert torch.isfinite(torch.from_numpy(result.audio)).all()
    assert result.duration_s > 0.5


def tokenized(model: LarkModel, text: str, voice_name: str | None = None) -> Prompt:
    sampling = SamplingParams().resolve(model.spec.sampling.defaults)
    return model.tokenize(Segment(text), PromptSettings(sampling, EncodedVoice.none(8), voice_name=voice_name))


@pytest.fixture(scope="module")
def choir(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> LarkModel:
    """The embedded voice as the first of three, which differ by their speaker vectors; the codec has no timbres."""
    folder = tmp_path_factory.mktemp("choir")
    for path in EMBEDDED_FOLDER.iterdir():
        if path.is_file():
            shutil.copyfile(path, folder / path.name)
    config = json.loads((folder / "config.json").read_text())
    config["speakers"] = [{"name": name, "byte": byte} for name, byte in (("lark", 1), ("ann", 251), ("bob", 252))]
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(folder / "model.safetensors")
    own = weights.get("speaker_embedding.weight", torch.zeros(1, 256, dtype=torch.float16))[:1]
    others = torch.randn(2, 256, generator=torch.Generator().manual_seed(1)).to(torch.float16)
    save_file(weights | {"speaker_embedding.weight": torch.cat([own, others])}, folder / "model.safetensors")
    codec = replace(engine.spec.codec, timbres=())
    return LarkModel.load(folder, codec=codec, dtype=torch.float32, device=torch.device("cpu"))


def test_a_speaker_is_chosen_by_name_and_the_first_is_the_default(engine: Engine, choir: LarkModel) -> None:
    assert choir.spec.voices == ("lark", "ann", "bob")
    alone = engine._model
    assert isinstance(alone, LarkModel)
    prompts = {name: tokenized(choir, SENTENCE, name) for name in (None, "lark", "ann", "bob")}
    assert [prompt.text_ids[0] for prompt in prompts.values()] == [1, 1, 251, 252]
    sides = {name: choir.prepare(prompt).side for name, prompt in prompts.items()}
    plain = alone.prepare(tokenized(alone, SENTENCE)).side
    assert all(side is not None for side in (plain, *sides.values()))
    torch.testing.assert_close(sides[None], plain, rtol=0.0, atol=0.0)
    torch.testing.assert_close(sides["lark"], plain, rtol=0.0, atol=0.0)
    assert not torch.equal(choir.durations_s(prompts["ann"]), choir.durations_s(prompts["bob"]))
    with pytest.raises(VoiceNotFound, match="'carl'.*lark, ann, bob"):
        tokenized(choir, SENTENCE, "carl")


def test_turns_of_a_dialogue_switch_the_voice(choir: LarkModel) -> None:
    text = "Listen. [S1] Who is there at this hour? [S2] It is only me. [s1] Come in then, quickly. [S4] Well, well."
    segments = choir.segments(text, TextOptions())
    # A fourth speaker of three is the first again.
    assert [tokenized(choir, segment.text).text_ids[0] for segment in segments] == [1, 1, 251, 1, 1]
    assert [tokenized(choir, segment.text, "ann").text_ids[0] for segment in segments] == [251, 251, 252, 251, 251]
    # The mark is not spoken, and the caller's words are where they were.
    assert tokenized(choir, segments[2].text).text_ids[1:] == tokenized(choir, "It is only me.").text_ids[1:]
    assert [segments[2].text[word.first : word.last] for word in segments[2].words] == ["It", "is", "only", "me."]
    with pytest.raises(InvalidRequest, match="no letter"):
        choir.segments("[S1] [S2] !", TextOptions())


def test_a_codecs_timbres_are_voices_that_say_the_first_speakers_codes(engine: Engine) -> None:
    assert engine.spec.voices == ("lark", "rook", "wren")
    model = engine._model
    assert isinstance(model, LarkModel)
    turns = model.segments("[S1] Who is there? [S2] It is only me. [S3] And I.", TextOptions())
    assert [tokenized(model, turn.text).timbre for turn in turns] == [0, 1, 2]
    assert [tokenized(model, turn.text, "rook").timbre for turn in turns] == [1, 2, 0]
    sampling = SamplingParams(seed=5)
    lark, rook = engine.generate(
        [SpeechRequest(SENTENCE, voice=voice, sampling=sampling) for voice in ("lark", "rook")], progress=False
    )
    np.testing.assert_array_equal(lark.codes, rook.codes)
    assert len(lark.audio) == len(rook.audio)
    assert not np.array_equal(lark.audio, rook.audio)
    # An octave lower, nearly: what is below 150 Hz is rook's.
    share = [np.abs(np.fft.rfft(result.audio)) ** 2 for result in (lark, rook)]
    low = int(150 / 24_000 * len(lark.audio))
    assert share[1][:low].sum() / share[1].sum() > 3 * share[0][:low].sum() / share[0].sum()


def test_a_speaker_of_the_models_own_goes_before_a_timbre_of_its_name(choir: LarkModel, engine: Engine) -> None:
    codec = replace(engine.spec.codec, timbres=("lark", "ann", "wren"))
    speakers = _all_speakers(choir._config, codec)
    assert [(speaker.name, speaker.byte, speaker.timbre) for speaker in speakers] == [
        ("lark", 1, 0),
        ("ann", 251, 0),
        ("bob", 252, 0),
        ("wren", 1, 2),
    ]


def test_a_voice_alone_says_all_turns(engine: Engine) -> None:
    marked, plain = (
        engine.generate([SpeechRequest(text, sampling=SamplingParams(seed=5, temperature=0.0))], progress=False)[0]
        for text in ("[S1] It is only me, he said.", "It is only me, he said.")
    )
    np.testing.assert_array_equal(marked.codes, plain.codes)


@pytest.mark.parametrize(
    ("speakers", "words"),
    [
        ([], "list"),
        (["lark"], "lark"),
        ([{"name": "lark", "byte": 1}, {"name": "lark", "byte": 2}], "share a name"),
        ([{"name": "lark", "byte": 1}, {"name": "wren", "byte": 1}], "differ"),
        ([{"name": "lark", "byte": 256}], "1 .. 255"),
        ([{"name": "lark"}], "byte"),
    ],
)
def test_a_config_with_impossible_speakers_is_refused(tmp_path: Path, speakers: list[object], words: str) -> None:
    config = json.loads((EMBEDDED_FOLDER / "config.json").read_text()) | {"speakers": speakers}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelLoadError, match=words):
        LarkConfig.read(tmp_path / "config.json")
