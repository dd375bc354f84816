"""Every way a model can fail to be there: each names the file and what to do."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from declaim.engine import Engine, EngineConfig, InvalidConfig, ModelLoadError, ModelNotFound, OutOfMemory, Voice
from declaim.engine import engine as engine_module
from declaim.engine.hub import Hub
from declaim.engine.loader import (
    EMBEDDED_FOLDER,
    SPEAKER_NAMES,
    ZONOS_CODEC,
    ZONOS_SPEAKER,
    codec_dtype,
    find_model,
)
from declaim.engine.speaker import SpeakerEncoder, SpeakerNet
from tests.dia_checkpoints import make_dia
from tests.fake_hub import FakeRepo, serve_hub
from tests.zonos_checkpoints import CONFIGS, make_zonos, reference_audio


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dia(tmp_path_factory.mktemp("saved") / "dia")


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "dia"))


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_the_embedded_voice_is_found_by_name() -> None:
    files = find_model("lark")
    assert (files.family, files.folder) == ("lark", EMBEDDED_FOLDER)


def test_the_processors_codec_path_wins_while_it_exists_and_the_codec_folder_after(folder: Path, saved: Path) -> None:
    assert find_model(str(folder)).codec_folder == saved / "codec"
    config = json.loads((folder / "processor_config.json").read_text())
    config["audio_tokenizer"]["audio_tokenizer_name_or_path"] = "/gone/codec"
    (folder / "processor_config.json").write_text(json.dumps(config))
    assert find_model(str(folder)).codec_folder == folder / "codec"
    (folder / "processor_config.json").unlink()
    assert find_model(str(folder)).codec_folder == folder / "codec"


def test_older_repositories_name_their_codec_in_a_file_of_its_own(folder: Path, saved: Path) -> None:
    (folder / "processor_config.json").unlink()
    shutil.rmtree(folder / "codec")
    path = folder / "audio_tokenizer_config.json"
    path.write_text(json.dumps({"audio_tokenizer_name_or_path": str(saved / "codec")}))
    assert find_model(str(folder)).codec_folder == saved / "codec"


def test_a_model_without_a_codec_says_where_to_put_one(folder: Path) -> None:
    shutil.rmtree(folder / "codec")
    config = json.loads((folder / "processor_config.json").read_text())
    config["audio_tokenizer"]["audio_tokenizer_name_or_path"] = "/gone/codec"
    (folder / "processor_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelLoadError, match="/gone/codec.*codec/"):
        find_model(str(folder))
    (folder / "processor_config.json").unlink()
    with pytest.raises(ModelLoadError, match="names no codec"):
        find_model(str(folder))


def test_a_folder_that_is_not_there_and_a_hub_that_is_not_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in ("nobody/nothing", "no such folder/at/all", "gone"):
        with pytest.raises(ModelNotFound, match="no folder"):
            find_model(name)


def test_a_file_in_place_of_a_folder(folder: Path) -> None:
    with pytest.raises(ModelNotFound, match="name the folder"):
        find_model(str(folder / "config.json"))


def test_a_family_that_is_not_served(folder: Path) -> None:
    edit(folder / "config.json", model_type="llama")
    with pytest.raises(ModelLoadError, match="llama.*dia and lark"):
        find_model(str(folder))


def test_weights_cut_short_corrupted_missing_or_of_another_model(folder: Path) -> None:
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for broken in (whole[: len(whole) // 2], whole[:-1], b"\x00" * 100, whole[:4], b""):
        path.write_bytes(broken)
        with pytest.raises(ModelLoadError, match=r"model\.safetensors.*download"):
            Engine.from_pretrained(folder)
    path.unlink()
    with pytest.raises(ModelLoadError, match="does not exist"):
        Engine.from_pretrained(folder)
    path.write_bytes(whole)
    tensors = load_file(path)
    missing = tensors.pop("model.decoder.norm.weight")
    save_file(tensors, path)
    with pytest.raises(ModelLoadError, match=r"model\.decoder\.norm\.weight"):
        Engine.from_pretrained(folder)
    save_file(tensors | {"model.decoder.norm.weight": torch.cat([missing, missing])}, path)
    with pytest.raises(ModelLoadError, match=r"model\.decoder\.norm\.weight is \[96\].*\[48\]"):
        Engine.from_pretrained(folder)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.int64])
def test_weights_of_a_dtype_that_is_not_read_are_named(folder: Path, dtype: torch.dtype) -> None:
    path = folder / "model.safetensors"
    tensors, name = load_file(path), "model.decoder.norm.weight"
    save_file(tensors | {name: tensors[name].to(dtype)}, path)
    found = str(dtype).removeprefix("torch.")
    with pytest.raises(ModelLoadError, match=rf"norm\.weight is {found}, this version reads float32.*--dtype int4"):
        Engine.from_pretrained(folder)


def test_a_config_that_is_not_json_or_lacks_a_key(folder: Path) -> None:
    path = folder / "config.json"
    whole = json.loads(path.read_text())
    for content in ("{", "[]", ""):
        path.write_text(content)
        with pytest.raises(ModelLoadError, match=r"config\.json"):
            Engine.from_pretrained(folder)
    del whole["decoder_config"]["num_hidden_layers"]
    path.write_text(json.dumps(whole))
    with pytest.raises(ModelLoadError, match="num_hidden_layers"):
        Engine.from_pretrained(folder)


def test_shards_are_read_through_their_index(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file_name, part in halves.items():
        save_file({name: tensors[name] for name in part}, folder / file_name)
    (folder / "model.safetensors").unlink()
    weight_map = {name: file_name for file_name, part in halves.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    Engine.from_pretrained(folder).close()
    last = folder / "b.safetensors"
    last.write_bytes(last.read_bytes()[:-1])
    with pytest.raises(ModelLoadError, match=r"b\.safetensors.*cut short"):
        Engine.from_pretrained(folder)
    last.unlink()
    with pytest.raises(ModelLoadError, match=r"b\.safetensors"):
        Engine.from_pretrained(folder)


def test_loading_tells_how_much_is_read(folder: Path) -> None:
    told: list[tuple[str, int, int]] = []
    Engine.from_pretrained(folder, None, lambda *progress: told.append(progress)).close()
    sizes = [(part / "model.safetensors").stat().st_size for part in (folder, find_model(str(folder)).codec_folder)]
    assert {(stage, total) for stage, _, total in told} == {("read", sum(sizes))}
    done = [done for _, done, _ in told]
    assert done[0] == 0 and done == sorted(done) and done[-1] == sum(sizes)
    assert len(set(done)) > 20  # the model's part tensor by tensor


def test_quantizing_while_loading_tells_how_far_it_is(folder: Path) -> None:
    told: list[tuple[str, int, int]] = []
    Engine.from_pretrained(folder, EngineConfig(dtype="int4"), lambda *progress: told.append(progress)).close()
    assert list(dict.fromkeys(stage for stage, _, _ in told)) == ["read", "quantize"]
    done = [(done, total) for stage, done, total in told if stage == "quantize"]
    assert len({total for _, total in done}) == 1 and len(done) > 10
    assert done == sorted(done) and done[-1][0] == done[-1][1]


PEAK = """
import re, sys
from pathlib import Path
import torch
from declaim.engine.checkpoint import Checkpoint
from declaim.engine.safetensors_io import freed_at_once

def host_bytes(name):
    return 1024 * int(re.search(name + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

torch.set_num_threads(1)
dtype = getattr(torch, sys.argv[2])
Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from here
before = host_bytes("VmRSS")
weights = Checkpoint(Path(sys.argv[1]), dtype=dtype, device=torch.device("cpu"))
with torch.inference_mode(), freed_at_once():
    kept = [weights.take_linear([(f"layer.{i}", 1024)], 1024) for i in range(80)]
print((host_bytes("VmHWM") - before) / weights.weight_bytes, (host_bytes("VmRSS") - before) / weights.weight_bytes)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measures with Linux's /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loading_holds_the_model_once(tmp_path: Path, dtype: str) -> None:
    """A float32 checkpoint of 336 MB, as it is or as bfloat16: never more than 1.2 times what is kept, and no page of
    the file afterwards."""
    save_file({f"layer.{i}": torch.full((1024, 1024), float(i)) for i in range(80)}, tmp_path / "model.safetensors")
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path), dtype], capture_output=True, text=True, timeout=120, check=True
    )
    peak, after = map(float, done.stdout.split())
    assert 0.95 <= after <= peak < 1.2


def test_no_memory_names_a_budget_that_then_starts(folder: Path) -> None:
    with pytest.raises(OutOfMemory, match="memory_gb of at least") as refused:
        Engine.from_pretrained(folder, EngineConfig(memory_gb=0.0001))
    least = float(str(refused.value).split("at least ")[1].split()[0])
    with Engine.from_pretrained(folder, EngineConfig(memory_gb=least + 0.001)) as engine:
        assert engine.plan.kv_bytes + engine.plan.weight_bytes <= (least + 0.002) * 1e9


def test_a_gpu_that_is_not_there() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(InvalidConfig, match="sees no GPU"):
        Engine.from_pretrained("lark", EngineConfig(device="cuda"))


def test_a_missing_embedded_voice_says_which_model_to_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("declaim.engine.loader.EMBEDDED_FOLDER", tmp_path)
    with pytest.raises(ModelNotFound, match="name a model folder or a hub id"):
        find_model("lark")


# Zonos: a speaker encoder of its own, and a checkpoint that may hold more than is read.


@pytest.fixture
def zonos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    return make_zonos(tmp_path / "zonos", CONFIGS["transformer"])


def save_small_speaker(folder: Path) -> Path:
    """Files with the names and shapes of the real ones, which take no room on the disk."""
    folder.mkdir(parents=True)
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in SpeakerNet().state_dict().items()}
    torch.save({name: torch.zeros(()).expand(shape) for name, shape in shapes.items()}, folder / SPEAKER_NAMES[0])
    torch.save({"weight": torch.zeros(128, 256), "bias": torch.zeros(128)}, folder / SPEAKER_NAMES[1])
    return folder


def test_a_missing_speaker_encoder_is_said_once_with_the_command_that_gets_it(
    zonos: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    with Engine.from_pretrained(zonos) as engine:
        assert not engine.spec.embeds_voices
        (said,) = [record.getMessage() for record in caplog.records if "no_speaker_encoder" in record.getMessage()]
        assert engine.device_plan is not None and engine.device_plan.parts.speaker is None
    assert f"hf download {ZONOS_SPEAKER} {' '.join(SPEAKER_NAMES)} --local-dir {zonos / 'speaker'}" in said
    save_small_speaker(zonos / "speaker")
    caplog.clear()
    with Engine.from_pretrained(zonos) as engine:
        assert engine.spec.embeds_voices and "no_speaker_encoder" not in caplog.text
        assert engine.device_plan is not None and engine.device_plan.parts.speaker is not None


def test_a_speaker_encoder_that_is_not_whole_is_refused_at_start(zonos: Path) -> None:
    folder = zonos / "speaker"
    folder.mkdir()
    with pytest.raises(ModelLoadError, match=rf"{SPEAKER_NAMES[0]} does not exist.*hf download {ZONOS_SPEAKER}"):
        Engine.from_pretrained(zonos)
    folder.rmdir()
    save_small_speaker(folder)
    (folder / SPEAKER_NAMES[1]).rename(folder / "kept")
    with pytest.raises(ModelLoadError, match=rf"{SPEAKER_NAMES[1]} does not exist"):
        Engine.from_pretrained(zonos)
    (folder / "kept").rename(folder / SPEAKER_NAMES[1])
    Engine.from_pretrained(zonos).close()
    whole = (folder / SPEAKER_NAMES[0]).read_bytes()
    (folder / SPEAKER_NAMES[0]).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelLoadError, match=rf"{SPEAKER_NAMES[0]} cannot be read"):
        Engine.from_pretrained(zonos)


@pytest.mark.parametrize("is_offloaded", [True, False])
def test_the_speaker_encoder_runs_where_the_plan_says(
    zonos: Path, monkeypatch: pytest.MonkeyPatch, is_offloaded: bool
) -> None:
    """There is no GPU here: one is named, and nothing is loaded on it."""
    devices: list[torch.device] = []

    class Stub:
        def encode(self, voice: Voice) -> np.ndarray:
            return np.zeros(128, np.float32)

    def load(folder: Path, *, device: torch.device) -> Stub:
        devices.append(device)
        return Stub()

    plan_device, load_model = engine_module._plan_device, engine_module.load_model

    def planned(*arguments: Any) -> Any:
        plan, config = plan_device(*arguments)
        return replace(plan, is_speaker_offloaded=is_offloaded), config

    def loaded(*arguments: Any, **keywords: Any) -> Any:
        model, codec, recipe = load_model(*arguments, **keywords)
        return model, codec, replace(recipe, device="cuda:7")

    save_small_speaker(zonos / "speaker")
    monkeypatch.setattr(SpeakerEncoder, "load", load)
    monkeypatch.setattr(engine_module, "_plan_device", planned)
    monkeypatch.setattr(engine_module, "load_model", loaded)
    with Engine.from_pretrained(zonos) as engine:
        assert engine.encode_voice(Voice("", reference_audio(seed=1), 16_000)).embedding is not None
    assert devices == [torch.device("cpu" if is_offloaded else "cuda:7")]


def test_a_zonos_of_the_hub_finds_the_speaker_encoder_that_was_pulled_with_it(zonos: Path, tmp_path: Path) -> None:
    """It has no config.json, by which the cache knows other repositories, and is not pulled again."""
    voice = FakeRepo.of_folder(save_small_speaker(tmp_path / "voice"))
    repos = {"org/zonos": FakeRepo.of_folder(zonos), ZONOS_SPEAKER: voice}
    repos[ZONOS_CODEC] = FakeRepo.of_folder(zonos / "codec")
    with serve_hub(repos) as server:
        hub = Hub(server.url, tmp_path / "cache")
        found = find_model("org/zonos", hub=hub)
        assert found.speaker_folder is not None
        assert {path.name for path in found.speaker_folder.iterdir()} >= set(SPEAKER_NAMES)
        server.requests.clear()
        told: list[object] = []
        assert find_model("org/zonos", lambda *progress: told.append(progress), hub=hub) == found
        assert not server.downloads() and not told
    (found.speaker_folder / SPEAKER_NAMES[1]).unlink()
    assert find_model(str(zonos), hub=hub).speaker_folder is None


def test_tensors_that_a_zonos_has_no_place_for_are_refused(zonos: Path) -> None:
    path = zonos / "model.safetensors"
    save_file(load_file(path) | {"backbone.layers.0.mixer.in_proj.bias": torch.zeros(128)}, path)
    with pytest.raises(ModelLoadError, match=r"1 tensors.*'backbone\.layers\.0\.mixer\.in_proj\.bias'"):
        Engine.from_pretrained(zonos)


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("name", ["qkv_proj_bias", "out_proj_bias"])
def test_a_zonos_whose_attention_has_biases_is_refused(tmp_path: Path, family: str, name: str) -> None:
    folder = make_zonos(tmp_path / "zonos", CONFIGS[family])
    path, config = folder / "config.json", json.loads((folder / "config.json").read_text())
    config["backbone"]["attn_cfg"][name] = True
    path.write_text(json.dumps(config))
    with pytest.raises(ModelLoadError, match=f"attn_cfg.{name} True: this version serves False"):
        Engine.from_pretrained(folder)


def test_beside_a_model_of_16_bits_on_a_gpu_the_codec_decodes_in_float16() -> None:
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert codec_dtype(gpu, torch.bfloat16) == codec_dtype(gpu, torch.float16) == "float16"
    assert codec_dtype(gpu, torch.float32) == codec_dtype(cpu, torch.float32) == codec_dtype(cpu, torch.bfloat16)
    assert codec_dtype(cpu, torch.float16) == "float32"
