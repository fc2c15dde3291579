"""How many real-time streams one core holds, and what one costs: `python -m tests.bench.streams [--full] [--out DIR]`.

    pip install -e '.[bench]'; a C compiler and OpenSSL's headers (apt-get install gcc libssl-dev)

Each contender is a process on the last core; the far end (`far_end.c`, built here) is one on the first. Streams send chunks of 50
or 100 ms and get five turns a second. How late a chunk is is judged by the far end, on arrival, the same for all: against the most
punctual chunk of its stream. CPU is user and system time of the whole process per second of audio. Each contender climbs its ladder
of streams, from where it is expected to hold, until it misses 50 ms; a step that misses 20 ms is tried once more, because a virtual
machine drifts. A window begins when what connecting left behind is sent. What many streams cost is compared at the same numbers in
interleaved rounds. `whole` is `turnwire serve` with a stored job and one subscriber per stream (`tests.bench.whole`); all others keep
and relay nothing.

Quick: this, stock, the guide's way, over TLS with 50 ms chunks, in five minutes. Full: all contenders, plain too, 100 ms too, in most
of an hour; `--kinds` and `--only` choose.
"""

import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from tests.bench.far_end import LIMITS_MS, RATE, FarEnd, Figures, holds, window
from tests.bench.harness import Cell, Report, arguments, cores, interleaved, python, start, stop
from tests.bench.whole import whole
from tests.raw_upstream import CERTIFICATE

__all__ = ["FarEnd", "climb", "measure", "most"]

QUICK_SECONDS, FULL_SECONDS, ROUND_SECONDS = 3.0, 4.0, 3.0
QUICK_ROUNDS, FULL_ROUNDS = 1, 3
WHOLE = "whole"
# The steps of each contender at 50 ms chunks, and the one it starts at. A coarse ladder has every second one.
LADDERS: dict[str, tuple[tuple[int, ...], int]] = {
    WHOLE: ((100, 200, 300, 400, 500, 600, 700, 800), 100),  # with more, uploads of the first are too long
    "edge": ((500, 750, 1000, 1250, 1500, 1750, 2000, 2250, 2500), 1500),
    "stock": ((50, 75, 100, 125, 150, 200, 250, 300, 400), 150),
    "guide": ((50, 75, 100, 125, 150, 175, 200, 250, 300), 150),
    "sdk": ((25, 50, 75, 100, 125, 150, 200, 250), 75),
    "sdk async": ((50, 75, 100, 150, 200, 250, 300, 400), 150),
    "websockets": ((100, 200, 300, 400, 500, 600, 700, 850, 1000), 300),
    "picows": ((750, 1000, 1250, 1500, 1750, 2000, 2250, 2500), 1250),
    "raw": ((1000, 1500, 2000, 2500, 3000, 3500), 1500),
}
QUICK, FULL = (WHOLE, "edge", "stock", "guide"), tuple(LADDERS)
COMMON = (100, 500, 1000)  # streams at which costs are compared
KINDS = {f"{name}-{ms}": (name == "tls", ms) for ms in (50, 100) for name in ("tls", "plain")}
Steps = dict[int, Figures]


@contextmanager
def contender(name: str, far: FarEnd, streams: int, chunk_ms: int) -> Iterator[int]:
    """One of `tests.bench.contenders`, streaming; its process id."""
    far.ask(f"reset {chunk_ms}")
    command = python("tests.bench.contenders", name, far.url, str(streams), str(chunk_ms))
    process = start(["env", f"SSL_CERT_FILE={CERTIFICATE}", *command], cores()[1])
    try:
        assert process.stdout is not None
        if process.stdout.readline() != "ready\n":
            raise RuntimeError(f"{name} did not start")
        yield process.pid
    finally:
        stop(process)


def measure(name: str, far: FarEnd, streams: int, chunk_ms: int, seconds: float) -> Figures:
    """A window of `streams` streams of a contender, in a process of its own."""
    far.ask(f"reset {chunk_ms}")
    if name == WHOLE:
        with whole(far) as service:
            live = service.grow(streams, chunk_ms, streams / 8 + 4 * seconds + 20)
            return window(far, service.pid, live, chunk_ms, seconds)
    with contender(name, far, streams, chunk_ms) as pid:
        return window(far, pid, streams, chunk_ms, seconds)


def climb(ladder: Sequence[int], first: int, measured: Callable[[int], Figures]) -> Steps:
    """Measure from step `first` up until 50 ms is missed; down from there if 20 ms is missed at once.

    A step that misses 20 ms has a second chance.
    """
    found: Steps = {}

    def held(streams: int, limit_ms: int) -> bool:
        found[streams] = measured(streams)
        if not holds(found[streams], LIMITS_MS[0]):
            found[streams] = min(found[streams], measured(streams), key=lambda figures: figures["p99"])
        return holds(found[streams], limit_ms)

    for streams in (step for step in ladder if step >= first):
        if not held(streams, LIMITS_MS[1]):
            break
    if not most(found, LIMITS_MS[0]):
        for streams in reversed([step for step in ladder if step < first]):
            if held(streams, LIMITS_MS[0]):
                break
    return dict(sorted(found.items()))


def climb_whole(far: FarEnd, ladder: Sequence[int], chunk_ms: int, seconds: float) -> Steps:
    """The ladder of the whole service: streams are added to one process, and are as many as it admits."""
    found: Steps = {}
    with whole(far) as service:
        for number, streams in enumerate(ladder):
            left = (ladder[-1] - streams) / 8 + 2.5 * seconds * (len(ladder) - number)
            live = service.grow(streams, chunk_ms, left + 30)
            service.heard()
            tried = [_told(WHOLE, live, window(far, service.pid, live, chunk_ms, seconds))]
            heard = service.heard()
            if not holds(tried[0], LIMITS_MS[0]):
                tried.append(_told(WHOLE, live, window(far, service.pid, live, chunk_ms, seconds)))
            found[live] = min(tried, key=lambda figures: figures["p99"]) | {"turn p99": heard["p99"]}
            if live < streams or not holds(found[live], LIMITS_MS[1]):
                break
    return found


def most(steps: Steps, limit_ms: float) -> int:
    """The largest number held; 0 if none was."""
    return max((streams for streams, figures in steps.items() if holds(figures, limit_ms)), default=0)


def ladder_of(name: str, chunk_ms: int, *, fine: bool) -> tuple[Sequence[int], int]:
    """The steps of a contender, and the one it starts at. With chunks of 100 ms each holds more."""
    steps, first = LADDERS[name]
    if not fine:
        steps = steps[steps.index(first) % 2 :: 2]
    return (steps, first) if chunk_ms == 50 else ([round(1.5 * step) for step in steps], round(1.5 * first))


def compare(
    report: Report, far: FarEnd, kind: str, ladders: Mapping[str, tuple[Sequence[int], int]], seconds: float
) -> dict[str, Steps]:
    """Table, plots and goals of how many streams each contender holds: its steps."""
    chunk_ms, label = KINDS[kind][1], _label(kind)
    every: dict[str, Steps] = {}
    for name, (ladder, first) in ladders.items():
        try:
            if name == WHOLE:
                every[name] = climb_whole(far, ladder, chunk_ms, seconds)
            else:
                every[name] = climb(ladder, first, partial(_measured, name, far, chunk_ms, seconds))
        except RuntimeError as exc:  # not installed, say; the others are worth their time
            print(f"{name} is left out: {exc}", file=sys.stderr)
    columns = ["contender", "streams", "p50 ms", "p99 ms", "max ms", "rate", "CPU ms/stream-s", "core", "others", "far end", "driver"]  # fmt: skip
    figures = ("p50", "p99", "max", "rate", "cpu", "busy", "others", "far", "driver")
    rows: list[list[Cell]] = [
        [name, streams, *(round(f[figure], 3) for figure in figures)]
        for name, steps in every.items() for streams, f in steps.items()
    ]  # fmt: skip
    report.table(f"every step, {label} (core, others, far end, driver: shares of a core)", columns, rows)
    held = {name: most(steps, 20) for name, steps in every.items()}
    base = held.get("guide") or float("nan")
    report.table(
        f"streams one core holds, {label}", ["contender", "p99 < 20 ms", "p99 < 50 ms", "x guide", "KB per stream"],
        [[name, held[name], most(steps, 50), held[name] / base, _slope(steps)] for name, steps in every.items()],
    )  # fmt: skip
    _goals(report, held, every, chunk_ms, label)
    lateness = {name: [(n, f["p99"]) for n, f in steps.items()] for name, steps in every.items()}
    report.lines(f"lateness-{kind}", f"p99 lateness, {label}", "streams on one core", "ms", lateness, 20)
    report.bars(f"held-{kind}", f"Streams with p99 under 20 ms, {label}", "", {k: float(v) for k, v in held.items()})
    return every


def _goals(report: Report, held: dict[str, int], every: dict[str, Steps], chunk_ms: int, label: str) -> None:
    for other, factor in (("guide", 8), ("stock", 6), ("websockets", 2)):
        if held.get(other) and "edge" in held:
            report.goal(f"edge, streams of {other}'s, {label}", held["edge"] / held[other], at_least=factor)
    if WHOLE in held:
        report.goal(f"whole service, streams, {label}", held[WHOLE], at_least=700 if chunk_ms == 50 else 1000)
        if held.get("guide"):
            report.goal(f"whole service, streams of the guide's, {label}", held[WHOLE] / held["guide"], at_least=4.5)
        report.goal(f"whole service, KB per stream, {label}", _slope(every[WHOLE]) or float("nan"), at_most=180)


def _slope(steps: Steps) -> float | None:
    """KB that a stream adds, between the fewest and the most."""
    low, high = min(steps), max(steps)
    return (steps[high]["rss"] - steps[low]["rss"]) / (high - low) if high > low else None


def comparable(every: Mapping[str, Steps], *, full: bool) -> dict[int, list[str]]:
    """Numbers of streams at which to compare costs, and who is there."""
    few, *more = COMMON
    if not full:  # the whole service connects its streams slowly, and its ladder tells its costs
        return {few: [name for name in every if name != WHOLE]}
    return {few: [*every], **{n: [name for name, steps in every.items() if most(steps, 50) >= n] for n in more}}


def costs(
    report: Report, far: FarEnd, kind: str, able: Mapping[int, Sequence[str]], rounds: int, seconds: float
) -> None:
    """What a stream-second costs at the same numbers of streams: medians of interleaved rounds."""
    chunk_ms, label = KINDS[kind][1], _label(kind)
    rows: list[list[Cell]] = []
    series: dict[str, list[tuple[float, float]]] = {name: [] for names in able.values() for name in names}
    for streams, names in able.items():
        found = interleaved(names, rounds, partial(_again, far, streams, chunk_ms, seconds))
        kept = {name: f for name, f in found.items() if f["rate"] > RATE}
        for name, f in found.items():
            ratios = [f["cpu"] / kept[other]["cpu"] if other in kept else None for other in ("guide", "stock", "raw")]
            rows.append([streams, name, f["cpu"] if name in kept else None, *(ratios if name in kept else [None] * 3),
                         f["rate"], f["p99"], f["busy"], f["others"], f["far"]])  # fmt: skip
            if name in kept:
                series[name].append((streams, f["cpu"]))
        for other, bound in (("raw", 2.0), ("picows", 1.3)):
            if streams == 1000 and {"edge", other} <= set(kept):
                ratio = kept["edge"]["cpu"] / kept[other]["cpu"]
                report.goal(f"edge's CPU of {other}'s at {streams}, {label}", ratio, at_most=bound)
    report.table(
        f"CPU of the same numbers of streams, {label}, medians of {rounds} rounds",
        ["streams", "contender", "CPU ms/stream-s", "x guide", "x stock", "x raw", "rate", "p99 ms", "core", "others", "far end"],
        rows,
    )  # fmt: skip
    report.lines(f"cpu-{kind}", f"CPU per stream-second, {label}", "streams", "ms", series)


def _label(kind: str) -> str:
    tls, chunk_ms = KINDS[kind]
    return f"{'TLS' if tls else 'plain'}, {chunk_ms} ms"


def _measured(name: str, far: FarEnd, chunk_ms: int, seconds: float, streams: int) -> Figures:
    return _told(name, streams, measure(name, far, streams, chunk_ms, seconds))


def _again(far: FarEnd, streams: int, chunk_ms: int, seconds: float, name: str) -> Figures:
    return _measured(name, far, chunk_ms, seconds, streams)


def _told(name: str, streams: int, found: Figures) -> Figures:
    print(name, streams, {key: round(value, 2) for key, value in found.items()}, file=sys.stderr, flush=True)
    return found


def main() -> None:
    """Compare."""
    parser = arguments(__doc__, "streams")
    parser.add_argument("--only", nargs="+", choices=LADDERS, help="these contenders")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, help="these connections and chunks")
    parser.add_argument("--streams", type=int, nargs="+", help="these numbers of streams instead of each ladder")
    parser.add_argument("--rounds", type=int, help="in which costs are compared; 0: not at all")
    given = parser.parse_args()
    rounds = (FULL_ROUNDS if given.full else QUICK_ROUNDS) if given.rounds is None else given.rounds
    names: Sequence[str] = given.only or (FULL if given.full else QUICK)
    report = Report("streams", ("httpx-ws", "uvloop", "websockets", "picows", "websocket-client", "assemblyai"))
    with tempfile.TemporaryDirectory() as directory:
        for kind in given.kinds or (KINDS if given.full else ["tls-50"]):
            tls, chunk_ms = KINDS[kind]
            ladders = {name: ladder_of(name, chunk_ms, fine=given.full and kind == "tls-50") for name in names}
            if given.streams:
                ladders = dict.fromkeys(names, (sorted(given.streams), min(given.streams)))
            far = FarEnd(Path(directory), tls=tls)
            try:
                every = compare(report, far, kind, ladders, FULL_SECONDS if given.full else QUICK_SECONDS)
                if rounds and chunk_ms == 50:
                    costs(report, far, kind, comparable(every, full=given.full), rounds, ROUND_SECONDS)
            finally:
                stop(far.process)
            report.write(given.out)


if __name__ == "__main__":
    main()
