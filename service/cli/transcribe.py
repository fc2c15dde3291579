"""`turnwire transcribe`: upload a file, follow it, hand over the transcript. FLOOR 6.

Without an address the whole service runs in this process and is spoken to over HTTP all the same. The transcript alone
is on stdout. The first Ctrl-C (or SIGTERM) cancels the job and hands over what there is, the second ends at once.
"""

import asyncio
import os
import shlex
import signal
import sys
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from service.cli.terminal import CommandError, clock, many, result, say

if TYPE_CHECKING:
    from service.cli.client import Service
    from service.cli.view import Narrator, View

FORMATS = ("txt", "json", "srt", "vtt")
CANCEL_SECONDS = 10.0  # the service takes at most 2 s for the last finals

EXAMPLES = """\b
Examples:
  turnwire transcribe talk.wav                          everything in this process
  turnwire transcribe talk.wav --format srt > talk.srt  subtitles; only they are on stdout
  turnwire transcribe talk.wav --output talk.vtt        the suffix tells the format
  turnwire transcribe call.wav --option channels=mix --option keyterms_prompt=Turnwire
  turnwire transcribe talk.wav --url http://127.0.0.1:8000   on a running service"""


@dataclass(frozen=True, slots=True)
class Order:
    """What the user asked for."""

    file: Path
    form: str
    output: Path | None
    options: list[tuple[str, str]]


def transcribe(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE", exists=True, dir_okay=False, readable=True, show_default=False, help="A WAV file."
        ),
    ],
    url: Annotated[
        str | None, typer.Option(metavar="URL", help="A running service. Without it the service runs in this process.")
    ] = None,
    key: Annotated[
        str | None,
        typer.Option(metavar="KEY", help="API key for --url; @FILE reads it from a file, which `ps` does not show."),
    ] = None,
    form: Annotated[
        str | None,
        typer.Option(
            "--format", metavar="FORMAT", help="txt, json, srt or vtt; by default what --output ends in, else txt."
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the transcript to this file instead of stdout.")
    ] = None,
    keep: Annotated[
        Path | None,
        typer.Option(metavar="DIR", file_okay=False, help="Without --url: keep jobs and audio in this directory."),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="An option of POST /jobs; repeatable. /docs lists them."),
    ] = None,
) -> None:
    """Transcribe a WAV file, live.

    Uploads FILE, follows its turns while they are spoken (a recording takes as long as it lasts), and ends with the
    transcript on stdout, or in --output. All else is on stderr: a progress bar if that is a terminal, and the lines
    `Session ID`, `[Partial]` (in a terminal one live line), `[Final]`, `[Revised]`, `Session terminated`.

    Ctrl-C cancels the job and hands over the turns so far; once more ends at once.

    Without --url and ASSEMBLYAI_API_KEY nothing is sent to AssemblyAI: the local sandbox listens instead.

    Exit code: 0 completed, 1 failed or canceled (with what there is of the transcript), 2 wrong use.
    """
    from service.cli.client import service_url

    if keep is not None and url is not None:
        raise typer.BadParameter("goes without --url: a running service keeps its jobs itself", param_hint="--keep")
    if key is not None and url is None:
        raise typer.BadParameter("goes with --url", param_hint="--key")
    order = Order(file, _format(form, output), _writable(output), [_pair(text) for text in option or ()])
    with asyncio.Runner() as runner:
        code = runner.run(_transcribe(order, service_url(url) if url is not None else None, key, keep))
    raise typer.Exit(code)


def _format(form: str | None, output: Path | None) -> str:
    if form is None:
        suffix = output.suffix.removeprefix(".").lower() if output is not None else ""
        return suffix if suffix in FORMATS else "txt"
    if form.lower() not in FORMATS:
        raise typer.BadParameter(f"{form!r} should be one of {', '.join(FORMATS)}", param_hint="--format")
    return form.lower()


def _writable(output: Path | None) -> Path | None:
    """Said before the file is streamed, not after."""
    if output is not None:
        target = output if output.exists() else output.parent
        if output.is_dir() or not (output.exists() or target.is_dir()) or not os.access(target, os.W_OK):
            raise typer.BadParameter(f"{str(output)!r} cannot be written", param_hint="--output")
    return output


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise typer.BadParameter(f"{text!r} should be NAME=VALUE, such as channels=mix", param_hint="--option")
    return name, value


async def _transcribe(order: Order, url: str | None, key: str | None, keep: Path | None) -> int:
    from service.cli.client import Service, key_of
    from service.cli.serving import local_service
    from service.cli.view import Narrator, open_view

    async with AsyncExitStack() as stack:
        interrupted = _interruption(stack)
        base, secret = await stack.enter_async_context(local_service(keep)) if url is None else (url, key_of(key))
        service = await stack.enter_async_context(Service(base, secret))
        view = open_view()
        stack.callback(view.close)
        job = await _upload(service, order, view, interrupted)
        if job is None:
            view.close()
            say("Canceled before all of the file was sent; nothing was kept")
            return 1
        if url is not None:
            view.line(f"Job: {url}{job['links']['view']}")
        narrator = Narrator(view)
        await _follow(service, job["id"], view, narrator, interrupted)
        view.close()
        ended: dict[str, Any] = narrator.job or await service.call("GET", f"/jobs/{job['id']}")
        _tell_end(ended)
        await _hand_over(service, order, ended)
        return 0 if ended["status"] == "completed" else 1


def _interruption(stack: AsyncExitStack) -> asyncio.Event:
    """Set by the first SIGINT or SIGTERM; the second ends the process, undoing what must be undone."""
    event, loop = asyncio.Event(), asyncio.get_running_loop()

    def on_signal() -> None:
        if event.is_set():
            raise SystemExit(1)
        event.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal)
        stack.callback(loop.remove_signal_handler, number)
    return event


async def _first(task: "asyncio.Task[Any]", interrupted: asyncio.Event, timeout: float | None = None) -> None:
    """Wait until the task is done or the user interrupts."""
    waiting = asyncio.create_task(interrupted.wait())
    await asyncio.wait([task, waiting], timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()


async def _upload(service: "Service", order: Order, view: "View", interrupted: asyncio.Event) -> dict[str, Any] | None:
    """The new job; None when the user interrupted before all was sent."""
    from service.cli.client import RefusedError

    whole = False

    def sent(done: int, total: int | None) -> None:
        nonlocal whole
        whole = done == total
        view.uploaded(done, total)

    view.stage("uploading")
    task = asyncio.create_task(service.upload(order.file, order.options, sent, view.lost))
    await _first(task, interrupted)
    if not task.done() and not whole:
        task.cancel()
        await asyncio.wait([task])
        return None
    try:
        # What is sent whole becomes a job whether or not its answer is waited for: wait, to cancel it then.
        return await task
    except RefusedError as exc:  # whose `ffmpeg` command can be pasted once it names the file
        raise CommandError(str(exc).replace("<file>", shlex.quote(str(order.file)))) from None


async def _follow(
    service: "Service", job_id: str, view: "View", narrator: "Narrator", interrupted: asyncio.Event
) -> None:
    async def tell_all() -> None:
        async for event in service.follow(job_id, view.lost):
            narrator.tell(event)

    following = asyncio.create_task(tell_all())
    await _first(following, interrupted)
    if not following.done():
        view.line("Canceling; the turns so far are kept (Ctrl-C again ends at once)")
        try:
            await _cancel(service, job_id)
            await asyncio.wait([following], timeout=CANCEL_SECONDS)
        finally:
            following.cancel()
            await asyncio.wait([following])
    if not following.cancelled():
        following.result()


async def _cancel(service: "Service", job_id: str) -> None:
    from service.cli.client import RefusedError

    try:
        await service.call("POST", f"/jobs/{job_id}/cancel")
    except RefusedError as exc:
        if exc.problem_code != "not_cancelable":  # it has just ended by itself
            raise
    except CommandError as exc:
        raise CommandError(f"the job could not be canceled and may go on: {exc}") from None


def _tell_end(job: dict[str, Any]) -> None:
    coverage = job["coverage"] or {}
    if coverage.get("upstream_ms") is not None:
        say(f"Session terminated: {coverage['upstream_ms'] / 1000:g} seconds of audio processed")
    if job["status"] == "failed" and job["error"]:
        upstream = job["error"]["upstream_code"]
        code = job["error"]["code"] + (f", upstream code {upstream}" if upstream is not None else "")
        say(f"Failed: {job['error']['message']} ({code})")
    if job["status"] == "canceled":
        say(f"Canceled after {many(job['turn_count'])}")
    if job["status"] == "completed" and not coverage.get("complete", True):
        gaps = ", ".join(f"{clock(gap['from_ms'])}-{clock(gap['to_ms'])}" for gap in coverage["gaps"])
        say(f"Warning: not all of the audio was transcribed{f'; missing: {gaps}' if gaps else ''}")


async def _hand_over(service: "Service", order: Order, job: dict[str, Any]) -> None:
    """The transcript, also of a job that did not complete, if there is anything in it."""
    from service.cli.view import View

    if job["status"] != "completed" and not job["turn_count"]:
        return
    data = await service.transcript(job["id"], order.form, View().lost)  # the live one is closed
    if order.output is None:
        if sys.stdout.isatty() and sys.stderr.isatty():
            say("")
        result(data)
    else:
        await asyncio.to_thread(order.output.write_bytes, data)
        say(f"Transcript saved to {order.output}")
