"""A job as it is watched in a terminal, or in a pipe. FLOOR 6.

Everything here is stderr. A terminal gets finals as lasting lines and beneath them what is alive: the open partials and
one bar with position, length and latency. A pipe gets every line, partials too, and no control characters.
"""

import math
import sys
import time
from collections.abc import Callable
from typing import Any, ClassVar

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from service.cli.terminal import clock, many, printable, say, size

STYLES = {"[Final]": "bold green", "[Revised]": "bold yellow", "[Partial]": "dim"}
RUN_AHEAD_S = 1.5  # the bar moves on by itself between two reports of progress
BAR_WIDTH = 40


def open_view() -> "View":
    """What suits stderr. `TERM=dumb` counts as a pipe."""
    console = Console(stderr=True, markup=False, highlight=False)
    return LiveView(console) if sys.stderr.isatty() and not console.is_dumb_terminal else View()


class View:
    """What a job's progress is shown on: in a pipe lines only."""

    def line(self, text: str) -> None:
        """Something that stays."""
        say(text)

    def partial(self, channel: int | None, text: str | None) -> None:
        """The open turn of a channel (None where there is but one stream); None: there is none."""
        del channel
        if text:
            say(f"[Partial] {text}")

    def stage(self, text: str) -> None:
        """What is going on."""

    def lost(self, reason: str, wait: float) -> None:
        """The event stream broke and is tried again in `wait` seconds; the job goes on meanwhile."""
        say(f"Connection to the service lost: {reason}; trying again in {wait:.1f} s")

    def found(self) -> None:
        """The event stream is there."""

    def uploaded(self, done: int, total: int | None) -> None:
        """Bytes."""

    def position(self, sent_ms: int, total_ms: int) -> None:
        """Of the stream in the file."""

    def latency(self, ms: int) -> None:
        """Of the newest final."""

    def close(self) -> None:
        """Nothing follows."""


class LiveView(View):
    """Lasting lines above, live ones below.

    rich draws in a thread of its own, so what it reads is replaced, never changed.
    """

    def __init__(self, console: Console, now: Callable[[], float] = time.monotonic) -> None:
        """Begins to draw at once."""
        self._console = console
        self._now = now
        self._partials: dict[int | None, str] = {}
        self._stage = "connecting"
        self._trouble = ""
        self._latency = ""
        self._bytes: tuple[int, int | None] | None = None
        self._position: tuple[float, int, int] | None = None  # when told, sent, total
        self._live = Live(
            get_renderable=self._draw, console=console, refresh_per_second=8, transient=True,
            redirect_stdout=False, redirect_stderr=False,
        )  # fmt: skip
        self._live.start()

    def line(self, text: str) -> None:
        text = printable(text)
        mark, _, rest = text.partition(" ")
        shown = Text.assemble((mark, STYLES[mark]), " ", rest) if mark in STYLES else Text(text)
        self._console.print(shown, soft_wrap=True)

    def partial(self, channel: int | None, text: str | None) -> None:
        others = {other: shown for other, shown in self._partials.items() if other != channel}
        self._partials = others | ({channel: printable(text)} if text else {})
        self._live.refresh()  # at once, or a final would be seen together with its partial

    def stage(self, text: str) -> None:
        self._stage = printable(text)
        self._bytes = None

    def lost(self, reason: str, wait: float) -> None:
        self._trouble = f"Connection to the service lost: {printable(reason)}; trying again in {math.ceil(wait)} s"

    def found(self) -> None:
        self._trouble = ""

    def uploaded(self, done: int, total: int | None) -> None:
        self._bytes = (done, total)

    def position(self, sent_ms: int, total_ms: int) -> None:
        self._position = (self._now(), sent_ms, total_ms)

    def latency(self, ms: int) -> None:
        self._latency = f"latency {ms} ms"

    def close(self) -> None:
        self._live.stop()

    def _draw(self) -> RenderableType:
        width = self._console.width
        rows: list[RenderableType] = [
            Text.assemble(("[Partial]", STYLES["[Partial]"]), " ", _tail(text, width - 11), no_wrap=True)
            for text in self._partials.values()
        ]
        if self._trouble:
            rows.append(Text(self._trouble, "yellow", no_wrap=True, overflow="ellipsis"))
        return Group(*rows, self._bar(width))

    def _bar(self, width: int) -> Table:
        done, total, figures = self._measure()
        grid = Table.grid(padding=(0, 1))
        bar = ProgressBar(total=total, completed=done, width=max(4, min(BAR_WIDTH, width - 48)), pulse=total is None)
        grid.add_row(Text(self._stage, "cyan"), bar, Text(figures), Text(self._latency, "dim"))
        return grid

    def _measure(self) -> tuple[float, float | None, str]:
        """How far, of how much, and that in words."""
        if self._bytes is not None:
            done, whole = self._bytes
            return done, whole, f"{size(done)} / {size(whole)}" if whole else size(done)
        if self._position is None:
            return 0, None, ""
        at, sent, total = self._position
        ahead = min(self._now() - at, RUN_AHEAD_S) * 1000 if self._stage == "streaming" and 0 < sent < total else 0
        position = min(sent + ahead, total)
        return position, total, f"{clock(position)} / {clock(total)}"


def _tail(text: str, width: int) -> str:
    """The end of a partial that is longer than the line: that is where it grows."""
    shown = Text(text).cell_len
    if shown <= width:
        return text
    text = text[-width:]
    while text and Text(text).cell_len > width - 1:
        text = text[1:]
    return "…" + text


class Narrator:
    """Tells the events of a job to a view. `job` is the job as its newest terminal event has it."""

    def __init__(self, view: View) -> None:
        """Knows nothing yet."""
        self.job: dict[str, Any] | None = None
        self._view = view
        self._told: dict[int, str] = {}  # turn index → its text
        self._channels: dict[str, int | None] = {}  # session → its channel

    def tell(self, event: dict[str, Any]) -> None:
        """One event, in order. Types not known here are new ones and left alone."""
        self._view.found()
        if (handler := self._HANDLERS.get(event["type"])) is not None:
            handler(self, event)

    def _on_job_status(self, event: dict[str, Any]) -> None:
        self._view.stage(str(event["stage"] or event["status"]).replace("_", " "))

    def _on_job_progress(self, event: dict[str, Any]) -> None:
        self._view.position(event["sent_ms"], event["total_ms"])

    def _on_session_begin(self, event: dict[str, Any]) -> None:
        self._channels[event["session_id"]] = event["channel"]
        self._view.partial(event["channel"], None)  # of a predecessor that died without a word
        channel = f" (channel {event['channel']})" if event["channel"] is not None else ""
        start = f" (from {clock(event['offset_ms'])})" if event["offset_ms"] else ""
        self._view.line(f"Session ID: {event['session_id']}{channel}{start}")

    def _on_session_lost(self, event: dict[str, Any]) -> None:
        self._view.partial(self._channels.get(event["session_id"]), None)
        why = " ".join(str(part) for part in (event["code"], event["reason"]) if part)
        wait = event["retry_in_ms"]
        then = "" if wait is None else f"; trying again in {wait / 1000:.1f} s" if wait else "; trying again"
        self._view.line(f"Upstream session lost{f' ({why})' if why else ''}{then}")

    def _on_turn_partial(self, event: dict[str, Any]) -> None:
        self._view.partial(event["turn"]["channel"], _labelled(event["turn"]))

    def _on_turn_final(self, event: dict[str, Any]) -> None:
        turn = event["turn"]
        self._view.partial(turn["channel"], None)
        self._view.latency(turn["latency_ms"])
        self._told[turn["index"]] = text = _labelled(turn)
        self._view.line(f"[Final] {text}")

    def _on_turn_revised(self, event: dict[str, Any]) -> None:
        turn = event["turn"]
        text = _labelled(turn)
        if self._told.get(turn["index"]) != text:
            self._told[turn["index"]] = text
            self._view.line(f"[Revised] {text}")

    def _on_job_warning(self, event: dict[str, Any]) -> None:
        self._view.line(f"Warning: {event['message']} ({event['code']})")

    def _on_job_restarted(self, event: dict[str, Any]) -> None:
        self.job = None
        withdrawn = [index for index in self._told if index >= event["from_turn"]]
        for index in withdrawn:
            del self._told[index]
        self._view.line(f"Restarted{f'; {many(len(withdrawn))} withdrawn' if withdrawn else ''}")

    def _on_stream_reset(self, event: dict[str, Any]) -> None:
        del event
        self._told.clear()
        self._view.line("The service has lost its place; everything follows from the start")

    def _on_end(self, event: dict[str, Any]) -> None:
        self.job = event["job"]

    _HANDLERS: ClassVar[dict[str, Callable[["Narrator", dict[str, Any]], None]]] = {
        "job.status": _on_job_status,
        "job.progress": _on_job_progress,
        "session.begin": _on_session_begin,
        "session.lost": _on_session_lost,
        "turn.partial": _on_turn_partial,
        "turn.final": _on_turn_final,
        "turn.revised": _on_turn_revised,
        "job.warning": _on_job_warning,
        "job.restarted": _on_job_restarted,
        "stream.reset": _on_stream_reset,
        "job.completed": _on_end,
        "job.failed": _on_end,
        "job.canceled": _on_end,
    }


def _labelled(turn: dict[str, Any]) -> str:
    parts = [] if turn["channel"] is None else [f"Channel {turn['channel']}"]
    speaker = turn.get("speaker")  # a partial has none
    if speaker and speaker not in ("PENDING", "UNKNOWN"):
        parts.append(f"Speaker {speaker}")
    text = " ".join(turn["transcript"].split())
    return f"{', '.join(parts)}: {text}" if parts else text
