"""The shape of the tree: imports only go down, one place reads the environment, no drawer for odds and ends."""

import ast
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = sorted((ROOT / "service").rglob("*.py"))
MAX_LINES = 400
DRAWERS = {"utils", "util", "helpers", "helper", "manager", "managers", "common", "misc", "shared"}
# What runs when it is loaded: the program itself, alembic's script, and typer, which knows its commands by being told.
SCRIPTS = {ROOT / "service" / name for name in ("__main__.py", "migrations/env.py", "cli/__init__.py")}


def lint(root: Path) -> subprocess.CompletedProcess[str]:
    """Import-linter, with the contracts of `root`'s pyproject.toml."""
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as run; run()", "--no-cache"]
    return subprocess.run(command, cwd=root, env={"PYTHONPATH": str(root)}, capture_output=True, text=True, check=False)


def names_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_imports_only_go_down() -> None:
    done = lint(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


def test_an_import_that_goes_up_is_found(tmp_path: Path) -> None:
    """The same check on a copy with two faults in it."""
    shutil.copytree(ROOT / "service", tmp_path / "service", ignore=shutil.ignore_patterns("__pycache__", "page"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for name, line in [("core/pacing.py", "import asyncio"), ("pacer.py", "from service.feed import Feed")]:
        path = tmp_path / "service" / name
        path.write_text(path.read_text().replace("\nfrom ", f"\n{line}\nfrom ", 1))
    done = lint(tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "the core is pure BROKEN" in done.stdout
    assert "imports only go down BROKEN" in done.stdout


def environment_readers(source: str) -> Iterator[int]:
    """Lines that look at the environment, however `os` was imported."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "environb", "getenv", "getenvb", "putenv"):
            yield node.lineno
        elif isinstance(node, ast.ImportFrom) and node.module == "os":
            yield from (
                node.lineno for alias in node.names if alias.name in ("environ", "environb", "getenv", "getenvb")
            )


def test_only_settings_reads_the_environment() -> None:
    found = {names_of(path) for path in MODULES if list(environment_readers(path.read_text()))}
    assert found <= {"service/settings.py"}


@pytest.mark.parametrize(
    "line", ["import os; os.environ['A']", "from os import getenv as g", "import os as o; o.getenv('A')"]
)
def test_a_reader_of_the_environment_is_found(line: str) -> None:
    assert list(environment_readers(line))


def test_nothing_is_called_after_a_drawer() -> None:
    parts = {part.removesuffix(".py").strip("_") for path in MODULES for part in path.relative_to(ROOT).parts}
    assert not parts & DRAWERS


@pytest.mark.parametrize("path", MODULES, ids=names_of)
def test_a_module_is_of_a_readable_size_and_says_what_it_is(path: Path) -> None:
    source = path.read_text()
    assert len(source.splitlines()) <= MAX_LINES
    assert ast.get_docstring(ast.parse(source)), "a module opens with what it is"


@pytest.mark.parametrize("path", [path for path in MODULES if path not in SCRIPTS], ids=names_of)
def test_importing_a_module_does_nothing_but_define(path: Path) -> None:
    """No call whose result is dropped: importing starts, opens, registers and prints nothing."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            allowed = ("disable_created_metrics",)  # a library's switch that has to be thrown before its first use
            assert getattr(node.value.func, "id", "") in allowed, f"line {node.lineno}"


def test_only_the_composition_root_names_concrete_backends() -> None:
    """By name, where import-linter cannot look: inside functions and strings."""
    guilty = [
        names_of(path)
        for path in MODULES
        if "service.backends" in path.read_text() and "backends" not in path.parts and path.name != "runtime.py"
    ]
    assert guilty == []
