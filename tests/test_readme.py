"""README.md and .env.example say what the code does: their made parts are made again and compared.

`python -m tests.test_readme` writes them.
"""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from service.core.job import TRANSITIONS
from service.settings import Settings, load_settings, settings_table

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
EXAMPLE = ROOT / ".env.example"
SCREENSHOTS = ("deploy/screenshot-light.png", "deploy/screenshot-dark.png")


# --- what is made ----------------------------------------------------------------------------------------------------


def settings_block() -> str:
    """The table of settings."""
    rows = [f"| `{row.name}` | {_code(row.default)} | {row.description} |" for row in settings_table()]
    return "\n".join(["| Name | Default | |", "|---|---|---|", *rows])


def _code(default: str) -> str:
    return default if _literal(default) == "" else f"`{default}`"


def _literal(default: str) -> str:
    """A default that can be written as a value; "" for one that is only described."""
    return "" if default == "—" or " " in default else default


def states_block() -> str:
    """The diagram of a job's status."""
    arrows = [
        f"  {status} --> {target}: {cause}"
        for status, causes in TRANSITIONS.items()
        for cause, target in causes.items()
    ]
    return "\n".join(["```mermaid", "stateDiagram-v2", "  [*] --> queued: upload", *arrows, "```"])


def screenshots_block() -> str:
    """The page by day and by night, once there are pictures of it."""
    light, dark = SCREENSHOTS
    if not all((ROOT / name).exists() for name in SCREENSHOTS):
        return ""
    return f'<img src="{light}" alt="The page, light" width="49%"> <img src="{dark}" alt="The page, dark" width="49%">'


BLOCKS: dict[str, Callable[[], str]] = {
    "screenshots": screenshots_block,
    "states": states_block,
    "settings": settings_block,
}


def made_anew(text: str) -> str:
    """`text` with every made part as it should be."""
    for name, make in BLOCKS.items():
        head, tail = f"<!-- {name}: made by tests/test_readme.py -->\n", f"<!-- /{name} -->"
        before, found, rest = text.partition(head)
        _, closed, after = rest.partition(tail)
        assert found, f"README.md has no place for {name}"
        assert closed, f"README.md does not end its {name}"
        body = make()
        text = f"{before}{head}{body}{chr(10) if body else ''}{tail}{after}"
    return text


def example() -> str:
    """.env.example: every setting, commented out, with its default where that is a value."""
    parts = [
        "# Copy to .env and uncomment what should differ. Made by `python -m tests.test_readme`.\n",
    ]
    for row in settings_table():
        described = "" if _literal(row.default) or row.default == "—" else f" (default: {row.default})"
        parts.append(f"# {row.description.replace('`', '')}{described}\n# {row.name}={_literal(row.default)}\n")
    return "\n".join(parts)


# --- the tests -------------------------------------------------------------------------------------------------------


def test_the_made_parts_are_current() -> None:
    """A setting or a transition changed: run `python -m tests.test_readme`."""
    text = README.read_text()
    assert made_anew(text) == text


def test_the_readme_is_short_and_its_links_lead_somewhere() -> None:
    text = README.read_text()
    assert len(text.splitlines()) <= 150
    targets = re.findall(r"\]\(([^)#]+)|src=\"([^\"]+)", text)
    assert targets, "not even a link to deploy/README.md"
    for target in ("".join(pair) for pair in targets):
        assert (ROOT / target).exists(), target


def test_every_command_the_readme_names_is_there() -> None:
    import typer

    from service.cli import app

    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]  # a group, which has some
    named = set(re.findall(r"(?:`|bin/)turnwire ([a-z]+)", README.read_text()))
    assert named
    assert named <= commands.keys()


def test_the_example_is_current() -> None:
    assert EXAMPLE.read_text() == example()


def test_uncommenting_all_of_the_example_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [line.removeprefix("# ") for line in EXAMPLE.read_text().splitlines() if re.match(r"# [A-Z_]+=", line)]
    assert [line.partition("=")[0] for line in lines] == [row.name for row in settings_table()]
    for row in settings_table():
        monkeypatch.delenv(row.name, raising=False)
    monkeypatch.chdir(tmp_path)
    defaults = load_settings()
    (tmp_path / ".env").write_text("\n".join(lines))
    settings = load_settings()
    assert [n for n in Settings.model_fields if getattr(settings, n) != getattr(defaults, n)] == []


if __name__ == "__main__":
    README.write_text(made_anew(README.read_text()))
    EXAMPLE.write_text(example())
