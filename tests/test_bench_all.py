"""All benchmarks can be run by one command; a part that fails is told of."""

import json
from pathlib import Path

import pytest

from tests.bench import __main__ as all_of_them


def test_every_part_is_there() -> None:
    """Each is a module that can be run by itself."""
    here = Path(all_of_them.__file__).parent
    assert all('__name__ == "__main__"' in (here / f"{name}.py").read_text() for name in all_of_them.PARTS)
    assert set(all_of_them.QUICK) <= set(all_of_them.PARTS)


def test_goals_of_all_parts_in_one_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    part = {"goals": [{"what": "speed", "measured": 2.5, "wanted": "at least 2", "met": True}], "tables": []}
    assert all_of_them.summary({"one": part}, {"one": 1.0}, tmp_path)
    assert not all_of_them.summary({"one": part, "two": {}}, {"one": 1.0, "two": 0.1}, tmp_path)
    written = json.loads((tmp_path / "bench.json").read_text())
    assert written["tables"][0]["rows"] == [["one", "speed", 2.5, "at least 2", "met"]]
    assert [row[2] for row in written["tables"][1]["rows"]] == ["ran", "FAILED"]
    assert written["parts"]["one"] == part
    assert "speed" in capsys.readouterr().out
