"""`declaim models` and `declaim quantize`: what they print, and how they fail; against a hub that runs here."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from safetensors.numpy import save
from typer.testing import CliRunner, Result

from declaim.api.cli import build_cli
from declaim.api.models import _family, _print_parts
from declaim.engine import InvalidConfig
from declaim.engine.hub import Hub, HubFile, HubRepo
from declaim.engine.progress import Progress
from tests.api.fake_engine import eventually
from tests.fake_hub import FakeHub, FakeRepo, serve_hub

NAME, CODEC = "org/dia", "org/codec"
WEIGHTS = save({"weight": np.arange(500_000, dtype=np.float32)})
ROOT = Path(__file__).parents[2]


@pytest.fixture
def server() -> Iterator[FakeHub]:
    naming = {"audio_tokenizer": {"audio_tokenizer_name_or_path": CODEC}}
    files = {
        "config.json": b'{"model_type": "dia"}',
        "processor_config.json": json.dumps(naming).encode(),
        "model.safetensors": WEIGHTS,
        "README.md": b"Hello.",
    }
    codec = {"config.json": b'{"model_type": "dac"}', "model.safetensors": save({"w": np.ones(9, np.float32)})}
    with serve_hub({NAME: FakeRepo(files), CODEC: FakeRepo(codec)}) as server:
        yield server


@pytest.fixture
def hub(server: FakeHub, tmp_path: Path) -> Hub:
    return Hub(server.url, tmp_path / "cache")


def invoke(hub: Hub, *arguments: str, stdin: str | None = None) -> Result:
    return CliRunner().invoke(build_cli(open_hub=lambda: hub), ["models", *arguments], input=stdin)


def check_failed(result: Result, code: int, *words: str) -> None:
    assert result.exit_code == code, result.output
    (line,) = result.stderr.strip().splitlines()
    for word in words:
        assert word in line


def row(result: Result, name: str) -> str:
    (line,) = [line for line in result.stdout.splitlines() if re.match(rf"{name}\s", line)]
    return line


def test_pull_names_every_part_and_says_where_it_put_them(hub: Hub) -> None:
    result = invoke(hub, "pull", NAME)
    assert result.exit_code == 0, result.output
    assert re.search(rf"{NAME} +2\.0 MB +2\.0 MB +model\.safetensors", row(result, "weights"))
    assert "processor_config.json" in row(result, "processor")
    assert CODEC in row(result, "codec")
    assert "README" not in result.stdout
    last = result.stdout.splitlines()[-1]
    assert "5 files" in last and "verified" in last and str(hub.cache) in last
    assert re.search(r"2\.0 MB +0 bytes", row(invoke(hub, "pull", NAME), "weights"))
    assert "README.md" in row(invoke(hub, "pull", NAME, "--all"), "other")


def test_a_zonos_has_a_speaker_encoder_beside_its_codec(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    repos = tuple(
        HubRepo(name, "0" * 40, (HubFile(path, 3_000_000, None, None),))
        for name, path in (
            ("org/zonos", "model.safetensors"),
            ("org/codec", "model.safetensors"),
            ("org/voice", "a.pt"),
        )
    )
    _print_parts(repos, Hub("http://127.0.0.1:9", tmp_path))
    printed = capsys.readouterr().out
    assert re.search(r"^weights +org/zonos +3\.0 MB +3\.0 MB", printed, re.MULTILINE)
    assert re.search(r"^codec +org/codec", printed, re.MULTILINE)
    assert re.search(r"^speaker encoder +org/voice +3\.0 MB", printed, re.MULTILINE)


def test_list_and_verify_and_rm(hub: Hub) -> None:
    assert len(invoke(hub, "list").stdout.splitlines()) == 2  # the headings, and the embedded voice
    invoke(hub, "pull", NAME)
    listed = invoke(hub, "list")
    assert re.search(r"2\.0 MB +dia +float32 +\d{4}-\d\d-\d\d +/", row(listed, NAME))
    assert "dac (codec)" in row(listed, CODEC) and "built in" in row(listed, "lark")
    verified = invoke(hub, "verify", NAME)
    assert verified.exit_code == 0
    assert [line.split(":")[0] for line in verified.stdout.splitlines()] == [NAME, CODEC]
    assert verified.stdout.count("all verified") == 2
    refused = invoke(hub, "rm", NAME, stdin="n\n")
    assert refused.exit_code == 1 and "nothing was deleted" in refused.stderr and hub.cached_folder(NAME)
    assert invoke(hub, "rm", NAME, stdin="y\n").exit_code == 0
    assert hub.cached_repos() == []
    invoke(hub, "pull", NAME)
    assert invoke(hub, "rm", NAME, "--yes").exit_code == 0
    assert hub.cached_repos() == []
    check_failed(invoke(hub, "rm", NAME), 2, NAME, "declaim models list")


def test_verify_names_the_bad_file_and_the_remedy(hub: Hub) -> None:
    invoke(hub, "pull", NAME)
    folder = hub.cached_folder(NAME)
    assert folder is not None
    (folder / "model.safetensors").write_bytes(WEIGHTS[:-1] + b"!")
    for arguments in ([NAME], []):
        result = invoke(hub, "verify", *arguments)
        check_failed(result, 1, str(folder / "model.safetensors"), f"declaim models pull {NAME}")
        assert "1 of them BAD" in result.stdout
    assert invoke(hub, "pull", NAME).exit_code == 0
    assert invoke(hub, "verify").exit_code == 0


def test_verify_takes_a_folder_and_says_what_it_cannot_know(hub: Hub, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(WEIGHTS)
    result = invoke(hub, "verify", str(folder))
    assert result.exit_code == 0 and "no SHA-256 is recorded" in result.stdout
    (folder / "model.safetensors").write_bytes(WEIGHTS[:-1])
    check_failed(invoke(hub, "verify", str(folder)), 1, "model.safetensors", "cut short")
    check_failed(invoke(hub, "verify", "org/gone"), 2, "org/gone", "declaim models pull")
    assert "lark" in invoke(hub, "verify", "lark").stdout


def test_pull_and_rm_refuse_a_folder(hub: Hub, tmp_path: Path) -> None:
    check_failed(invoke(hub, "pull", str(tmp_path)), 2, "verify")
    check_failed(invoke(hub, "rm", str(tmp_path), "--yes"), 2, "delete it yourself")
    assert tmp_path.exists()


def test_pull_fails_in_one_line(hub: Hub, server: FakeHub) -> None:
    check_failed(invoke(hub, "pull", "org/gone"), 2, "no such repository")
    server.repos[NAME].files.pop("model.safetensors")
    check_failed(invoke(hub, "pull", NAME), 1, "no model.safetensors")
    check_failed(
        invoke(Hub("http://127.0.0.1:9", hub.cache), "pull", NAME),
        2,
        "http://127.0.0.1:9 did not give it",
        "HF_ENDPOINT",
    )


def run_declaim(hub: Hub, *arguments: str) -> subprocess.Popen[str]:
    # As at a terminal: what a script starts in the background is deaf to Ctrl-C, and so would its children be.
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    code += "from declaim.api.cli import main; main()"
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        env={**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HUB_CACHE": str(hub.cache), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_pull_that_is_stopped_goes_on_where_it_was(hub: Hub, server: FakeHub, number: signal.Signals) -> None:
    """With the environment's HF_ENDPOINT and HF_HUB_CACHE, as a user has it."""
    server.stall = threading.Event()
    with run_declaim(hub, "models", "pull", NAME) as first:
        parts = hub.cache / "models--org--dia" / "blobs"
        half = len(WEIGHTS) // 2

        def is_halfway() -> bool:
            with contextlib.suppress(FileNotFoundError):  # small files are whole, and renamed, between look and look
                return any(part.stat().st_size >= half for part in parts.glob("*.incomplete"))
            return False

        assert eventually(is_halfway, within_s=30)
        first.send_signal(number)
        _, told = first.communicate(timeout=20)
    server.stall.set()
    server.stall = None
    if number == signal.SIGINT:
        assert first.returncode == 1 and "interrupted: run the same command again" in told
        assert "Traceback" not in told
    server.requests.clear()
    second = invoke(hub, "pull", NAME)
    assert second.exit_code == 0, second.output
    assert "verified" in second.stdout
    assert (NAME.split("/")[1], server.downloads("model.safetensors")[0][1]) == ("dia", f"bytes={half}-")
    folder = hub.cached_folder(NAME)
    assert folder is not None and (folder / "model.safetensors").read_bytes() == WEIGHTS


def test_quantize_hands_on_its_options_and_says_what_it_saved(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The arithmetic has its own tests: here a stand-in writes half of the bytes, or refuses."""

    def halve(source: Path, target: Path, *, group_size: int, progress: Progress) -> None:
        if group_size not in (32, 64, 128):
            raise InvalidConfig(f"group_size is {group_size}: use 32, 64 or 128")
        target.mkdir()
        progress("quantize", 1, 2)
        whole = (source / "model.safetensors").read_bytes()
        (target / "model.safetensors").write_bytes(whole[: len(whole) // 2])

    module = ModuleType("declaim.engine.quantize")
    monkeypatch.setattr(module, "quantize_folder", halve, raising=False)
    monkeypatch.setitem(sys.modules, "declaim.engine.quantize", module)
    out = str(tmp_path / "small")
    cli = build_cli(open_hub=lambda: hub)
    result = CliRunner().invoke(cli, ["quantize", "lark", "-o", out, "--group-size", "64"])
    assert result.exit_code == 0, result.output
    assert out in result.stdout and "before" in result.stdout and "--model" in result.stdout
    check_failed(CliRunner().invoke(cli, ["quantize", "lark", "-o", out, "--group-size", "7"]), 2, "group_size is 7")
    check_failed(CliRunner().invoke(cli, ["quantize", str(tmp_path / "gone"), "-o", out]), 2, "no folder")


@pytest.mark.parametrize(
    ("config", "family"),
    [
        ({"model_type": "dia"}, "dia"),
        ({"backbone": {}, "prefix_conditioner": {}}, "zonos"),
        ({"model_type": "llama"}, None),
        ([1], None),
    ],
)
def test_a_folder_is_of_the_family_that_its_config_describes(
    config: object, family: str | None, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert _family(tmp_path) == family
