"""The command line with a fake engine: files, exit codes, and errors of one line."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import pytest
import soundfile
from typer.testing import CliRunner, Result

from declaim.api.cli import build_cli
from declaim.api.encode import to_s16
from declaim.engine import (
    AudioChunk,
    EngineConfig,
    ModelLoadError,
    ModelNotFound,
    SequenceFailed,
    SpeechRequest,
)
from declaim.engine.progress import Progress
from tests.api.fake_engine import FakeEngine, eventually, scripted


class Factory:
    """Makes one fake engine, or fails; remembers what it was asked for."""

    def __init__(self, engine: FakeEngine | None = None, *, failure: Exception | None = None) -> None:
        self.engine = engine or FakeEngine()
        self.failure = failure
        self.calls: list[tuple[str, EngineConfig]] = []

    def __call__(self, model: str, config: EngineConfig, progress: Progress) -> FakeEngine:
        self.calls.append((model, config))
        progress("read", 1, 2)
        if self.failure is not None:
            raise self.failure
        return self.engine


def invoke(factory: Factory, *arguments: str, stdin: str | None = None) -> Result:
    return CliRunner().invoke(build_cli(factory), list(arguments), input=stdin)


def check_failed(result: Result, code: int, *words: str) -> None:
    assert result.exit_code == code, result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    for word in words:
        assert word in lines[0]


@pytest.fixture(autouse=True)
def in_tmp_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DECLAIM_DATABASE_URL", f"sqlite:///{tmp_path}/declaim.db")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))


def test_say_writes_a_16_bit_wav_at_the_models_rate_and_says_how_it_went() -> None:
    factory = Factory(scripted(sample_rate_hz=44_100))
    result = invoke(factory, "say", "Hello.")
    assert result.exit_code == 0, result.output
    assert soundfile.info("out.wav").subtype == "PCM_16"
    samples, rate_hz = soundfile.read("out.wav", dtype="int16")
    assert rate_hz == 44_100
    np.testing.assert_array_equal(samples, to_s16(factory.engine.audio()))
    (line,) = [line for line in result.stderr.splitlines() if "out.wav" in line]
    assert re.search(r"0\.60 s of audio in .* real-time factor .* first audio after \d+ ms", line)
    assert factory.engine.num_closed == 1


def test_say_hands_its_options_on() -> None:
    factory = Factory()
    options = "--model dia -o a.wav --seed 3 --temperature 0.5 --top-k 9 --top-p 0.8 --guidance-scale 2 "
    options += "--max-seconds 5 --speed 1.5 --device cpu --dtype bfloat16 --vocoder ray"
    assert invoke(factory, "say", "Hello.", *options.split()).exit_code == 0
    assert Path("a.wav").is_file()
    assert factory.calls == [("dia", EngineConfig(device="cpu", dtype="bfloat16", vocoder="ray"))]
    (request,) = factory.engine.requests
    sampling = request.sampling
    assert (sampling.seed, sampling.temperature, sampling.top_k, sampling.top_p) == (3, 0.5, 9, 0.8)
    assert (sampling.guidance_scale, sampling.max_seconds, request.speed) == (2.0, 5.0, 1.5)


def test_say_decodes_in_its_own_process_unless_told() -> None:
    factory = Factory()
    assert invoke(factory, "say", "Hello.").exit_code == 0
    assert factory.calls == [("lark", EngineConfig(vocoder="inline"))]


def test_say_reads_standard_input_for_a_dash() -> None:
    factory = Factory()
    assert invoke(factory, "say", "-", stdin="Good morning.\n").exit_code == 0
    assert factory.engine.requests[0].text == "Good morning.\n"


def test_say_imitates_a_wav_with_its_transcript() -> None:
    factory = Factory()
    soundfile.write("me.wav", np.linspace(-0.5, 0.5, 1600, dtype=np.float32), 16_000)
    assert invoke(factory, "say", "Hi.", "--voice", "me.wav", "--transcript", "I am me.").exit_code == 0
    voice = factory.engine.requests[0].voice
    assert voice is not None and not isinstance(voice, str)
    assert (voice.transcript, voice.sample_rate_hz, voice.audio.dtype) == ("I am me.", 16_000, np.float32)
    np.testing.assert_allclose(voice.audio, np.linspace(-0.5, 0.5, 1600), atol=1e-4)


@pytest.mark.parametrize(("name", "given"), [("anna", "anna"), ("default", None), ("lark", None)])
def test_say_knows_voices_by_name(name: str, given: str | None) -> None:
    factory = Factory()
    assert invoke(factory, "say", "Hi.", "--voice", name).exit_code == 0
    assert factory.engine.requests[0].voice == given


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["  "], ["nothing to say"]),
        (["Hi.", "--temperature", "-1"], ["temperature is -1", "between 0 and 10"]),
        (["Hi.", "--speed", "9"], ["speed is 9"]),
        (["Hi.", "-o", "no/where.wav"], ["folder no ", "-o"]),
        (["Hi.", "-o", "."], ["cannot be written"]),
        (["Hi.", "--voice", "gone.wav", "--transcript", "x"], ["gone.wav cannot be read"]),
        (["Hi.", "--transcript", "x"], ["--voice"]),
    ],
)
def test_say_refuses_bad_input_before_a_model_is_loaded(arguments: list[str], words: list[str]) -> None:
    factory = Factory()
    check_failed(invoke(factory, "say", *arguments), 2, *words)
    assert factory.calls == []


def test_say_wants_a_transcript_for_a_wav() -> None:
    soundfile.write("me.wav", np.zeros(100, np.float32), 16_000)
    check_failed(invoke(Factory(), "say", "Hi.", "--voice", "me.wav"), 2, "--transcript")


@pytest.mark.parametrize(
    ("failure", "code"),
    [(ModelNotFound("no model 'x': try lark"), 2), (ModelLoadError("it is truncated"), 1)],
)
def test_say_reports_a_model_it_cannot_load(failure: Exception, code: int) -> None:
    check_failed(invoke(Factory(failure=failure), "say", "Hi."), code, str(failure))


def test_say_leaves_no_file_when_the_engine_fails() -> None:
    factory = Factory(scripted(fail_after=1, failure=SequenceFailed("it fell\nover [red]")))
    result = invoke(factory, "say", "Hi.")
    assert result.exit_code == 1 and "it fell over [red]" in result.stderr
    assert not Path("out.wav").exists()
    assert factory.engine.num_closed == 1


def test_say_admits_that_speech_was_cut() -> None:
    class Cut(FakeEngine):
        def stream(self, request: SpeechRequest) -> Iterator[AudioChunk]:
            for chunk in FakeEngine.stream(self, request):
                yield replace(chunk, finish_reason="length") if chunk.is_last else chunk

    assert "--max-seconds" in invoke(Factory(Cut()), "say", "Hi.").stderr


def test_serve_names_the_port_that_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        factory = Factory()
        check_failed(invoke(factory, "serve", "--port", port), 1, port, "--port")
    assert factory.calls == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--workers", "many"], ["--workers", "1:2"]),
        (["--workers", "3:1"], ["3:1"]),
        (["--max-batch", "0"], ["max_batch is 0"]),
        (["--memory-gb", "-2"], ["memory_gb is -2"]),
        (["--max-input-chars", "0"], ["max_input_chars is 0"]),
        (["--metrics-token", "short"], ["metrics_token has 5 characters", "16 or more"]),
        (["--cache-dir", "c", "--cache-gb", "-1"], ["-1000000000 bytes"]),
        (["--host", "0.0.0.0"], ["no API key", "declaim keys create", "--no-auth"]),
        (["--database-url", "mysql://x/y"], ["mysql"]),
    ],
)
def test_serve_refuses_bad_settings_before_it_listens(arguments: list[str], words: list[str]) -> None:
    check_failed(invoke(Factory(), "serve", "--port", "0", *arguments), 2, *words)


def test_serve_ends_when_the_model_cannot_be_loaded() -> None:
    factory = Factory(failure=ModelLoadError("it is truncated: download it again"))
    result = invoke(factory, "serve", "--port", "0", "--log-level", "error")
    assert result.exit_code == 1
    assert "download it again" in result.stderr.splitlines()[-1]


def test_serve_uses_ray_unless_told() -> None:
    wanted = {
        (): EngineConfig(vocoder="ray", shed="late"),
        ("--vocoder", "inline", "--shed", "full"): EngineConfig(vocoder="inline", shed="full"),
        ("--workers", "2:5", "--ray-address", "auto"): EngineConfig(
            vocoder="ray", shed="late", vocoder_workers=(2, 5), ray_address="auto"
        ),
        ("--workers", "3", "--max-batch", "8", "--max-waiting", "9", "--memory-gb", "1.5"): EngineConfig(
            vocoder="ray", shed="late", vocoder_workers=(3, 3), max_batch=8, max_waiting=9, memory_gb=1.5
        ),
        ("--eager",): EngineConfig(vocoder="ray", shed="late", eager=True),
    }
    for arguments, config in wanted.items():
        factory = Factory(failure=ModelLoadError("stop here"))
        assert invoke(factory, "serve", "--port", "0", *arguments).exit_code == 1
        assert factory.calls == [("lark", config)]


def test_serve_takes_its_options_from_the_environment_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DECLAIM_SERVE_MAX_BATCH", "5")
    monkeypatch.setenv("DECLAIM_SERVE_VOCODER", "inline")
    factory = Factory(failure=ModelLoadError("stop here"))
    assert invoke(factory, "serve", "--port", "0", "--vocoder", "ray").exit_code == 1
    assert factory.calls == [("lark", EngineConfig(vocoder="ray", shed="late", max_batch=5))]


def test_serve_says_who_may_come_in() -> None:
    factory = Factory(failure=ModelLoadError("stop here"))
    assert "no API key" in invoke(factory, "serve", "--port", "0").stdout
    assert "--no-auth" in invoke(factory, "serve", "--port", "0", "--host", "0.0.0.0", "--no-auth").stdout
    assert invoke(factory, "keys", "create", "--tenant", "acme").exit_code == 0
    assert "everybody" not in invoke(factory, "serve", "--port", "0").stdout


SERVER = """
import sys
from declaim.api.cli import build_cli
from tests.api.fake_engine import FakeEngine
build_cli(lambda model, config, progress: FakeEngine())(sys.argv[1:])
"""


def test_serve_prints_how_to_call_it_and_an_interrupt_stops_it_cleanly() -> None:
    root = Path(__file__).parents[2]
    with subprocess.Popen(
        [sys.executable, "-c", SERVER, "serve", "--port", "0"],
        cwd=root,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None and process.stderr is not None
            line = process.stdout.readline()
            match = re.search(r"http://127\.0\.0\.1:\d+", line)
            assert match is not None and "curl" in line and "/v1/audio/speech" in line
            url = match.group()
            assert eventually(lambda: httpx.get(url + "/ready").status_code == 200)
            body = {"model": "lark", "input": "Hello.", "response_format": "wav"}
            assert len(httpx.post(url + "/v1/audio/speech", json=body).content) == 44 + 28_800
            process.send_signal(signal.SIGINT)
            assert process.wait(20) == 0, "it waited for the end of its drain, 25 s"
            log = process.stderr.read()
        finally:
            process.kill()
    assert "event=ready" in log and log.count("event=request") == 1 and "Traceback" not in log
