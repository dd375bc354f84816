"""The whole engine on its Triton path: operation by operation, and one step ahead of the CPU from seats on the device.

The interpreter stands for the GPU, and the step that a graph would hold runs uncaptured.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from transformers import DacConfig, DacModel, DiaConfig, DiaForConditionalGeneration
from transformers.models.dia.configuration_dia import DiaDecoderConfig, DiaEncoderConfig

from declaim.engine import Engine, EngineConfig, SamplingParams, SpeechRequest
from declaim.engine.graphs import GraphRunner
from declaim.engine.integrity import QUANTIZATION_NAME
from declaim.engine.models import zonos
from declaim.engine.quantize import quantize_folder
from declaim.engine.request import SpeechResult
from declaim.kernels import backend
from declaim.kernels.int4 import quantize_weight, w4a16_dequantize_reference
from tests.dia_checkpoints import quiet_transformers
from tests.fakes import FAKE_CODEC, FakeCodec, FakeModel, ShuffledVocoder
from tests.zonos_checkpoints import HYBRID, load_zonos, make_zonos

BOS, EOS, PAD, VOCAB_SIZE, NUM_CODEBOOKS = 34, 32, 33, 36, 3
FRAME_RATE_HZ = 44100 / 512
TEXTS = ("[S1] Hello.", "[S2] Hi é!", "[S1] No.")  # at most 8 bytes: two blocks of the cross-attention cache each
NUM_FRAMES = (9, 7, 8)
# By their end the first has two branches of three blocks, the others as many or fewer: not all of that is there.
DIA_CONFIG = EngineConfig(max_batch=3, num_blocks=8, block_size=4)
FAKE_TEXTS = ("one", "a longer one", "a|b", "q")


@pytest.fixture(scope="module")
def dia(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Dia of one layer and three codebooks of 32 codes, every dimension of which 32 divides."""
    folder = tmp_path_factory.mktemp("dia")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    encoder = DiaEncoderConfig(**sizes, num_key_value_heads=2, head_dim=16, max_position_embeddings=64)
    decoder = DiaDecoderConfig(
        **sizes,
        num_key_value_heads=1,
        head_dim=16,
        cross_num_attention_heads=2,
        cross_num_key_value_heads=2,
        cross_head_dim=16,
        cross_hidden_size=32,
        max_position_embeddings=64,
        vocab_size=VOCAB_SIZE,
        num_channels=NUM_CODEBOOKS,
    )
    ids = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
    config = DiaConfig(encoder_config=encoder, decoder_config=decoder, delay_pattern=[0, 1, 2], **ids)
    codec = DacConfig(
        encoder_hidden_size=2,
        decoder_hidden_size=32,
        n_codebooks=NUM_CODEBOOKS,
        codebook_size=EOS,
        codebook_dim=8,
        sampling_rate=44100,
        downsampling_ratios=[2, 4, 8, 8],
        upsampling_ratios=[8, 8, 4, 2],
    )
    with quiet_transformers():
        model = DiaForConditionalGeneration(config)
        with torch.no_grad():
            for weight in model.parameters():
                if weight.ndim > 1:
                    weight.normal_(0, 0.3)
        model.save_pretrained(folder)
        DacModel(codec).save_pretrained(folder / "codec")
    return folder


def greedy_codes(folder: Path, config: EngineConfig) -> list[NDArray[np.int32]]:
    """What an engine draws for all texts at once, after it ran out of blocks and began one of them anew."""
    requests = [
        SpeechRequest(
            text,
            sampling=SamplingParams(
                temperature=0.0, guidance_scale=1.0 if i == 1 else 3.0, top_k=20, max_seconds=count / FRAME_RATE_HZ
            ),
        )
        for i, (text, count) in enumerate(zip(TEXTS, NUM_FRAMES, strict=True))
    ]
    with Engine.from_pretrained(folder, config) as engine:
        assert isinstance(engine._runner, GraphRunner) == (backend.IS_INTERPRETED and not config.eager)
        results = engine.generate(requests, progress=False)
        assert engine.stats().preemptions > 0
    for result, count in zip(results, NUM_FRAMES, strict=True):
        assert result.error is None and 0 < len(result.codes) <= count
    return [result.codes for result in results]


def torch_codes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[NDArray[np.int32]]:
    """The same on the torch path, which tests/engine/test_dia.py compares with transformers."""
    with monkeypatch.context() as patched:
        patched.setattr(backend, "IS_INTERPRETED", False)
        return greedy_codes(folder, replace(DIA_CONFIG, eager=True))


def assert_equal(got: Sequence[NDArray[np.int32]], expected: Sequence[NDArray[np.int32]]) -> None:
    assert len({tuple(codes.ravel()) for codes in expected}) == len(TEXTS)
    for ours, wanted in zip(got, expected, strict=True):
        np.testing.assert_array_equal(ours, wanted)


@pytest.mark.parametrize("eager", [True, False])
def test_greedy_codes_of_a_ragged_preempted_batch_are_those_of_the_torch_path(
    dia: Path, monkeypatch: pytest.MonkeyPatch, *, eager: bool
) -> None:
    assert_equal(greedy_codes(dia, replace(DIA_CONFIG, eager=eager)), torch_codes(dia, monkeypatch))


def test_an_int4_folder_speaks_as_a_dense_one_of_its_dequantized_weights(
    dia: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small, dense = tmp_path / "small", Path(shutil.copytree(dia, tmp_path / "dense"))
    quantize_folder(dia, small)
    tensors = load_file(dense / "model.safetensors")
    groups = json.loads((small / QUANTIZATION_NAME).read_text())["group_sizes"]
    assert len(groups) == 16 and set(groups.values()) == {32}
    for name, group in groups.items():
        weight = w4a16_dequantize_reference(quantize_weight(tensors[name], group))
        tensors[name] = weight.t().contiguous()
    save_file(tensors, dense / "model.safetensors", metadata={"format": "pt"})
    expected = torch_codes(dense, monkeypatch)
    unquantized = torch_codes(dia, monkeypatch)
    assert not all(np.array_equal(ours, theirs) for ours, theirs in zip(unquantized, expected, strict=True))
    assert_equal(greedy_codes(small, DIA_CONFIG), expected)


def fake_results(config: EngineConfig, requests: Sequence[SpeechRequest]) -> list[SpeechResult]:
    model = FakeModel(seed=1, eos_bias=1.0)
    with Engine(
        model,
        config.resolve(),
        make_vocoder=lambda wake: ShuffledVocoder(seed=0, wake=wake),
        model_name="fake",
        load_encoder=FakeCodec,
    ) as engine:
        results = engine.generate(requests, progress=False)
        stats = engine.stats()
        assert (stats.blocks_used, stats.running, stats.waiting) == (0, 0, 0)
        assert (stats.preemptions > 0) == (config.num_blocks is not None)
        return results


@pytest.fixture
def on_torch(monkeypatch: pytest.MonkeyPatch) -> Callable[[Sequence[SpeechRequest]], list[SpeechResult]]:
    """What the fake family says without Triton: step by step, with room for all."""

    def run(requests: Sequence[SpeechRequest]) -> list[SpeechResult]:
        with monkeypatch.context() as patched:
            patched.setattr(backend, "IS_INTERPRETED", False)
            return fake_results(EngineConfig(eager=True, max_batch=8, block_size=8), requests)

    return run


@pytest.mark.parametrize("num_blocks", [None, 9])
def test_a_step_ahead_draws_the_same_as_step_by_step(
    num_blocks: int | None, on_torch: Callable[[Sequence[SpeechRequest]], list[SpeechResult]]
) -> None:
    requests = [
        SpeechRequest(
            text,
            sampling=SamplingParams(
                temperature=0.0 if i == 1 else 1.1,
                guidance_scale=1.0 if i == 2 else 2.5,
                top_k=(0, 5, 7)[i % 3],
                seed=i,
                max_seconds=0.3 + 0.2 * i,
            ),
        )
        for i, text in enumerate(FAKE_TEXTS)
    ]
    results = fake_results(EngineConfig(max_batch=3, block_size=8, num_blocks=num_blocks), requests)
    for result, wanted in zip(results, on_torch(requests), strict=True):
        assert result.error is None and wanted.error is None
        np.testing.assert_array_equal(result.codes, wanted.codes)
        np.testing.assert_array_equal(result.audio, wanted.audio)
        assert result.finish_reason == wanted.finish_reason


def test_a_failed_draw_ends_its_own_request_a_step_late(
    on_torch: Callable[[Sequence[SpeechRequest]], list[SpeechResult]],
) -> None:
    sampling = SamplingParams(temperature=0.0, max_seconds=0.4)
    texts = ("fine", "this one is !nan", "fine too", "and !crash")
    requests = [SpeechRequest(text, sampling=sampling) for text in texts]
    results = fake_results(EngineConfig(max_batch=4, block_size=8), requests)
    assert [result.error is None for result in results] == [True, False, True, False]
    for result, wanted in zip(results[::2], on_torch(requests[::2]), strict=True):
        np.testing.assert_array_equal(result.codes, wanted.codes)


# A hybrid of one Mamba-2 and one attention layer, whose codebooks have few codes: heads of the real size, and a table
# of 6400 positions, take the interpreter minutes.
HYBRID_CODEC = replace(FAKE_CODEC, num_codebooks=9, codebook_size=30)
HYBRID_TEXTS = (("oʊ", 0.3, 2.0), ("wʌn", 0.6, 2.0), ("ænd", 0.2, 1.0))
"""Phonemes, seconds, guidance scale."""


@pytest.fixture
def hybrid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(zonos, "MAX_POSITIONS", 64)
    ssm = {"layer": "Mamba2", "d_state": 8, "headdim": 64}
    config = {
        **HYBRID,
        "backbone": {**HYBRID["backbone"], "n_layer": 2, "attn_layer_idx": [1], "ssm_cfg": ssm},
        "prefix_conditioner": {
            **HYBRID["prefix_conditioner"],
            "conditioners": HYBRID["prefix_conditioner"]["conditioners"][:2],
        },
        "eos_token_id": HYBRID_CODEC.codebook_size,
        "masked_token_id": HYBRID_CODEC.codebook_size + 1,
    }
    return make_zonos(tmp_path / "hybrid", config, codec_channels=0)


def hybrid_codes(folder: Path, config: EngineConfig) -> list[NDArray[np.int32]]:
    """Greedy, all texts at once; whoever loses his blocks loses his state, and begins anew."""
    requests = [
        SpeechRequest(
            text,
            sampling=SamplingParams(temperature=0.0, guidance_scale=scale, max_seconds=seconds),
            normalize=False,
        )
        for text, seconds, scale in HYBRID_TEXTS
    ]
    with Engine(
        load_zonos(folder, codec=HYBRID_CODEC),
        config.resolve(),
        make_vocoder=lambda wake: ShuffledVocoder(seed=0, wake=wake),
        model_name="hybrid",
    ) as engine:
        assert isinstance(engine._runner, GraphRunner) != config.eager
        results = engine.generate(requests, progress=False)
        assert (engine.stats().preemptions > 0) == (config.num_blocks is not None)
    assert all(result.error is None for result in results)
    return [result.codes for result in results]


def test_a_hybrid_s_states_move_on_as_on_the_torch_path(hybrid: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = EngineConfig(device="cpu", dtype="float32", max_batch=3, block_size=4)
    with monkeypatch.context() as patched:
        patched.setattr(backend, "IS_INTERPRETED", False)
        expected = hybrid_codes(hybrid, replace(config, eager=True))
    assert [len(codes) for codes in expected] == [3, 6, 2]
    assert_equal(hybrid_codes(hybrid, replace(config, num_blocks=22)), expected)
