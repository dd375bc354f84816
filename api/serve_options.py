"""The options of `declaim serve`, in the groups that its help shows: what they are called and what is said of them.

What they mean is in `ApiSettings`, `ServerOptions` and `EngineConfig`; `cli.py` puts them together.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from declaim.api.terminal import exits_on_error

_MODEL, _ENGINE, _ACCESS = "The model", "The engine", "Who may ask"
_ANSWERS, _RUNNING = "What is answered", "How it runs"

DType = Literal["auto", "float32", "float16", "bfloat16", "int4"]
ServedVocoder = Literal["auto", "ray", "inline"]
Offload = Literal["auto", "none", "text"]
Shed = Literal["late", "full"]
LogLevel = Literal["debug", "info", "warning", "error"]
LogFormat = Literal["logfmt", "json"]


def take_config(context: typer.Context, path: Path | None) -> Path | None:
    """Make a file's settings the defaults of the options, which are read after this one."""
    if path is not None:
        from declaim.api.settings import read_config

        known = {option.name or "" for option in context.command.params} - {"", "config_file", "help"}
        with exits_on_error():
            context.default_map = dict(read_config(path, known=known))
    return path


ModelOption = Annotated[str, typer.Option(help="A model's name, hub id or folder.", rich_help_panel=_MODEL)]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.", rich_help_panel=_MODEL)]
DTypeOption = Annotated[DType, typer.Option(help="The model's arithmetic.", rich_help_panel=_MODEL)]
MemoryOption = Annotated[
    float | None,
    typer.Option(help="For weights, codec and KV cache; by default from what is free.", rich_help_panel=_MODEL),
]
OffloadOption = Annotated[
    Offload,
    typer.Option(
        help="Keep a text encoder on the CPU: where the card is too small, never, or always.", rich_help_panel=_MODEL
    ),
]

VocoderOption = Annotated[
    ServedVocoder,
    typer.Option(
        help="Where audio is decoded: in Ray workers or in this process; auto is ray.", rich_help_panel=_ENGINE
    ),
]
VocoderWorkersOption = Annotated[str, typer.Option(help="Ray vocoder workers, fewest:most.", rich_help_panel=_ENGINE)]
RayAddressOption = Annotated[str | None, typer.Option(help="A running Ray cluster to join.", rich_help_panel=_ENGINE)]
MaxBatchOption = Annotated[int, typer.Option(help="Sequences in one step.", rich_help_panel=_ENGINE)]
MaxWaitingOption = Annotated[
    int, typer.Option(help="Sequences that may wait; more are refused.", rich_help_panel=_ENGINE)
]
ShedOption = Annotated[
    Shed,
    typer.Option(
        help="Refuse who would be served slower than they listen, or only beyond --max-waiting.",
        rich_help_panel=_ENGINE,
    ),
]
EagerOption = Annotated[
    bool,
    typer.Option("--eager", help="On a GPU, no captured graphs: slower, to debug.", rich_help_panel=_ENGINE),
]

HostOption = Annotated[str, typer.Option(help="The address to listen on.", rich_help_panel=_ACCESS)]
PortOption = Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.", rich_help_panel=_ACCESS)]
NoAuthOption = Annotated[
    bool, typer.Option("--no-auth", help="Let everybody in, keys or not.", rich_help_panel=_ACCESS)
]
DatabaseUrlOption = Annotated[
    str | None,
    typer.Option(
        envvar="DECLAIM_DATABASE_URL",
        help="Keys, voices, lexicons and usage: sqlite:///PATH or postgresql://USER:PASSWORD@HOST/NAME; by default a "
        "SQLite file in your data folder.",
        rich_help_panel=_ACCESS,
    ),
]
PublicListingsOption = Annotated[
    bool,
    typer.Option("--public-listings", help="List models and own voices without a key.", rich_help_panel=_ACCESS),
]
MetricsTokenOption = Annotated[
    str | None,
    typer.Option(
        help="/metrics names tenants only to who brings this as a bearer; better set in the environment.",
        rich_help_panel=_ACCESS,
    ),
]
CorsOption = Annotated[
    list[str] | None,
    typer.Option(help="A web page's origin that may call; * is any. Repeatable.", rich_help_panel=_ACCESS),
]

MaxInputOption = Annotated[int, typer.Option(help="The longest input.", rich_help_panel=_ANSWERS)]
StrictOption = Annotated[
    bool, typer.Option("--strict", help="Refuse fields that are not known.", rich_help_panel=_ANSWERS)
]
CacheDirOption = Annotated[
    Path | None,
    typer.Option(help="Keep answers here, to give them again for the same request.", rich_help_panel=_ANSWERS),
]
CacheSizeOption = Annotated[float, typer.Option(help="The most that --cache-dir may hold.", rich_help_panel=_ANSWERS)]

ApiWorkersOption = Annotated[
    int,
    typer.Option(
        min=1, max=64, help="Processes that answer and encode; they share one engine.", rich_help_panel=_RUNNING
    ),
]
DrainOption = Annotated[
    float, typer.Option(min=0.0, help="The longest that running streams hold up a stop.", rich_help_panel=_RUNNING)
]
LogLevelOption = Annotated[LogLevel, typer.Option(help="The least to log.", rich_help_panel=_RUNNING)]
LogFormatOption = Annotated[LogFormat, typer.Option(help="How log lines are written.", rich_help_panel=_RUNNING)]
ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config",
        envvar="DECLAIM_SERVE_CONFIG",
        callback=take_config,
        is_eager=True,
        help="A TOML file with any of these options, such as max_batch = 8. A flag goes before the environment, and "
        "that before the file.",
        rich_help_panel=_RUNNING,
    ),
]
