"""The command line: `declaim say` speaks into a file, `declaim serve` serves HTTP; the rest is about models.

Owns options, what the terminal shows, and exit codes: 0 done, 1 something failed, 2 the command was wrong.
Every error is one line that ends with what to do. Loads no model itself: an engine comes from a factory. Imports the
engine only inside the commands that need it: help and listings should not wait for torch.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Protocol

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from declaim.api import serve_options as opt
from declaim.api.admin_cli import OpenDatabase, add_admin_commands, open_store, opened
from declaim.api.lexicon_cli import build_lexicon_cli
from declaim.api.models import build_models_cli, open_default_hub, quantize
from declaim.api.plan import plan
from declaim.api.terminal import StageBars, exit_with, exits_on_error
from declaim.load.cli import build_bench_cli

if TYPE_CHECKING:
    from declaim.api.server import ServerOptions
    from declaim.api.serving import SpeechEngine
    from declaim.api.store.database import Database
    from declaim.engine import AudioChunk, EngineConfig, SpeechRequest
    from declaim.engine.hub import Hub
    from declaim.engine.progress import Progress as ProgressCallback
    from declaim.engine.request import Voice

DEFAULT_MODEL = "lark"
VocoderKind = Literal["inline", "ray"]


class EngineFactory(Protocol):
    """Makes an engine, and says how far it is."""

    def __call__(self, model: str, config: EngineConfig, progress: ProgressCallback) -> SpeechEngine: ...


def load_engine(model: str, config: EngineConfig, progress: ProgressCallback) -> SpeechEngine:
    """Engine.from_pretrained, imported when it is called."""
    from declaim.engine import Engine

    return Engine.from_pretrained(model, config, progress)


def build_cli(
    factory: EngineFactory = load_engine,
    *,
    open_hub: Callable[[], Hub] = open_default_hub,
    open_database: OpenDatabase = open_store,
) -> typer.Typer:
    """The commands: engines are made by `factory`, models kept in what `open_hub` gives, the rest in a database.

    Every option can come from the environment: DECLAIM_SERVE_PORT is `declaim serve --port`.
    """
    description = "Serve and speak with autoregressive text-to-speech models."
    app = typer.Typer(
        name="declaim",
        help=description,
        no_args_is_help=True,
        add_completion=False,
        context_settings={"auto_envvar_prefix": "DECLAIM"},
    )

    app.add_typer(build_models_cli(open_hub), name="models")
    app.command()(quantize)
    app.command()(plan)
    add_admin_commands(app, open_database)
    app.add_typer(build_lexicon_cli(open_database), name="lexicon")
    app.add_typer(build_bench_cli(), name="bench")
    _add_say(app, factory)
    _add_serve(app, factory, open_database)
    return app


def main() -> None:
    """The `declaim` command."""
    build_cli()()


def _add_say(app: typer.Typer, factory: EngineFactory) -> None:
    @app.command()
    def say(
        text: Annotated[str, typer.Argument(help="What to say; - reads it from standard input.")],
        out: Annotated[Path, typer.Option("-o", "--out", help="The wav file to write.")] = Path("out.wav"),
        model: Annotated[str, typer.Option(help="A model's name, hub id or folder.")] = DEFAULT_MODEL,
        voice: Annotated[
            str | None, typer.Option(help="A voice's name, or a wav file to imitate (with --transcript).")
        ] = None,
        transcript: Annotated[str | None, typer.Option(help="What is said in the --voice file.")] = None,
        seed: Annotated[int | None, typer.Option(help="The same seed gives the same audio.")] = None,
        temperature: Annotated[float | None, typer.Option(help="0 draws the most likely code.")] = None,
        top_k: Annotated[int | None, typer.Option(help="Draw from the k likeliest codes; 0 is off.")] = None,
        top_p: Annotated[float | None, typer.Option(help="Draw from the likeliest p of the mass.")] = None,
        guidance_scale: Annotated[float | None, typer.Option(help="1 is off.")] = None,
        max_seconds: Annotated[float | None, typer.Option(help="The longest audio to make.")] = None,
        speed: Annotated[float, typer.Option(help="1 is the model's own pace.")] = 1.0,
        device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
        dtype: Annotated[opt.DType, typer.Option(help="The model's arithmetic.")] = "auto",
        vocoder: Annotated[VocoderKind, typer.Option(help="Where audio is decoded.")] = "inline",
    ) -> None:
        """Speak TEXT into a wav file."""
        from declaim.engine import EngineConfig, SamplingParams, SpeechRequest

        with exits_on_error():
            request = SpeechRequest(
                text=_read_text(text),
                voice=_read_voice(voice, transcript=transcript, model=model),
                sampling=SamplingParams(
                    seed=seed,
                    temperature=temperature,
                    top_k=top_k,
                    top_p=top_p,
                    guidance_scale=guidance_scale,
                    max_seconds=max_seconds,
                ),
                speed=speed,
            )
            _check_writable(out)
            with StageBars() as bars:
                engine = factory(model, EngineConfig(device=device, dtype=dtype, vocoder=vocoder), bars)
            try:
                _speak(engine, request, out=out)
            finally:
                engine.close()


def _add_serve(app: typer.Typer, factory: EngineFactory, open_database: OpenDatabase) -> None:
    @app.command()
    def serve(
        model: opt.ModelOption = DEFAULT_MODEL,
        device: opt.DeviceOption = "auto",
        dtype: opt.DTypeOption = "auto",
        memory_gb: opt.MemoryOption = None,
        offload: opt.OffloadOption = "auto",
        vocoder: opt.VocoderOption = "auto",
        workers: opt.VocoderWorkersOption = "1:2",
        ray_address: opt.RayAddressOption = None,
        max_batch: opt.MaxBatchOption = 32,
        max_waiting: opt.MaxWaitingOption = 256,
        shed: opt.ShedOption = "late",
        eager: opt.EagerOption = False,
        host: opt.HostOption = "127.0.0.1",
        port: opt.PortOption = 8000,
        no_auth: opt.NoAuthOption = False,
        database_url: opt.DatabaseUrlOption = None,
        public_listings: opt.PublicListingsOption = False,
        metrics_token: opt.MetricsTokenOption = None,
        cors_origin: opt.CorsOption = None,
        max_input_chars: opt.MaxInputOption = 4096,
        strict: opt.StrictOption = False,
        cache_dir: opt.CacheDirOption = None,
        cache_gb: opt.CacheSizeOption = 1.0,
        api_workers: opt.ApiWorkersOption = 1,
        drain_seconds: opt.DrainOption = 25.0,
        log_level: opt.LogLevelOption = "info",
        log_format: opt.LogFormatOption = "logfmt",
        config_file: opt.ConfigOption = None,
    ) -> None:
        """Serve the OpenAI speech API over HTTP."""
        from declaim.api.logs import set_up_logs
        from declaim.api.server import ServerOptions
        from declaim.api.settings import ApiSettings
        from declaim.engine import EngineConfig

        with exits_on_error():
            settings = ApiSettings(
                max_input_chars=max_input_chars,
                strict=strict,
                public_listings=public_listings,
                metrics_token=metrics_token,
                cors_origins=tuple(cors_origin or ()),
                cache_folder=cache_dir,
                cache_bytes=int(cache_gb * 1e9),
            )
            config = EngineConfig(
                device=device,
                dtype=dtype,
                vocoder="inline" if vocoder == "inline" else "ray",
                max_batch=max_batch,
                max_waiting=max_waiting,
                shed=shed,
                memory_gb=memory_gb,
                vocoder_workers=_parse_workers(workers),
                ray_address=ray_address,
                eager=eager,
                offload=offload,
            )
        start_logs = partial(set_up_logs, logging.getLevelNamesMapping()[log_level.upper()], log_format)
        start_logs()
        failure = _serve(
            lambda progress: factory(model, config, progress),
            ServerOptions(settings, is_open=no_auth, drain_s=drain_seconds),
            model=model,
            listener=_bind(host, port),
            host=host,
            open_database=lambda: open_database(database_url),
            num_workers=api_workers,
            start_logs=start_logs,
        )
        if failure is not None:
            exit_with(f"the model could not be served: {failure}", code=1)


def _serve(
    load: Callable[[ProgressCallback], SpeechEngine],
    options: ServerOptions,
    *,
    model: str,
    listener: socket.socket,
    host: str,
    open_database: Callable[[], Database],
    num_workers: int,
    start_logs: Callable[[], None],
) -> str | None:
    """Say where the server is and who may come in, and serve until a signal comes; why it could not, if so."""
    from declaim.api.server import check_open_to, run_server

    url = _url_of(listener)
    body = '{"model":"tts-1","input":"Hello.","response_format":"wav"}'  # whatever the model is called
    curl = f"curl {url}/v1/audio/speech -H 'content-type: application/json' -d '{body}' -o hello.wav"
    with listener, opened(open_database) as database:
        has_keys = check_open_to(host, database, is_open=options.is_open)
        print(f"declaim serves {model} at {url} as soon as {url}/ready says so; try: {curl}", flush=True)
        if options.is_open or not has_keys:
            print(f"It lets everybody in who can reach {host}: {_how_open(options.is_open)}", flush=True)
        if num_workers == 1:
            return run_server(load, listener, database, options, host=host)
        from declaim.api.workers import run_workers

        return run_workers(
            load, listener, database, options, host=host, num_workers=num_workers, set_up_logs=start_logs
        )


def _read_text(argument: str) -> str:
    text = sys.stdin.read() if argument == "-" else argument
    if not text.strip():
        exit_with("there is nothing to say: give a text, or - and one on standard input", code=2)
    return text


def _read_voice(voice: str | None, *, transcript: str | None, model: str) -> Voice | str | None:
    """A Voice from a file, a saved voice's name, or None for the model's own."""
    is_file = voice is not None and (Path(voice).suffix.lower() == ".wav" or Path(voice).is_file())
    if voice is None or not is_file:
        if transcript is not None:
            exit_with("--transcript says what is said in a wav file: give that file as --voice", code=2)
        return None if voice in (None, "default", model) else voice
    if transcript is None:
        exit_with(f"--voice {voice} is to be imitated: give --transcript with what is said in it", code=2)
    import numpy as np
    import soundfile

    from declaim.engine.request import Voice

    try:
        audio, rate_hz = soundfile.read(voice, dtype="float32")
    except soundfile.LibsndfileError as error:
        exit_with(f"--voice {voice} cannot be read ({error}): give a wav file", code=2)
    return Voice(transcript, audio.astype(np.float32, copy=False), rate_hz)


def _check_writable(out: Path) -> None:
    """Before minutes of work, not after."""
    if not out.parent.is_dir():
        exit_with(f"the folder {out.parent} does not exist: make it, or give another -o", code=2)
    if out.is_dir() or not os.access(out if out.exists() else out.parent, os.W_OK):
        exit_with(f"{out} cannot be written: give another -o", code=2)


def _speak(engine: SpeechEngine, request: SpeechRequest, *, out: Path) -> None:
    """Stream one request into a file, and say how fast it went."""
    import numpy as np
    import soundfile

    from declaim.api.encode import to_s16

    console = Console(stderr=True)
    began_s = time.perf_counter()
    first_s: float | None = None
    chunks: list[AudioChunk] = []
    audio_s = 0.0
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(24), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("speaking", total=None)
        for chunk in engine.stream(request):
            if first_s is None:
                first_s = time.perf_counter() - began_s
            chunks.append(chunk)
            audio_s += len(chunk.audio) / chunk.sample_rate_hz
            progress.update(task, description=f"{audio_s:.1f} s of audio")
    wall_s = time.perf_counter() - began_s
    audio = np.concatenate([chunk.audio for chunk in chunks]) if chunks else np.zeros(0, np.float32)
    with out.open("wb") as file:
        rate_hz = engine.spec.codec.sample_rate_hz
        soundfile.write(file, to_s16(audio), rate_hz, format="WAV", subtype="PCM_16")
    facts = [f"{audio_s:.2f} s of audio in {wall_s:.2f} s"]
    if audio_s > 0.0:
        facts.append(f"real-time factor {wall_s / audio_s:.2f}")
    if first_s is not None:
        facts.append(f"first audio after {first_s * 1000:.0f} ms")
    if chunks and chunks[-1].finish_reason == "length":
        facts.append("cut at the longest audio allowed (--max-seconds)")
    console.print(Text.assemble((str(out), "bold"), ": ", ", ".join(facts)), soft_wrap=True)


def _parse_workers(value: str) -> tuple[int, int]:
    fewest, colon, most = value.partition(":")
    if not fewest.isdecimal() or (colon and not most.isdecimal()):
        exit_with(f"--workers is {value!r}: give fewest:most, such as 1:2", code=2)
    return int(fewest), int(most) if colon else int(fewest)


def _bind(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio sets TCP_NODELAY only where the protocol is named; without it the first audio waits 40 ms for an ACK.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(2048)
    except OSError as error:
        listener.close()
        message = f"cannot listen on {host} port {port} ({error.strerror}): give another --port or --host"
        exit_with(message, code=1)
    return listener


def _how_open(no_auth: bool) -> str:
    if no_auth:
        return "--no-auth asks for no key."
    return "there is no API key. `declaim keys create --tenant NAME` makes one, and then every request needs one."


def _url_of(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
