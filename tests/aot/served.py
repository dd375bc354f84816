"""Every kernel launch that serving makes, found by serving: models of real widths and without memory take their steps
while launches are recorded instead of made. They have one layer of each kind, as the others launch the same again."""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping
from collections.abc import Sequence as Items
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import DiaConfig as HfDiaConfig

from declaim.engine.batch import Batch, Entry
from declaim.engine.checkpoint import Checkpoint
from declaim.engine.config import Int4Recipe
from declaim.engine.graphs import GraphRunner
from declaim.engine.loader import EMBEDDED_FOLDER
from declaim.engine.models import dia, lark, zonos
from declaim.engine.models.base import Prefill, PromptSettings, SpeechModel
from declaim.engine.parts import ZONOS_HYBRID, ZONOS_TRANSFORMER
from declaim.engine.phonemes import Phonemizer
from declaim.engine.progress import ignore_progress
from declaim.engine.request import EncodedVoice, ResolvedSampling
from declaim.engine.runner import Runner
from declaim.engine.sequence import Playback, Prompt, Sequence, SequenceInput
from declaim.engine.spec import CodecSpec
from declaim.engine.words import Segment
from declaim.kernels import backend
from declaim.kernels.backend import Variant
from declaim.kernels.int4 import Int4Weight

META = torch.device("meta")
# More layers are int4 here than any family's table allows: a caller may have int4_keep_dense name fewer.
NEVER_INT4 = ("*embedding*", "logits_dense.*", "head.*", "duration.*", "side_proj.*")
BLOCK_SIZE, MAX_BATCH, MAX_STEP_POSITIONS = 32, 128, 256
SAMPLING = ResolvedSampling(1.0, 45, 0.95, 0.0, 1.0, 3.0, 0, 30.0)
DAC = CodecSpec(sample_rate_hz=44100, hop=512, left=10, right=10, num_codebooks=9, codebook_size=1024)


class WeightlessCheckpoint(Checkpoint):
    """Hands out tensors of any shape that is asked for, without memory; int4 where the recipe says so."""

    def __init__(self, *, dtype: torch.dtype, recipe: Int4Recipe | None) -> None:
        self.folder = Path("weightless")
        self.weight_bytes = 0
        self._dtype = dtype
        self._device = META
        self._recipe = recipe
        self._mapped: set[int] = set()

    def take(self, name: str, shape: Items[int]) -> torch.Tensor:
        return torch.empty(tuple(shape), dtype=self._dtype, device=META)

    def _take_int4(self, name: str, shape: tuple[int, int], group_size: int) -> Int4Weight:
        num_out, num_in = shape
        packed = torch.empty(-(-num_in // 128) * 16, num_out, dtype=torch.int32, device=META)
        scales, offsets = (torch.empty(num_in // group_size, num_out, device=META) for _ in range(2))
        return Int4Weight(packed, scales, offsets, num_in)


def dia_model(dtype: torch.dtype, recipe: Int4Recipe | None) -> SpeechModel:
    """Dia-1.6B."""
    config = dia.DiaConfig.read(HfDiaConfig().to_dict(), source=Path("Dia-1.6B"))
    config = replace(config, encoder_layers=1, layers=1)
    spec = dia._spec(config, DAC, defaults=dia._defaults({}))
    with torch.inference_mode():
        return dia.DiaModel(config, WeightlessCheckpoint(dtype=dtype, recipe=recipe), spec=spec)


def lark_model(dtype: torch.dtype, recipe: Int4Recipe | None) -> SpeechModel:
    """The embedded voice."""
    config = lark.LarkConfig.read(EMBEDDED_FOLDER / "config.json")
    config = replace(config, encoder_layers=1, layers=1)
    codec = CodecSpec(
        sample_rate_hz=24000,
        hop=960,
        left=10,
        right=10,
        num_codebooks=config.num_codebooks,
        codebook_size=config.codebook_size,
    )
    with torch.inference_mode():
        return lark.LarkModel(
            config,
            WeightlessCheckpoint(dtype=dtype, recipe=recipe),
            spec=lark._spec(config, codec),
            phonemizer=Phonemizer.load(EMBEDDED_FOLDER),
        )


def zonos_model(
    published: Mapping[str, Any], attention_layers: frozenset[int], dtype: torch.dtype, recipe: Int4Recipe | None
) -> SpeechModel:
    """A Zonos-v0.1 of one layer beside those with attention; texts are taken for phonemes."""
    config = zonos.ZonosConfig.read(published, source=Path("Zonos-v0.1"))
    config = replace(config, layers=2, attention_layers=attention_layers)
    with torch.inference_mode():
        return zonos.ZonosModel(
            config,
            WeightlessCheckpoint(dtype=dtype, recipe=recipe),
            spec=zonos.zonos_spec(config, DAC),
            phonemize=lambda text, language: text,
        )


MODELS = {
    "dia": dia_model,
    "lark": lark_model,
    "zonos": functools.partial(zonos_model, ZONOS_TRANSFORMER, frozenset({0, 1})),
    "zonos-hybrid": functools.partial(zonos_model, ZONOS_HYBRID, frozenset({0})),
}


def served_variants(name: str, dtype: torch.dtype, capability: int, *, is_int4: bool) -> dict[str, Variant]:
    """What a model launches on a card of this compute capability: prompts of some lengths, and steps of any size."""
    with backend.recording(capability) as record:
        model = MODELS[name](dtype, Int4Recipe(NEVER_INT4) if is_int4 else None)
        runner = Runner(model, num_blocks=4096, num_cross_blocks=1024, block_size=BLOCK_SIZE)
        for num_text in (1, 40, 200):
            for num_prompt in (0, 30, MAX_STEP_POSITIONS // 2 - 2):
                _run_prompt(model, runner, num_text=num_text, num_prompt=num_prompt)
        graphs = GraphRunner(model, runner, block_size=BLOCK_SIZE, max_batch=MAX_BATCH)
        graphs.capture(ignore_progress)
        with torch.inference_mode():
            for lanes in graphs.lanes.values():
                lanes.replay()
    return record.variants


def _told(model: lark.LarkModel, prompt: Prompt) -> Prefill:
    text_side, config = model._text_side, model._config
    encoded = text_side.encode(torch.zeros(len(prompt.text_ids), dtype=torch.int64, device=META), config)
    durations_s = text_side.durations_s(encoded)
    side = text_side.side_vectors(encoded, durations_s, num_rows=100, rate_hz=config.frame_rate_hz)
    return Prefill(side=side, num_frames=90)


def _run_prompt(model: SpeechModel, runner: Runner, *, num_text: int, num_prompt: int) -> None:
    spec = model.spec
    frames = np.zeros((num_prompt if spec.supports_voice_prompt else 0, spec.rule.num_codebooks), dtype=np.int32)
    text = "[S1] " + "a" * num_text if spec.family == "dia" else "a" * num_text
    prompt = model.tokenize(Segment(text), PromptSettings(SAMPLING, EncodedVoice("", frames)))
    sequence = Sequence(SequenceInput(0, "r", 0, SAMPLING, prompt, 0.0), spec.rule, Playback(paced=False))
    needed = -(-sequence.num_positions // BLOCK_SIZE)
    sequence.block_tables = [list(range(b * needed, (b + 1) * needed)) for b in range(sequence.num_branches)]
    sequence.cross_blocks = list(range(-(-prompt.cross_len // BLOCK_SIZE)))
    with torch.inference_mode():
        if isinstance(model, lark.LarkModel):
            runner._prefills[0] = _told(model, prompt)  # how long a text lasts is read back from its tensors
        else:
            runner.begin(sequence)
        count = min(sequence.num_pending, MAX_STEP_POSITIONS // sequence.num_branches)
        runner.compute(Batch((Entry(sequence, count, draws=True),)))
    runner.release(sequence)


LIST = Path(__file__).parent / "variants.txt"
CAPABILITIES = (75, 80, 86, 89, 90, 100)


@functools.cache
def all_served(capability: int) -> dict[str, Variant]:
    """Every variant that serving any model launches on such a card, in the 16-bit type it would pick there and int4."""
    dtype = torch.float16 if capability < 80 else torch.bfloat16
    found: dict[str, Variant] = {}
    for name in MODELS:
        for is_int4 in (False, True):
            found |= served_variants(name, dtype, capability, is_int4=is_int4)
    return found


def main() -> None:
    """Write the list: `python -m tests.aot.served`."""
    lines = [f"sm_{capability} {key}" for capability in CAPABILITIES for key in sorted(all_served(capability))]
    LIST.write_text("\n".join(lines) + "\n")
    print(f"{len(lines)} variants in {LIST}", file=sys.stderr)


if __name__ == "__main__":
    main()
