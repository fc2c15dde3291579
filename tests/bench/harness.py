"""What the benchmarks share: pinned processes and what they cost, and results as tables, JSON and SVG plots.

What is measured runs on the last core, everything that drives it on the first, so that a figure is one of one core. A machine
drifts by more than what is often compared: contenders are measured in turn in one run (`interleaved`), the median of the rounds
counts, and every result says how busy the machine was. Linux only.
"""

import argparse
import ctypes
import json
import os
import platform
import resource
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib.metadata import PackageNotFoundError, version
from math import ceil, floor, log10
from pathlib import Path
from typing import Any

_libc = ctypes.CDLL(None)
Points = Sequence[tuple[float, float]]
Cell = str | float | int | None

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#666666", "#000000", "#b8860b")
_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 760, 420, 70, 50, 50


# --- processes -------------------------------------------------------------------------------------------------------


def cores() -> tuple[int, int]:
    """The core that drives and the one that is measured; the same one on a machine that has only one."""
    usable = sorted(os.sched_getaffinity(0))
    return usable[0], usable[-1]


def start(command: Sequence[str], core: int, **options: Any) -> subprocess.Popen[str]:
    """Start `command` on that core alone, its threads too; text pipes to its stdin and from its stdout."""

    def prepare() -> None:
        _libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: a benchmark that is killed leaves nothing behind
        os.sched_setaffinity(0, {core})
        # Many are allowed fewer files than a thousand streams need.
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))

    # Nothing here starts threads, which a function run in the child would not survive.
    options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True} | options
    return subprocess.Popen(command, preexec_fn=prepare, **options)  # noqa: PLW1509


def python(module: str, *arguments: str) -> list[str]:
    """The command that runs `module` with this interpreter."""
    return [sys.executable, "-m", module, *arguments]


def stop(process: subprocess.Popen[str]) -> None:
    """End it at once and reap it."""
    process.kill()
    process.communicate()


def cpu_seconds(pid: int) -> float:
    """User and system time that the process has used so far, all threads."""
    return time.clock_gettime((~pid << 3) | 2)  # Linux: its CPU-time clock, to the nanosecond


def core_seconds(core: int) -> float:
    """Time that core has not been idle so far, whoever used it; in hundredths, and what a host took from a guest too."""
    line = next(line for line in Path("/proc/stat").read_text().splitlines() if line.startswith(f"cpu{core} "))
    user, nice, system, _idle, _iowait, *others = map(int, line.split()[1:9])
    return (user + nice + system + sum(others)) / os.sysconf("SC_CLK_TCK")


def rss_bytes(pid: int) -> int:
    """Resident memory of the process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def written_bytes(pid: int) -> int:
    """Bytes that the process has caused to be written to disk so far."""
    lines = Path(f"/proc/{pid}/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("write_bytes")).split()[1])


# --- measuring -------------------------------------------------------------------------------------------------------


def interleaved(
    contenders: Iterable[str], rounds: int, measure: Callable[[str], Mapping[str, float]]
) -> dict[str, dict[str, float]]:
    """`measure` each contender once a round; of each figure the median over the rounds."""
    found: dict[str, list[Mapping[str, float]]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, results in found.items():
            results.append(measure(name))
    return {name: medians(results) for name, results in found.items()}


def medians(results: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Of each figure the median."""
    return {figure: statistics.median(result[figure] for result in results) for figure in results[0]}


def percentile(values: Iterable[float], part: float) -> float:
    """The smallest value that `part` (0…1) of them do not exceed; NaN of none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, ceil(part * len(ordered)) - 1)] if ordered else float("nan")


# --- telling ---------------------------------------------------------------------------------------------------------


def arguments(doc: str | None, name: str) -> argparse.ArgumentParser:
    """A parser with what every benchmark takes: `--quick` (the default), `--full` and `--out`."""
    parser = argparse.ArgumentParser(
        prog=f"python -m tests.bench.{name}", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="what matters most, in minutes (default)")
    size.add_argument("--full", action="store_true", help="everything")
    parser.add_argument("--out", type=Path, default=Path("bench-results"), help="directory of the JSON and SVG files")
    return parser


@dataclass
class Report:
    """The results of one run, told as they come and written at the end."""

    name: str
    packages: Sequence[str] = ()  # whose versions matter
    tables: list[dict[str, Any]] = field(default_factory=list)
    goals: list[dict[str, Any]] = field(default_factory=list)
    plots: dict[str, str] = field(default_factory=dict)
    load_before: tuple[float, ...] = field(default_factory=os.getloadavg)
    began: float = field(default_factory=time.time)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
        """Print rows under their columns, and keep them."""
        self.tables.append({"title": title, "columns": list(columns), "rows": [list(row) for row in rows]})
        lines = [[*map(str, columns)], *([_cell(cell) for cell in row] for row in rows)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
        print(f"\n{title}  (load {os.getloadavg()[0]:.1f})")
        for line in lines:
            first, *others = (
                cell.ljust(width) if i == 0 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            )
            print("  ".join([first, *others]).rstrip(), flush=True)

    def goal(self, what: str, measured: float, *, at_least: float | None = None, at_most: float | None = None) -> None:
        """Print whether a figure is where it should be, and keep it."""
        met = (at_least is None or measured >= at_least) and (at_most is None or measured <= at_most)
        wanted = f"at least {at_least:g}" if at_least is not None else f"at most {at_most:g}"
        self.goals.append({"what": what, "measured": measured, "wanted": wanted, "met": met})
        print(f"{'met   ' if met else 'MISSED'}  {what}: {_cell(measured)}, {wanted}", flush=True)

    def lines(self, name: str, title: str, x: str, y: str, series: Mapping[str, Points], limit: float = 0) -> None:
        """Plot lines over a linear x and a logarithmic y; `limit` draws a level across."""
        self.plots[name] = _lines(title, x, y, {k: p for k, p in series.items() if p}, limit)

    def bars(self, name: str, title: str, unit: str, values: Mapping[str, float]) -> None:
        """Plot one bar a value."""
        self.plots[name] = _bars(title, unit, values)

    def write(self, directory: Path) -> None:
        """`<name>.json`, and `<name>-<plot>.svg` for each plot."""
        directory.mkdir(parents=True, exist_ok=True)
        found = {
            "benchmark": self.name,
            "began": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.began)),
            "seconds": round(time.time() - self.began),
            "machine": _machine(),
            "load_before": self.load_before,
            "load_after": os.getloadavg(),
            "versions": {package: _version(package) for package in self.packages},
            "goals": self.goals,
            "tables": self.tables,
        }
        (directory / f"{self.name}.json").write_text(json.dumps(found, indent=1, allow_nan=True) + "\n")
        for plot, svg in self.plots.items():
            (directory / f"{self.name}-{plot}.svg").write_text(svg)
        print(f"\nwritten to {directory}/{self.name}.json and {len(self.plots)} plots")


def _cell(cell: Cell) -> str:
    if cell is None:
        return "-"
    if isinstance(cell, float):
        return f"{cell:.0f}" if abs(cell) >= 100 else f"{cell:.3g}"
    return str(cell)


def _machine() -> dict[str, Any]:
    info = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(":")[2].strip() for line in info if line.startswith("model name")), platform.machine())
    speed = next((float(line.partition(":")[2]) for line in info if line.startswith("cpu MHz")), None)
    return {"cpu": model, "mhz": speed, "cores": os.cpu_count(), "kernel": platform.release(), "python": sys.version}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


# --- plots -----------------------------------------------------------------------------------------------------------


def _svg(title: str, parts: Sequence[str]) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif" font-size="12">'
    ground = f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>'
    return "\n".join([head, ground, _text(_WIDTH / 2, 22, title, "middle", size=15), *parts, "</svg>", ""])


def _text(x: float, y: float, text: str, anchor: str = "start", *, size: int = 12) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}">{escape(text)}</text>'


def _lines(title: str, x: str, y: str, series: Mapping[str, Points], limit: float) -> str:
    points = [point for line in series.values() for point in line]
    right, low_y = _WIDTH - 210, _HEIGHT - _BOTTOM
    most = max((px for px, _ in points), default=1) or 1
    heights = [py for _, py in points if py > 0] + ([limit] if limit else [])
    low, high = floor(log10(min(heights, default=1))), ceil(log10(max(heights, default=10)))
    high = max(high, low + 1)

    def at(px: float, py: float) -> tuple[float, float]:
        up = (log10(max(py, 10**low)) - low) / (high - low)
        return _LEFT + (right - _LEFT) * px / most, low_y - (low_y - _TOP) * up

    parts = [_text((_LEFT + right) / 2, _HEIGHT - 12, x, "middle"), _text(8, _TOP - 12, y)]
    for power in range(low, high + 1):
        level = at(0, 10**power)[1]
        parts.append(f'<path d="M{_LEFT} {level:.1f}H{right}" stroke="#ddd"/>')
        parts.append(_text(_LEFT - 8, level + 4, f"{10**power:g}", "end"))
    parts += [_text(at(most * i / 5, 1)[0], low_y + 18, f"{most * i / 5:g}", "middle") for i in range(6)]
    if limit:
        parts.append(f'<path d="M{_LEFT} {at(0, limit)[1]:.1f}H{right}" stroke="#b00" stroke-dasharray="5 4"/>')
    for number, (name, line) in enumerate(series.items()):
        colour, down = _COLOURS[number % len(_COLOURS)], _TOP + 18 * number
        path = " ".join(f"{px:.1f},{py:.1f}" for px, py in (at(*point) for point in sorted(line)))
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{px:.1f}" cy="{py:.1f}" r="3" fill="{colour}"/>' for px, py in (at(*p) for p in line)]
        parts.append(f'<rect x="{right + 16}" y="{down - 9}" width="12" height="10" fill="{colour}"/>')
        parts.append(_text(right + 34, down, name))
    return _svg(title, parts)


def _bars(title: str, unit: str, values: Mapping[str, float]) -> str:
    most = max(values.values(), default=1) or 1
    left, right, step = 220, _WIDTH - 90, (_HEIGHT - _TOP - 20) / max(1, len(values))
    parts = []
    for number, (name, value) in enumerate(values.items()):
        top, length = _TOP + step * number, (right - left) * value / most
        colour = _COLOURS[number % len(_COLOURS)]
        parts.append(_text(left - 8, top + step / 2 + 4, name, "end"))
        parts.append(
            f'<rect x="{left}" y="{top + step * 0.15:.1f}" width="{length:.1f}" height="{step * 0.7:.1f}" fill="{colour}"/>'
        )
        parts.append(_text(left + length + 6, top + step / 2 + 4, f"{_cell(float(value))} {unit}"))
    return _svg(title, parts)
