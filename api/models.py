"""`declaim models pull | verify | list | rm`, and `declaim quantize`: what lies on the disk, before it is served."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from declaim.api.terminal import StageBars, exit_with, exits_on_error, print_columns

if TYPE_CHECKING:
    from declaim.engine.hub import CachedRepo, Hub, HubRepo
    from declaim.engine.integrity import Verdict

EMBEDDED_NAME = "lark"
PARTS_AFTER_THE_MODEL = ("codec", "speaker encoder")  # as the loader lists a model's repositories
_ELEMENT_BITS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "U32": 32, "I8": 8, "U8": 8}
_PRECISIONS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def open_default_hub() -> Hub:
    """The hub and the cache that the environment names."""
    from declaim.engine.hub import Hub

    return Hub()


def build_models_cli(open_hub: Callable[[], Hub] = open_default_hub) -> typer.Typer:
    """The commands under `declaim models`, on the hub and cache that `open_hub` gives."""
    app = typer.Typer(help="Fetch, check, list and remove models.", no_args_is_help=True)

    @app.command()
    def pull(
        model: Annotated[str, typer.Argument(help="A hub id, such as nari-labs/Dia-1.6B-0626.")],
        everything: Annotated[bool, typer.Option("--all", help="Every file, not only what serving reads.")] = False,
    ) -> None:
        """Fetch a model with all its parts, check them, and record their SHA-256. Goes on where it was interrupted."""
        from declaim.engine.loader import resolve_parts

        if Path(model).exists():
            exit_with(f"{model} is a folder here already: `declaim models verify {model}` checks it", code=2)
        hub = open_hub()
        with exits_on_error():
            try:
                repos = resolve_parts(model, hub, everything=everything)
                _print_parts(repos, hub)
                with StageBars() as bars:
                    folders = hub.pull(repos, bars)
            except KeyboardInterrupt:
                exit_with("interrupted: run the same command again, it goes on from there", code=1)
        num_files = sum(len(repo.files) for repo in repos)
        print(f"{model}: {num_files} files, {_size(sum(repo.num_bytes for repo in repos))}, verified, in {folders[0]}")

    @app.command()
    def verify(
        model: Annotated[str | None, typer.Argument(help="A hub id or a folder; all models if left out.")] = None,
    ) -> None:
        """Hash the files again and compare with what was recorded when they were pulled."""
        from declaim.engine.integrity import check_folder

        hub = open_hub()
        with exits_on_error(), StageBars() as bars:
            verdicts: list[tuple[str, Verdict]] = []
            if model in (None, EMBEDDED_NAME):
                verdicts.append((EMBEDDED_NAME, check_folder(_embedded_folder(), bars)))
            if model is not None and Path(model).exists():
                verdicts.append((model, check_folder(Path(model), bars)))
            elif model != EMBEDDED_NAME:
                verdicts += [(repo.repo_id, hub.verify(repo, bars)) for repo in _chosen(hub, model)]
        if not verdicts:
            print(f"there is no model in {hub.cache}")
        for name, verdict in verdicts:
            print(f"{name}: {_verdict_line(verdict)}")
        problems = [problem for _, verdict in verdicts for problem in verdict.problems]
        if problems:
            exit_with("; ".join(problems), code=1)

    @app.command("list")
    def list_models() -> None:
        """The models in the cache: size, family, precision, whether verified, folder."""
        hub = open_hub()
        rows = [("name", "size", "family", "precision", "verified", "folder")]
        embedded = _embedded_folder()
        size = sum(path.stat().st_size for path in embedded.rglob("*") if path.is_file())
        rows.append((EMBEDDED_NAME, _size(size), "lark", _precision(embedded), "built in", str(embedded)))
        for repo in hub.cached_repos():
            family = _family(repo.folder)
            if family is not None:
                facts = (_size(repo.num_bytes), family, _precision(repo.folder), _state(repo))
                rows.append((repo.repo_id, *facts, str(repo.folder)))
        print_columns(rows)

    @app.command()
    def rm(
        model: Annotated[str, typer.Argument(help="A hub id.")],
        yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    ) -> None:
        """Delete a model from the cache, with the parts that no other model uses."""
        if Path(model).exists():
            exit_with(f"{model} is a folder of your own, not one in the cache: delete it yourself", code=2)
        hub = open_hub()
        with exits_on_error():
            repos = hub.removable(model)
            print_columns([(repo.repo_id, _size(repo.num_bytes), str(repo.folder.parents[1])) for repo in repos])
            if not yes and not typer.confirm("Delete these?"):
                exit_with("nothing was deleted", code=1)
            hub.remove(repos)
        print(f"deleted {_size(sum(repo.num_bytes for repo in repos))}")

    return app


def quantize(
    model: Annotated[str, typer.Argument(help="A model's name, hub id or folder.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The folder to write.")],
    group_size: Annotated[
        int | None, typer.Option(help="Inputs that share a scale, 128, 64 or 32; the largest that fits if left out.")
    ] = None,
) -> None:
    """Write a model with int4 weights into a folder. Goes on where it was interrupted."""
    from declaim.engine.loader import find_model
    from declaim.engine.quantize import quantize_folder

    with exits_on_error():
        try:
            with StageBars() as bars:
                source = find_model(model, bars).folder
                quantize_folder(source, out, group_size=group_size, progress=bars)
        except KeyboardInterrupt:
            exit_with("interrupted: run the same command again, it goes on from there", code=1)
    before, after = _weight_bytes(source), _weight_bytes(out)
    print(f"{out}: {_size(after)} of weights ({_size(before)} before); declaim serve --model {out} serves it")


def _print_parts(repos: tuple[HubRepo, ...], hub: Hub) -> None:
    """Every part of a model and its size, before the first of it is fetched."""
    rows = [("part", "repository", "size", "to fetch", "files")]
    for index, repo in enumerate(repos):
        missing = {file.path for file in hub.missing(repo)}
        parts: dict[str, list[str]] = {}
        sizes: Counter[str] = Counter()
        fetched: Counter[str] = Counter()
        for file in repo.files:
            part = _part_of(file.path) if index == 0 else PARTS_AFTER_THE_MODEL[index - 1]
            parts.setdefault(part, []).append(file.path)
            sizes[part] += file.size
            fetched[part] += file.size if file.path in missing else 0
        for part, paths in parts.items():
            rows.append((part, repo.repo_id, _size(sizes[part]), _size(fetched[part]), _some(paths)))
    print_columns(rows)


def _part_of(path: str) -> str:
    if path.startswith("codec/"):
        return "codec"
    if path.endswith((".safetensors", ".safetensors.index.json")):
        return "weights"
    if path in ("config.json", "generation_config.json"):
        return "config"
    return "processor" if path.endswith(".json") and "/" not in path else "other"


def _some(paths: list[str]) -> str:
    shown = ", ".join(sorted(paths)[:4])
    return shown if len(paths) <= 4 else f"{shown} and {len(paths) - 4} more"


def _chosen(hub: Hub, model: str | None) -> list[CachedRepo]:
    """A cached model with its parts, or every cached model."""
    from declaim.engine.errors import ModelNotFound

    repos = {repo.repo_id: repo for repo in hub.cached_repos() if repo.record or _family(repo.folder)}
    if model is None:
        return list(repos.values())
    if model not in repos:
        raise ModelNotFound(
            f"{model!r} is neither a folder nor a model in {hub.cache}: `declaim models pull {model}` fetches it"
        )
    return [repos[name] for name in (model, *repos[model].parts) if name in repos]


def _verdict_line(verdict: Verdict) -> str:
    amount = f"{verdict.num_files} files, {_size(verdict.num_bytes)}"
    if verdict.problems:
        return f"{amount}, {len(verdict.problems)} of them BAD"
    return f"{amount}, all verified" if verdict.unknown is None else f"{amount}, all whole; {verdict.unknown}"


def _embedded_folder() -> Path:
    import declaim.engine

    return Path(declaim.engine.__path__[0]) / "assets" / EMBEDDED_NAME


def _state(repo: CachedRepo) -> str:
    if _precision(repo.folder) == "?":
        return "incomplete: pull it again"
    return "never" if repo.record is None else repo.record.verified_at[:10]


def _family(folder: Path) -> str | None:
    """What a folder's config.json says it is, None if nothing that declaim reads."""
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError):
        return None
    from declaim.engine.parts import family_of

    if not isinstance(config, dict):
        return None
    return "dac (codec)" if config.get("model_type") == "dac" else family_of(config)


def _precision(folder: Path) -> str:
    """The format that most bytes of a folder's weights have, "?" where there are none or they cannot be read."""
    from safetensors import SafetensorError, safe_open

    from declaim.engine.integrity import QUANTIZATION_NAME

    if (folder / QUANTIZATION_NAME).exists():
        return "int4"
    bits: Counter[str] = Counter()
    try:
        for path in folder.glob("*.safetensors"):
            with safe_open(path, framework="numpy") as file:
                for name in file.keys():
                    tensor = file.get_slice(name)
                    dtype = tensor.get_dtype()
                    size = _ELEMENT_BITS.get(dtype, 8)
                    for extent in tensor.get_shape():
                        size *= extent
                    bits[dtype] += size
    except (SafetensorError, OSError):
        return "?"
    if not bits:
        return "?"
    most = bits.most_common(1)[0][0]
    return _PRECISIONS.get(most, "int4" if most in ("I32", "U32", "U8") else most)


def _weight_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _size(num_bytes: int) -> str:
    from rich.filesize import decimal

    return decimal(num_bytes)
