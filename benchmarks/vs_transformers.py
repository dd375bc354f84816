"""How much faster does declaim make the codes of a batch of Dia requests than transformers, on the same machine?

Method. One run, a process for each system (threads that computed before slow down the next: LOG.md), one checkpoint
(Dia's architecture and vocabulary, random weights saved by transformers), one device, one dtype (float32 unless --dtype
says otherwise), the same number of threads for all, 16 requests of 2 to 9 seconds, guidance 3, greedy or (--sampled)
temperature 1.2, top_k 45, top_p 0.95. Compared are
- transformers, one by one: a generate() for each request, with max_new_tokens of its own;
- transformers, static batch: one generate() of all, padded, which runs until the longest is done; only the audio that
  was asked for counts; and static batches of four, one after the other, which wait for the longest of four;
- declaim: Engine.generate() of all at once.
The head cannot draw an end, so lengths are exactly those asked for; each system's are checked. Tokenizing counts,
turning codes into audio does not: declaim gets a vocoder that returns silence. What declaim takes with its vocoder is
a row of its own; its codec is a small random one, so that row says what the plumbing costs and not what DAC does.
Greedy codes are compared between the systems. transformers computes in another order, so where two codes are all but
tied they may part, the sooner the coarser the dtype; from there on a request has other codes.
Each system first runs one short request. The median of --repeats is reported.

    python benchmarks/vs_transformers.py [--device cuda] [--dtype bfloat16] [--threads N] [--repeats N]
        [--sampled] [--alone] [--profile] [--quick]
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import machine
import numpy as np
import profiling
import random_dia
import torch
from numpy.typing import NDArray
from random_dia import FRAME_RATE_HZ, GUIDANCE, TOP_K, DiaSize, quiet_transformers
from silent_vocoder import SilentVocoder
from texts import text_of_length
from transformers import DiaForConditionalGeneration, DiaProcessor

from declaim.engine import Engine, EngineConfig, SamplingParams, SpeechRequest
from declaim.engine.loader import find_model, load_model

QUESTION = "Dia codes: transformers one by one and in a static batch, and declaim"
SECONDS = (2.0, 7.3, 4.1, 9.0, 3.2, 5.5, 2.4, 8.1, 6.0, 2.9, 4.8, 7.0, 3.6, 5.1, 2.2, 6.6)
QUICK_SECONDS = (0.3, 0.9, 0.5)
CHARS_PER_SECOND = 15
STATIC_BATCH = 4  # requests, of the smaller batches
SHORT_FRAMES = 8  # of the request that warms a system up
TEMPERATURE, TOP_P = 1.2, 0.95

Codes = list[NDArray[np.int64]]


@dataclass(frozen=True)
class Ask:
    """One request: a text, and the frames that are wanted of it."""

    text: str
    num_frames: int

    @property
    def seconds(self) -> float:
        return self.num_frames / FRAME_RATE_HZ


@dataclass(frozen=True)
class Run:
    """One system's time for all requests, and the codes it made ([num_frames, Q] each)."""

    name: str
    wall_s: float
    codes: Codes


class Transformers:
    """transformers' pipeline up to the codes."""

    def __init__(self, folder: Path, size: DiaSize, *, sampled: bool, device: str, dtype: str) -> None:
        self._size = size
        self._sampled = sampled
        self._device = device
        with quiet_transformers():
            model: Any = DiaForConditionalGeneration.from_pretrained(folder, dtype=getattr(torch, dtype))
            self._model = model.to(device).eval()
            # transformers types what its calls take and return too loosely for a checker.
            self._processor: Any = DiaProcessor.from_pretrained(folder)

    def generate(self, asks: Sequence[Ask]) -> Codes:
        """One batch, which runs until its longest request is done. Returns what each asked for."""
        longest = max(ask.num_frames for ask in asks)
        sampling = {"temperature": TEMPERATURE, "top_p": TOP_P} if self._sampled else {}
        with quiet_transformers(), torch.inference_mode():
            inputs = self._processor(text=[ask.text for ask in asks], return_tensors="pt").to(self._device)
            config = random_dia.generation_config(self._size, longest, **sampling)
            grids: Any = self._model.generate(**inputs, generation_config=config)
        frames = [self._undelay(grid) for grid in grids.cpu().numpy()]
        lengths = [len(codes) for codes in frames]
        if lengths != [longest] * len(asks):
            raise RuntimeError(f"transformers made {lengths} frames where {longest} were asked for")
        return [codes[: ask.num_frames] for codes, ask in zip(frames, asks, strict=True)]

    def _undelay(self, grid: NDArray[np.int64]) -> NDArray[np.int64]:
        """A delayed grid [T, Q] -> its frames; the audio ends where codebook 0 holds the end code."""
        end = int(np.flatnonzero(grid[:, 0] == self._size.eos)[0])
        return random_dia.undelay(grid, self._size, end - 1)


def _requests(asks: Sequence[Ask], *, sampled: bool) -> list[SpeechRequest]:
    return [
        SpeechRequest(
            ask.text,
            sampling=SamplingParams(
                temperature=TEMPERATURE if sampled else 0.0,
                top_k=TOP_K,
                top_p=TOP_P,
                guidance_scale=GUIDANCE,
                seed=i,
                max_seconds=ask.seconds,
            ),
        )
        for i, ask in enumerate(asks)
    ]


def _speak(engine: Engine, asks: Sequence[Ask], *, sampled: bool) -> Codes:
    results = engine.generate(_requests(asks, sampled=sampled), progress=False)
    for result in results:
        if result.error is not None:
            raise result.error
    lengths, wanted = [len(result.codes) for result in results], [ask.num_frames for ask in asks]
    if lengths != wanted:
        raise RuntimeError(f"declaim made {lengths} frames where {wanted} were asked for")
    return [result.codes.astype(np.int64) for result in results]


def _size(args: argparse.Namespace) -> DiaSize:
    return random_dia.TINY if args.quick else random_dia.MEDIUM


def _config(args: argparse.Namespace) -> EngineConfig:
    return EngineConfig(device=args.device, dtype=args.dtype, max_batch=args.max_batch, num_threads=args.threads)


def _silent_engine(folder: Path, config: EngineConfig) -> Engine:
    files, resolved = find_model(str(folder)), config.resolve()
    model, codec, _ = load_model(files, resolved)
    hop = codec.spec.hop
    return Engine(model, resolved, make_vocoder=lambda wake: SilentVocoder(hop, wake=wake), model_name=files.name)


def _timed(name: str, work: Callable[[], Codes], *, warm_up: Callable[[], object], repeats: int) -> Run:
    warm_up()
    walls: list[float] = []
    codes: Codes = []
    for _ in range(repeats):
        begin = time.perf_counter()
        codes = work()
        walls.append(time.perf_counter() - begin)
    return Run(name, statistics.median(walls), codes)


def _run_transformers(folder: Path, asks: Sequence[Ask], args: argparse.Namespace) -> list[Run]:
    torch.set_num_threads(args.threads)
    theirs = Transformers(folder, _size(args), sampled=args.sampled, device=args.device, dtype=args.dtype)
    torch.manual_seed(0)
    short = [Ask(asks[0].text, SHORT_FRAMES)]
    groups = [asks[i : i + STATIC_BATCH] for i in range(0, len(asks), STATIC_BATCH)]
    runs = [
        _timed(
            "transformers, one by one",
            lambda: [codes for ask in asks for codes in theirs.generate([ask])],
            warm_up=lambda: theirs.generate(short),
            repeats=args.repeats,
        ),
        _timed(
            "transformers, static batch",
            lambda: theirs.generate(asks),
            warm_up=lambda: theirs.generate(short * len(asks)),
            repeats=args.repeats,
        ),
    ]
    if len(groups) > 1:
        runs.append(
            _timed(
                f"transformers, static batches of {STATIC_BATCH}",
                lambda: [codes for group in groups for codes in theirs.generate(group)],
                warm_up=lambda: theirs.generate(short * STATIC_BATCH),
                repeats=args.repeats,
            )
        )
    return runs


def _run_declaim(folder: Path, asks: Sequence[Ask], args: argparse.Namespace) -> list[Run]:
    config = _config(args)
    short = [Ask(asks[0].text, SHORT_FRAMES)]

    def run(name: str, engine: Engine, groups: Sequence[Sequence[Ask]]) -> Run:
        """The groups one after the other, each at once."""
        return _timed(
            name,
            lambda: [codes for group in groups for codes in _speak(engine, group, sampled=args.sampled)],
            warm_up=lambda: _speak(engine, short, sampled=args.sampled),
            repeats=args.repeats,
        )

    with _silent_engine(folder, config) as engine:
        runs = [run("declaim", engine, [asks])]
        if args.alone:
            runs.append(run("declaim, one by one", engine, [[ask] for ask in asks]))
    return runs


def _run_declaim_with_vocoder(folder: Path, asks: Sequence[Ask], args: argparse.Namespace) -> list[Run]:
    config = _config(args)
    short = [Ask(asks[0].text, SHORT_FRAMES)]
    with Engine.from_pretrained(folder, config) as engine:
        return [
            _timed(
                "declaim, with vocoder",
                lambda: _speak(engine, asks, sampled=args.sampled),
                warm_up=lambda: _speak(engine, short, sampled=args.sampled),
                repeats=args.repeats,
            )
        ]


def _compare(folder: Path, asks: Sequence[Ask], args: argparse.Namespace) -> list[Run]:
    """All systems, one after the other, each in a process of its own but for --quick: most of that would be imports."""
    systems = (_run_transformers, _run_declaim, _run_declaim_with_vocoder)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=None if args.quick else 1) as process:
        return [run for system in systems for run in process.submit(system, folder, asks, args).result()]


def _agreement(ours: Codes, theirs: Codes, *, skip_last: int = 0) -> dict[str, float]:
    """How much of two systems' codes is equal. skip_last: frames at each request's end that may differ by design."""
    pairs = [(a[: len(a) - skip_last], b[: len(b) - skip_last]) for a, b in zip(ours, theirs, strict=True)]
    equal = [a == b for a, b in pairs]
    return {
        "identical_requests_percent": 100 * float(np.mean([part.all() for part in equal])),
        "identical_codes_percent": 100 * float(np.mean(np.concatenate([part.ravel() for part in equal]))),
    }


def _report(runs: Sequence[Run], asks: Sequence[Ask], *, sampled: bool) -> dict[str, Any]:
    audio_s = sum(ask.seconds for ask in asks)
    one_by_one, static = runs[0].wall_s, runs[1].wall_s
    rows = [
        {
            "system": run.name,
            "wall_s": run.wall_s,
            "audio_s_per_s": audio_s / run.wall_s,
            "vs_one_by_one": one_by_one / run.wall_s,
            "vs_static_batch": static / run.wall_s,
        }
        for run in runs
    ]
    machine.print_table(
        f"{len(asks)} requests, {audio_s:.1f} s of audio",
        ("system", "seconds", "audio s/s", "x one by one", "x static batch"),
        [list(row.values()) for row in rows],
    )
    result: dict[str, Any] = {"num_requests": len(asks), "audio_s": audio_s, "systems": rows}
    if sampled:
        return result
    codes = {run.name: run.codes for run in runs}
    # A static batch goes on where a shorter request would have ended, and drains 16 rows otherwise.
    result["greedy"] = {
        "declaim vs one by one": _agreement(codes["declaim"], codes["transformers, one by one"]),
        "static batch vs one by one, less 16 frames": _agreement(
            codes["transformers, static batch"],
            codes["transformers, one by one"],
            skip_last=random_dia.MEDIUM.num_drain_rows,
        ),
        "declaim, with vocoder vs without": _agreement(codes["declaim, with vocoder"], codes["declaim"]),
    }
    machine.print_table(
        "greedy codes",
        ("pair", "identical requests %", "identical codes %"),
        [(name, *shares.values()) for name, shares in result["greedy"].items()],
    )
    return result


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=QUESTION)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--max-batch", type=int, default=16)
    parser.add_argument("--sampled", action="store_true", help="draw at temperature 1.2 instead of greedily")
    parser.add_argument("--alone", action="store_true", help="declaim one by one as well")
    parser.add_argument("--profile", action="store_true", help="where declaim's step time goes, and no comparison")
    parser.add_argument("--quick", action="store_true", help="a tiny model and three short requests")
    return parser.parse_args()


def main() -> None:
    args = _arguments()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit(f"--device is cuda, and torch {torch.__version__} sees no GPU here: use cpu")
    torch.set_num_threads(args.threads)
    size = _size(args)
    scale = 0.15 if args.quick else 0.02
    seconds = QUICK_SECONDS if args.quick else SECONDS
    asks = [
        Ask("[S1] " + text_of_length(max(20, int(wanted * CHARS_PER_SECOND)), skip=i), int(wanted * FRAME_RATE_HZ))
        for i, wanted in enumerate(seconds)
    ]
    config = vars(args) | {"guidance": GUIDANCE, "seconds": seconds, "model": asdict(size)}
    with tempfile.TemporaryDirectory(prefix="declaim-dia-") as name:
        config["decoder_parameters"] = random_dia.save_dia(Path(name), size, scale=scale)
        document = machine.begin(QUESTION, config)
        if args.profile:
            with _silent_engine(Path(name), _config(args)) as engine:
                result = profiling.profile_engine(engine, _requests(asks, sampled=args.sampled))
        else:
            result = _report(_compare(Path(name), asks, args), asks, sampled=args.sampled)
    machine.end(document, result)


if __name__ == "__main__":
    main()
