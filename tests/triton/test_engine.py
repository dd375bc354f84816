"""The whole engine on its Triton path: operation by operation, and one step ahead of the CPU from seats on the device.

The interpreter stands for the GPU, and the step that a graph would hold runs uncaptured.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from declaim.engine import Engine, EngineConfig, SamplingParams, SpeechRequest
from declaim.engine.graphs import GraphRunner
from declaim.engine.request import SpeechResult
from tests.dia_checkpoints import DiaSize, Reference, make_dia, seconds_of
from tests.fakes import FakeCodec, FakeModel, ShuffledVocoder

pytestmark = [pytest.mark.filterwarnings("ignore:`max_length` is ignored:UserWarning")]

TINY = DiaSize(layers=1, hidden=32, heads=2, kv_heads=1, head_dim=16, cross_heads=2, ffn=32, encoder_layers=1)
TEXTS = ("[S1] Hello there. [S2] Hi!", "[S1] Short é.", "[S2] A longer line.")
MAX_NEW_TOKENS = (20, 18, 19)
FAKE_TEXTS = ("one", "a longer one", "a|b", "q")


@pytest.mark.parametrize(("eager", "guidance_scale"), [(True, 3.0), (False, 3.0), (False, None)])
def test_greedy_codes_of_a_ragged_batch_equal_transformers(
    tmp_path: Path, *, eager: bool, guidance_scale: float | None
) -> None:
    folder = make_dia(tmp_path / "dia", TINY)
    reference = Reference.load(folder)
    expected = [
        reference.greedy(text, max_new_tokens=count, guidance_scale=guidance_scale)
        for text, count in zip(TEXTS, MAX_NEW_TOKENS, strict=True)
    ]
    requests = [
        SpeechRequest(
            text,
            sampling=SamplingParams(
                temperature=0.0, guidance_scale=guidance_scale or 1.0, top_k=45, max_seconds=seconds_of(count)
            ),
        )
        for text, count in zip(TEXTS, MAX_NEW_TOKENS, strict=True)
    ]
    with Engine.from_pretrained(folder, EngineConfig(eager=eager, max_batch=4, num_blocks=12, block_size=16)) as engine:
        assert isinstance(engine._runner, GraphRunner) != eager
        for result, codes in zip(engine.generate(requests, progress=False), expected, strict=True):
            assert result.error is None
            np.testing.assert_array_equal(result.codes, codes)


def fake_results(config: EngineConfig, requests: Sequence[SpeechRequest]) -> tuple[list[SpeechResult], Engine]:
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
        return results, engine


@pytest.mark.parametrize("num_blocks", [None, 9])
def test_a_step_ahead_draws_the_same_as_step_by_step(num_blocks: int | None) -> None:
    requests = [
        SpeechRequest(
            text,
            sampling=SamplingParams(
                temperature=0.0 if i == 1 else 1.1,
                guidance_scale=1.0 if i == 2 else 2.5,
                top_k=(0, 5, 7)[i % 3],
                seed=i,
                max_seconds=0.5 + 0.3 * i,
            ),
        )
        for i, text in enumerate(FAKE_TEXTS)
    ]
    expected, _ = fake_results(EngineConfig(eager=True, max_batch=8, block_size=8), requests)
    config = EngineConfig(max_batch=3, block_size=8, num_blocks=num_blocks)
    results, _ = fake_results(config, requests)
    for result, wanted in zip(results, expected, strict=True):
        assert result.error is None and wanted.error is None
        np.testing.assert_array_equal(result.codes, wanted.codes)
        np.testing.assert_array_equal(result.audio, wanted.audio)
        assert result.finish_reason == wanted.finish_reason


def test_a_failed_draw_ends_its_own_request_a_step_late() -> None:
    sampling = SamplingParams(temperature=0.0, max_seconds=1.0)
    texts = ("fine", "this one is !nan", "fine too", "and !crash")
    requests = [SpeechRequest(text, sampling=sampling) for text in texts]
    results, _ = fake_results(EngineConfig(max_batch=4, block_size=8), requests)
    assert [result.error is None for result in results] == [True, False, True, False]
    alone: list[NDArray[np.int32]] = [
        fake_results(EngineConfig(max_batch=4, block_size=8), [request])[0][0].codes for request in requests[::2]
    ]
    for result, codes in zip(results[::2], alone, strict=True):
        np.testing.assert_array_equal(result.codes, codes)
