"""The laws of tests/engine/test_properties.py, unchanged, on Zonos: transformer and hybrid.

Fewer examples than there, since each step of a real decoder takes longer; the fake codec is given nine codebooks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from declaim.engine import Engine, EngineConfig
from declaim.engine.models.base import Prefill
from declaim.engine.models.zonos import ZonosModel
from declaim.engine.models.zonos_conditioning import encode_phonemes
from declaim.engine.sequence import Prompt
from declaim.engine.text import TextOptions
from declaim.engine.words import Segment
from tests import fakes
from tests.engine import test_properties as laws
from tests.zonos_checkpoints import CONFIGS, EOS, load_zonos, make_zonos

CODEC = replace(fakes.FAKE_CODEC, num_codebooks=9, codebook_size=1024)
END_BIAS = 8.0  # of the end's logit: so a quarter of the requests end by themselves
FEW = settings(laws.PROPERTY, max_examples=12)
LAWS = {name: law for name, law in vars(laws).items() if name.startswith("test_")}


class NineCodebooks(fakes.FakeCodec):
    def encode(self, audio: torch.Tensor) -> torch.Tensor:
        return super().encode(audio)[:1].repeat(CODEC.num_codebooks, 1)


@pytest.fixture(scope="module", params=tuple(CONFIGS))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ZonosModel:
    folder: Path = tmp_path_factory.mktemp("zonos") / request.param
    make_zonos(folder, CONFIGS[request.param], seed=1, eos_like=117, codec_channels=0)
    return load_zonos(folder, codec=CODEC)


@pytest.fixture(autouse=True)
def zonos_for_fake(model: ZonosModel, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    # Beyond what the fake family has: begin, end and conditions of the prefix, and a longer drain.
    longer = 2 + model._config.prefix.num_vectors - 1 + model.spec.rule.num_drain_rows - 3

    def make_engine(config: EngineConfig = laws.ROOMY, *, vocoder_seed: int = 0, eos_bias: float = 0.0) -> Engine:
        class Biased(ZonosModel):
            """Fails where the fake family does: on "!crash" and "!nan"; cuts texts where it does, at "|"."""

            def segments(self, text: str, options: TextOptions) -> list[Segment]:
                return [
                    segment for piece in text.split("|") for segment in super(Biased, self).segments(piece, options)
                ]

            def prepare(self, prompt: Prompt) -> Prefill:
                if holds(prompt, "!crash"):
                    raise RuntimeError("this text crashes the conditioner")
                prefill = super().prepare(prompt)
                if holds(prompt, "!nan") and prefill.prefix is not None:
                    return replace(prefill, prefix=prefill.prefix * float("nan"))
                return prefill

            def logits(self, hidden: torch.Tensor) -> torch.Tensor:
                out = super().logits(hidden)
                out[:, 0, EOS] += eos_bias + END_BIAS
                return out

        # As many blocks more as one sequence in both branches is longer.
        num_blocks = (config.num_blocks or 0) + 2 * -(-longer // config.block_size)
        biased = object.__new__(Biased)
        biased.__dict__.update(model.__dict__)
        return Engine(
            biased,
            replace(config, num_blocks=num_blocks),
            make_vocoder=lambda wake: fakes.ShuffledVocoder(seed=vocoder_seed, wake=wake),
            model_name="zonos",
            load_encoder=NineCodebooks,
        )

    monkeypatch.setattr(laws, "make_engine", make_engine)
    monkeypatch.setattr(fakes.FakeCodec, "spec", CODEC)


def holds(prompt: Prompt, word: str) -> bool:
    wanted = encode_phonemes(word)[1:-1]
    return any(prompt.text_ids[i : i + len(wanted)] == wanted for i in range(len(prompt.text_ids)))


def fewer(name: str, **strategies: Any) -> Callable[..., None]:
    """A law over other examples: its own body, without the arguments it is given there."""
    inner = LAWS.pop(name).hypothesis.inner_test

    @FEW
    @given(**strategies)
    def test(**drawn: Any) -> None:
        inner(**drawn)

    return test


test_any_schedule_gives_the_codes_and_samples_of_alone = fewer(
    "test_any_arrival_batch_blocks_preemption_and_cancellation_give_the_codes_and_samples_of_alone",
    crowd=laws.crowds(),
)
test_a_list_gives_each_request_the_codes_of_alone = fewer(
    "test_a_list_gives_each_request_the_codes_of_alone",
    chosen=st.lists(laws.requests, min_size=1, max_size=5),
    max_batch=st.integers(1, 8),
)
test_any_chunk_schedule_gives_the_samples_of_the_whole = fewer(
    "test_any_chunk_schedule_gives_the_samples_of_the_whole",
    request=laws.requests,
    first_s=st.floats(0.05, 1.0),
    max_s=st.floats(0.05, 2.0),
    cut=st.integers(1, 40),
)


@pytest.mark.parametrize("name", LAWS)
def test_every_other_law_of_the_fake_family_holds(name: str) -> None:
    LAWS[name]()
