"""A running service, spoken to over its public HTTP, as any client would. FLOOR 6.

Whatever goes wrong leaves as `CommandError` with a line for the user. `follow` never loses or repeats an event: it
resumes its stream after the last durable one, however often the connection drops.
"""

import asyncio
import json
import os
import random
import re
import stat
import threading
import uuid
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing, suppress
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Self, TypeVar
from urllib.parse import quote, urlsplit

import httpx

from service.cli.terminal import CommandError
from service.core.job import TERMINAL_EVENTS
from service.settings import is_loopback

CONNECT_SECONDS = 10.0
SILENCE_SECONDS = 45.0  # the service says something every 15 s
PATIENCE_SECONDS = 600.0  # how long a service that has gone is waited for
MAX_RETRY_AFTER_SECONDS = 60.0
PIECE = 1 << 18
BUSY = frozenset({429, 502, 503, 504})

Json = dict[str, Any]
T = TypeVar("T")


class RefusedError(CommandError):
    """The service answered with a problem."""

    def __init__(self, status: int, problem: Json, retry_after: float) -> None:
        """`problem` is the body (RFC 9457), or empty where the answer was none of ours."""
        self.status = status
        self.retry_after = retry_after
        self.problem_code = str(problem.get("code", ""))
        title = problem.get("title") or f"HTTP {status}"
        detail = problem.get("detail") or f"the answer was {title}; is this the address of a Turnwire service?"
        super().__init__(str(detail) + (f" ({self.problem_code})" if self.problem_code else ""))


def service_url(text: str) -> str:
    """A checked base URL without its trailing slash."""
    try:
        url = urlsplit(text)
        sound = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
    except ValueError:
        sound = False
    if not sound or url.query or url.fragment or url.username:
        raise CommandError(f"--url: {text!r} should be an address such as http://127.0.0.1:8000", 2)
    return text.rstrip("/")


def key_of(option: str | None) -> str | None:
    """The key given with --key; `@FILE` reads it from a file."""
    if option is None or not option.startswith("@"):
        return option
    try:
        return Path(option[1:]).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as exc:
        raise CommandError(f"--key: cannot read {option[1:]}: {getattr(exc, 'strerror', exc)}", 2) from None


def backoff() -> Iterator[float]:
    """Seconds to wait before each next attempt: doubling to 10 s, each with full jitter above a small floor."""
    ceiling = 0.5
    while True:
        yield 0.1 + random.uniform(0, ceiling)  # noqa: S311 - spreads clients, protects nothing
        ceiling = min(ceiling * 2, 10.0)


async def pause(seconds: float) -> None:
    """Wait; here time is the user's own, so no clock is asked."""
    try:
        async with asyncio.timeout(seconds):
            await asyncio.get_running_loop().create_future()
    except TimeoutError:
        pass


class Service:
    """The client; enter it in a task and use it there."""

    def __init__(self, url: str, key: str | None = None) -> None:
        """`url` comes from `service_url`; `key` is an API key of the service."""
        self.url = url
        try:
            headers = httpx.Headers({"Authorization": f"Bearer {key}"} if key else {}, encoding="ascii")
        except UnicodeEncodeError:
            raise CommandError("--key: should be ASCII characters only", 2) from None
        self._arguments: dict[str, Any] = {
            "base_url": url,
            "headers": headers,
            "timeout": httpx.Timeout(SILENCE_SECONDS, connect=CONNECT_SECONDS),
            "trust_env": not is_loopback(urlsplit(url).hostname or ""),  # no proxy reaches this machine's loopback
        }
        self._http = httpx.AsyncClient(**self._arguments)

    async def __aenter__(self) -> Self:
        """Open nothing yet."""
        await self._http.__aenter__()
        return self

    async def __aexit__(self, *exc: object) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def call(self, method: str, path: str, **request: Any) -> Any:  # noqa: ANN401 - whatever JSON it is
        """One request; its JSON, None for an empty answer."""
        try:
            response = await self._http.request(method, path, **request)
        except httpx.TransportError as exc:
            raise self._unreachable(exc) from None
        if not response.is_success:
            raise _refused(response)
        return _json(response.content) if response.content else None

    async def transcript(self, job_id: str, form: str, lost: Callable[[str, float], None]) -> bytes:
        """The transcript as it is now. After hours a moment's outage is waited out; `lost` is as in `follow`."""
        patience = _Patience(self.url, lost)
        while True:
            try:
                response = await self._http.get(f"/jobs/{quote(job_id, safe='')}/transcript.{form}")
                if response.is_success:
                    return response.content
                raise _refused(response)
            except (httpx.TransportError, RefusedError) as exc:
                await patience.after(exc)

    async def upload(
        self,
        path: Path,
        options: Sequence[tuple[str, str]],
        sent: Callable[[int, int | None], None],
        lost: Callable[[str, float], None],
    ) -> Json:
        """Send a file as a raw body; the new job. `sent` is told of bytes done and the file's size, if it has one.

        What breaks on the way is sent again under the same key, so that it makes one job; `lost` is as in `follow`.
        """
        key, broken, patience = uuid.uuid4().hex, False, _Patience(self.url, lost)
        while True:
            over = threading.Event()
            try:
                return await _in_thread(partial(self._upload, path, options, sent, over, key))
            except httpx.TransportError as exc:
                never_there = isinstance(exc, httpx.ConnectError | httpx.ConnectTimeout) and not broken
                if never_there or not await asyncio.to_thread(path.is_file):  # a pipe is empty by now
                    raise self._unreachable(exc) from None
                broken = True
                await patience.after(exc)
            except RefusedError as exc:
                if not broken:
                    raise
                in_progress = exc.problem_code == "idempotency_in_progress"  # it has not noticed the break yet
                await patience.after(str(exc) if in_progress else exc)
            finally:
                over.set()

    def _upload(
        self,
        path: Path,
        options: Sequence[tuple[str, str]],
        sent: Callable[[int, int | None], None],
        over: threading.Event,
        key: str,
    ) -> Json:
        """With blocking sockets: an answer given early, to a bad file say, can be read after sending has failed."""
        with path.open("rb") as file, httpx.Client(**self._arguments) as http:
            status = os.fstat(file.fileno())
            total = status.st_size if stat.S_ISREG(status.st_mode) else None
            headers = {"Content-Type": "audio/wav", "Idempotency-Key": key} | (
                {"Content-Length": str(total)} if total is not None else {}
            )
            named = any(name == "filename" for name, _ in options)
            params = [*options, *([] if named else [("filename", path.name)])]
            body = _pieces(file, total, sent, over)
            response = http.post("/jobs", params=httpx.QueryParams(tuple(params)), headers=headers, content=body)
            if not response.is_success:
                raise _refused(response)
            job: Json = _json(response.content)
            return job

    async def follow(self, job_id: str, lost: Callable[[str, float], None]) -> AsyncGenerator[Json, None]:
        """Every event from the start, to the end of the job.

        `lost` is told why the stream broke, and in how many seconds it is tried again.
        """
        last, ended, patience = 0, False, _Patience(self.url, lost)
        while True:
            try:
                async with aclosing(self._events(job_id, last)) as events:
                    async for event in events:
                        patience = _Patience(self.url, lost)
                        if event["id"] or event["type"] == "stream.reset":
                            last, ended = event["id"] or 0, event["type"] in TERMINAL_EVENTS
                        yield event
                if ended:
                    return
                await patience.after("the stream ended early")
            except (httpx.TransportError, RefusedError) as exc:
                await patience.after(exc)

    async def _events(self, job_id: str, after: int) -> AsyncGenerator[Json, None]:
        """One connection's events; none (204) where `after` is the newest and ends the job."""
        headers = {"Accept": "application/x-ndjson", "Last-Event-ID": str(after)}
        async with self._http.stream("GET", f"/jobs/{quote(job_id, safe='')}/events", headers=headers) as response:
            if not response.is_success:
                await response.aread()
                raise _refused(response)
            rest = b""
            async for piece in response.aiter_bytes():  # httpx would break lines at U+2028 and its like, too
                *lines, rest = (rest + piece).split(b"\n")
                for line in filter(None, lines):
                    yield _json(line)

    def _unreachable(self, exc: httpx.TransportError) -> CommandError:
        hint = "; is it running? `turnwire serve` starts it" if isinstance(exc, httpx.ConnectError) else ""
        return CommandError(f"{self.url} does not answer: {_why(exc)}{hint}")


class _Patience:
    """Waits, ever longer, for a service that has gone; gives up after `PATIENCE_SECONDS`."""

    def __init__(self, url: str, lost: Callable[[str, float], None]) -> None:
        self._url = url
        self._lost = lost
        self._waits = backoff()
        self._since: float | None = None

    async def after(self, failure: Exception | str) -> None:
        """Wait before another attempt. Raises what no waiting mends."""
        now = asyncio.get_running_loop().time()
        self._since = self._since or now
        wait = next(self._waits)
        if isinstance(failure, RefusedError):
            if failure.status not in BUSY:
                raise failure
            wait = max(wait, failure.retry_after)
        reason = _why(failure) if isinstance(failure, httpx.TransportError) else str(failure)
        if now - self._since > PATIENCE_SECONDS:
            raise CommandError(f"{self._url} has been gone for {PATIENCE_SECONDS / 60:.0f} minutes: {reason}")
        self._lost(reason, wait)
        await pause(wait)


def _pieces(
    file: BinaryIO, total: int | None, sent: Callable[[int, int | None], None], over: threading.Event
) -> Iterator[bytes]:
    done = 0
    while piece := file.read(PIECE if total is None else min(PIECE, total - done)):  # no more than was announced
        if over.is_set():
            raise httpx.WriteError("nobody waits for this upload any more")
        yield piece
        done += len(piece)
        sent(done, total)


async def _in_thread(work: Callable[[], T]) -> T:
    """In a thread that, unlike those of `asyncio.to_thread`, never keeps the process from ending."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, exc: BaseException | None) -> None:
        if future.done():
            return
        if exc is not None:
            future.set_exception(exc)
        else:
            future.set_result(result)  # type: ignore[arg-type]  # there is a result where there is no exception

    def run() -> None:
        result, problem = None, None
        try:
            result = work()
        except Exception as exc:  # noqa: BLE001 - whatever it is, it is raised where the result is awaited
            problem = exc
        with suppress(RuntimeError):  # the loop is over: nobody waits
            loop.call_soon_threadsafe(settle, result, problem)

    threading.Thread(target=run, daemon=True).start()
    return await future


def _json(body: bytes) -> Any:  # noqa: ANN401
    try:
        return json.loads(body)
    except ValueError:
        raise CommandError("the answer makes no sense; is this the address of a Turnwire service?") from None


def _refused(response: httpx.Response) -> RefusedError:
    try:
        problem = json.loads(response.content)
    except ValueError:
        problem = None
    if response.is_redirect:
        problem = {"detail": f"the service has moved to {response.headers.get('Location', 'another address')}"}
    after = response.headers.get("Retry-After", "")
    wait = min(float(after), MAX_RETRY_AFTER_SECONDS) if after.isdecimal() else 0.0
    return RefusedError(response.status_code, problem if isinstance(problem, dict) else {}, wait)


def _why(exc: httpx.TransportError) -> str:
    match exc:
        case httpx.ConnectTimeout() | httpx.ReadTimeout() | httpx.WriteTimeout() | httpx.PoolTimeout():
            return "no answer in time"
        case httpx.ConnectError():
            text = re.sub(r"^\[Errno -?\d+\] ", "", str(exc).partition("\n")[0])
            return "no connection" if text in ("", "All connection attempts failed") else text
        case _:
            return "the connection broke"
