"""The benchmarks of growth and of what a turn costs can be run: tiny sizes, nothing asserted of how fast."""

import json
from pathlib import Path

from tests.bench import costs, growth


def test_growth(tmp_path: Path) -> None:
    """Each window is of a job that goes on where its worker died, with all its events for a late subscriber."""
    growth.run(tmp_path, counts=(1,), hours=0.1, files=1, seconds=0.5)
    more, places = json.loads((tmp_path / "growth.json").read_text())["tables"]
    assert [row[0] for row in more["rows"]] == [1]
    assert [row[0] for row in places["rows"]] == ["start", "middle", "end"]
    assert all(row[2] > 0 for row in places["rows"])
    turns = [180_000 // growth.TURN_MS, (360_000 - 61_500) // growth.TURN_MS]
    assert [row[7] > count for row, count in zip(places["rows"][1:], turns, strict=True)] == [True, True]


def test_costs(tmp_path: Path) -> None:
    """Every way keeps rows and reads turns."""
    costs.run(tmp_path, counts=(2,), seconds=0.05, rounds=1)
    keeping, reading = json.loads((tmp_path / "costs.json").read_text())["tables"]
    assert [row[1] for row in keeping["rows"]] == list(costs.KEEPING)
    assert all(row[2] > 0 for row in keeping["rows"])
    assert [row[0] for row in reading["rows"]] == list(costs.ways())
