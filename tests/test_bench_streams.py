"""The benchmark of streams can be run: a handful of streams for a moment, nothing asserted of how fast."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.bench.far_end import FarEnd, holds
from tests.bench.harness import Report, stop
from tests.bench.streams import climb, comparable, compare, costs, ladder_of, measure, most


@pytest.fixture(scope="module")
def far(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FarEnd]:
    far = FarEnd(tmp_path_factory.mktemp("far"), tls=True)
    yield far
    stop(far.process)


@pytest.mark.parametrize("name", ["stock", "websockets", "sdk", "sdk async"])
def test_every_contender_that_needs_nothing_new_streams(name: str, far: FarEnd) -> None:
    """Over TLS; audio arrives and the far end judges it."""
    found = measure(name, far, 2, 100, seconds=0.3)
    assert found["cpu"] > 0
    assert found["rate"] > 0
    assert found["live"] == 2


def test_the_whole_service_climbs(far: FarEnd, tmp_path: Path) -> None:
    """Table, plots, and the goals that need no other contender."""
    report = Report("streams")
    steps = compare(report, far, "tls-50", {"whole": ([1], 1)}, 0.3)
    assert list(steps["whole"]) == [1]
    costs(report, far, "tls-50", {2: ["edge", "raw"]}, rounds=1, seconds=0.3)
    report.write(tmp_path)
    written = json.loads((tmp_path / "streams.json").read_text())
    every, held, cpu = written["tables"]
    assert [row[:2] for row in every["rows"]] == [["whole", 1]]
    assert [row[0] for row in held["rows"]] == ["whole"]
    assert [row[:2] for row in cpu["rows"]] == [[2, "edge"], [2, "raw"]]
    assert {goal["wanted"] for goal in written["goals"]} == {"at least 700", "at most 180"}
    assert (tmp_path / "streams-lateness-tls-50.svg").exists()


def figures(p99: float) -> dict[str, float]:
    return {"p99": p99, "rate": 1.0}


def test_the_ladder_ends_where_50_ms_are_missed() -> None:
    """A step that misses once is tried again."""
    asked: list[int] = []

    def measured(streams: int) -> dict[str, float]:
        asked.append(streams)
        return figures({1: 5.0, 2: 30.0, 3: 80.0}[streams])

    steps = climb((1, 2, 3, 4), 1, measured)
    assert asked == [1, 2, 2, 3, 3]
    assert (most(steps, 20), most(steps, 50)) == (1, 2)
    assert not holds({"p99": 1.0, "rate": 0.5}, 20)


def test_a_ladder_goes_down_where_it_began_too_high() -> None:
    """Until 20 ms hold, and no further."""
    asked: list[int] = []

    def measured(streams: int) -> dict[str, float]:
        asked.append(streams)
        return figures(5.0 if streams <= 2 else 90.0)

    steps = climb((1, 2, 3, 4, 5), 4, measured)
    assert asked == [4, 4, 3, 3, 2]
    assert list(steps) == [2, 3, 4]
    assert most(steps, 20) == 2


def test_ladders_and_comparable_numbers() -> None:
    assert ladder_of("edge", 50, fine=False) == ((500, 1000, 1500, 2000, 2500), 1500)
    assert ladder_of("sdk", 100, fine=True)[0][:3] == [38, 75, 112]
    every = {"whole": {100: figures(3.0)}, "edge": {1000: figures(3.0), 1500: figures(90.0)}}
    assert comparable(every, full=False) == {100: ["edge"]}
    assert comparable(every, full=True) == {100: ["whole", "edge"], 500: ["edge"], 1000: ["edge"]}


def test_a_report_is_written(tmp_path: Path) -> None:
    """JSON and a plot."""
    report = Report("small")
    report.lines("late", "Lateness", "streams", "ms", {"one": [(1, 0.5), (2, 30.0)], "none": []}, 20)
    report.table("t", ["a"], [[1.5], [None]])
    report.write(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small-late.svg", "small.json"]
