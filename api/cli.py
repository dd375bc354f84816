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

from declaim.api.admin_cli import OpenDatabase, add_admin_commands, open_store
from declaim.api.lexicon_cli import build_lexicon_cli
from declaim.api.models import build_models_cli, open_default_hub, quantize
from declaim.api.plan import plan
from declaim.api.terminal import StageBars, exit_with, exits_on_error
from declaim.load.cli import build_bench_cli

if TYPE_CHECKING:
    from declaim.api.serving import SpeechEngine
    from declaim.engine import AudioChunk, EngineConfig, SpeechRequest
    from declaim.engine.hub import Hub
    from declaim.engine.progress import Progress as ProgressCallback
    from declaim.engine.request import Voice

DEFAULT_MODEL = "lark"
DType = Literal["auto", "float32", "float16", "bfloat16", "int4"]
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
        dtype: Annotated[DType, typer.Option(help="The model's arithmetic.")] = "auto",
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

    @app.command()
    def serve(
        model: Annotated[str, typer.Option(help="A model's name, hub id or folder.")] = DEFAULT_MODEL,
        host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
        port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
        vocoder: Annotated[
            Literal["auto", "ray", "inline"],
            typer.Option(help="Where audio is decoded: in Ray workers or in this process; auto is ray."),
        ] = "auto",
        workers: Annotated[str, typer.Option(help="Ray vocoder workers, fewest:most.")] = "1:2",
        ray_address: Annotated[str | None, typer.Option(help="A running Ray cluster to join.")] = None,
        device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
        dtype: Annotated[DType, typer.Option(help="The model's arithmetic.")] = "auto",
        memory_gb: Annotated[
            float | None, typer.Option(help="For weights, codec and KV cache; by default from what is free.")
        ] = None,
        offload: Annotated[
            Literal["auto", "none", "text"],
            typer.Option(help="Keep a text encoder on the CPU: where the card is too small, never, or always."),
        ] = "auto",
        max_batch: Annotated[int, typer.Option(help="Sequences in one step.")] = 32,
        max_waiting: Annotated[int, typer.Option(help="Sequences that may wait; more are refused.")] = 256,
        eager: Annotated[bool, typer.Option("--eager", help="On a GPU, no captured graphs: slower, to debug.")] = False,
        no_auth: Annotated[bool, typer.Option("--no-auth", help="Let everybody in, keys or not.")] = False,
        database_url: Annotated[
            str | None,
            typer.Option(
                envvar="DECLAIM_DATABASE_URL",
                help="Keys, voices and usage: sqlite:///PATH or postgresql://USER:PASSWORD@HOST/NAME; by default a "
                "SQLite file in your data folder.",
            ),
        ] = None,
        max_input_chars: Annotated[int, typer.Option(help="The longest input.")] = 4096,
        api_workers: Annotated[
            int, typer.Option(min=1, max=64, help="Processes that answer and encode; they share one engine.")
        ] = 1,
        strict: Annotated[bool, typer.Option("--strict", help="Refuse fields that are not known.")] = False,
        public_listings: Annotated[
            bool, typer.Option("--public-listings", help="List models and own voices without a key.")
        ] = False,
        cors_origin: Annotated[
            list[str] | None, typer.Option(help="A web page's origin that may call; * is any. Repeatable.")
        ] = None,
        cache_dir: Annotated[
            Path | None, typer.Option(help="Keep answers here, to give them again for the same request.")
        ] = None,
        cache_gb: Annotated[float, typer.Option(help="The most that --cache-dir may hold.")] = 1.0,
        drain_seconds: Annotated[
            float, typer.Option(min=0.0, help="The longest that running streams hold up a stop.")
        ] = 25.0,
        log_level: Annotated[
            Literal["debug", "info", "warning", "error"], typer.Option(help="The least to log.")
        ] = "info",
        log_format: Annotated[Literal["logfmt", "json"], typer.Option(help="How log lines are written.")] = "logfmt",
        config_file: Annotated[
            Path | None,
            typer.Option(
                "--config",
                envvar="DECLAIM_SERVE_CONFIG",
                callback=_take_config,
                is_eager=True,
                help="A TOML file with any of these options, such as max_batch = 8. A flag goes before the "
                "environment, and that before the file.",
            ),
        ] = None,
    ) -> None:
        """Serve the OpenAI speech API over HTTP."""
        from declaim.api.logs import set_up_logs
        from declaim.api.server import ServerOptions, check_open_to, run_server
        from declaim.api.settings import ApiSettings
        from declaim.api.store.database import StoreUnavailable
        from declaim.engine import EngineConfig

        with exits_on_error():
            settings = ApiSettings(
                max_input_chars=max_input_chars,
                strict=strict,
                public_listings=public_listings,
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
                memory_gb=memory_gb,
                vocoder_workers=_parse_workers(workers),
                ray_address=ray_address,
                eager=eager,
                offload=offload,
            )
        set_up_logs(logging.getLevelNamesMapping()[log_level.upper()], log_format)
        listener = _bind(host, port)
        url = _url_of(listener)
        body = f'{{"model":"{model}","input":"Hello.","response_format":"wav"}}'
        curl = f"curl {url}/v1/audio/speech -H 'content-type: application/json' -d '{body}' -o hello.wav"
        with exits_on_error(), listener:
            try:
                database = open_database(database_url)
                has_keys = check_open_to(host, database, is_open=no_auth)
            except StoreUnavailable as error:
                exit_with(error.detail, code=1)
            print(f"declaim serves {model} at {url} as soon as {url}/ready says so; try: {curl}", flush=True)
            if no_auth or not has_keys:
                print(f"It lets everybody in who can reach {host}: {_how_open(no_auth)}", flush=True)
            options = ServerOptions(settings, is_open=no_auth, drain_s=drain_seconds)

            def load(progress: ProgressCallback) -> SpeechEngine:
                return factory(model, config, progress)

            if api_workers == 1:
                failure = run_server(load, listener, database, options, host=host)
            else:
                from declaim.api.workers import run_workers

                failure = run_workers(
                    load,
                    listener,
                    database,
                    options,
                    host=host,
                    num_workers=api_workers,
                    set_up_logs=partial(set_up_logs, logging.getLevelNamesMapping()[log_level.upper()], log_format),
                )
            database.close()
        if failure is not None:
            exit_with(f"the model could not be served: {failure}", code=1)

    return app


def main() -> None:
    """The `declaim` command."""
    build_cli()()


def _take_config(context: typer.Context, path: Path | None) -> Path | None:
    """Make a file's settings the defaults of the options, which are read after this one."""
    if path is not None:
        from declaim.api.settings import read_config

        known = {option.name or "" for option in context.command.params} - {"", "config_file", "help"}
        with exits_on_error():
            context.default_map = dict(read_config(path, known=known))
    return path


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
