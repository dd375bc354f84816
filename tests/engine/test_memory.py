"""The memory plan against the bytes that models, codecs and runners really hold, and what it chooses."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DacConfig, DacModel, DiaConfig, DiaForConditionalGeneration

from declaim.engine import memory
from declaim.engine.codec.base import Codec, CodecRecipe
from declaim.engine.codec.load import load_codec
from declaim.engine.config import EngineConfig
from declaim.engine.errors import InvalidConfig, ModelLoadError, OutOfMemory
from declaim.engine.loader import EMBEDDED_FOLDER, codec_dtype, find_model, load_model
from declaim.engine.memory import (
    Device,
    DevicePlan,
    Load,
    MemoryPlan,
    Use,
    available_bytes,
    imagined_gpu,
    plan_device,
    plan_memory,
    probe_device,
)
from declaim.engine.models.base import LayerCache
from declaim.engine.parts import (
    DAC_44KHZ,
    DIA_1_6B,
    KNOWN_CONFIGS,
    SPARE_STATES,
    ZONOS_HYBRID,
    ZONOS_TRANSFORMER,
    Matrices,
    ModelParts,
    Precision,
    dac_parts,
    describe_model,
    lark_codec_parts,
    speaker_parts,
)
from declaim.engine.request import ResolvedSampling
from declaim.engine.runner import Runner
from declaim.engine.safetensors_io import read_json
from declaim.engine.sequence import Playback, Prompt, Sequence, SequenceInput
from declaim.engine.speaker import EMBEDDING_SIZE, NUM_MELS, SpeakerNet, _fold_norms
from declaim.engine.spec import CacheSpec, CrossSpec, ModelSpec, StateSpec
from declaim.engine.states import LayerState, StateSlots
from declaim.engine.voices import MAX_REFERENCE_S
from declaim.kernels import attention, int4
from declaim.kernels.matmul import split_of
from tests.dia_checkpoints import SMALL, WIDE, DiaSize, make_dia
from tests.fakes import FakeModel
from tests.zonos_checkpoints import make_speaker

WITH_CROSS = CacheSpec(3, 2, 8, cross=CrossSpec(2, 4, 16, max_positions=64, positions_per_row=0.15))
WITH_STATE = CacheSpec(1, 2, 8, state=StateSpec(3, num_conv=3, conv_size=40, num_heads=2, head_dim=8, size=16))


def spec_with(cache: CacheSpec) -> ModelSpec:
    return replace(FakeModel().spec, cache=cache)


def tensor_bytes(caches: tuple[LayerCache | LayerState, ...]) -> int:
    return sum(tensor.untyped_storage().nbytes() for pair in caches for tensor in pair)


@pytest.mark.parametrize("cache", [CacheSpec(3, 2, 8), CacheSpec(1, 1, 128), WITH_CROSS, WITH_STATE])
@pytest.mark.parametrize("block_size", [4, 32])
def test_the_plan_counts_the_bytes_that_the_runner_allocates(cache: CacheSpec, block_size: int) -> None:
    model = FakeModel()
    model.spec = spec_with(cache)
    plan = plan_memory(
        model.spec, element_bytes=4, weight_bytes=1000, budget_bytes=2_000_000, block_size=block_size, max_batch=100
    )
    runner = Runner(
        model,
        num_blocks=plan.num_blocks,
        num_cross_blocks=plan.num_cross_blocks,
        block_size=block_size,
        max_batch=100,
    )
    assert tensor_bytes(runner.caches) + tensor_bytes(runner.cross_caches) == plan.kv_bytes
    assert (plan.num_cross_blocks > 0) == (cache.cross is not None)
    assert plan.reserved_bytes == (tensor_bytes(runner.states.layers) if runner.states is not None else 0)
    assert (plan.reserved_bytes > 0) == (cache.state is not None)


caches = st.builds(
    CacheSpec,
    num_layers=st.integers(1, 30),
    num_kv_heads=st.integers(1, 16),
    head_dim=st.integers(8, 128),
    cross=st.none()
    | st.builds(
        CrossSpec, st.integers(1, 18), st.integers(1, 16), st.integers(8, 128), st.just(64), st.floats(0.01, 2)
    ),
    state=st.none() | st.builds(StateSpec, *(st.integers(1, 64) for _ in range(6))),
)


@settings(deadline=None)
@given(
    cache=caches,
    weight_bytes=st.integers(0, 4_000_000_000),
    spare_bytes=st.integers(0, 10_000_000_000),
    block_size=st.integers(1, 128),
    max_batch=st.integers(1, 300),
)
def test_weights_and_cache_stay_within_the_budget_and_a_refusal_names_one_that_works(
    cache: CacheSpec, weight_bytes: int, spare_bytes: int, block_size: int, max_batch: int
) -> None:
    spec = replace(spec_with(cache), max_positions=3072)

    def plan(budget_bytes: int) -> MemoryPlan:
        return plan_memory(
            spec,
            element_bytes=2,
            weight_bytes=weight_bytes,
            budget_bytes=budget_bytes,
            block_size=block_size,
            max_batch=max_batch,
        )

    try:
        made = plan(weight_bytes + spare_bytes)
    except OutOfMemory as error:
        named = re.search(r"memory_gb of at least ([0-9.]+) starts", str(error))
        assert named is not None
        budget = int(float(named[1]) * 1e9)
        assert budget > weight_bytes + spare_bytes
        made = plan(budget)
    else:
        budget = weight_bytes + spare_bytes
    assert weight_bytes + made.reserved_bytes + made.kv_bytes <= budget
    assert made.budget_bytes == budget
    assert made.num_blocks >= 2


@pytest.mark.parametrize("name", KNOWN_CONFIGS)
def test_the_plan_of_a_real_config_counts_the_recurrent_states_that_a_runner_would_allocate(name: str) -> None:
    parts = describe_model(KNOWN_CONFIGS[name], DAC_44KHZ, name=name)
    plan = plan_device(parts, imagined_gpu(24), load=Load(max_batch=16))
    counted = sum(use.num_bytes for use in plan.workspaces if use.name == "recurrent states")
    if parts.cache.state is None:
        assert counted == 0
        return
    slots = StateSlots(
        parts.cache.state,
        plan.max_batch + SPARE_STATES,
        num_branches=parts.num_branches,
        dtype=torch.bfloat16,
        device=torch.device("meta"),
    )
    assert counted == tensor_bytes(slots.layers) > 100e6


def test_no_more_is_planned_than_the_largest_batch_of_longest_sequences_can_use() -> None:
    spec = replace(spec_with(CacheSpec(3, 2, 8)), max_positions=320)
    plan = plan_memory(spec, element_bytes=4, weight_bytes=0, budget_bytes=10**12, block_size=32, max_batch=4)
    num_branches = 2
    assert plan.num_blocks == num_branches * 4 * 320 // 32


def test_the_budget_is_split_as_ordinary_speech_needs_it() -> None:
    plan = plan_memory(
        spec_with(WITH_CROSS), element_bytes=4, weight_bytes=0, budget_bytes=50_000_000, block_size=32, max_batch=10_000
    )
    rows = plan.num_blocks / 2
    assert plan.num_cross_blocks == pytest.approx(0.15 * rows, abs=1.5)
    assert plan.kv_bytes > 0.99 * 50_000_000


def test_what_a_cpu_offers_is_a_part_of_what_is_free() -> None:
    with open("/proc/meminfo", encoding="ascii") as lines:
        total = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemTotal"))
    assert 0 < available_bytes(torch.device("cpu")) <= total / 2


# The parts of a model, from its config, against the loaded model.

DIA_NAME = "nari-labs/Dia-1.6B-0626"
SAMPLING = ResolvedSampling(1.0, 0, 1.0, 0.0, 1.0, 1.0, 0, 60.0)


@pytest.fixture(scope="module", params=[SMALL, WIDE], ids=["small", "wide"])
def dia_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    size: DiaSize = request.param
    return make_dia(tmp_path_factory.mktemp("dia"), size)


def parts_of(folder: Path) -> ModelParts:
    return describe_model(read_json(folder / "config.json"), read_json(folder / "codec/config.json"), name=folder.name)


def tensors_in(value: object) -> Iterator[torch.Tensor]:
    """Every tensor that an object of ours holds, however deep."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, torch.nn.Module):
        yield from value.parameters()
        yield from value.buffers()
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from tensors_in(getattr(value, field.name))
    elif type(value).__module__.startswith("declaim.engine."):
        yield from tensors_in(list(vars(value).values()))


def held_bytes(value: object) -> int:
    return sum(t.numel() * t.element_size() for t in {id(t): t for t in tensors_in(value)}.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["dia", "lark"])
def test_the_config_tells_every_byte_of_weights_that_the_loaded_model_holds(
    dtype: Any, name: str, dia_folder: Path
) -> None:
    folder = dia_folder if name == "dia" else EMBEDDED_FOLDER
    config = EngineConfig(device="cpu", dtype=dtype).resolve()
    model, codec, _ = load_model(find_model(str(folder)), config)
    parts = parts_of(folder)
    assert parts.weight_bytes(dtype) == held_bytes(model)
    assert parts.codec.decoder_bytes(4) == held_bytes(codec)
    text_side = next(part for part in parts.weights if part.may_offload)
    held = model._encoder if name == "dia" else model._text_side  # type: ignore[attr-defined]
    assert text_side.bytes_in(dtype) == held_bytes(held)
    assert parts.weight_bytes(dtype, is_text_offloaded=True) == held_bytes(model) - held_bytes(held)


@pytest.mark.parametrize("name", ["dia", "lark"])
def test_the_config_tells_what_the_loaded_model_says_of_itself(name: str, dia_folder: Path) -> None:
    folder = dia_folder if name == "dia" else EMBEDDED_FOLDER
    model, codec, _ = load_model(find_model(str(folder)), EngineConfig(device="cpu").resolve())
    parts, spec = parts_of(folder), model.spec
    assert parts.cache == spec.cache
    assert parts.num_branches == (2 if spec.sampling.has_guidance else 1)
    assert parts.max_positions == spec.max_positions
    assert parts.num_drain_rows == spec.rule.num_drain_rows
    assert parts.logits_per_row == spec.rule.num_codebooks * spec.vocab_size
    assert parts.codec.frame_rate_hz == spec.codec.frame_rate_hz
    assert parts.codec.num_context == codec.spec.left + codec.spec.right
    assert bool(parts.side_elements) == spec.has_side
    assert bool(parts.codec.num_encoding) == spec.supports_voice_prompt


def test_a_stream_takes_the_positions_that_its_sequence_will(dia_folder: Path) -> None:
    parts = parts_of(dia_folder)
    model, _, _ = load_model(find_model(str(dia_folder)), EngineConfig(device="cpu").resolve())
    num_frames = int(3.0 * parts.codec.frame_rate_hz) + 1
    prompt = Prompt((1,), 0, 1, np.zeros((0, 9), np.int32), num_frames, 2, 1.0)
    sequence = Sequence(SequenceInput(0, "r", 0, SAMPLING, prompt, 0.0), model.spec.rule, Playback(paced=False))
    assert parts.rows_for(3.0) == sequence.max_positions
    assert parts.rows_for(1e6) == parts.max_positions


def test_what_encodes_reference_audio_is_counted_whole(dia_folder: Path) -> None:
    codec = load_codec(CodecRecipe("dac", str(dia_folder / "codec")), with_encoder=True)
    parts = parts_of(dia_folder).codec
    assert parts.num_encoding * 4 == held_bytes(codec)
    frames = -(-MAX_REFERENCE_S * 44100 // 512)
    assert parts.encoding_bytes == 4 * (parts.num_encoding + frames * parts.encoding_elements)


def test_the_numbers_shipped_for_dia_are_the_models() -> None:
    config, dac = DiaConfig(), DacConfig(n_codebooks=9, sampling_rate=44100)
    with torch.device("meta"):
        num_weights = sum(weight.numel() for weight in DiaForConditionalGeneration(config).parameters())
        codec = DacModel(dac)
    says = config.to_dict()

    def check(shipped: Mapping[str, Any], actual: Mapping[str, Any]) -> None:
        for key, value in shipped.items():
            if isinstance(value, Mapping):
                check(value, actual[key])
            else:
                assert actual[key] == value, key

    check(DIA_1_6B, says)
    check(DAC_44KHZ, dac.to_dict())
    parts = dia()
    derived = 18 * 2048 * 4 + (3072 + 1024) * 256 * 4  # constants of the unconditional branch, and rotary tables
    assert parts.weight_bytes("float32") == 4 * num_weights + derived
    assert parts.codec.num_encoding == sum(weight.numel() for weight in codec.parameters())
    assert parts.codec.num_decoder == sum(weight.numel() for weight in codec.decoder.parameters())


@pytest.mark.parametrize(
    ("num_in", "num_out", "bits"),
    [(2048, 8192, 4.25), (320, 960, 4 * 384 / 320 + 0.5), (1024, 8, 16), (96, 64, 4 * 128 / 96 + 1), (48, 16, 16)],
)
def test_int4_takes_half_a_byte_and_a_scale_and_offset_a_group(num_in: int, num_out: int, bits: float) -> None:
    """Groups of 128, 64 or 32 inputs, packed in blocks of 128; a shape that allows none stays in 16 bits."""
    layer = Matrices(num_in, num_out, count=3)
    assert layer.bytes_in("int4") * 8 == pytest.approx(3 * num_in * num_out * bits)
    assert layer.bytes_in("bfloat16") == layer.bytes_in("float16") == layer.bytes_in("float32") / 2


@pytest.mark.parametrize(("num_in", "num_out"), [(128, 16), (320, 48), (96, 64), (48, 16), (128, 8)])
def test_a_quantized_layer_takes_the_bytes_counted_for_it(num_in: int, num_out: int) -> None:
    layer = Matrices(num_in, num_out)
    assert (layer.group_size is not None) == any(int4.can_quantize(num_in, num_out, size) for size in (128, 64, 32))
    if layer.group_size is not None:
        weight = int4.quantize_weight(torch.randn(num_out, num_in), layer.group_size)
        assert weight.to(dtype=torch.bfloat16, device=torch.device("cpu")).num_bytes == layer.bytes_in("int4")


def test_products_have_no_more_parts_than_are_kept_for_them() -> None:
    parts = dia()
    for layer in (
        *parts.matrices(read_text=False),
        *parts.matrices(read_text=True),
        Matrices(64, 48),
        Matrices(8192, 64),
    ):
        for capability in (75, 80, 86, 89, 90, 100):
            split = split_of(layer.num_in, layer.num_out, capability=capability)
            assert split.count * layer.num_out <= layer.columns_in_parts
    assert attention.CHUNK == memory.KV_CHUNK and int4.DEQUANTIZE_ROWS == memory.DEQUANTIZE_ROWS


class PeakMemory(TorchDispatchMode):
    """The most bytes that operations' results took at once. Counts storages, as an allocator would."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(result):
            if not isinstance(tensor, torch.Tensor) or tensor.is_mkldnn:
                continue
            storage = tensor.untyped_storage()
            if storage._cdata not in given and storage._cdata not in self._seen:
                self._seen.add(storage._cdata)
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())
        return result

    def _free(self, key: int, num_bytes: int) -> None:
        self._seen.discard(key)
        self.live -= num_bytes


def peak_of_decoding(codec: Codec, num_frames: int) -> int:
    codes = torch.zeros(1, codec.spec.num_codebooks, num_frames, dtype=torch.int64)
    with PeakMemory() as peak:
        codec.decode(codes)
    return peak.peak


@pytest.mark.parametrize("name", ["dia", "lark"])
def test_a_codec_window_peaks_below_what_is_kept_for_it(name: str, dia_folder: Path) -> None:
    folder = dia_folder if name == "dia" else EMBEDDED_FOLDER
    codec = load_codec(CodecRecipe("dac" if name == "dia" else "lark", str(folder / "codec")))
    parts = parts_of(folder).codec
    for num_frames in (8, 40):
        kept = parts.window_bytes(num_frames, 4)
        assert kept / 3 < peak_of_decoding(codec, num_frames + parts.num_context) <= kept


def test_reference_audio_peaks_below_what_is_kept_for_it(dia_folder: Path) -> None:
    codec = load_codec(CodecRecipe("dac", str(dia_folder / "codec")), with_encoder=True)
    with PeakMemory() as peak:
        codec.encode(torch.zeros(512 * 60))
    kept = 60 * parts_of(dia_folder).codec.encoding_elements * 4
    assert kept / 3 < peak.peak <= kept


@pytest.mark.parametrize("is_tiled", [True, False], ids=["cpu", "gpu"])
def test_the_plan_counts_every_weight_of_the_speaker_encoder(is_tiled: bool) -> None:
    with torch.device("meta"):
        net, projection = SpeakerNet().eval(), torch.nn.Linear(EMBEDDING_SIZE, 128)
    _fold_norms(net, is_tiled=is_tiled)
    num_batches_seen = 8  # an integer of the attention's norm, which nothing reads
    assert held_bytes([net, projection]) - num_batches_seen == 4 * speaker_parts().num_weights


@pytest.mark.parametrize("is_tiled", [True, False], ids=["cpu", "gpu"])
def test_the_speaker_encoder_peaks_below_what_is_kept_for_it(is_tiled: bool) -> None:
    """With fewer blocks, which follow one another, in the stages of real size."""
    seconds, parts = 8, speaker_parts()
    net = SpeakerNet((2, 2, 1, 1)).eval().requires_grad_(False)
    _fold_norms(net, is_tiled=is_tiled)
    with torch.inference_mode(), PeakMemory() as peak:
        net(torch.zeros(1, NUM_MELS, 100 * seconds + 1))
    kept = 4 * seconds * parts.elements_per_s
    assert kept / 3 < peak.peak <= kept
    assert parts.encoding_bytes == 4 * (parts.num_weights + MAX_REFERENCE_S * parts.elements_per_s)


SPEAKER_PEAK = """
import re, sys
from pathlib import Path
import torch
from declaim.engine.speaker import SpeakerEncoder

def host_bytes(name):
    return 1024 * int(re.search(name + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

torch.set_num_threads(1)
torch.nn.functional.conv2d(torch.zeros(1, 8, 8, 8), torch.zeros(8, 8, 3, 3))
before = host_bytes("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from here
encoder = SpeakerEncoder.load(Path(sys.argv[1]), device=torch.device("cpu"))
after = host_bytes("VmRSS")
encoder.encode_audio(torch.randn(16_000 * 2))
print(after - before, host_bytes("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measures with Linux's /proc")
def test_a_process_with_a_speaker_encoder_grows_by_no_more_than_is_kept_for_it(tmp_path: Path) -> None:
    """As loaded, by its weights alone: nothing stays of what they were folded from."""
    folder = make_speaker(tmp_path, seed=0)
    done = subprocess.run(
        [sys.executable, "-c", SPEAKER_PEAK, str(folder)], capture_output=True, text=True, timeout=120, check=True
    )
    loaded, peak = map(int, done.stdout.split())
    parts = speaker_parts()
    assert 0.95 * 4 * parts.num_weights <= loaded < 1.2 * 4 * parts.num_weights
    assert peak <= parts.encoding_bytes


def test_the_longest_text_peaks_below_what_is_kept_for_it(dia_folder: Path) -> None:
    model, _, _ = load_model(find_model(str(dia_folder)), EngineConfig(device="cpu").resolve())
    parts = parts_of(dia_folder)
    prompt = Prompt((65,) * parts.max_text, 0, parts.max_text, np.zeros((0, 9), np.int32), 1, 2, 1.0)
    with PeakMemory() as peak:
        model.prepare(prompt)
    kept = parts.max_text * (parts.text_elements * 4 + parts.cache.cross_bytes_per_position(4))
    assert kept / 3 < peak.peak <= kept


# What is chosen.


def dia() -> ModelParts:
    return describe_model(DIA_1_6B, DAC_44KHZ, name=DIA_NAME)


def total_bytes(plan: DevicePlan) -> int:
    """Everything on the device, added up again from the plan's lines."""
    return sum(use.num_bytes for use in (*plan.weights, *plan.workspaces)) + plan.memory.kv_bytes


def test_dia_on_8_gb_holds_eight_guided_streams_of_20_seconds_in_16_bits() -> None:
    plan = plan_device(dia(), imagined_gpu(8.0), load=Load(max_batch=8, stream_s=20.0))
    assert plan.precision == "bfloat16" and not plan.is_text_offloaded
    assert plan.num_streams >= plan.num_running == 8
    assert plan.held_s >= 8 * 20
    assert total_bytes(plan) == plan.used_bytes <= 8_000_000_000


def test_dia_on_6_gb_holds_four_guided_streams_of_20_seconds_in_int4() -> None:
    plan = plan_device(dia(), imagined_gpu(6.0), load=Load(max_batch=4, stream_s=20.0), dtype="int4")
    assert plan.num_running == 4 and not plan.is_text_offloaded and plan.window_batch == 4


def test_the_largest_precision_that_holds_what_is_asked_is_chosen() -> None:
    def precision(memory_gb: float, max_batch: int, *, has_bfloat16: bool = True) -> str:
        device = imagined_gpu(memory_gb, has_bfloat16=has_bfloat16)
        return plan_device(dia(), device, load=Load(max_batch=max_batch)).precision

    assert precision(16.0, 32) == "bfloat16"
    assert precision(16.0, 32, has_bfloat16=False) == "float16"
    assert precision(8.0, 8) == "bfloat16"
    assert precision(8.0, 32) == "int4"
    assert precision(4.0, 4) == "int4"


def test_on_the_cpu_the_precision_is_float32_unless_another_is_asked_for() -> None:
    device = Device("cpu", 16_000_000_000)
    assert plan_device(dia(), device, load=Load()).precision == "float32"
    plan = plan_device(dia(), device, load=Load(max_batch=2), dtype="int4")
    assert plan.precision == "int4" and not plan.is_text_offloaded and plan.window_batch == 1


def test_the_text_encoder_leaves_the_card_only_where_that_makes_room() -> None:
    def plan(memory_gb: float, offload: str = "auto", max_batch: int = 8) -> DevicePlan:
        return plan_device(dia(), imagined_gpu(memory_gb), load=Load(max_batch), dtype="bfloat16", offload=offload)

    roomy, tight = plan(8.0), plan(5.6)
    assert not roomy.is_text_offloaded
    assert tight.is_text_offloaded and tight.num_running == 8
    assert sum(use.num_bytes for use in tight.workspaces) < sum(use.num_bytes for use in roomy.workspaces) - 100_000_000
    assert "text encoder" in tight.reason
    assert "text encoder" in {use.name for use in tight.offloaded}
    assert plan(8.0, "text").is_text_offloaded
    assert plan(8.0).is_reference_offloaded
    here = plan(12.0, "none")
    assert not here.is_reference_offloaded and not here.offloaded
    assert "reference-audio encoder" in {use.name for use in here.weights}


def zonos(family: str = "transformer") -> ModelParts:
    config = ZONOS_TRANSFORMER if family == "transformer" else ZONOS_HYBRID
    return describe_model(config, DAC_44KHZ, name=f"Zyphra/Zonos-v0.1-{family}")


def test_the_speaker_encoder_is_on_the_gpu_where_it_fits_and_gives_way_before_anything_else() -> None:
    parts = zonos()
    assert parts.speaker is not None

    def plan(memory_gb: float, offload: str = "auto", parts: ModelParts = parts) -> DevicePlan:
        return plan_device(parts, imagined_gpu(memory_gb), load=Load(max_batch=8), dtype="bfloat16", offload=offload)

    roomy = plan(24.0)
    assert not roomy.is_speaker_offloaded and roomy.is_reference_offloaded
    assert Use("speaker encoder", parts.speaker.encoding_bytes) in roomy.weights
    # Enough for all that was asked but the speaker encoder: no stream and no window waits for it.
    spare = roomy.memory.budget_bytes - roomy.used_bytes
    full = (roomy.memory.budget_bytes - spare - roomy.memory.kv_bytes + needed_for_streams(roomy)) / 1e9
    tight = plan(full - 0.1)
    assert tight.is_speaker_offloaded and tight.num_running == 8 and tight.window_batch == roomy.window_batch
    assert Use("speaker encoder", parts.speaker.encoding_bytes) in tight.offloaded
    assert tight.memory.weight_bytes == roomy.memory.weight_bytes - parts.speaker.encoding_bytes
    assert not plan(9.0, "none").is_speaker_offloaded
    assert plan(4.2).is_speaker_offloaded and plan(4.2).num_running < 8
    absent = plan(24.0, parts=replace(parts, speaker=None))
    assert "speaker encoder" not in {use.name for use in (*absent.weights, *absent.offloaded)}


def needed_for_streams(plan: DevicePlan) -> int:
    """Bytes of cache for the streams that were asked for, and no more."""
    num_blocks, num_cross = plan.stream_blocks
    assert num_cross == 0
    return plan.load.max_batch * num_blocks * plan.load.block_size * plan.parts.cache.bytes_per_position(2)


def test_on_the_cpu_the_speaker_encoder_is_in_host_memory_like_all_that_encodes_reference_audio() -> None:
    plan = plan_device(zonos(), Device("cpu", 16_000_000_000), load=Load())
    assert plan.is_speaker_offloaded and plan.is_reference_offloaded
    assert {use.name for use in plan.offloaded} == {"reference-audio encoder", "speaker encoder"}


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16", "int4"])
def test_the_codec_is_planned_in_what_it_decodes_in(kind: Any, precision: Precision) -> None:
    activations = torch.bfloat16 if precision == "int4" else getattr(torch, precision)
    chosen: torch.dtype = getattr(torch, codec_dtype(torch.device(kind), activations))
    assert chosen.itemsize == memory.codec_element_bytes(Device(kind, 1), precision)
    assert chosen != torch.bfloat16


def test_a_batch_that_cannot_have_two_seconds_each_is_capped() -> None:
    plan = plan_device(dia(), imagined_gpu(4.6), load=Load(max_batch=256), dtype="bfloat16")
    assert 1 < plan.max_batch < 256
    assert f"{plan.num_running} of 256 streams" in plan.reason


def test_a_model_of_short_sequences_is_batched_and_holds_the_longest_text_of_each(dia_folder: Path) -> None:
    """However long an ordinary stream is, none of this model's is longer than its longest sequence."""
    parts = replace(parts_of(dia_folder), max_positions=64)
    plan = plan_device(parts, Device("cpu", 4 << 30), load=Load(max_batch=16, block_size=4))
    assert plan.max_batch == 16
    assert parts.cache.cross is not None
    assert plan.memory.num_cross_blocks == 16 * -(-parts.cache.cross.max_positions // 4)


def test_the_kv_blocks_take_the_bytes_that_the_runner_allocates(dia_folder: Path) -> None:
    model, _, _ = load_model(find_model(str(dia_folder)), EngineConfig(device="cpu", dtype="bfloat16").resolve())
    device = Device("cpu", 60_000_000)
    plan = plan_device(parts_of(dia_folder), device, load=Load(max_batch=2), dtype="bfloat16").memory
    runner = Runner(model, num_blocks=plan.num_blocks, num_cross_blocks=plan.num_cross_blocks, block_size=32)
    assert tensor_bytes(runner.caches) + tensor_bytes(runner.cross_caches) == plan.kv_bytes


@settings(deadline=None, max_examples=200)
@given(
    memory_gb=st.floats(0.01, 100.0),
    max_batch=st.integers(1, 300),
    stream_s=st.floats(0.5, 60.0),
    block_size=st.sampled_from([16, 32, 64]),
    dtype=st.sampled_from(["auto", "float32", "float16", "bfloat16", "int4"]),
    offload=st.sampled_from(["auto", "none", "text"]),
    kind=st.sampled_from(["cpu", "cuda"]),
    parts=st.sampled_from([dia(), zonos("transformer"), zonos("hybrid")]),
)
def test_a_plan_stays_within_its_budget_and_a_refusal_names_one_that_starts(
    memory_gb: float,
    max_batch: int,
    stream_s: float,
    block_size: int,
    dtype: str,
    offload: str,
    kind: str,
    parts: ModelParts,
) -> None:
    load = Load(max_batch=max_batch, stream_s=stream_s, block_size=block_size)

    def plan(memory_gb: float) -> DevicePlan:
        device = imagined_gpu(memory_gb) if kind == "cuda" else Device("cpu", int(memory_gb * 1e9))
        return plan_device(parts, device, load=load, dtype=dtype, offload=offload)

    try:
        made = plan(memory_gb)
    except OutOfMemory as error:
        named = re.search(r"memory_gb of at least ([0-9.]+) starts", str(error))
        assert named is not None
        assert float(named[1]) > memory_gb
        made = plan(float(named[1]))
    assert total_bytes(made) == made.used_bytes <= made.device.budget_bytes
    assert 1 <= made.max_batch <= max_batch
    assert made.num_running == max_batch or made.reason
    assert plan(made.device.budget_bytes / 1e9 * 2).num_running >= made.num_running


def test_too_little_memory_says_what_would_do_with_less() -> None:
    def refusal(dtype: str, offload: str, device: Device) -> str:
        with pytest.raises(OutOfMemory) as refused:
            plan_device(dia(), device, load=Load(), dtype=dtype, offload=offload)
        return str(refused.value)

    said = refusal("float16", "none", imagined_gpu(3.0))
    numbers = [float(number) for number in re.findall(r"\d+\.\d{3}", said)]
    assert numbers[0] == 3.0 and numbers[1] > max(numbers[2:]) and len(numbers) == 4
    assert DIA_NAME in said and "dtype int4" in said and "offload text" in said
    assert "device cpu" in refusal("auto", "auto", imagined_gpu(1.0))
    assert "dtype int4" in refusal("float32", "auto", Device("cpu", 1_000_000_000))


def test_wrong_settings_are_named() -> None:
    gpu = imagined_gpu(8.0)
    with pytest.raises(InvalidConfig, match="dtype is 'fp8': use auto, float32"):
        plan_device(dia(), gpu, load=Load(), dtype="fp8")
    with pytest.raises(InvalidConfig, match="offload is 'all'"):
        plan_device(dia(), gpu, load=Load(), offload="all")
    with pytest.raises(InvalidConfig, match="use float16"):
        plan_device(dia(), imagined_gpu(8.0, has_bfloat16=False), load=Load(), dtype="bfloat16")
    for field in ("max_batch", "stream_s", "block_size"):
        with pytest.raises(InvalidConfig, match=f"{field} is 0"):
            Load(**{field: 0})


def test_a_config_that_cannot_be_read_says_which_key() -> None:
    with pytest.raises(ModelLoadError, match="model_type 'zonos'"):
        describe_model({"model_type": "zonos"}, {}, name="x")
    with pytest.raises(ModelLoadError, match="config of x has no key 'encoder_config'"):
        describe_model({"model_type": "dia"}, {}, name="x")
    with pytest.raises(ModelLoadError, match="decoder_config is 3"):
        describe_model({**DIA_1_6B, "decoder_config": 3}, DAC_44KHZ, name="x")
    with pytest.raises(ModelLoadError, match="hidden_size is -1, it must be a positive integer"):
        describe_model({**DIA_1_6B, "encoder_config": {"hidden_size": -1}}, DAC_44KHZ, name="x")
    with pytest.raises(ModelLoadError, match=r"downsampling_ratios is \[0\]"):
        dac_parts({**DAC_44KHZ, "downsampling_ratios": [0]})
    with pytest.raises(ModelLoadError, match="n_fft is '1024'"):
        lark_codec_parts({**read_json(EMBEDDED_FOLDER / "codec/config.json"), "n_fft": "1024"})


def test_this_machine_is_probed_or_given_a_budget() -> None:
    cpu = torch.device("cpu")
    assert probe_device(cpu, memory_gb=1.5) == Device("cpu", 1_500_000_000)
    assert probe_device(cpu, memory_gb=None).budget_bytes > 0


@pytest.mark.parametrize(("capability", "has_bfloat16"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_a_gpu_is_probed_for_what_it_computes_in(
    capability: tuple[int, int], has_bfloat16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert probe_device(torch.device("cuda"), memory_gb=8).has_bfloat16 == has_bfloat16


def test_a_gpu_that_is_too_old_says_which_are_not_and_what_else_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 1))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GTX 1080")
    with pytest.raises(InvalidConfig, match=r"GTX 1080 has compute capability 6\.1.*from 7\.5 on.*device cpu"):
        probe_device(torch.device("cuda"), memory_gb=8)


def test_the_plan_needs_no_torch_to_be_made() -> None:
    for name in ("memory", "parts"):
        source = (Path(__file__).parents[2] / f"engine/{name}.py").read_text()
        assert not re.search(r"^(import|from) torch", source, re.MULTILINE), name
    assert DIA_NAME in KNOWN_CONFIGS


def test_the_plan_counts_as_int4_what_the_familys_table_makes_int4() -> None:
    """On the CPU the embedded voice's int4 layers are packed otherwise, but they are the same ones."""
    parts = parts_of(EMBEDDED_FOLDER)
    taken = [layer for part in parts.weights for layer in part.matrices if layer.group_size is not None]
    model, _, _ = load_model(find_model(str(EMBEDDED_FOLDER)), EngineConfig(device="cpu", dtype="int4").resolve())
    assert sum(layer.count for layer in taken) == num_int4_in(model) > 0


def num_int4_in(value: object) -> int:
    """How many layers of an object of ours are int4, however deep."""
    if isinstance(value, int4.CpuInt4Weight):
        return 1
    if isinstance(value, list | tuple):
        return sum(num_int4_in(item) for item in value)
    if dataclasses.is_dataclass(value):
        return sum(num_int4_in(getattr(value, field.name)) for field in dataclasses.fields(value))
    if type(value).__module__.startswith("declaim.engine."):
        return num_int4_in(list(vars(value).values()))
    return 0
