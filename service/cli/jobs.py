"""`turnwire jobs`: the jobs of a running service. FLOOR 6.

Results on stdout: tables in a terminal, tab-separated lines without a head in a pipe, the job as it is with `--json`.
Several ids are tried one by one; what failed is said and makes the exit code 1.
"""

import asyncio
import datetime
import json
import sys
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import quote

import typer

from service.cli.terminal import clock, printable, result_line, say, size

if TYPE_CHECKING:
    from service.cli.client import Service

PAGE = 200
COLORS = {"completed": "green", "failed": "red", "canceled": "yellow", "processing": "cyan", "queued": "default"}

Job = dict[str, Any]
Url = Annotated[str, typer.Option(metavar="URL", help="The service.")]
Key = Annotated[
    str | None, typer.Option(metavar="KEY", help="API key; @FILE reads it from a file, which `ps` does not show.")
]
Ids = Annotated[list[str], typer.Argument(metavar="ID...", show_default=False, help="Ids of jobs.")]
HERE = "http://127.0.0.1:8000"

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="See and manage a running service's jobs.",
    epilog="""\b
Examples:
  turnwire jobs ls --status failed
  turnwire jobs show 0199c1d2-5c1e-7cc0-9f3b-3f6f2b3c4d5e
  turnwire jobs ls --status failed | cut -f1 | xargs -r turnwire jobs retry
  turnwire jobs ls --url https://turnwire.example.com --key @key.txt""",
)


@app.command(
    epilog="""In a pipe, tab-separated and without a head: id, status, created_at, duration in ms, turns, file name.

\b
Examples:
  turnwire jobs ls --limit 100
  turnwire jobs ls --status queued --status processing"""
)
def ls(
    status: Annotated[
        list[str] | None,
        typer.Option(metavar="STATUS", help="Only queued, processing, completed, failed or canceled ones; repeatable."),
    ] = None,
    limit: Annotated[int, typer.Option(metavar="N", min=1, help="At most so many, newest first.")] = 20,
    url: Url = HERE,
    key: Key = None,
) -> None:
    """List jobs, newest first."""

    async def run(service: "Service") -> None:
        jobs, more = await _listed(service, status or (), limit)
        if not sys.stdout.isatty():
            for job in jobs:
                length = job["audio"]["duration_ms"]
                cells = (job["id"], job["status"], job["created_at"], length, job["turn_count"], job["filename"])
                result_line("\t".join(str(cell).replace("\t", " ") for cell in cells))
            return
        _table(jobs)
        if more:
            say(f"Older jobs are not shown; --limit {limit * 5} shows more")

    _talk(url, key, run)


@app.command(epilog="\b\nExample:\n  turnwire jobs show 0199c1d2-5c1e-7cc0-9f3b-3f6f2b3c4d5e --json | jq .coverage")
def show(
    job_id: Annotated[str, typer.Argument(metavar="ID", show_default=False, help="A job's id.")],
    as_json: Annotated[bool, typer.Option("--json", help="The job as the service tells it.")] = False,
    url: Url = HERE,
    key: Key = None,
) -> None:
    """Look at one job."""

    async def run(service: "Service") -> None:
        job = await service.call("GET", _path(job_id))
        if as_json:
            result_line(json.dumps(job, indent=2, ensure_ascii=False))
        else:
            _card(job, service.url)

    _talk(url, key, run)


@app.command(epilog="\b\nExample:\n  turnwire jobs cancel 0199c1d2-5c1e-7cc0-9f3b-3f6f2b3c4d5e")
def cancel(ids: Ids, url: Url = HERE, key: Key = None) -> None:
    """Cancel queued or running jobs.

    Their turns so far are kept. Prints each id and its status.
    """
    _each(ids, url, key, lambda service, job_id: service.call("POST", f"{_path(job_id)}/cancel"))


@app.command(epilog="\b\nExample:\n  turnwire jobs retry 0199c1d2-5c1e-7cc0-9f3b-3f6f2b3c4d5e --from-start")
def retry(
    ids: Ids,
    from_start: Annotated[
        bool, typer.Option("--from-start", help="From the start, not from the last final turn.")
    ] = False,
    url: Url = HERE,
    key: Key = None,
) -> None:
    """Run failed, canceled or incomplete jobs again.

    Prints each id and its status.
    """
    body = {"from": "start"} if from_start else {}
    _each(ids, url, key, lambda service, job_id: service.call("POST", f"{_path(job_id)}/retry", json=body))


@app.command(epilog="\b\nExample:\n  turnwire jobs rm 0199c1d2-5c1e-7cc0-9f3b-3f6f2b3c4d5e")
def rm(ids: Ids, url: Url = HERE, key: Key = None) -> None:
    """Remove jobs, audio and transcript included.

    For good. Running ones are canceled. Prints each id.
    """
    _each(ids, url, key, lambda service, job_id: service.call("DELETE", _path(job_id)))


def _path(job_id: str) -> str:
    return f"/jobs/{quote(job_id, safe='')}"


def _talk(url: str, key: str | None, run: Callable[["Service"], Awaitable[None]]) -> None:
    from service.cli.client import Service, key_of, service_url

    async def main() -> None:
        async with AsyncExitStack() as stack:
            await run(await stack.enter_async_context(Service(service_url(url), key_of(key))))

    asyncio.run(main())


def _each(
    ids: Sequence[str], url: str, key: str | None, act: Callable[["Service", str], Awaitable[Job | None]]
) -> None:
    from service.cli.client import RefusedError

    async def run(service: "Service") -> None:
        failed = 0
        for job_id in ids:
            try:
                job = await act(service, job_id)
            except RefusedError as exc:
                failed += 1
                say(f"turnwire: {job_id}: {exc}")
            else:
                result_line(job_id if job is None else f"{job_id}\t{job['status']}")
        if failed:
            raise typer.Exit(1)

    _talk(url, key, run)


async def _listed(service: "Service", statuses: Sequence[str], limit: int) -> tuple[list[Job], bool]:
    jobs: list[Job] = []
    cursor: dict[str, str] = {}
    while True:
        wanted = min(PAGE, limit - len(jobs))
        params = [*(("status", status) for status in statuses), ("limit", str(wanted)), *cursor.items()]
        page = await service.call("GET", "/jobs", params=params)
        jobs += page["data"]
        if len(jobs) >= limit or not page["has_more"]:
            return jobs, page["has_more"]
        cursor = {"cursor": page["next_cursor"]}


def _table(jobs: Sequence[Job]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    if not jobs:
        say("No jobs")
        return
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name, width in (("ID", 36), ("STATUS", 10), ("AGE", 4), ("LENGTH", 7), ("TURNS", 5), ("FILE", 8)):
        right = name in ("AGE", "LENGTH", "TURNS")
        table.add_column(name, no_wrap=True, min_width=width, justify="right" if right else "left")
    for job in jobs:
        state = Text(_state(job), COLORS.get(job["status"], "default"))
        length, turns = clock(job["audio"]["duration_ms"]), str(job["turn_count"])
        table.add_row(job["id"], state, _age(job["created_at"]), length, turns, Text(printable(job["filename"])))
    Console(highlight=False).print(table)


def _state(job: Job) -> str:
    progress = job["progress"]
    if job["status"] == "processing" and progress["total_ms"]:
        return f"{progress['sent_ms'] * 100 // progress['total_ms']} %"
    if job["status"] == "queued" and job["queue_position"]:
        return f"queued #{job['queue_position']}"
    incomplete = job["status"] == "completed" and job["coverage"] and not job["coverage"]["complete"]
    return "incomplete" if incomplete else str(job["status"])


def _age(created_at: str) -> str:
    seconds = (datetime.datetime.now(datetime.UTC) - datetime.datetime.fromisoformat(created_at)).total_seconds()
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f}{unit}"
    return f"{max(0, seconds):.0f}s"


def _local(text: str | None) -> str:
    """RFC 3339 as the user's own clock shows it."""
    if text is None:
        return "-"
    return datetime.datetime.fromisoformat(text).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def _card(job: Job, url: str) -> None:
    """One line a fact: aligned in a terminal, name, tab, value in a pipe."""
    facts = list(_facts(job, url))
    width = max(len(name) for name, _ in facts)
    for name, value in facts:
        result_line(f"{name:<{width}}  {value}" if sys.stdout.isatty() else f"{name}\t{value}")


def _facts(job: Job, url: str) -> Sequence[tuple[str, str]]:
    audio, progress, stage = job["audio"], job["progress"], job["stage"]
    form = f"{audio['sample_rate']} Hz, {audio['channels']} ch, {audio['encoding']}, {size(audio['bytes'])}"
    facts = [
        ("id", job["id"]),
        ("status", job["status"] + (f" ({stage.replace('_', ' ')})" if stage else "")),
        ("file", job["filename"]),
        ("audio", f"{clock(audio['duration_ms'])}, {form}" + (", converted" if audio["converted"] else "")),
        ("created", _local(job["created_at"])),
        ("started", _local(job["started_at"])),
        ("finished", _local(job["finished_at"])),
        ("progress", f"{clock(progress['sent_ms'])} / {clock(progress['total_ms'])}"),
        ("attempt", str(job["attempt"])),
        ("turns", str(job["turn_count"])),
        ("options", json.dumps(job["options"], ensure_ascii=False)),
    ]
    if job["queue_position"]:
        facts.append(("queue", f"#{job['queue_position']}"))
    facts += [("session", _session(session)) for session in job["sessions"]]
    if job["coverage"]:
        facts.append(("coverage", _coverage(job["coverage"])))
    facts += [("warning", f"{warning['message']} ({warning['code']})") for warning in job["warnings"]]
    if job["error"]:
        facts.append(("error", f"{job['error']['message']} ({job['error']['code']})"))
    if job["metadata"]:
        facts.append(("metadata", json.dumps(job["metadata"], ensure_ascii=False)))
    return [*facts, ("transcript", f"{url}{job['links']['transcript']}.txt"), ("view", f"{url}{job['links']['view']}")]


def _session(session: Job) -> str:
    parts = [session["id"], session["model"] or "unknown model", f"from {clock(session['offset_ms'])}"]
    if session["channel"] is not None:
        parts.append(f"channel {session['channel']}")
    if session["audio_duration_seconds"] is not None:
        parts.append(f"{session['audio_duration_seconds']:g} s processed")
    if session["closed"]:
        parts.append(f"closed {session['closed']['code'] or ''} {session['closed']['reason']}".strip())
    return ", ".join(parts)


def _coverage(coverage: Job) -> str:
    gaps = ", ".join(f"{clock(gap['from_ms'])}-{clock(gap['to_ms'])}" for gap in coverage["gaps"])
    if coverage["complete"]:
        return "complete"
    return f"incomplete, missing {gaps}" if gaps else "incomplete: upstream processed another length than was sent"
