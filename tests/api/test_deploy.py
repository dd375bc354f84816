"""The deployment files, as far as they can be checked without a daemon that builds and runs them."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from declaim.api.cli import build_cli
from declaim.api.store.database import Database

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "examples" / "deploy"
DOCKERFILES = [DEPLOY / "Dockerfile.cpu", DEPLOY / "Dockerfile.cuda"]


def instructions(dockerfile: Path) -> list[tuple[str, str]]:
    """Instruction and arguments, continued lines joined."""
    text = re.sub(r"^#.*\n", "", dockerfile.read_text(), flags=re.M).replace("\\\n", " ")
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in text.splitlines() if line.strip()]


def options_of_serve() -> set[str]:
    group = typer.main.get_command(build_cli())
    return {name for option in group.commands["serve"].params for name in option.opts}  # type: ignore[attr-defined]


def settings_of_serve() -> set[str]:
    group = typer.main.get_command(build_cli())
    return {option.name or "" for option in group.commands["serve"].params}  # type: ignore[attr-defined]


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_an_image_copies_what_exists_installs_what_is_declared_and_starts_with_options_that_there_are(
    dockerfile: Path,
) -> None:
    steps = instructions(dockerfile)
    for name, arguments in steps:
        if name == "COPY":
            assert all((ROOT / source).exists() for source in arguments.split()[:-1])
    ignored = dockerfile.with_name(f"{dockerfile.name}.dockerignore").read_text().split()
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"].values()
    assert {".git", ".ci"} <= set(ignored) and not {folder.split("/")[0] for folder in packages} & set(ignored)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    runs = " ".join(arguments for name, arguments in steps if name == "RUN")
    (extras,) = re.findall(r'"/src\[([\w,]+)\]"', runs)
    assert set(extras.split(",")) <= set(project["optional-dependencies"])
    assert re.search(r"torch==2\.\d+\.\d+", runs)
    program, command, *options = json.loads(dict(steps)["ENTRYPOINT"])
    assert program in project["scripts"] and command == "serve"
    assert {option for option in options if option.startswith("-")} <= options_of_serve()
    assert dict(steps)["STOPSIGNAL"] == "SIGTERM" and "/ready" in dict(steps)["HEALTHCHECK"]
    # Not as root, with a folder of its own for the database.
    assert [arguments for name, arguments in steps if name == "USER"] == ["declaim"]
    environment = dict(part.split("=", 1) for name, part in steps if name == "ENV")
    folder = Path(environment["DECLAIM_DATABASE_URL"].removeprefix("sqlite:///")).parent
    assert str(folder) == dict(steps)["VOLUME"] and f"install -d -o declaim {folder}" in runs


def test_compose_mounts_builds_and_sets_what_there_is() -> None:
    compose: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    services = compose["services"]
    for service in services.values():
        if "build" in service:
            context = (DEPLOY / service["build"]["context"]).resolve()
            assert context == ROOT and (context / service["build"]["dockerfile"]).is_file()
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0]
            assert (DEPLOY / source).exists() if source.startswith(".") else source in compose["volumes"]
        assert set(service.get("depends_on", ())) <= set(services)
    declaim = services["declaim"]
    known = {f"DECLAIM_SERVE_{name.upper()}" for name in settings_of_serve()} | {"DECLAIM_DATABASE_URL"}
    assert set(declaim["environment"]) <= known
    assert not Database(re.sub(r"\$\{.*?\}", "x", declaim["environment"]["DECLAIM_DATABASE_URL"])).is_sqlite
    # Docker kills what drains for longer than this.
    assert int(declaim["stop_grace_period"].removesuffix("s")) > 25
