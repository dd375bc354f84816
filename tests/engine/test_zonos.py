"""Zonos against its own repository: the same prefixes, greedy codes and chances, alone and in a crowd; and what it is
told.

The reference's outputs lie in fixtures/zonos.npz; fixtures/make_zonos.py makes them.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from transformers import DacModel

from declaim.engine import (
    EncodedVoice,
    Engine,
    EngineConfig,
    InvalidRequest,
    ModelLoadError,
    SamplingParams,
    SpeechRequest,
    SpeechResult,
    TooLong,
    sampler,
)
from declaim.engine.batch import Batch, Entry
from declaim.engine.chunks import ChunkPlanner, ChunkPolicy
from declaim.engine.config import Int4Recipe
from declaim.engine.controls import read_instructions, resolve_controls
from declaim.engine.espeak import EspeakPhonemizer, JapaneseReader
from declaim.engine.loader import find_model
from declaim.engine.models.base import PromptSettings, StepContext
from declaim.engine.models.layers import AttentionWeights
from declaim.engine.models.zonos import ZonosConfig, ZonosModel, ZonosPrompt, zonos_spec
from declaim.engine.models.zonos_conditioning import LANGUAGES, PUNCTUATION, PrefixConfig, encode_phonemes
from declaim.engine.parts import DAC_44KHZ, KNOWN_CONFIGS, describe_model
from declaim.engine.request import ResolvedSampling
from declaim.engine.runner import Runner
from declaim.engine.sequence import Playback, Sequence, SequenceInput
from declaim.engine.spec import RepetitionPenalty, SamplingSpec
from declaim.engine.states import StateSlots
from declaim.engine.text import TextOptions
from declaim.engine.vocoder.inline import InlineVocoder
from declaim.engine.words import Segment
from declaim.kernels.linear import linear
from tests.zonos_checkpoints import (
    CASES,
    CONFIGS,
    CROWDS,
    DAC,
    EOS,
    ESPEAK,
    FIXTURE,
    FRAME_RATE_HZ,
    HALVED,
    HYBRID,
    MASKED,
    SAMPLED,
    SAMPLED_DRAWS,
    Case,
    Script,
    load_dac,
    load_zonos,
    make_zonos,
)

FAMILIES = tuple(CONFIGS)
SAMPLING = ResolvedSampling(
    temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=3.0, guidance_scale=2.0, seed=0, max_seconds=1.0
)


@pytest.fixture(scope="module")
def stored() -> Mapping[str, NDArray[Any]]:
    with np.load(FIXTURE) as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], Path]:
    """Folders by what makes their weights, each saved once."""
    root, made = tmp_path_factory.mktemp("zonos"), dict[tuple[str, int, int | None], Path]()

    def make(case: Case) -> Path:
        key = (case.family, case.seed, case.eos_like)
        if key not in made:
            made[key] = make_zonos(root / str(len(made)), CONFIGS[case.family], seed=case.seed, eos_like=case.eos_like)
        return made[key]

    return make


def prompt_of(model: ZonosModel, case: Case) -> ZonosPrompt:
    settings = PromptSettings(SAMPLING, case.voice, language=case.language, controls=case.controls)
    return model.tokenize(Segment(case.text_to_say), settings)


def engine_of(model: ZonosModel, folder: Path, config: EngineConfig | None = None) -> Engine:
    resolved = (config or EngineConfig(device="cpu", num_blocks=200)).resolve()
    return Engine(
        model,
        resolved,
        make_vocoder=lambda wake: InlineVocoder(load_dac(folder), wake=wake),
        model_name="zonos",
        load_encoder=lambda: load_dac(folder, with_encoder=True),
    )


def request_of(case: Case) -> SpeechRequest:
    return SpeechRequest(
        case.text_to_say,
        voice=case.voice if case.has_speaker or case.num_prompt else None,
        sampling=SamplingParams(
            temperature=0.0, guidance_scale=case.guidance_scale, max_seconds=(case.max_frames + 0.5) / FRAME_RATE_HZ
        ),
        language=case.language,
        normalize=False,
        controls=case.controls,
    )


def assert_codes(codes: NDArray[np.int32], expected: NDArray[np.int16], case: Case) -> None:
    """Without an end, the reference mixes its codebooks up in the last eight frames."""
    count = len(expected) if len(expected) < case.max_frames else len(expected) - 8
    assert len(codes) == len(expected)
    np.testing.assert_array_equal(codes[:count], expected[:count])


@pytest.mark.parametrize("name", CASES)
def test_the_prefixes_of_both_branches_are_the_references(
    stored: Mapping[str, NDArray[Any]], checkpoint: Callable[[Case], Path], name: str
) -> None:
    model = load_zonos(checkpoint(CASES[name]))
    prompt = prompt_of(model, CASES[name])
    prefix = model.prepare(prompt).prefix
    assert prefix is not None and prefix.shape[1] == prompt.prefix_len
    np.testing.assert_allclose(prefix.numpy(), stored[f"{name}.prefix"], atol=1e-5)


@pytest.mark.parametrize("name", HALVED)
def test_prefixes_are_computed_in_16_bits_where_the_weights_have_them(
    stored: Mapping[str, NDArray[Any]], checkpoint: Callable[[Case], Path], name: str
) -> None:
    """So the model was trained. Off by 0.012 and more with angles in 32 bits, by 0.004 with other roundings of sums."""
    case = CASES[name]
    model = load_zonos(checkpoint(case), dtype=torch.bfloat16)
    prefix = model.prepare(prompt_of(model, case)).prefix
    assert prefix is not None and prefix.dtype == torch.bfloat16
    difference = prefix.float().numpy() - stored[f"{name}.prefix16"]
    assert np.abs(difference).max() < 0.1
    conditioners = CONFIGS[case.family]["prefix_conditioner"]["conditioners"]
    turned = [i - len(conditioners) for i, item in enumerate(conditioners) if item["type"] == "FourierConditioner"]
    assert np.sqrt(np.square(difference[0, turned]).mean()) < 0.006


@pytest.mark.parametrize("name", CASES)
def test_greedy_codes_are_the_references(
    stored: Mapping[str, NDArray[Any]], checkpoint: Callable[[Case], Path], name: str
) -> None:
    case = CASES[name]
    folder = checkpoint(case)
    with engine_of(load_zonos(folder), folder) as engine:
        (result,) = engine.generate([request_of(case)], progress=False)
    assert result.error is None
    assert result.finish_reason == ("length" if case.eos_like is None else "stop")
    assert_codes(result.codes, stored[f"{name}.codes"], case)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_ragged_crowd_with_preemption_speaks_the_references_codes(
    stored: Mapping[str, NDArray[Any]], checkpoint: Callable[[Case], Path], family: str
) -> None:
    """Six requests that differ in everything, in a pool of little more than the longest: two that run need more."""
    crowd = CROWDS[family]
    folder = checkpoint(crowd[0])
    config = EngineConfig(device="cpu", num_blocks=36, max_batch=len(crowd), block_size=8, max_step_positions=24)
    results: dict[int, SpeechResult] = {}
    with engine_of(load_zonos(folder), folder, config) as engine:

        def run(i: int) -> None:
            (results[i],) = engine.generate([request_of(crowd[i])], progress=False)

        threads = [threading.Thread(target=run, args=(i,)) for i in range(len(crowd))]
        for thread in threads:
            thread.start()
            time.sleep(0.005)
        for thread in threads:
            thread.join(timeout=60)
        assert engine.stats().preemptions > 0
        assert engine.stats().blocks_used == 0
    for i, case in enumerate(crowd):
        expected = stored[f"{family}-crowd-{i}.codes"]
        assert results[i].error is None
        assert results[i].finish_reason == ("stop" if len(expected) < case.max_frames else "length")
        assert_codes(results[i].codes, expected, case)
    assert {result.finish_reason for result in results.values()} == {"stop", "length"}


@pytest.mark.parametrize("name", SAMPLED)
def test_what_is_left_to_draw_from_is_what_the_reference_leaves(
    stored: Mapping[str, NDArray[Any]], checkpoint: Callable[[Case], Path], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """From the logits on, through guidance, past rows and every filter; both are told what they draw."""
    script, left, pasts = Script.write(), [], []
    logits = torch.from_numpy(script.logits)
    model = load_zonos(checkpoint(CASES["transformer-plain"]))
    monkeypatch.setattr(model, "logits", lambda hidden: logits.clone())

    def told(inputs: sampler.DrawInputs, spec: SamplingSpec) -> torch.Tensor:
        candidates = sampler.filter_logits(inputs, spec)
        values = torch.full_like(logits[:1], -torch.inf).scatter(-1, candidates.all_ids(), candidates.values)
        left.append(values[0].softmax(-1).numpy())
        pasts.append(inputs.history[0])
        return torch.from_numpy(script.drawn[len(left) - 1].astype(np.int64))[None]

    monkeypatch.setattr(sampler, "draw", told)
    sampling = SAMPLED[name].resolve(model.spec.sampling.defaults)
    runner = Runner(model, num_blocks=16, num_cross_blocks=0, block_size=8, max_batch=1)
    prompt = model.tokenize(Segment("oʊ"), PromptSettings(sampling, EncodedVoice("", script.prompt)))
    sequence = begun(runner, prompt, sampling, blocks=range(16))
    for _ in script.drawn:
        take_step(runner, sequence)

    for draw in SAMPLED_DRAWS[name]:
        expected, found = stored[f"{name}.{draw}"], left[draw]
        if draw == 0:
            # Only the first codebook is heard. The reference would ignore an end there, which here is not drawn.
            expected, found = expected[:1].copy(), found[:1]
            expected[:, EOS] = 0.0
            expected /= expected.sum()
        np.testing.assert_array_equal(found > 0, expected > 0, err_msg=f"draw {draw}")
        np.testing.assert_allclose(found, expected, rtol=1e-4, err_msg=f"draw {draw}")
    # What the script is for: a past that is not filled yet, and codes twice in the last one, above 0 and below.
    assert (pasts[2] == MASKED).any() and (pasts[2] < MASKED).any()
    older, newer = pasts[-1]
    guided = (2 * logits[0] - logits[1])[range(9), newer]
    assert (guided[older == newer] > 0).any() and (guided[older == newer] < 0).any() and (older != newer).any()


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_request_leaves_open_is_as_in_the_reference(stored: Mapping[str, NDArray[Any]], family: str) -> None:
    config = ZonosConfig.read(CONFIGS[family], source=Path("config.json"))
    spec = zonos_spec(config, DAC).sampling
    (window,) = (op.window for op in spec.ops if isinstance(op, RepetitionPenalty))
    ours = {
        "temperature": spec.defaults.temperature,
        "top_k": spec.defaults.top_k,
        "top_p": spec.defaults.top_p % 1.0,  # off is 0 there, 1 here
        "min_p": spec.defaults.min_p,
        "repetition_penalty": spec.defaults.repetition_penalty,
        "repetition_penalty_window": window,
        "cfg_scale": spec.defaults.guidance_scale,
        "max_new_tokens": spec.defaults.max_seconds * 86,  # as it counts seconds
    }
    assert ours == {name: stored[f"default {name}"] for name in ours}


def test_states_lost_in_a_step_that_failed_half_way_are_made_again(
    stored: Mapping[str, NDArray[Any]], checkpoint: Callable[[Case], Path]
) -> None:
    case = CASES["hybrid-lively"]
    folder = checkpoint(case)
    model = load_zonos(folder)
    forward, num_calls, num_replayed = model.forward, 0, 0

    def failing(x: torch.Tensor, context: StepContext) -> torch.Tensor:
        nonlocal num_calls, num_replayed
        num_calls += 1
        num_replayed += len(context.last) == 0
        hidden = forward(x, context)
        if num_calls in (3, 20) and context.num_conditional > 1:
            raise RuntimeError("the states have moved and the step is lost")
        return hidden

    model.forward = failing  # type: ignore[method-assign]
    with engine_of(model, folder) as engine:
        results = engine.generate([request_of(case)] * 3, progress=False)
    assert num_replayed >= 6  # of three sequences, twice
    for result in results:
        assert result.error is None
        assert_codes(result.codes, stored["hybrid-lively.codes"], case)


def begun(runner: Runner, prompt: ZonosPrompt, sampling: ResolvedSampling, *, blocks: range) -> Sequence:
    """A sequence before its first step; named by its first block."""
    rule, half = runner._model.spec.rule, len(blocks) // 2
    sequence = Sequence(SequenceInput(blocks.start, "r", 0, sampling, prompt, 0.0), rule, Playback(paced=False))
    sequence.block_tables = [list(blocks[:half]), list(blocks[half:])]
    runner.begin(sequence)
    return sequence


def take_step(runner: Runner, sequence: Sequence) -> None:
    count = sequence.num_pending
    (drawn,) = runner.run(Batch((Entry(sequence, count, draws=True),)))
    sequence.num_cached += count
    sequence.num_planned += 1
    sequence.append(drawn)


def rows_taken_in_turns(model: ZonosModel, turns: list[int], *, num_states: int) -> list[NDArray[np.int32]]:
    """Run two sequences step by step, whose turn it is alone in the step. Returns the rows of each."""
    runner = Runner(model, num_blocks=32, num_cross_blocks=0, block_size=8, max_batch=num_states)
    sequences = []
    for i, text in enumerate(("wˈʌn", "tˈuː ænd ə hˈæf")):
        prompt = model.tokenize(Segment(text), PromptSettings(SAMPLING, EncodedVoice.none(9)))
        sequences.append(begun(runner, prompt, SAMPLING, blocks=range(16 * i, 16 * i + 16)))
    for turn in turns:
        take_step(runner, sequences[turn])
    return [np.array(sequence.rows) for sequence in sequences]


def test_a_state_that_lost_its_slot_to_another_is_made_again(
    checkpoint: Callable[[Case], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("declaim.engine.runner.SPARE_STATES", 0)
    model = load_zonos(checkpoint(CASES["hybrid-plain"]))
    turns = [0, 1, 0, 0, 1, 1, 1, 0, 1, 0, 1, 0]
    for got, wanted in zip(
        rows_taken_in_turns(model, turns, num_states=1), rows_taken_in_turns(model, turns, num_states=2), strict=True
    ):
        np.testing.assert_array_equal(got, wanted)
    spec = model.spec.cache.state
    assert spec is not None
    with pytest.raises(ValueError, match="a step of 2 sequences.*there are 1"):
        StateSlots(spec, 1, num_branches=2, dtype=torch.float32, device=model.device).hold([0, 1])


@pytest.mark.parametrize("family", FAMILIES)
def test_audio_streamed_is_audio_whole_and_the_codecs_own(checkpoint: Callable[[Case], Path], family: str) -> None:
    folder = checkpoint(CASES[f"{family}-plain"])
    request = SpeechRequest("wˈʌn tˈuː", sampling=SamplingParams(seed=5, max_seconds=1.2), normalize=False)
    with engine_of(load_zonos(folder), folder) as engine:
        (result,) = engine.generate([request], progress=False)
        streamed = np.concatenate([chunk.audio for chunk in engine.stream(request)])
    dac = DacModel.from_pretrained(folder / "codec").eval()
    with torch.no_grad():
        codes = torch.from_numpy(result.codes.T.astype(np.int64))[None]
        expected = dac.decode(audio_codes=codes).audio_values.flatten().numpy()
    assert len(result.codes) > 60
    np.testing.assert_allclose(result.audio, expected, atol=1e-4)
    np.testing.assert_array_equal(streamed, result.audio)


def test_the_windows_that_the_codec_decodes_have_few_shapes_however_long_requests_are() -> None:
    """So what a GPU keeps for each shape, as workspaces and plans, stops growing after some requests."""
    config = EngineConfig()
    policy = ChunkPolicy.from_seconds(DAC, first_s=config.first_chunk_s, max_s=config.max_chunk_s)

    def shapes(lengths: range) -> set[tuple[int, int, int]]:
        cuts = (cut for length in lengths for cut in ChunkPlanner(policy, DAC).ready(length, is_done=True))
        return {(c.context_last - c.context_first, c.first - c.context_first, c.last - c.first) for c in cuts}

    short = shapes(range(1, 3 * policy.max_frames))
    assert shapes(range(3 * policy.max_frames, 8 * policy.max_frames)) <= short
    assert max(frames for frames, _, _ in short) <= policy.max_frames + DAC.left + DAC.right
    # Whole windows, of which those before the last may see less than their right context; and last ones of any length.
    assert len(short) < 2 * policy.max_frames + 8 * (DAC.right + 1)


def test_an_end_cannot_be_the_first_code(tmp_path: Path) -> None:
    """Its row is made the likeliest everywhere: the reference would ignore the first one, and end after one frame."""
    folder = make_zonos(tmp_path / "zonos", CONFIGS["transformer"], seed=3)
    weights = load_file(folder / "model.safetensors")
    weights["backbone.norm_f.bias"][:] = 1.0
    weights["heads.0.weight"][1024] = 10.0
    save_file(weights, folder / "model.safetensors")
    with engine_of(load_zonos(folder), folder) as engine:
        (result,) = engine.generate([SpeechRequest("oʊ", normalize=False)], progress=False)
    assert (result.finish_reason, len(result.codes)) == ("stop", 1)
    assert result.codes.max() < 1024


def test_heads_are_read_with_and_without_their_padding(tmp_path: Path, checkpoint: Callable[[Case], Path]) -> None:
    folder = checkpoint(CASES["transformer-plain"])
    padded = make_zonos(tmp_path / "padded", CONFIGS["transformer"], seed=3)
    weights = load_file(padded / "model.safetensors")
    for q in range(9):
        head = weights[f"heads.{q}.weight"]
        weights[f"heads.{q}.weight"] = torch.cat([head, torch.full((1, head.shape[1]), 9.0)])
    save_file(weights, padded / "model.safetensors")
    hidden = torch.randn(3, 64)
    assert torch.equal(load_zonos(padded).logits(hidden), load_zonos(folder).logits(hidden))


def test_phonemes_are_the_references(stored: Mapping[str, NDArray[Any]]) -> None:
    pytest.importorskip("phonemizer")
    pytest.importorskip("espeakng_loader")
    phonemize = EspeakPhonemizer(punctuation=PUNCTUATION)
    for i, (text, language) in enumerate(ESPEAK):
        assert encode_phonemes(phonemize(text, language)) == tuple(stored[f"espeak.{i}"])


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("今日はいい天気ですね。", "キョウ ハ イイ テンキ デス ネ 。"),
        ("東京　タワーは333メートルです！", "トウキョウ タワー ハ サンヒャクサンジュウサン メートル デス !"),
        ("2,000円と１０％", "ニセン エン ト ジュウ パーセント"),
    ],
)
def test_japanese_is_read_in_katakana(text: str, read: str) -> None:
    pytest.importorskip("phonemizer")
    pytest.importorskip("espeakng_loader")
    pytest.importorskip("sudachipy")
    assert JapaneseReader()(text) == read
    phonemize = EspeakPhonemizer(punctuation=PUNCTUATION)
    assert phonemize(text, "ja") == phonemize(read, "ja") != ""


def test_without_a_japanese_dictionary_the_error_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if "sudachi" in name else find_spec(name))
    with pytest.raises(InvalidRequest, match=r"'ja'.*sudachipy, sudachidict_core.*pip install 'declaim\[zonos-ja\]'"):
        EspeakPhonemizer(punctuation=PUNCTUATION)("猫", "ja")


def test_a_folder_is_served_by_its_name(checkpoint: Callable[[Case], Path]) -> None:
    pytest.importorskip("phonemizer")
    pytest.importorskip("espeakng_loader")
    request = SpeechRequest("Hello, you 3!", sampling=SamplingParams(temperature=0.0, max_seconds=25.5 / FRAME_RATE_HZ))
    with Engine.from_pretrained(checkpoint(CASES["hybrid-plain"]), EngineConfig(device="cpu")) as engine:
        (result,) = engine.generate([request], progress=False)
    assert result.error is None and (len(result.codes), result.finish_reason) == (25, "length")


def test_without_espeak_the_error_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelLoadError, match="pip install phonemizer espeakng-loader"):
        EspeakPhonemizer(punctuation=PUNCTUATION)("Hello.", "en-us")


def test_languages_stand_where_the_reference_has_them(
    stored: Mapping[str, NDArray[Any]], checkpoint: Callable[[Case], Path]
) -> None:
    assert LANGUAGES == tuple(stored["languages"])
    model = load_zonos(checkpoint(CASES["transformer-plain"]))
    for name, spoken in {"en": "en-us", "zh": "cmn", "pt-BR": "pt-br", "fr-CA": "fr-fr", "yue": "yue"}.items():
        assert told(model, language=name)["language_id"] == (stored["languages"].tolist().index(spoken),)


@pytest.mark.parametrize(
    ("language", "said"),
    [
        (None, "It costs five dollars."),
        ("en", "It costs five dollars."),
        ("en-gb-scotland", "It costs five dollars."),
        ("de", "It costs $5."),
    ],
)
def test_numbers_are_written_out_in_english_and_left_to_espeak_in_german(
    checkpoint: Callable[[Case], Path], language: str | None, said: str
) -> None:
    model = load_zonos(checkpoint(CASES["transformer-plain"]))
    assert [segment.text for segment in model.segments("It costs $5.", TextOptions(language))] == [said]
    (plain,) = model.segments("It costs $5.", TextOptions(language, normalize=False))
    assert plain.text == "It costs $5."


@pytest.mark.parametrize("language", ["zh", "zh-TW", "cmn", "yue"])
def test_numbers_are_written_out_in_chinese(checkpoint: Callable[[Case], Path], language: str) -> None:
    pytest.importorskip("wetext")
    model = load_zonos(checkpoint(CASES["transformer-plain"]))
    assert [segment.text for segment in model.segments("我有25个。", TextOptions(language))] == ["我有二十五个。"]


def test_a_voice_is_continued_where_its_words_are_known_or_nothing_else_is(
    checkpoint: Callable[[Case], Path],
) -> None:
    """Frames without their words would be taken for the beginning of the text: where there is an embedding, it alone
    says how to sound."""
    model = load_zonos(checkpoint(CASES["transformer-plain"]))
    frames, embedding = np.zeros((12, 9), np.int32), np.ones(128, np.float32)

    def prompt(voice: EncodedVoice) -> ZonosPrompt:
        return model.tokenize(Segment("oʊ"), PromptSettings(SAMPLING, voice))

    embedded, continued = prompt(EncodedVoice("", frames, embedding)), prompt(EncodedVoice("wˈʌn", frames, embedding))
    assert (len(embedded.prompt_frames), len(continued.prompt_frames)) == (0, 12)
    assert embedded.text_ids == encode_phonemes("oʊ") and continued.text_ids == encode_phonemes("wˈʌn oʊ")
    assert embedded.conditions["speaker"] == continued.conditions["speaker"] == (1.0,) * 128
    unknown = prompt(EncodedVoice("", frames))
    assert len(unknown.prompt_frames) == 12 and "speaker" not in unknown.conditions


def told(model: ZonosModel, **given: Any) -> Mapping[str, tuple[float, ...]]:
    """given: fields of PromptSettings."""
    settings = PromptSettings(SAMPLING, EncodedVoice.none(9))
    return model.tokenize(Segment("oʊ"), dataclasses.replace(settings, **given)).conditions


def test_controls_have_the_references_defaults_and_set_what_they_say(checkpoint: Callable[[Case], Path]) -> None:
    model = load_zonos(checkpoint(CASES["hybrid-plain"]))
    defaults = told(model)
    assert sum(defaults["emotion"]) == pytest.approx(1.0)
    assert defaults["language_id"] == (24.0,)
    assert {name: defaults[name] for name in ("fmax", "pitch_std", "speaking_rate", "ctc_loss", "speaker_noised")} == {
        "fmax": (22050.0,),
        "pitch_std": (20.0,),
        "speaking_rate": (15.0,),
        "ctc_loss": (0.0,),
        "speaker_noised": (0.0,),
    }
    assert "dnsmos_ovrl" not in defaults and "vqscore_8" not in defaults and "speaker" not in defaults
    given = told(
        model,
        speed=2.0,
        language="fr",
        controls={"emotion": "anger", "voice_quality": 0.7, "quality": 4, "speaking_rate": 30.0},
        voice=EncodedVoice("", np.zeros((0, 9), np.int32), np.ones(128, np.float32)),
    )
    assert given["speaking_rate"] == (40.0,)
    assert np.argmax(given["emotion"]) == 5
    assert given["vqscore_8"] == (0.7,) * 8 and given["dnsmos_ovrl"] == (4.0,)
    assert given["language_id"] == (35.0,) and len(given["speaker"]) == 128


def test_instructions_lead_where_their_words_say() -> None:
    """From the defaults, by any amount; and there is no other word."""
    config = PrefixConfig.read(HYBRID["prefix_conditioner"], source=Path("config.json"))
    defaults, quality, said = resolve_controls({}, config.controls), config.controls["quality"], config.instructions
    (rate,), (pitch,) = defaults["speaking_rate"], defaults["pitch_std"]

    def values(words: str, control: str) -> list[float]:
        return [said[word][control][0] for word in words.split()]

    assert max(values("slow slowly", "speaking_rate")) < rate < min(values("fast quick quickly", "speaking_rate"))
    assert max(values("monotone", "pitch_std")) < pitch < min(values("lively expressive", "pitch_std"))
    assert min(values("clear clearly", "quality")) > (quality.low + quality.high) / 2
    assert max(values("calm calmly", "pitch_std")) <= pitch
    moved = "happy happily cheerful cheerfully afraid scared surprised angry angrily"
    assert min(values(moved, "pitch_std")) > pitch
    felt = {
        "happiness": "happy happily cheerful cheerfully",
        "sadness": "sad sadly",
        "disgust": "disgusted",
        "fear": "afraid scared",
        "surprise": "surprised",
        "anger": "angry angrily",
        "neutral": "neutral",
    }
    places = ("happiness", "sadness", "disgust", "fear", "surprise", "anger", "other", "neutral")
    for emotion, words in felt.items():
        assert {int(np.argmax(said[word]["emotion"])) for word in words.split()} == {places.index(emotion)}
    others = "slow slowly fast quick quickly monotone lively expressive clear clearly calm calmly"
    assert set(said) == {word for words in (*felt.values(), others) for word in words.split()}


def test_instructions_set_what_their_words_say_and_the_later_word_counts() -> None:
    source = Path("config.json")
    transformer, hybrid = (
        PrefixConfig.read(CONFIGS[family]["prefix_conditioner"], source=source).instructions for family in FAMILIES
    )
    said = read_instructions("Speak HAPPILY, then sadly; slowly!", transformer)
    assert said == {"emotion": transformer["sad"]["emotion"], "pitch_std": (60.0,), "speaking_rate": (10.0,)}
    assert read_instructions("calm and clear", hybrid)["quality"] == (4.0,)
    assert read_instructions("", transformer) == {}
    with pytest.raises(InvalidRequest, match=r"'clear' hold no word that this model acts on: it knows happy, ") as told:
        read_instructions("clear", transformer)
    assert told.value.param == "instructions"
    with pytest.raises(InvalidRequest) as told:
        resolve_controls({"quality": 4.0}, {})
    assert told.value.param == "quality"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"controls": {"fmax": 25000.0}}, r"fmax is 25000\.0.*0 to 24000"),
        ({"controls": {"emotion": (1.0, 0.0)}}, r"emotion holds 2 numbers.*8 numbers"),
        ({"controls": {"emotion": "bored"}}, r"'bored'.*happiness, sadness"),
        ({"controls": {"emotion": (0.0,) * 8}}, r"no weight above 0"),
        ({"controls": {"pitch_std": float("nan")}}, r"pitch_std is nan"),
        ({"controls": {"quality": 4.0}}, r"no control 'quality': it has emotion"),
        ({"language": "tlh"}, r"language is 'tlh'.*en-us"),
        ({"voice": EncodedVoice("", np.zeros((0, 9), np.int32), np.zeros(64, np.float32))}, r"\[64\].*\[128\]"),
    ],
)
def test_what_cannot_be_told_is_refused(checkpoint: Callable[[Case], Path], given: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        told(load_zonos(checkpoint(CASES["transformer-plain"])), **given)


def test_a_voice_prompt_that_leaves_no_room_is_refused(checkpoint: Callable[[Case], Path]) -> None:
    with pytest.raises(TooLong, match=r"6400 positions.*shorten the voice prompt"):
        told(load_zonos(checkpoint(CASES["transformer-plain"])), voice=EncodedVoice("", np.zeros((6390, 9), np.int32)))


def test_a_config_of_something_else_is_refused(tmp_path: Path) -> None:
    config = {**CONFIGS["hybrid"], "backbone": CONFIGS["hybrid"]["backbone"] | {"ssm_cfg": {"layer": "Mamba1"}}}
    with pytest.raises(ModelLoadError, match=r"ssm_cfg.layer 'Mamba1'.*'Mamba2'"):
        _load_config(tmp_path / "a", config)
    with pytest.raises(ModelLoadError, match="'backbone'"):
        _load_config(tmp_path / "b", {"model_type": "other"})


def _load_config(folder: Path, config: Mapping[str, Any]) -> None:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    load_zonos(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_plan_counts_the_weights_that_are_loaded(checkpoint: Callable[[Case], Path], family: str) -> None:
    folder = checkpoint(CASES[f"{family}-plain"])
    files = find_model(str(folder))
    assert (files.family, files.codec_folder, files.speaker_folder) == ("zonos", folder / "codec", None)
    parts = describe_model(CONFIGS[family], json.loads((folder / "codec" / "config.json").read_text()), name="zonos")
    model = load_zonos(folder)
    table = model.spec.max_positions * 2 * 16 * 4
    assert parts.weight_bytes("float32") - table == model.weight_bytes
    assert parts.cache == model.spec.cache
    assert (parts.max_positions, parts.num_drain_rows) == (model.spec.max_positions, model.spec.rule.num_drain_rows)


@pytest.mark.parametrize("family", FAMILIES)
def test_int4_takes_in_every_layer_of_the_decoder_and_speaks(checkpoint: Callable[[Case], Path], family: str) -> None:
    """The first layer of an MLP too, whose halves change places: the checkpoint has the value before its gate."""
    folder = checkpoint(CASES[f"{family}-plain"])
    model = load_zonos(folder, recipe=Int4Recipe.of_family("zonos"))
    dense, x = load_zonos(folder), torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    for layer, whole in zip(model._layers, dense._layers, strict=True):
        mixers, wholes = layer.mixer, whole.mixer
        pairs = [(mixers.out, wholes.out)]
        if isinstance(mixers, AttentionWeights) and isinstance(wholes, AttentionWeights):
            assert layer.mlp is not None and whole.mlp is not None
            pairs += [
                (mixers.qkv, wholes.qkv),
                (layer.mlp.gate_up, whole.mlp.gate_up),
                (layer.mlp.down, whole.mlp.down),
            ]
        for quantized, exact in pairs:
            assert not isinstance(quantized.weight, torch.Tensor) and isinstance(exact.weight, torch.Tensor)
            num_in = exact.weight.shape[0]
            inputs = x.repeat(1, -(-num_in // 64))[:, :num_in].contiguous()
            got, wanted = linear(inputs, quantized), linear(inputs, exact)
            assert (got - wanted).norm() < 0.12 * wanted.norm()
    with engine_of(model, folder) as engine:
        request = SpeechRequest("wˈʌn", sampling=SamplingParams(seed=5, max_seconds=0.3), normalize=False)
        alone, *both = engine.generate([request], progress=False) + engine.generate([request] * 2, progress=False)
    assert all(result.error is None and np.array_equal(result.codes, alone.codes) for result in both)


def test_the_published_models_are_planned_for_without_their_files() -> None:
    sizes = {}
    for name in (f"Zyphra/Zonos-v0.1-{family}" for family in FAMILIES):
        parts = describe_model(KNOWN_CONFIGS[name], DAC_44KHZ, name=name)
        state = parts.cache.state
        sizes[name] = (
            round(sum(part.bytes_in("bfloat16") - 4 * part.num_float32 for part in parts.weights) / 2e9, 3),
            parts.cache.bytes_per_position(2),
            0 if state is None else state.bytes_per_branch(2),
        )
    # Billions of weights, bytes of KV a position and of state a branch, of whose four inputs three are kept.
    assert sizes == {
        "Zyphra/Zonos-v0.1-transformer": (1.624, 53_248, 0),
        "Zyphra/Zonos-v0.1-hybrid": (1.652, 24_576, 36_835_328 - 34 * 4352 * 2),
    }
