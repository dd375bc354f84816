"""What does each precision cost in quality, and does int4 pass its gate?

Method. The embedded voice speaks --sentences sentences greedily in float32. Then every precision is told those codes,
row by row, and predicts the next: --agreement is how often its likeliest code is float32's (top-1), and the mean KL
divergence from float32's distribution is in nats, over all codes of all frames. All are told the durations of float32,
because a frame more or less is not an error of the codes; how far their own durations are off is reported beside it.
The signal-to-quantization-noise ratio (SQNR) of a layer is that of its output, for the inputs that float32 gave it.
16-bit rows are of this CPU's arithmetic, not of a GPU's.

The gate: int4 as the family's table (engine/config.py) has it agrees on --gate of the codes. If it does not, or where
--search asks for it, the script says which table would: it makes one kind of layer int4 at a time, and then all of
them, the least divergence for each byte saved first, for as long as the gate holds. A gate that fails exits with 1.

--words: what a recogniser hears of N held-out sentences that each precision speaks as it is served here (voice.py says
how words are counted; it needs declaim[train]).

    python benchmarks/quality.py [--sentences N] [--gate 0.97] [--search] [--rounding] [--words N] [--threads N]
        [--quick]
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from unittest import mock

import machine
import numpy as np
import torch
from texts import SENTENCES

from declaim.engine import Engine, EngineConfig, SamplingParams, SpeechRequest
from declaim.engine.config import Int4Recipe
from declaim.engine.loader import EMBEDDED_FOLDER
from declaim.engine.models import layers
from declaim.engine.models.base import PromptSettings, StepContext
from declaim.engine.models.lark import LarkModel
from declaim.engine.request import EncodedVoice
from declaim.engine.sequence import Prompt
from declaim.engine.spec import ModelSpec
from declaim.engine.text import TextOptions
from declaim.kernels import int4
from declaim.kernels.attention import plan_attention
from declaim.kernels.kv_cache import allocate_cache
from declaim.kernels.linear import Linear, gated_linear, linear

QUESTION = "Quality of the embedded voice by precision: next codes, durations, and layers' outputs"
CPU = torch.device("cpu")
BLOCK_SIZE = 32
KINDS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
GATED = "int4"
ALWAYS_DENSE = ("*_embedding.*", "head.*", "duration.*", "side_proj.*")
RANKED_CASES = 4


@dataclass(frozen=True)
class Case:
    """A sentence and what float32 said for it. rows: int64 [T, Q], fed; is_code: bool [T, Q], what is predicted."""

    prompt: Prompt
    rows: torch.Tensor
    is_code: torch.Tensor
    durations_s: torch.Tensor
    logits: torch.Tensor


@dataclass
class Score:
    """Sums over cases."""

    num_codes: int = 0
    num_equal: int = 0
    kl_nats: float = 0.0
    duration_errors: list[float] = field(default_factory=list)

    @property
    def agreement(self) -> float:
        return self.num_equal / self.num_codes

    def summary(self) -> dict[str, float]:
        return {
            "agreement": self.agreement,
            "kl_nats": self.kl_nats / self.num_codes,
            "duration_error_percent": 100 * float(np.mean(self.duration_errors)),
        }


def _load(spec: ModelSpec, dtype: torch.dtype, recipe: Int4Recipe | None = None) -> LarkModel:
    return LarkModel.load(EMBEDDED_FOLDER, codec=spec.codec, dtype=dtype, device=CPU, recipe=recipe)


def _grid(codes: torch.Tensor, spec: ModelSpec, *, pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Delayed rows that are fed, and which of the codes that the next row holds are a frame's."""
    num_frames, delay = len(codes), torch.tensor(spec.rule.delay)
    frames = torch.arange(num_frames + int(delay.max()))[:, None] - 1 - delay
    rows = codes.gather(0, frames.clamp(0, num_frames - 1))
    rows = rows.where(frames >= 0, spec.rule.fill).where(frames < num_frames, pad)
    following = frames + 1
    return rows, (following >= 0) & (following < num_frames)


@torch.inference_mode()
def _logits(model: LarkModel, prompt: Prompt, rows: torch.Tensor, durations_s: torch.Tensor) -> torch.Tensor:
    """Teacher-forced: float32 [T, Q, V], what follows each row."""
    num_rows, cache = len(rows), model.spec.cache
    text_side, config = model._text_side, model._config
    encoded = text_side.encode(torch.tensor(prompt.text_ids), config)
    told = text_side.side_vectors(encoded, durations_s, num_rows=num_rows, rate_hz=config.frame_rate_hz)
    num_blocks = -(-num_rows // BLOCK_SIZE)
    shape = {"block_size": BLOCK_SIZE, "head_dim": cache.head_dim, "dtype": model.dtype, "device": CPU}
    positions = torch.arange(num_rows)
    context = StepContext(
        positions=positions,
        slots=positions,
        attention=plan_attention(
            [list(range(num_blocks))],
            [num_rows],
            context_lens=[num_rows],
            block_size=BLOCK_SIZE,
            causal=True,
            device=CPU,
        ),
        caches=tuple(
            (
                allocate_cache(num_blocks, cache.num_kv_heads, **shape),
                allocate_cache(num_blocks, cache.num_kv_heads, **shape),
            )
            for _ in range(cache.num_layers)
        ),
        cross=None,
        cross_caches=(),
        num_conditional=num_rows,
        last=positions,
    )
    return model.logits(model.forward(model.embed(rows) + told, context))


def _cases(engine: Engine, reference: LarkModel, count: int) -> list[Case]:
    greedy = SamplingParams(temperature=0.0)
    sampling = greedy.resolve(engine.spec.sampling.defaults)
    settings = PromptSettings(sampling, EncodedVoice.none(engine.spec.rule.num_codebooks))
    requests = [SpeechRequest(text, sampling=greedy) for text in SENTENCES[:count]]
    cases = []
    for request, result in zip(requests, engine.generate(requests, progress=False), strict=True):
        if result.error is not None:
            raise result.error
        (segment,) = reference.segments(request.text, TextOptions())
        prompt = reference.tokenize(segment, settings)
        rows, is_code = _grid(torch.from_numpy(result.codes.astype(np.int64)), engine.spec, pad=reference._config.pad)
        durations_s = reference.durations_s(prompt)
        logits = _logits(reference, prompt, rows, durations_s)
        cases.append(Case(prompt, rows, is_code, durations_s, logits))
    return cases


def _score(model: LarkModel, cases: Sequence[Case]) -> Score:
    score = Score()
    for case in cases:
        logits = _logits(model, case.prompt, case.rows, case.durations_s)[case.is_code].double()
        expected = case.logits[case.is_code].double()
        score.num_codes += len(expected)
        score.num_equal += int((logits.argmax(-1) == expected.argmax(-1)).sum())
        apart = expected.softmax(-1) * (expected.log_softmax(-1) - logits.log_softmax(-1))
        score.kl_nats += float(apart.sum())
        total_s = case.durations_s.sum()
        score.duration_errors.append(abs(float(model.durations_s(case.prompt).sum() / total_s - 1)))
    return score


def _named_layers(model: LarkModel) -> Iterator[tuple[str, Linear]]:
    """The linear layers of all blocks, by their names in the checkpoint."""
    for part, blocks in (("encoder", model._text_side.layers), ("decoder", model._layers)):
        for i, (attention, feed_forward) in enumerate(blocks):
            of_block = (attention.qkv, attention.out, feed_forward.gate_up, feed_forward.down)
            for kind, layer in zip(KINDS, of_block, strict=True):
                yield f"{part}.{i}.{kind}", layer


def _sqnr_db(reference: LarkModel, quantized: LarkModel, cases: Sequence[Case]) -> dict[str, float]:
    """By layer, in decibels, over the inputs that float32 has in all cases."""
    inputs: dict[int, list[torch.Tensor]] = defaultdict(list)

    def recorded(x: torch.Tensor, layer: Linear, *, residual: torch.Tensor | None = None) -> torch.Tensor:
        inputs[id(layer)].append(x.clone())
        return linear(x, layer, residual=residual)

    def recorded_gated(x: torch.Tensor, layer: Linear) -> torch.Tensor:
        inputs[id(layer)].append(x.clone())
        return gated_linear(x, layer)

    with mock.patch.object(layers, "linear", recorded), mock.patch.object(layers, "gated_linear", recorded_gated):
        for case in cases:
            _logits(reference, case.prompt, case.rows, case.durations_s)
    result = {}
    for (name, dense), (_, layer) in zip(_named_layers(reference), _named_layers(quantized), strict=True):
        if isinstance(layer.weight, torch.Tensor):
            continue
        x = torch.cat(inputs[id(dense)])
        expected = linear(x, dense).double()
        noise = linear(x, layer).double() - expected
        result[name] = float(10 * torch.log10(expected.square().sum() / noise.square().sum()))
    return result


def _search(
    spec: ModelSpec, cases: Sequence[Case], reference: LarkModel, recipe: Int4Recipe, gate: float
) -> tuple[str, ...]:
    """Patterns to leave dense so that the gate is passed and the most bytes are saved; RANKED_CASES rank the layers."""
    units = [f"encoder.*.{kind}.*" for kind in KINDS]
    units += [f"decoder.{i}.{kind}.*" for i in range(spec.cache.num_layers) for kind in KINDS]

    def load(quantized: Sequence[str]) -> LarkModel:
        dense = tuple(unit for unit in units if unit not in quantized)
        return _load(spec, torch.float32, replace(recipe, keep_dense=ALWAYS_DENSE + dense))

    costs = {}
    for unit in units:
        model = load([unit])
        saved = reference.weight_bytes - model.weight_bytes
        costs[unit] = _score(model, cases[:RANKED_CASES]).kl_nats / saved
    ranked = sorted(units, key=lambda unit: costs[unit])
    count = 0
    for end in range(1, len(ranked) + 1):
        model = load(ranked[:end])
        agreement = _score(model, cases).agreement
        shown = f"int4 {ranked[end - 1]} too: agreement {agreement:.4f}, {model.weight_bytes / 1e6:.1f} MB"
        machine.CONSOLE.print(shown, markup=False)
        if agreement < gate:
            break
        count = end
    return tuple(sorted(ranked[count:]))


def _round_over_the_range(groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Round to nearest between the smallest and the largest weight: what the search of kernels/int4.py starts from."""
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scale = ((high - low) / 15).clamp(min=1e-12)
    codes = ((groups - low) / scale).round().clamp(0, 15)
    return codes.to(torch.uint8), scale.squeeze(-1), low.squeeze(-1)


def _half_quadratic(groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """HQQ (Badri and Shaji, 2023): the offset that leaves the least l_0.7 error, by half-quadratic splitting."""
    exponent, beta = 0.7, 10.0
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scale = ((high - low) / 15).clamp(min=1e-12)
    zero = best_zero = -low / scale
    least = torch.inf
    for _ in range(20):
        codes = (groups / scale + zero).round().clamp(0, 15)
        apart = groups - scale * (codes - zero)
        error = float(apart.abs().mean())
        if error >= least:
            break
        least, best_zero = error, zero
        shrunk = apart.sign() * (apart.abs() - apart.abs().clamp(min=1e-12) ** (exponent - 1) / beta).relu()
        zero = (codes - (groups - shrunk) / scale).mean(-1, keepdim=True)
        beta *= 1.01
    codes = (groups / scale + best_zero).round().clamp(0, 15)
    return codes.to(torch.uint8), scale.squeeze(-1), (-best_zero * scale).squeeze(-1)


def _compare_roundings(spec: ModelSpec, cases: Sequence[Case], recipe: Int4Recipe) -> dict[str, dict[str, float]]:
    """Every layer of the blocks int4, by three ways of choosing codes, scales and offsets."""
    everything = replace(recipe, keep_dense=ALWAYS_DENSE)
    scores = {"search and fit, as served": _score(_load(spec, torch.float32, everything), cases)}
    for name, quantize in (("over the range", _round_over_the_range), ("HQQ", _half_quadratic)):
        with mock.patch.object(int4, "_quantize_groups", quantize):
            scores[name] = _score(_load(spec, torch.float32, everything), cases)
    machine.print_table(
        "Every layer int4, by how it is rounded",
        ("rounding", "agreement", "KL nats", "durations off %"),
        [(name, *score.summary().values()) for name, score in scores.items()],
    )
    return {name: score.summary() for name, score in scores.items()}


def _word_errors(count: int) -> dict[str, float]:
    """Percent of the words of held-out sentences that are not heard right, by what `--dtype` says."""
    import voice

    recogniser, texts = voice.Recogniser(), voice.held_out(count)
    errors: dict[str, float] = {}
    for dtype in ("float32", "bfloat16", "int4"):
        with Engine.from_pretrained(config=EngineConfig(device="cpu", dtype=dtype)) as engine:
            heard = voice.listen(voice.speaker_of(engine, None), texts, recogniser)
        errors[dtype] = float(heard.summary()["word_error_percent"])
    machine.print_table(
        f"What is heard of {count} held-out sentences", ("--dtype", "word errors, %"), list(errors.items())
    )
    return errors


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=QUESTION)
    parser.add_argument("--sentences", type=int, default=20)
    parser.add_argument("--gate", type=float, default=0.97, help="agreement that int4 must keep")
    parser.add_argument("--search", action="store_true", help="look for a table even where the gate is passed")
    parser.add_argument("--rounding", action="store_true", help="compare ways to round, too")
    parser.add_argument("--words", type=int, default=0, metavar="N", help="have N sentences recognised, too")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true", help="two sentences")
    return parser.parse_args()


def main() -> int:
    args = _arguments()
    torch.set_num_threads(args.threads)
    count = 2 if args.quick else args.sentences
    document = machine.begin(QUESTION, vars(args) | {"sentences": count})
    with Engine.from_pretrained(config=EngineConfig(device="cpu", dtype="float32")) as engine:
        spec = engine.spec
        reference = _load(spec, torch.float32)
        cases = _cases(engine, reference, count)
    recipe = Int4Recipe.of_family("lark")
    models = {
        "float32": reference,
        "bfloat16": _load(spec, torch.bfloat16),
        "float16": _load(spec, torch.float16),
        GATED: _load(spec, torch.float32, recipe),
        "int4, every layer": _load(spec, torch.float32, replace(recipe, keep_dense=ALWAYS_DENSE)),
        "int4, every layer, groups of 32": _load(
            spec, torch.float32, replace(recipe, keep_dense=ALWAYS_DENSE, group_size=32)
        ),
    }
    scores = {name: _score(model, cases) for name, model in models.items()}
    sqnr = _sqnr_db(reference, models["int4, every layer"], cases)
    machine.print_table(
        f"{scores[GATED].num_codes} codes of {count} sentences, against float32",
        ("precision", "agreement", "KL nats", "durations off %", "weights MB"),
        [(name, *score.summary().values(), models[name].weight_bytes / 1e6) for name, score in scores.items()],
    )
    machine.print_table("SQNR of layers as int4", ("layer", "dB"), list(sqnr.items()))
    errors = _word_errors(args.words) if args.words else {}
    roundings = _compare_roundings(spec, cases, recipe) if args.rounding else {}
    passed = scores[GATED].agreement >= args.gate
    dense = _search(spec, cases, reference, recipe, args.gate) if args.search or not passed else ()
    machine.CONSOLE.print(f"gate of {args.gate}: {'passed' if passed else 'failed'}", markup=False)
    if dense:
        machine.CONSOLE.print(f"the table that passes leaves dense: {', '.join(dense)}", markup=False)
    machine.end(
        document,
        {
            "precisions": {name: score.summary() for name, score in scores.items()},
            "sqnr_db": sqnr,
            "word_error_percent": errors,
            "roundings": roundings,
            "passed": passed,
            "leave_dense": list(dense),
        },
    )
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
