"""What happens when twice as much is asked for as one core holds: `python -m tests.bench.overload [--full] [--out DIR]`.

    a C compiler and OpenSSL's headers (apt-get install gcc libssl-dev)

Jobs are submitted to the whole service (`tests.bench.whole`, TLS) until its load guard stays closed, and then as many again as are
live. None of it may be refused or fail: what does not fit waits, what runs keeps its pace, as the far end judges it, and when jobs end
the waiting ones follow by themselves. Turns come four times as often as in life and chunks are of 50 ms, so that a core is full with
some hundred streams and the run is over in minutes; full: as often as in life.
"""

import re
import tempfile
import time
from http.client import HTTPConnection
from pathlib import Path

from tests.bench.far_end import FarEnd
from tests.bench.harness import Report, arguments, core_seconds, cores, cpu_seconds, percentile, stop
from tests.bench.whole import SUBMITS_PER_SECOND, Whole, whole
from tests.wavs import wav_bytes

CHUNK_MS = 50
LOOK_SECONDS = 2.0
MOST = 2000  # streams that no core holds
CLOSED_LOOKS = 3  # in a row: what many beginnings at once cost closes it for some seconds too
LIMIT_MS = 50


class Run:
    """One overload, looked at every other second."""

    def __init__(self, far: FarEnd, service: Whole) -> None:
        """Nothing is submitted yet."""
        self.rows: list[list[float]] = []
        self.submitted = 0
        self._far = far
        self._service = service
        self._began = time.monotonic()
        self._before = self._used()

    def submit(self, wav: bytes, jobs: int) -> None:
        """So many more."""
        due = time.monotonic()
        for _ in range(jobs):
            self._service.follow(self._service._submit(wav, CHUNK_MS))
            due += 1 / SUBMITS_PER_SECOND
            time.sleep(max(0.0, due - time.monotonic()))
        self.submitted += jobs

    def look(self) -> dict[str, float]:
        """Wait, and note what it was like meanwhile."""
        self._far.ask(f"reset {CHUNK_MS}")
        time.sleep(LOOK_SECONDS)
        found, metrics, used = self._far.ask("stats"), self._metrics(), self._used()
        process, core, at = (now - then for now, then in zip(used, self._before, strict=True))
        self._before = used
        row = {
            "s": float(round(time.monotonic() - self._began)), "submitted": self.submitted, "live": found["sessions"],
            "waiting": metrics["turnwire_queue_depth"], "ended": metrics['turnwire_job_transitions_total{status="completed"}'],
            "taking": metrics["turnwire_admission_open"], "p50": found["p50"], "p99": found["p99"], "core": process / at,
            "others": max(0.0, core - process) / at, "failed": metrics['turnwire_job_transitions_total{status="failed"}'],
        }  # fmt: skip
        self.rows.append(list(row.values()))
        return row

    def _used(self) -> tuple[float, float, float]:
        return cpu_seconds(self._service.pid), core_seconds(cores()[1]), time.monotonic()

    def _metrics(self) -> dict[str, float]:
        connection = HTTPConnection("127.0.0.1", self._service.port)
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
        connection.close()
        return {name: float(value) for name, value in re.findall(r"^(turnwire_\S+) (\S+)$", text, re.MULTILINE)}


COLUMNS = ["s", "submitted", "live", "waiting", "ended", "taking", "p50 ms late", "p99 ms late", "core", "others", "failed"]  # fmt: skip


def overload(report: Report, far: FarEnd, seconds: float) -> None:
    """Fill a core, ask for as much again, and wait until all is done."""
    with whole(far) as service:
        run, wav = Run(far, service), wav_bytes(frames=int(16_000 * seconds))
        row, closed = run.look(), 0
        while closed < CLOSED_LOOKS and run.submitted < MOST:
            if row["taking"]:
                run.submit(wav, int(SUBMITS_PER_SECOND * LOOK_SECONDS))
            row = run.look()
            closed = 0 if row["taking"] else closed + 1
        held = int(row["live"])
        run.submit(wav, max(0, 2 * held - run.submitted))
        full = []
        deadline = time.monotonic() + 6 * seconds
        while (row := run.look())["live"] + row["waiting"] and time.monotonic() < deadline:
            if row["waiting"]:
                full.append(row)
    report.table("twice what a core holds (TLS, 50 ms chunks, a subscriber each)", COLUMNS, run.rows)
    report.goal("streams live when the guard stays closed", held, at_least=1)
    report.goal(
        "p99 ms late of live streams while others wait, median", percentile((r["p99"] for r in full), 0.5), at_most=20
    )
    report.goal("the same, worst two seconds", max((r["p99"] for r in full), default=0.0), at_most=LIMIT_MS)
    took = (run.rows[-1][0] - full[0]["s"]) / seconds if full else 0.0
    report.goal("time from then until all is done, in lengths of a job", took, at_most=3)
    report.goal("jobs that did not complete", run.submitted - row["ended"], at_most=0)
    at = [r[0] for r in run.rows]
    report.lines("streams", "Twice what a core holds", "seconds", "jobs",
                 {name: [(s, r[i]) for s, r in zip(at, run.rows, strict=True)]
                  for name, i in (("live", 2), ("waiting", 3), ("ended", 4))})  # fmt: skip
    report.lines("lateness", "p99 lateness of live streams", "seconds", "ms",
                 {"p99": [(s, r[7]) for s, r in zip(at, run.rows, strict=True)]}, 20)  # fmt: skip


def main() -> None:
    """Overload."""
    options = arguments(__doc__, "overload").parse_args()
    report = Report("overload", ("uvloop", "httpx-ws"))
    with tempfile.TemporaryDirectory() as directory:
        far = FarEnd(Path(directory), tls=True, per_second=5 if options.full else 20)
        try:
            overload(report, far, 150 if options.full else 75)
        finally:
            stop(far.process)
    report.write(options.out)


if __name__ == "__main__":
    main()
