"""Quantized folders: the codes of quantizing at load, whatever killed the run before; nothing half written loads."""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from declaim.engine import Engine, InvalidConfig, ModelLoadError, SamplingParams, SpeechRequest
from declaim.engine.checkpoint import Checkpoint, choose_group_size
from declaim.engine.config import Int4Recipe
from declaim.engine.integrity import PROGRESS_NAME, QUANTIZATION_NAME, check_folder
from declaim.engine.loader import EMBEDDED_FOLDER
from declaim.engine.quantize import quantize_folder
from declaim.engine.safetensors_io import read_json
from declaim.kernels.int4 import CpuInt4Weight
from declaim.kernels.linear import Linear, linear
from tests.dia_checkpoints import DiaSize, make_dia

CPU = torch.device("cpu")
# Dia's real proportions, divided by 16: no dimension that 16 does not divide.
EVEN = DiaSize(layers=2, hidden=128, heads=2, kv_heads=1, head_dim=32, cross_heads=2, ffn=256, encoder_hidden=64)
# The key and value projections have 24 outputs, which 16 does not divide.
ODD = DiaSize(layers=1, hidden=64, heads=4, kv_heads=1, head_dim=24, cross_heads=4, ffn=96, encoder_layers=1)
REQUEST = SpeechRequest("[S1] Hello.", sampling=SamplingParams(temperature=0.0, max_seconds=0.3))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dia(tmp_path_factory.mktemp("source") / "dia", EVEN)


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("whole") / "small"
    quantize_folder(source, target)
    return target


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "copy"))


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("declaim.engine.quantize.SHARD_BYTES", 800_000)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def codes_of(folder: Path) -> list[list[int]]:
    with Engine.from_pretrained(folder) as engine:
        (result,) = engine.generate([REQUEST], progress=False)
    assert result.error is None
    codes: list[list[int]] = result.codes.tolist()
    assert codes
    return codes


def linear_layers(folder: Path, recipe: Int4Recipe | None, parts: list[tuple[str, int]], num_in: int) -> Linear:
    return Checkpoint(folder, dtype=torch.float32, device=CPU, recipe=recipe).take_linear(parts, num_in)


def qkv_parts(size: DiaSize) -> list[tuple[str, int]]:
    widths = (size.heads, size.kv_heads, size.kv_heads)
    return [
        (f"model.decoder.layers.0.self_attention.{part}_proj.weight", width * size.head_dim)
        for part, width in zip("qkv", widths, strict=True)
    ]


def test_every_layer_is_what_quantizing_at_load_makes_of_it(source: Path, whole: Path) -> None:
    recipe = Int4Recipe.of_family("dia")
    groups = read_json(whole / QUANTIZATION_NAME)["group_sizes"]
    assert isinstance(groups, dict)
    matrices = {name: t.shape for name, t in load_file(source / "model.safetensors").items() if t.dim() == 2}
    for name, (num_out, num_in) in matrices.items():
        assert groups.get(name) == choose_group_size(recipe, name, num_in, num_out=num_out)
        at_load = linear_layers(source, recipe, [(name, num_out)], num_in)
        stored = linear_layers(whole, None, [(name, num_out)], num_in)
        x = torch.randn(2, num_in, generator=torch.Generator().manual_seed(0))
        assert torch.equal(linear(x, stored), linear(x, at_load))
        assert isinstance(stored.weight, CpuInt4Weight) == isinstance(at_load.weight, CpuInt4Weight) == (name in groups)
        if isinstance(stored.weight, CpuInt4Weight) and isinstance(at_load.weight, CpuInt4Weight):
            assert torch.equal(stored.weight.packed, at_load.weight.packed)
            assert torch.equal(stored.weight.scales_and_zeros, at_load.weight.scales_and_zeros)
    assert {128, 64} <= set(groups.values())
    assert not any("embed" in name or "logits" in name for name in groups)


def test_parts_that_one_layer_is_made_of_lie_side_by_side(source: Path, whole: Path) -> None:
    parts = qkv_parts(EVEN)
    merged = linear_layers(whole, None, parts, EVEN.hidden).weight
    alone = [linear_layers(whole, None, [part], EVEN.hidden).weight for part in parts]
    assert isinstance(merged, CpuInt4Weight) and merged.num_out == sum(size for _, size in parts)
    scales = [weight.scales_and_zeros for weight in alone if isinstance(weight, CpuInt4Weight)]
    assert torch.equal(merged.scales_and_zeros, torch.cat(scales, 1))


def test_a_folder_speaks_is_smaller_and_verifies(source: Path, whole: Path) -> None:
    assert codes_of(whole)
    assert check_folder(whole).problems == ()
    smaller = sum(path.stat().st_size for path in whole.glob("*.safetensors"))
    assert smaller < (source / "model.safetensors").stat().st_size


def test_a_layer_with_a_part_that_does_not_fit_is_dense_at_load_and_from_a_folder(tmp_path: Path) -> None:
    source, target = make_dia(tmp_path / "dia", ODD), tmp_path / "small"
    quantize_folder(source, target)
    at_load = linear_layers(source, Int4Recipe.of_family("dia"), qkv_parts(ODD), ODD.hidden).weight
    stored = linear_layers(target, None, qkv_parts(ODD), ODD.hidden).weight
    assert isinstance(at_load, torch.Tensor) and isinstance(stored, torch.Tensor)
    assert not torch.equal(stored, at_load)  # the query's part was int4
    torch.testing.assert_close(stored, at_load, atol=0.1, rtol=0)
    assert codes_of(target)


def test_the_embedded_voice_is_written_and_speaks(tmp_path: Path) -> None:
    quantize_folder(EMBEDDED_FOLDER, tmp_path / "small", group_size=64)
    groups = read_json(tmp_path / "small" / QUANTIZATION_NAME)["group_sizes"]
    assert isinstance(groups, dict) and set(groups.values()) == {64}
    assert all(name.startswith("encoder.") and "_proj" in name for name in groups)
    request = SpeechRequest("Hi.", sampling=SamplingParams(temperature=0.0))
    with Engine.from_pretrained(tmp_path / "small") as engine:
        (result,) = engine.generate([request], progress=False)
    assert result.error is None and len(result.audio) > 1000


def test_shards_have_an_index_and_hold_what_one_file_holds(
    source: Path, whole: Path, tmp_path: Path, small_shards: None
) -> None:
    quantize_folder(source, tmp_path / "cut")
    files = sorted(path.name for path in (tmp_path / "cut").glob("*.safetensors"))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    cut = {name: tensor for file in files for name, tensor in load_file(tmp_path / "cut" / file).items()}
    expected = load_file(whole / "model.safetensors")
    assert cut.keys() == expected.keys() and all(torch.equal(cut[name], expected[name]) for name in cut)
    assert codes_of(tmp_path / "cut") == codes_of(whole)
    assert check_folder(tmp_path / "cut").problems == ()


class Killed(BaseException):
    """Nothing of the package's own runs after this, as after a SIGKILL."""


def stop_at_rename(monkeypatch: pytest.MonkeyPatch, last: int) -> None:
    """Let `last` files be put in their place, and no more."""
    rename, counter = Path.replace, itertools.count()

    def replace(self: Path, target: Path) -> Path:
        if next(counter) >= last:
            raise Killed
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", replace)


def test_a_run_killed_before_any_of_its_files_goes_on_and_redoes_none(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_shards: None
) -> None:
    quantize_folder(source, tmp_path / "expected")
    expected = contents(tmp_path / "expected")
    for num_renames in itertools.count():
        target = tmp_path / f"killed-{num_renames}"
        with monkeypatch.context() as patched:
            stop_at_rename(patched, num_renames)
            try:
                quantize_folder(source, target)
            except Killed:
                pass
            else:
                break
        if (target / PROGRESS_NAME).exists():
            with pytest.raises(ModelLoadError, match="half written: run declaim quantize again"):
                Engine.from_pretrained(target)
            assert "half written" in check_folder(target).problems[0]
        before = {path.name: path.stat().st_mtime_ns for path in target.glob("*.safetensors")}
        quantize_folder(source, target)
        assert contents(target) == expected
        after = {name: (target / name).stat().st_mtime_ns for name in before}
        redone = [name for name in before if before[name] != after[name]]
        assert len(redone) <= 1  # one that was whole and not recorded yet
    assert num_renames > 2 * len(list((tmp_path / "expected").glob("*.safetensors")))


def test_a_file_damaged_between_two_runs_is_written_again(
    source: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "target"
    with monkeypatch.context() as patched, pytest.raises(Killed):
        stop_at_rename(patched, 3)
        quantize_folder(source, target)
    path = target / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    quantize_folder(source, target)
    assert contents(target) == contents(whole)


def test_progress_counts_the_bytes_of_the_original(source: Path, tmp_path: Path, small_shards: None) -> None:
    told: list[tuple[str, int, int]] = []
    quantize_folder(source, tmp_path / "out", progress=lambda *now: told.append(now))
    total = sum(tensor.nbytes for tensor in load_file(source / "model.safetensors").values())
    done = [now[1] for now in told]
    assert {(stage, of) for stage, _, of in told} == {("quantize", total)}
    assert done == sorted(set(done)) and done[0] == 0 and done[-1] == total and len(done) > 3


def test_a_finished_folder_is_left_as_it_is_and_others_are_not_touched(
    source: Path, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(copy)
    quantize_folder(source, copy)
    with pytest.raises(InvalidConfig, match="holds another quantized model"):
        quantize_folder(source, copy, group_size=32)
    assert contents(copy) == before
    with pytest.raises(InvalidConfig, match="holds other files"):
        quantize_folder(source, source.parent)
    with pytest.raises(InvalidConfig, match="is a file"):
        quantize_folder(source, source / "config.json")
    with pytest.raises(InvalidConfig, match="int4 already"):
        quantize_folder(copy, tmp_path / "again")
    with monkeypatch.context() as patched, pytest.raises(Killed):
        stop_at_rename(patched, 1)
        quantize_folder(source, tmp_path / "begun")
    with pytest.raises(InvalidConfig, match="another group size"):
        quantize_folder(source, tmp_path / "begun", group_size=32)


@pytest.mark.parametrize("group_size", [7, 16, 256, 0])
def test_a_group_size_that_is_none(source: Path, tmp_path: Path, group_size: int) -> None:
    with pytest.raises(InvalidConfig, match=f"group_size is {group_size}: use 128, 64 or 32"):
        quantize_folder(source, tmp_path / "out", group_size=group_size)
    assert not (tmp_path / "out").exists()


def test_a_group_size_that_does_not_divide_a_layers_inputs_names_it(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"weight \(\d+ outputs of 64 inputs\) cannot have int4 groups of 128"):
        quantize_folder(source, tmp_path / "out", group_size=128)
    assert not (tmp_path / "out").exists()


def test_values_that_are_not_finite_are_named(source: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(source, tmp_path / "broken"))
    tensors = load_file(broken / "model.safetensors")
    name = "model.decoder.layers.1.mlp.down_proj.weight"
    tensors[name][3, 5] = torch.nan
    save_file(tensors, broken / "model.safetensors")
    with pytest.raises(ModelLoadError, match=rf"{name} holds values that are not finite"):
        quantize_folder(broken, tmp_path / "out")


def test_weights_of_a_dtype_that_is_not_read_are_named(source: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(source, tmp_path / "model"))
    tensors, name = load_file(model / "model.safetensors"), "model.decoder.norm.weight"
    save_file(tensors | {name: tensors[name].to(torch.float8_e4m3fn)}, model / "model.safetensors")
    with pytest.raises(ModelLoadError, match=r"norm\.weight is float8_e4m3fn, this version reads float32"):
        quantize_folder(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weights_that_are_cut_short_or_gone(source: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(source, tmp_path / "broken"))
    path = broken / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ModelLoadError, match="cut short or corrupted"):
        quantize_folder(broken, tmp_path / "out")
    path.unlink()
    with pytest.raises(ModelLoadError, match="does not exist"):
        quantize_folder(broken, tmp_path / "out")


def test_a_disk_too_small_is_told_before_a_weight_is_read(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr("shutil.disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))  # type: ignore[attr-defined]
        with pytest.raises(ModelLoadError, match=r"disk of .*/out is full: \d+ more bytes are needed, and 1 are free"):
            quantize_folder(source, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.safetensors"))
    quantize_folder(source, tmp_path / "out")
    assert check_folder(tmp_path / "out").problems == ()


def test_a_disk_that_fills_up_names_the_file_and_what_to_do(
    source: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced = os.fsync

    def full(descriptor: int) -> None:
        if os.fstat(descriptor).st_size > 100_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        synced(descriptor)

    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", full)
        with pytest.raises(ModelLoadError, match=r"model\.safetensors is full.*run the same command again"):
            quantize_folder(source, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.safetensors*"))
    quantize_folder(source, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(whole)


def test_a_file_that_cannot_be_written(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelLoadError, match="cannot be written"):
        quantize_folder(source, tmp_path / "file" / "out")


def test_a_truncated_changed_or_missing_file_is_found_at_load_and_by_verify(copy: Path) -> None:
    path = copy / "model.safetensors"
    data = path.read_bytes()
    flipped = data[:-1] + bytes([data[-1] ^ 1])
    for broken in (data[:-1], flipped, data[: len(data) // 2]):
        path.write_bytes(broken)
        with pytest.raises(ModelLoadError, match=r"model\.safetensors is not what was written"):
            Engine.from_pretrained(copy)
        assert any("model.safetensors" in problem for problem in check_folder(copy).problems)
    path.unlink()
    with pytest.raises(ModelLoadError, match=r"has no model\.safetensors"):
        Engine.from_pretrained(copy)
    assert any("is gone" in problem for problem in check_folder(copy).problems)
    path.write_bytes(data)
    assert check_folder(copy).problems == () and check_folder(copy).unknown is None
    codec = copy / "codec" / "model.safetensors"
    codec.write_bytes(codec.read_bytes()[:-1])
    (problem,) = check_folder(copy).problems
    assert "codec/model.safetensors" in problem


def test_a_list_that_is_not_one_or_of_another_version(copy: Path) -> None:
    path = copy / QUANTIZATION_NAME
    config = json.loads(path.read_text())
    for change, said in (
        ({"format": "other"}, "says format 'other'"),
        ({"sha256": None}, "no group_sizes or no sha256"),
        ({"group_sizes": dict.fromkeys(config["group_sizes"], 0)}, "must be a positive integer"),
    ):
        path.write_text(json.dumps(config | change))
        with pytest.raises(ModelLoadError, match=said):
            Engine.from_pretrained(copy)
    path.write_text(json.dumps(config | {"sha256": None}))
    assert "no list of SHA-256" in check_folder(copy).problems[0]
