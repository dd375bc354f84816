"""`declaim plan` without a GPU, a network or weights: its table, its sentences, its exit codes."""

from __future__ import annotations

import json
import re
import socket
from pathlib import Path
from typing import NoReturn

import pytest
import torch
import typer
from rich.console import Console
from typer.testing import CliRunner, Result

from declaim.api.plan import describe, plan, render_plan
from declaim.engine.memory import Load, imagined_gpu, plan_device
from declaim.engine.parts import DAC_44KHZ, DIA_1_6B, ZONOS_TRANSFORMER

DIA = "nari-labs/Dia-1.6B-0626"
ZONOS = "Zyphra/Zonos-v0.1-transformer"


@pytest.fixture(autouse=True)
def without_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> NoReturn:
        raise AssertionError("a plan opened a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setenv("COLUMNS", "120")


def invoke(*arguments: str) -> Result:
    app = typer.Typer()
    app.command()(plan)
    return CliRunner().invoke(app, list(arguments))


def planned(*arguments: str) -> str:
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def check_failed(result: Result, code: int, *words: str) -> None:
    assert result.exit_code == code, result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    for word in words:
        assert word in lines[0]


def gigabytes(output: str, name: str) -> float:
    """The GB column of one row."""
    (row,) = re.findall(rf"^\s*{re.escape(name)}\s*│\s*([0-9.]+) │", output, re.MULTILINE)
    return float(row)


def test_dia_is_planned_for_a_card_that_is_not_there() -> None:
    output = planned(DIA, "--memory-gb", "8", "--concurrency", "8")
    assert f"{DIA} in bfloat16 on a GPU" in output
    streams = re.search(r"Holds (\d+) streams of 20 s at once, each with guidance \(2 branches\)", output)
    assert streams is not None and int(streams[1]) >= 8
    assert gigabytes(output, "decoder layers") == 2.491
    assert gigabytes(output, "codec (DAC)") == 0.109
    sections = [
        gigabytes(output, name) for name in ("weights and codec", "graphs and workspaces", "KV cache", "unused")
    ]
    assert sum(sections) == pytest.approx(gigabytes(output, "budget"), abs=0.002)


def test_a_small_card_runs_int4_and_says_why() -> None:
    output = planned(DIA, "--memory-gb", "8")
    assert f"{DIA} in int4 on a GPU" in output
    assert re.search(r"16 bits hold \d+ of 32 streams of 20 s, so int4 was chosen", output)
    streams = re.search(r"Holds (\d+) streams", planned(DIA, "--memory-gb", "6", "--dtype", "int4"))
    assert streams is not None and int(streams[1]) >= 4


def test_options_change_what_is_asked() -> None:
    short = planned(DIA, "--memory-gb", "8", "--dtype", "float16", "--seconds", "5", "--offload", "text")
    assert "in float16" in short and "streams of 5 s" in short
    assert re.search(r"In host memory, beyond the budget: text encoder, 1\.0\d\d GB", short)
    assert "reference-audio encoder" in planned(DIA, "--memory-gb", "16", "--offload", "none")
    assert "on the CPU" in planned(DIA, "--memory-gb", "16", "--device", "cpu").splitlines()[0]


def test_the_embedded_voice_is_planned_for_this_machine() -> None:
    output = planned("lark")
    where = "a GPU" if torch.cuda.is_available() else "the CPU"
    assert f"on {where}" in output.splitlines()[0]
    assert "codec (lark codec)" in output and "guidance" not in output and "cross-attention" not in output


def test_a_folder_is_planned_from_its_config_alone(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**DIA_1_6B}))
    assert describe(str(tmp_path)).weights == describe(DIA).weights
    assert describe(str(tmp_path)).codec == describe(DIA).codec
    (tmp_path / "codec").mkdir()
    (tmp_path / "codec/config.json").write_text(json.dumps({**DAC_44KHZ, "decoder_hidden_size": 768}))
    assert describe(str(tmp_path)).codec.num_decoder < describe(DIA).codec.num_decoder


def test_a_speaker_encoder_is_planned_on_the_card_or_beside_it() -> None:
    roomy = planned(ZONOS, "--memory-gb", "24")
    assert 0.5 < gigabytes(roomy, "speaker encoder") < 0.8
    assert "speaker encoder" not in roomy.split("In host memory")[1]
    beside = r"In host memory, beyond the budget: speaker encoder, 0\.\d+ GB"
    assert re.search(beside, planned(ZONOS, "--memory-gb", "4.5"))
    assert re.search(beside, planned(ZONOS, "--memory-gb", "24", "--device", "cpu"))
    assert "speaker encoder" not in planned(DIA, "--memory-gb", "24")


def test_a_folder_is_planned_with_a_speaker_encoder_only_where_it_has_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "zonos"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**ZONOS_TRANSFORMER}))
    assert describe(str(folder)).speaker is None
    (folder / "speaker").mkdir()
    assert describe(str(folder)).speaker == describe(ZONOS).speaker is not None


def test_the_table_fits_a_narrow_terminal() -> None:
    made = plan_device(describe(DIA), imagined_gpu(8.0), load=Load())
    console = Console(width=60, record=True, quiet=True)
    console.print(render_plan(made))
    lines = console.export_text().splitlines()
    assert all(len(line) <= 60 for line in lines)
    assert not any("…" in line for line in lines)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ((DIA, "--memory-gb", "1"), 1, ("memory_gb of at least", "with one request at a time")),
        ((DIA, "--memory-gb", "3", "--dtype", "bfloat16"), 1, ("dtype int4 starts from",)),
        ((DIA, "--memory-gb", "-1"), 2, ("memory_gb is -1.0", "must be positive")),
        ((DIA, "--memory-gb", "nan"), 2, ("memory_gb is nan",)),
        ((DIA, "--memory-gb", "8", "--seconds", "0"), 2, ("stream_s is 0",)),
        (("./nowhere",), 2, ("nowhere",)),
    ],
)
def test_what_cannot_be_planned_ends_in_one_line(arguments: tuple[str, ...], code: int, words: tuple[str, ...]) -> None:
    check_failed(invoke(*arguments), code, *words)


def test_a_gpu_that_is_not_there_needs_a_budget() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    check_failed(invoke(DIA, "--device", "cuda"), 2, "--memory-gb")


def test_a_folder_of_another_family_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "zonos"}')
    check_failed(invoke(str(tmp_path), "--memory-gb", "8"), 1, "zonos", "dia and lark")


@pytest.mark.parametrize("option", ["--dtype", "--offload", "--device"])
def test_unknown_choices_are_refused_with_the_known_ones(option: str) -> None:
    result = invoke(DIA, option, "fp8")
    assert result.exit_code == 2 and "fp8" in result.stderr and "auto" in result.stderr
