"""All benchmarks, one after the other: `python -m tests.bench [--full] [--only PART …] [--out DIR]`.

    pip install -e '.[bench]'; a C compiler and OpenSSL's headers (apt-get install gcc libssl-dev)

Each part is also a command of its own, `python -m tests.bench.<part>`, and says in its docstring what it compares and how. Quick runs
`streams` and `costs` in their quick form, this service beside the common ways, in about five minutes; full runs all, in two hours;
`--only` chooses, in the quick form unless it is with `--full`. A part that fails is told of, and the others go on. Written
are the JSON and SVG files of each part, and `bench.json` with all of them. The machine should have nothing else to do.
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.bench.harness import Cell, Report, arguments, python

PARTS = ("streams", "costs", "delivery", "upload", "growth", "overload", "cluster_bus", "cluster", "edge")
QUICK = ("streams", "costs")


def run_part(name: str, out: Path, *, full: bool) -> tuple[dict[str, Any], float]:
    """Run one part in a process of its own; what it wrote (nothing if it failed) and the seconds it took."""
    began, written = time.monotonic(), out / f"{name}.json"
    written.unlink(missing_ok=True)
    print(f"\n=== {name} ===", flush=True)
    process = subprocess.run(
        [*python(f"tests.bench.{name}"), *(["--full"] if full else []), "--out", str(out)], check=False
    )
    found: dict[str, Any] = json.loads(written.read_text()) if written.exists() and process.returncode == 0 else {}
    return found, time.monotonic() - began


def summary(parts: dict[str, dict[str, Any]], seconds: dict[str, float], out: Path) -> bool:
    """The combined table and `bench.json`; whether every part ran."""
    report = Report("bench")
    goals: list[list[Cell]] = [
        [name, goal["what"], float(goal["measured"]), goal["wanted"], "met" if goal["met"] else "MISSED"]
        for name, part in parts.items() for goal in part.get("goals", [])
    ]  # fmt: skip
    report.table("goals", ["part", "", "measured", "wanted", ""], goals)
    ran: list[list[Cell]] = [[name, took, "ran" if parts[name] else "FAILED"] for name, took in seconds.items()]
    report.table("parts", ["part", "seconds", ""], ran)
    report.write(out)
    path = out / "bench.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "parts": parts}, indent=1) + "\n")
    return all(parts.values())


def main() -> None:
    """Run them; the exit status is 1 if one of them failed."""
    parser = arguments(__doc__, "all")
    parser.prog = "python -m tests.bench"
    parser.add_argument("--only", nargs="+", choices=PARTS, help="these parts")
    given = parser.parse_args()
    parts, seconds = {}, {}
    for name in given.only or (PARTS if given.full else QUICK):
        parts[name], seconds[name] = run_part(name, given.out, full=given.full)
    sys.exit(not summary(parts, seconds, given.out))


if __name__ == "__main__":
    main()
