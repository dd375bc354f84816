"""Sections of gpu.py: whole models of real size with random weights, alone, in a crowd, and beside transformers.

Random weights that never draw an end: each request is as long as it was asked to be.
"""

from __future__ import annotations

import fcntl
import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import random_dia
import torch
from gpu_run import DEVICE, REPLAYS, Mark, Run, Watch, median_s, synchronize, used_bytes
from random_dia import GUIDANCE, LARGE, REAL_DAC_WIDTH, REHEARSED, TOP_K, DiaSize, generation_config, quiet_transformers
from silent_vocoder import SilentVocoder
from texts import text_of_length

from declaim.engine import Engine, EngineConfig, SamplingParams, SpeechRequest
from declaim.engine.checkpoint import Checkpoint
from declaim.engine.codec.base import CodecRecipe
from declaim.engine.codec.load import load_codec
from declaim.engine.graphs import GraphRunner
from declaim.engine.loader import find_model, load_model
from declaim.engine.memory import Load, plan_device, probe_device
from declaim.engine.models.zonos import ZonosConfig, ZonosModel, zonos_spec
from declaim.engine.parts import ZONOS_HYBRID, ZONOS_TRANSFORMER, describe_model
from declaim.engine.safetensors_io import read_json
from declaim.engine.vocoder.inline import InlineVocoder

BUDGET_GB = 20.0  # holds any of these crowds, and lets sections run beside one another
STEP_CONTEXT, TEXT_LEN = 500, 128
SPOKEN_FRAMES = 430  # 5 seconds
ZONOS = {"transformer": ZONOS_TRANSFORMER, "hybrid": ZONOS_HYBRID}


def compare_codes(run: Run) -> None:
    """Greedy codes of a tiny Dia in float32: graphs, eager and transformers; ragged lengths, preemption."""
    size, lengths = (REHEARSED, (1, 2)) if run.quick else (random_dia.TINY, (34, 94, 60, 77, 43))
    asks = [("[S1] " + text_of_length(30 + 9 * i, skip=i), frames) for i, frames in enumerate(lengths)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        random_dia.save_dia(folder, size, scale=0.15)
        theirs = [_transformers_codes(folder, size, text, frames=frames) for text, frames in asks]
        for label, config in (
            ("graphs", EngineConfig(device=DEVICE, dtype="float32", max_batch=4, num_blocks=16)),
            ("eager", EngineConfig(device=DEVICE, dtype="float32", max_batch=4, eager=True)),
        ):
            with Engine.from_pretrained(folder, config) as speaking:
                results = speaking.generate([_request(text, frames) for text, frames in asks], progress=False)
                preemptions = speaking.stats().preemptions
            equal = sum(np.array_equal(r.codes, t) for r, t in zip(results, theirs, strict=True))
            run.put(label, {"identical_requests": equal, "requests": len(asks), "preemptions": preemptions})
            run.say(f"{label}: {equal} of {len(asks)} requests as transformers, {preemptions} preemptions")
    if any(found["identical_requests"] < found["requests"] for found in run.found.values()):
        raise RuntimeError(f"codes differ: {run.found}")


def prepare_bfloat16(run: Run) -> None:
    """Save the large model, and compile what the sections to come will launch."""
    _prepare(run, "bfloat16")


def prepare_int4(run: Run) -> None:
    """Compile what int4 launches."""
    _prepare(run, "int4")


def _prepare(run: Run, precision: str) -> None:
    begin = time.perf_counter()
    folder = _dia_folder(run)
    run.say(f"a random Dia is there after {time.perf_counter() - begin:.1f} s")
    with _open_dia(folder, precision, max_batch=max(run.batches)) as speaking:
        for batch in run.batches[-1:] if run.quick else run.batches:
            speaking.generate(_requests(run, batch, 2), progress=False)
    run.say(f"loaded, compiled and captured after {time.perf_counter() - begin:.1f} s")


def time_bfloat16(run: Run) -> None:
    """The step at Dia-1.6B's size, replayed; then the engine around it."""
    _time_dia(run, "bfloat16")


def time_int4(run: Run) -> None:
    """The same with int4 weights."""
    _time_dia(run, "int4")


def _time_dia(run: Run, precision: str) -> None:
    folder, size = _dia_folder(run), _dia_size(run)
    frames = 2 if run.quick else SPOKEN_FRAMES
    begin = time.perf_counter()
    with _open_dia(folder, precision, max_batch=max(run.batches)) as speaking:
        run.put("start_s", time.perf_counter() - begin)
        run.say(f"{precision}: started in {run.found['start_s']:.1f} s")
        runner = speaking._runner
        assert isinstance(runner, GraphRunner)
        replays: dict[str, Any] = {}
        for batch in run.batches:
            us = _replay_us(runner, batch)
            floor_us = _floor_bytes(size, batch, precision=precision) / run.copy_gb_per_s / 1e3
            rtf = us * 1e-6 * random_dia.FRAME_RATE_HZ
            replays[str(batch)] = {"us": us, "floor_us": floor_us, "of_floor": us / floor_us, "rtf": rtf}
            run.put("replay", replays)
            run.say(
                f"{precision} {batch:4d} requests: {us:8.0f} us a step, {us / floor_us:.2f} x its byte floor,"
                f" real-time factor {rtf:.3f}"
            )
        speaking.generate(_requests(run, max(run.batches), 2), progress=False)
        engines: dict[str, Any] = {}
        for batch in run.batches:
            clock = ReplayClock(runner, batch)
            begin = time.perf_counter()
            results = speaking.generate(_requests(run, batch, frames), progress=False)
            wall_s = time.perf_counter() - begin
            clock.stop()
            audio_s = sum(len(r.codes) for r in results) / random_dia.FRAME_RATE_HZ
            engines[str(batch)] = {"audio_s_per_s": audio_s / wall_s, "idle": clock.idle_share()}
            run.put("engine", engines)
            idle = engines[str(batch)]["idle"]
            run.say(
                f"{precision} {batch:4d} requests through the engine: {audio_s / wall_s:7.1f} audio s/s, the card idle"
                f" {'for an unknown part' if idle is None else f'{100 * idle:.1f} %'} of the time between steps"
            )


def time_transformers(run: Run) -> None:
    """Audio seconds per second of transformers' generate(), bfloat16, the same texts and lengths."""
    from transformers import DiaForConditionalGeneration, DiaProcessor

    folder, size = _dia_folder(run), _dia_size(run)
    frames = 2 if run.quick else SPOKEN_FRAMES
    speeds: dict[str, float] = {}
    with quiet_transformers(), torch.inference_mode():
        model: Any = DiaForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16).to(DEVICE).eval()
        processor: Any = DiaProcessor.from_pretrained(folder)
        for batch in (batch for batch in (1, 64) if batch <= max(run.batches)):
            texts = [request.text for request in _requests(run, batch, frames)]
            inputs = _inputs(processor, size, texts)
            model.generate(**inputs, generation_config=generation_config(size, 4))
            synchronize()
            begin = time.perf_counter()
            model.generate(**inputs, generation_config=generation_config(size, frames))
            synchronize()
            speeds[str(batch)] = batch * frames / random_dia.FRAME_RATE_HZ / (time.perf_counter() - begin)
            run.put("audio_s_per_s", speeds)
            run.say(f"transformers, {batch} requests: {speeds[str(batch)]:.2f} audio s/s")


def watch_dia_memory(run: Run) -> None:
    """Dia with a DAC of real size, as it is served: is memory what was planned, and does it stay there?"""
    folder = _dia_folder(run)
    config = EngineConfig(device=DEVICE, dtype="bfloat16", max_batch=2 if run.quick else 32, memory_gb=BUDGET_GB)
    before = _used_before_models()
    with Engine.from_pretrained(folder, config) as speaking:
        assert speaking.device_plan is not None
        _watch_memory(run, speaking, before, planned=speaking.device_plan.used_bytes, words="[S1] ")


def time_zonos_transformer(run: Run) -> None:
    """Zonos-v0.1-transformer's size with a DAC of real size: alone, in a crowd, and its memory."""
    _time_zonos(run, "transformer")


def time_zonos_hybrid(run: Run) -> None:
    """The same of Zonos-v0.1-hybrid."""
    _time_zonos(run, "hybrid")


def _time_zonos(run: Run, family: str) -> None:
    config = _tiny_zonos(ZONOS[family]) if run.quick else ZONOS[family]
    most, frames = (1, 1) if run.quick else (64, SPOKEN_FRAMES)
    before = _used_before_models()
    codec_folder = run.folder / "codec-of-zonos"
    if not codec_folder.exists():
        of_zonos = replace(REHEARSED, delay=random_dia.DELAY, codebook_size=32) if run.quick else LARGE
        with quiet_transformers():
            random_dia.save_dac(codec_folder, of_zonos, width=64 if run.quick else REAL_DAC_WIDTH)
    settings = EngineConfig(device=DEVICE, dtype="bfloat16", max_batch=most, memory_gb=BUDGET_GB).resolve()
    parts = describe_model(config, read_json(codec_folder / "config.json"), name=f"Zonos {family}")
    device = probe_device(settings.torch_device, memory_gb=settings.memory_gb)
    plan = plan_device(parts, device, load=Load(max_batch=most), dtype="bfloat16")
    dtype = "float32" if DEVICE == "cpu" else "float16"
    codec = load_codec(CodecRecipe(kind="dac", folder=str(codec_folder), dtype=dtype, device=DEVICE))
    begin = time.perf_counter()
    with torch.inference_mode():
        zonos = ZonosConfig.read(config, source=Path("config.json"))
        model = ZonosModel(
            zonos,
            RandomCheckpoint(dtype=settings.torch_dtype, device=settings.torch_device, eos=zonos.eos),
            spec=zonos_spec(zonos, codec.spec),
            phonemize=lambda text, language: text,
        )
    with Engine(
        model,
        replace(settings, max_batch=plan.max_batch),
        make_vocoder=lambda wake: InlineVocoder(codec, wake=wake, max_windows_per_poll=plan.window_batch),
        model_name=parts.name,
        plan=plan,
    ) as speaking:
        for batch in () if run.quick else (1, most):
            speaking.generate(_requests(run, batch, 2, words=""), progress=False)
        run.say(f"{parts.name}: made, compiled and captured in {time.perf_counter() - begin:.1f} s")
        for batch in sorted({1, most}):
            requests = _requests(run, batch, frames, words="")
            begin = time.perf_counter()
            results = speaking.generate(requests, progress=False)
            wall_s = time.perf_counter() - begin
            for result in results:
                if result.error is not None:
                    raise result.error
            audio_s = sum(len(r.audio) for r in results) / codec.spec.sample_rate_hz
            found = {"audio_s_per_s": audio_s / wall_s, "rtf": wall_s * batch / audio_s}
            run.put(f"requests_{batch}", found)
            run.say(
                f"{parts.name}, {batch} requests with their audio: {found['audio_s_per_s']:.1f} audio s/s,"
                f" real-time factor {found['rtf']:.3f}"
            )
        _watch_memory(run, speaking, before, planned=plan.used_bytes, words="")


def _watch_memory(run: Run, speaking: Engine, before: int, *, planned: int, words: str) -> None:
    """A round of requests of many lengths to warm up on, then others: growth, and the plan's share that is used."""
    count, longest, most_words = (1, 2, 2) if run.quick else (32, 400, 20)
    random = np.random.default_rng(0)

    def requests() -> list[SpeechRequest]:
        lengths = random.integers(1, longest, size=count)
        return [_request(words + "word " * (1 + int(n) % most_words), int(n)) for n in lengths]

    if not run.quick:
        speaking.generate(requests(), progress=False)
        synchronize()
    with Watch() as watch:
        for _ in range(1 if run.quick else 3):
            results = speaking.generate(requests(), progress=False)
    used = watch.peak_bytes - before
    run.put("growth_mb", watch.growth_bytes / 1e6)
    run.put("used_gb", used / 1e9)
    run.put("planned_gb", planned / 1e9)
    failed = [result.error for result in results if result.error is not None]
    run.say(
        f"memory after the warm-up grew by {watch.growth_bytes / 1e6:.1f} MB; in use {used / 1e9:.2f} GB, planned"
        f" {planned / 1e9:.2f} GB"
    )
    if failed:
        raise failed[0]


class ReplayClock:
    """When each of a batch size's replays began and ended on the device, while an engine makes them."""

    def __init__(self, runner: GraphRunner, batch: int) -> None:
        self._runner, self._spans = runner, list[tuple[Mark, Mark]]()
        self._key = next((size, branches) for size, branches in sorted(runner.lanes) if size >= batch and branches == 2)
        self._lanes = runner.lanes[self._key]
        runner.lanes[self._key] = replace(self._lanes, replay=self._timed(self._lanes.replay))

    def stop(self) -> None:
        self._runner.lanes[self._key] = self._lanes

    def idle_share(self) -> float | None:
        """Of the middle half of the run, where nobody comes or goes: the time between one replay's end and the next's
        beginning, in which the card copies a few kilobytes or waits. None where there were too few replays."""
        spans = self._spans[len(self._spans) // 4 : -(len(self._spans) // 4) or None]
        if len(spans) < 2:
            return None
        gaps_s = sum(a[1].seconds_to(b[0]) for a, b in zip(spans, spans[1:], strict=False))
        return gaps_s / spans[0][0].seconds_to(spans[-1][1])

    def _timed(self, replay: Callable[[], object]) -> Callable[[], object]:
        def timed() -> object:
            begin = Mark()
            replay()
            self._spans.append((begin, Mark()))
            return None

        return timed


class RandomCheckpoint(Checkpoint):
    """Hands out random weights of any shape that is asked for, drawn on the device, so that logits vary and stay
    finite. eos: the code that the first head never draws, of those that are called heads."""

    def __init__(self, *, dtype: torch.dtype, device: torch.device, eos: int) -> None:
        self.folder = Path("random")
        self.weight_bytes = 0
        self._dtype, self._device, self._eos = dtype, device, eos
        self._generator = torch.Generator(device).manual_seed(0)

    def take(self, name: str, shape: Sequence[int]) -> torch.Tensor:
        values = torch.randn(*shape, generator=self._generator, device=self._device)
        if name.endswith("A_log"):
            values = values.abs().mul_(4).add_(1).log_()
        elif name.endswith("dt_bias"):
            values = values - 1
        elif ("norm" in name and name.endswith("weight")) or name.endswith("mixer.D"):
            values = values.mul_(0.2).add_(1)
        elif "embed" not in name and len(shape) == 2:
            values = values.mul_((3.0 if "head" in name else 1.0) / math.sqrt(shape[-1]))
        elif len(shape) != 2:
            values = values.mul_(0.3)
        if name == "heads.0.weight":
            values[self._eos] = 0
        self.weight_bytes += values.numel() * self._dtype.itemsize
        return values.to(self._dtype)


def _tiny_zonos(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same with two small layers, one of each kind where there are two, and 32 codes a codebook."""
    backbone = dict(config["backbone"])
    is_hybrid = bool(backbone["ssm_cfg"])
    backbone |= {"d_model": 64, "attn_mlp_d_intermediate": 128, "n_layer": 2}
    backbone |= {"attn_layer_idx": [0] if is_hybrid else [0, 1]}
    backbone["attn_cfg"] = {**backbone["attn_cfg"], "num_heads": 2, "num_heads_kv": 1, "rotary_emb_dim": 32}
    if is_hybrid:
        backbone["ssm_cfg"] = {"layer": "Mamba2", "d_state": 16, "headdim": 32}
    return {**config, "backbone": backbone, "eos_token_id": 32, "masked_token_id": 33}


def _used_before_models() -> int:
    """With a context on the card, which its driver keeps."""
    torch.zeros(1, device=DEVICE)
    return used_bytes()


def _dia_size(run: Run) -> DiaSize:
    return REHEARSED if run.quick else LARGE


def _dia_folder(run: Run) -> Path:
    """The large model that the sections share, made by the first that asks; others wait for it."""
    folder, done = run.folder / "dia", run.folder / "dia" / "done"
    with (run.folder / "dia.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            folder.mkdir(exist_ok=True)
            dtype = torch.float32 if run.quick else torch.bfloat16
            width = 64 if run.quick else REAL_DAC_WIDTH
            random_dia.save_dia(folder, _dia_size(run), scale=0.02, dac_width=width, device=DEVICE, dtype=dtype)
            done.touch()
    return folder


def _open_dia(folder: Path, precision: Any, *, max_batch: int) -> Engine:
    """An engine whose vocoder makes silence: the step is what is timed."""
    config = EngineConfig(device=DEVICE, dtype=precision, max_batch=max_batch, memory_gb=BUDGET_GB).resolve()
    model, codec, _ = load_model(find_model(str(folder)), config)
    return Engine(model, config, make_vocoder=lambda wake: SilentVocoder(codec.spec.hop, wake=wake), model_name="dia")


def _replay_us(runner: GraphRunner, batch: int) -> float:
    """One replay with every sequence at STEP_CONTEXT positions, blocks scattered over the cache."""
    bucket = min(size for size, branches in runner.lanes if size >= batch and branches == 2)
    lanes, seats = runner.lanes[bucket, 2], runner.seats
    # Each replay moves every sequence on by a row.
    count = min(math.ceil((STEP_CONTEXT + 2 * REPLAYS) / runner.block_size), lanes.tables.shape[1])
    context = min(STEP_CONTEXT, (count - 1) * runner.block_size)
    blocks = torch.randint(0, runner.num_blocks, (2 * bucket, count), device=DEVICE, dtype=torch.int32)
    with torch.inference_mode():
        for caches in (*runner._runner.caches, *runner._runner.cross_caches):
            for cache in caches:
                cache.zero_()  # what was never written may be NaN, of which nothing is drawn
        lanes.tables.zero_()[:, :count] = blocks
        lanes.seats.fill_(seats.nobody)
        lanes.seats[:batch] = torch.arange(batch, device=DEVICE)
        seats.pretend(batch, row=context, cross_len=TEXT_LEN)
        return 1e6 * median_s(lanes.replay)


def _floor_bytes(size: DiaSize, batch: int, *, precision: str) -> float:
    """Bytes a step must read: the decoder's weights once, K and V of both branches, cross-attention's of one."""
    q, kv, cross = size.heads * size.head_dim, size.kv_heads * size.head_dim, size.cross_heads * size.head_dim
    layer = size.hidden * (q + 2 * kv) + q * size.hidden + 2 * size.hidden * cross + 3 * size.hidden * size.ffn
    bytes_per_weight = 2.0 if precision == "bfloat16" else 0.5 + 4 / 128
    head = len(size.delay) * size.vocab_size * size.hidden * 2
    per_sequence = size.layers * 2 * 2 * (2 * STEP_CONTEXT * kv + TEXT_LEN * cross)
    return size.layers * layer * bytes_per_weight + head + batch * per_sequence


def _transformers_codes(folder: Path, size: DiaSize, text: str, *, frames: int) -> np.ndarray[Any, Any]:
    from transformers import DiaForConditionalGeneration, DiaProcessor

    with quiet_transformers(), torch.inference_mode():
        model: Any = DiaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).to(DEVICE).eval()
        processor: Any = DiaProcessor.from_pretrained(folder)
        inputs = _inputs(processor, size, [text])
        config = generation_config(size, frames)
        grid = model.generate(**inputs, generation_config=config)[0].cpu().numpy()
    return random_dia.undelay(grid, size, frames)


def _inputs(processor: Any, size: DiaSize, texts: list[str]) -> Any:
    """What generate() takes; the processor knows the real model's codes and delays alone."""
    of_audio: dict[str, Any] = {}
    if size.delay != random_dia.DELAY:
        of_audio = {"delay_pattern": list(size.delay), "bos_token_id": size.bos}
        of_audio |= {"eos_token_id": size.eos, "pad_token_id": size.pad}
    return processor(text=texts, padding=True, return_tensors="pt", **of_audio).to(DEVICE)


def _requests(run: Run, count: int, frames: int, *, words: str = "[S1] ") -> list[SpeechRequest]:
    num_chars = 8 if run.quick else TEXT_LEN
    return [_request(words + text_of_length(num_chars, skip=i), frames) for i in range(count)]


def _request(text: str, frames: int) -> SpeechRequest:
    # Half a frame more, so that rounding takes none away.
    seconds = (frames + 0.5) / random_dia.FRAME_RATE_HZ
    sampling = SamplingParams(temperature=0.0, guidance_scale=GUIDANCE, top_k=TOP_K, max_seconds=seconds)
    return SpeechRequest(text, sampling=sampling, normalize=False)
