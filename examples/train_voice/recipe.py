"""Train the embedded voice: data, codec, codes, code model, report, export.

    python examples/train_voice/recipe.py --sentences sentences.txt [--work runs/voice] [--stage STAGE ...]

Every stage goes on from where it was cut off; run the same command again. What is already there is not made again.
The stages: data, codec, encode, model, export, report.

    --init engine/assets/lark   go on from a voice: its codes stay as they are, its decoder and code model learn on
    --speakers 2                of lark, rook, wren, how many the code model learns, lark alone if left out; the others
                                are timbres that the codec gives what lark says
    --minutes 90                end either training after so long, its learning rate timed for that
    --tiny                      toy sizes, a minute on one core: that the recipe runs, not that the voice speaks
    TRAIN_VOICE_PAUSE=FILE      sleep while FILE exists

Needs `pip install declaim[train]`.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from allocator import keep_freed_memory
from code_model import ModelShape, StackShape
from codec import CodecShape
from data import make_shards
from encode import encode_shards
from evaluate import evaluate
from export import export
from teacher import SPEAKERS
from train_codec import CodecSettings, train_codec
from train_model import ModelSettings, train_model

STAGES = ("data", "codec", "encode", "model", "export", "report")
NAMES = tuple(speaker.name for speaker in SPEAKERS)


@dataclass(frozen=True, slots=True)
class Plan:
    """How much of everything."""

    num_shards: int
    shard_size: int
    num_speakers: int
    codec: CodecSettings
    model: ModelSettings


def plan_of(args: argparse.Namespace) -> Plan:
    plan = Plan(
        num_shards=args.shards,
        shard_size=250,
        num_speakers=args.speakers,
        codec=CodecSettings(
            steps=args.codec_steps,
            minutes=args.minutes,
            init=args.init and args.init / "codec",
            device=args.device,
        ),
        model=ModelSettings(
            steps=args.model_steps,
            minutes=args.minutes,
            init=args.init,
            device=args.device,
            shape=ModelShape(NAMES[: args.speakers]),
        ),
    )
    return _tiny(plan) if args.tiny else plan


def _tiny(plan: Plan) -> Plan:
    codec = CodecShape(hidden_size=32, encoder_hidden_size=24, codebook_size=64)
    stack = StackShape(
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=64,
        intermediate_size=128,
    )
    names = plan.model.shape.speakers
    model = ModelShape(names, codebook_size=codec.codebook_size, encoder=stack, decoder=stack)
    return Plan(
        num_speakers=plan.num_speakers,
        num_shards=4,
        shard_size=8,
        codec=replace(plan.codec, steps=12, batch=2, window=24, judged_from=6, shape=codec, init=None),
        model=replace(plan.model, steps=20, rows=400, shape=model, init=None),
    )


def run(stages: tuple[str, ...], work: Path, plan: Plan, *, sentences: Path, workers: int, target: Path) -> None:
    """Run the stages named, in order; each prints how far it is and how long it took."""
    for stage in stages:
        started = time.monotonic()
        print(f"== {stage}", flush=True)
        match stage:
            case "data":
                made = make_shards(
                    work / "data",
                    plan.num_shards,
                    speakers=plan.num_speakers,
                    sentences=sentences,
                    workers=workers,
                    size=plan.shard_size,
                )
                for path in made:
                    print(path.name, flush=True)
            case "codec":
                init = plan.codec.init
                if init is not None:
                    _encode(work, init)
                train_codec(work / "data", None if init is None else work / "codes", work, plan.codec)
            case "encode":
                _encode(work, plan.codec.init or work / "codec")
            case "model":
                train_model(work / "data", work / "codes", work, plan.model)
            case "export":
                export(work, target)
            case "report":
                print(evaluate(work, target))
        print(f"== {stage}: {time.monotonic() - started:.0f} s", flush=True)


def _encode(work: Path, codec: Path) -> None:
    for path in encode_shards(work / "data", work / "codes", codec):
        print(f"encoded {path.name}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sentences", type=Path, required=True, help="text to speak, a sentence a line")
    parser.add_argument("--work", type=Path, default=Path("runs/voice"))
    parser.add_argument("--export", type=Path, help="the voice's folder; WORK/lark if left out")
    parser.add_argument("--stage", choices=STAGES, nargs="+", default=STAGES, help="all, in order, if left out")
    parser.add_argument("--init", type=Path, help="a voice's folder to go on from")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--shards", type=int, default=160, help="of 250 sentences, 12 minutes of speech each")
    parser.add_argument("--codec-steps", type=int, default=20_000)
    parser.add_argument("--model-steps", type=int, default=20_000)
    parser.add_argument("--minutes", type=float, default=math.inf, help="of either training, if its steps take longer")
    parser.add_argument("--speakers", type=int, choices=range(1, len(NAMES) + 1), default=1)
    parser.add_argument("--workers", type=int, default=1, help="processes that make speech")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="of training: cpu or cuda")
    args = parser.parse_args()
    if not args.sentences.is_file():
        parser.error(f"--sentences {args.sentences} is no file: name a text file with a sentence a line")
    if args.minutes <= 0:
        parser.error(f"--minutes {args.minutes:g} is no time: name more than 0, or leave it out")
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    target = args.export or args.work / "lark"
    run(tuple(args.stage), args.work, plan_of(args), sentences=args.sentences, workers=args.workers, target=target)


if __name__ == "__main__":
    main()
