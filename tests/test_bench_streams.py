"""The benchmark of streams can be run: a handful of streams for a moment, nothing asserted of how fast."""

from pathlib import Path

import pytest

from tests.bench.harness import Report, stop
from tests.bench.streams import FarEnd, climb, holds, measure, most


@pytest.mark.parametrize("name", ["edge", "whole"])
def test_it_measures(name: str, tmp_path: Path) -> None:
    """Over TLS, far end built here; all audio of that second arrives."""
    far = FarEnd(tmp_path, tls=True)
    try:
        found = measure(name, far, 3, 100, seconds=1)
    finally:
        stop(far.process)
    assert found["cpu"] > 0
    assert found["rate"] > 0


def test_the_ladder_ends_where_50_ms_are_missed() -> None:
    """A step that misses once is tried again."""
    asked: list[int] = []

    def measured(streams: int) -> dict[str, float]:
        asked.append(streams)
        return {"p99": {1: 5.0, 2: 30.0, 3: 80.0}[streams], "rate": 1.0}

    steps = climb((1, 2, 3, 4), measured)
    assert asked == [1, 2, 2, 3, 3]
    assert (most(steps, 20), most(steps, 50)) == (1, 2)
    assert not holds({"p99": 1.0, "rate": 0.5}, 20)


def test_a_report_is_written(tmp_path: Path) -> None:
    """JSON and a plot."""
    report = Report("small")
    report.lines("late", "Lateness", "streams", "ms", {"one": [(1, 0.5), (2, 30.0)], "none": []}, 20)
    report.table("t", ["a"], [[1.5], [None]])
    report.write(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small-late.svg", "small.json"]
