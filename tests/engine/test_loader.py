"""Every way a model can fail to be there: each names the file and what to do."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from declaim.engine import Engine, EngineConfig, InvalidConfig, ModelLoadError, ModelNotFound, OutOfMemory
from declaim.engine.loader import EMBEDDED_FOLDER, find_model
from tests.dia_checkpoints import make_dia


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
