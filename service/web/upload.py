"""The body of `POST /jobs`, taken apart while it arrives. FLOOR 5.

Drives python-multipart's parser directly over ASGI `receive`: the file's bytes go to whoever iterates `chunks`, nothing
is spooled and at most one received message is in memory. What the headers prove is refused by the constructor, before
the first `receive`. Most pieces lie inside the file, far from any boundary: they go past the parser untouched. What the
parser does see is cut small, so that the event loop is never held, and its CPU time is budgeted (near-boundary data
costs it 250 times the usual). Before each piece `turn` is awaited: running streams come first. A client that sends too
slowly is given up. The limit of an upload counts the file's bytes; around them a multipart body may have 1 MiB.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.datastructures import Headers
from starlette.types import Receive, Scope

from service.core.errors import CallerError
from service.core.options import clean_filename

PIECE = 512 * 1024
PARSED = 64 * 1024  # by the multipart parser at a time
MAX_FIELDS = 100
MAX_FIELD_BYTES = 8 * 1024
MULTIPART_OVERHEAD = 2**20


@dataclass(frozen=True)
class Pace:
    """How long a client is waited for, in seconds of waiting: the time we take to store is not held against it.

    Every 10 KiB may take `stall`, which makes 1 KiB/s at the least without credit for earlier haste.
    """

    first_byte: float = 10
    stall: float = 10
    stall_bytes: int = 10 * 1024
    total: float = 15 * 60


class ClientDisconnected(Exception):
    """The client went away before its body was complete."""


async def _at_once() -> None:
    await asyncio.sleep(0)


class UploadBody:
    """One request body. Iterate `chunks` once; then `fields` and `filename` are complete."""

    def __init__(
        self,
        scope: Scope,
        receive: Receive,
        max_bytes: int,
        *,
        pace: Pace = Pace(),
        received: Callable[[int], None] = lambda _: None,
        turn: Callable[[], Awaitable[None]] = _at_once,
    ) -> None:
        """Raise `CallerError` for what the headers alone show to be wrong.

        `received` is told of the file's bytes so far, and may raise one too; `turn` is waited for before each piece.
        """
        headers = Headers(scope=scope)
        self.fields: list[tuple[str, str]] = []
        self.filename: str | None = None
        self._source = _Source(receive, pace, _content_length(headers))
        self._max_bytes = max_bytes
        self._received = received
        self._turn = turn
        self._file_bytes = 0
        self._form = _form(headers)
        self._max_body = max_bytes if self._form is None else max_bytes + MULTIPART_OVERHEAD
        if (self._source.length or 0) > self._max_body:
            raise self._too_large()

    @property
    def raw_length(self) -> int | None:
        """The length of the file where it is the whole body and its Content-Length is known."""
        return self._source.length if self._form is None else None

    async def chunks(self) -> AsyncIterator[bytes]:
        """The file's bytes as they arrive, at most 512 KiB at a time.

        Raises `CallerError` for what is wrong with the body and `ClientDisconnected` when it will never be complete.
        """
        parts = self._raw() if self._form is None else self._multipart(self._form)
        async for data in parts:
            self._file_bytes += len(data)
            if self._file_bytes > self._max_bytes:
                raise self._too_large()
            self._received(self._file_bytes)
            yield data

    async def _raw(self) -> AsyncIterator[bytes]:
        async for piece in self._pieces():
            yield piece
        if self._source.received == 0:
            raise CallerError(
                "missing_file", "The body is empty; send the WAV file as the body, or as a part named 'file'."
            )

    async def _multipart(self, form: "_Form") -> AsyncIterator[bytes]:
        budget = _Budget()
        async for piece in self._pieces():
            if form.is_inside_file(piece):
                yield piece
                continue
            for start in range(0, len(piece), PARSED):
                if start:
                    await self._turn()
                part = piece[start : start + PARSED]
                with budget.spend(len(part)):
                    data = form.write(part)
                if data:
                    yield data
        if not form.ended:
            raise _truncated("The multipart body ends before its final boundary.")
        if not form.file_seen or (form.filename == "" and self._file_bytes == 0):
            raise CallerError("missing_file", "No part named 'file' is in the body; send the WAV file as one.")
        self.fields = form.fields
        self.filename = clean_filename(form.filename) if form.filename else None

    async def _pieces(self) -> AsyncIterator[bytes]:
        await self._turn()
        while (body := await self._source.next()) is not None:
            if self._source.received > self._max_body:
                raise self._too_large()
            for start in range(0, len(body), PIECE):
                yield body[start : start + PIECE]
                await self._turn()

    def _too_large(self) -> CallerError:
        return CallerError("upload_too_large", f"The upload exceeds this server's limit of {self._max_bytes} bytes.")


# --- what arrives ----------------------------------------------------------------------------------------------------


class _Source:
    """Body messages of one request, with the deadlines of `Pace`."""

    def __init__(self, receive: Receive, pace: Pace, length: int | None) -> None:
        self.length = length
        self.received = 0
        self._receive = receive
        self._pace = pace
        self._waited = 0.0  # since `_mark` bytes had arrived
        self._mark = 0
        self._total = 0.0
        self._more = True

    async def next(self) -> bytes | None:
        """The next piece of the body; None at its end."""
        if not self._more:
            if self.length is not None and self.received < self.length:
                raise _truncated(f"The body has {self.received} bytes, its Content-Length says {self.length}.")
            return None
        loop = asyncio.get_running_loop()
        started = loop.time()
        patience = self._pace.stall if self.received else self._pace.first_byte
        try:
            async with asyncio.timeout(min(patience - self._waited, self._pace.total - self._total)):
                message = await self._receive()
        except TimeoutError:
            raise _truncated("The body arrived too slowly to wait for its end.") from None
        if message["type"] == "http.disconnect":
            raise ClientDisconnected
        body: bytes = message.get("body", b"")
        self._more = message.get("more_body", False)
        self._account(len(body), loop.time() - started)
        return body

    def _account(self, size: int, waited: float) -> None:
        first = self.received == 0 < size
        self.received += size
        self._total += waited
        self._waited += waited
        if first or self.received - self._mark >= self._pace.stall_bytes:
            self._waited, self._mark = 0.0, self.received


class _Budget:
    """Time that the parser may use: 0.2 s, 20 ms a megabyte, and what many small writes cost by themselves.

    By the wall first: its clock is cheap, while asking for a thread's CPU time may cost more than the parsing. When
    that is used up the machine may only be busy, so CPU time decides, of a budget of its own.
    """

    def __init__(self) -> None:
        self._clock = time.perf_counter
        self._left = 0.2
        self._started = 0.0

    def spend(self, size: int) -> "_Budget":
        self._left += size * 0.02 / 1e6 + 20e-6
        return self

    def __enter__(self) -> None:
        self._started = self._clock()

    def __exit__(self, *exc: object) -> None:
        self._left -= self._clock() - self._started
        if self._left >= 0 or exc[0] is not None:
            return
        if self._clock is time.thread_time:
            raise CallerError(
                "malformed_multipart", "The file imitates the multipart boundary; use another boundary, or a raw body."
            )
        self._clock, self._left = time.thread_time, 0.2


# --- multipart -------------------------------------------------------------------------------------------------------


class _Form:
    """python-multipart's parser and the state of the part it is in."""

    def __init__(self, boundary: bytes) -> None:
        self.fields: list[tuple[str, str]] = []
        self.filename: str | None = None
        self.file_seen = False
        self.ended = False
        self._in_file = False
        self._boundary = b"\r\n--" + boundary
        self._headers: dict[str, str] = {}
        self._header = (bytearray(), bytearray())
        self._name: str | None = None  # of the field being read; None in the file
        self._value = bytearray()
        self._file: list[bytes] = []
        try:
            self._parser = MultipartParser(
                boundary,
                {
                    "on_part_begin": self._headers.clear,
                    "on_header_field": lambda data, start, end: self._header[0].extend(data[start:end]),
                    "on_header_value": lambda data, start, end: self._header[1].extend(data[start:end]),
                    "on_header_end": self._header_end,
                    "on_headers_finished": self._headers_finished,
                    "on_part_data": self._part_data,
                    "on_part_end": self._part_end,
                    "on_end": self._end,
                },
            )
        except FormParserError:
            raise _malformed("The boundary is too long") from None

    def write(self, piece: bytes) -> bytes:
        """Parse a piece; the file's bytes found in it."""
        try:
            self._parser.write(piece)
        except FormParserError:
            raise _malformed(
                "The body does not follow its boundary, or a part's headers are out of form or bounds"
            ) from None
        data = b"".join(self._file)
        self._file.clear()
        return data

    def is_inside_file(self, piece: bytes) -> bool:
        """Whether a piece is the file's alone: no boundary is in it, goes on in it or may begin at its end.

        The parser's state after it would be what it is before it, so it need not be written.
        """
        if not self._in_file or self._parser.index or self._boundary in piece:
            return False
        end = piece[1 - len(self._boundary) :]
        begun = end.rfind(b"\r")  # a boundary has no other
        return begun < 0 or not self._boundary.startswith(end[begun:])

    def _header_end(self) -> None:
        name, value = (text.decode("latin-1") for text in self._header)
        for text in self._header:
            text.clear()
        if name.lower() in self._headers:
            raise _malformed("A part has the same header twice")
        self._headers[name.lower()] = value

    def _headers_finished(self) -> None:
        kind, parameters = parse_options_header(self._headers.get("content-disposition"))
        if kind != b"form-data" or b"name" not in parameters:
            raise _malformed("A part has no 'Content-Disposition: form-data' with a name")
        if self._headers.get("content-transfer-encoding", "binary").lower() not in ("binary", "8bit", "7bit"):
            raise _malformed("A part is encoded for transfer; send it as it is")
        name = parameters[b"name"].decode(errors="replace")
        if name == "file":
            self._begin_file(parameters.get(b"filename"))
        elif b"filename" in parameters:
            raise CallerError("unknown_option", f"Only the part 'file' may be a file, not {name[:64]!r}.")
        elif len(self.fields) == MAX_FIELDS:
            raise _malformed(f"The form has more than {MAX_FIELDS} fields")
        else:
            self._name = name

    def _begin_file(self, filename: bytes | None) -> None:
        if self.file_seen:
            raise CallerError("too_many_files", "More than one part is named 'file'; upload one file a job.")
        self.file_seen = self._in_file = True
        self.filename = None if filename is None else filename.decode(errors="replace")
        self._name = None

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        if self._name is None:
            self._file.append(data[start:end])
        else:
            self._value += data[start:end]
            if len(self._value) > MAX_FIELD_BYTES:
                raise CallerError("bad_option", f"{self._name[:64]}: should be at most {MAX_FIELD_BYTES} bytes long.")

    def _part_end(self) -> None:
        self._in_file = False
        if self._name is not None:
            try:
                self.fields.append((self._name, self._value.decode()))
            except UnicodeDecodeError:
                raise CallerError("bad_option", f"{self._name[:64]}: should be UTF-8 text.") from None
            self._value.clear()
            self._name = None

    def _end(self) -> None:
        self.ended = True


# --- headers ---------------------------------------------------------------------------------------------------------


def _form(headers: Headers) -> _Form | None:
    """A parser for a multipart body, None for a raw one. Without a type a body is octets (RFC 9110, 8.3)."""
    if headers.get("content-encoding", "identity").lower() != "identity":
        raise CallerError("unsupported_media_type", "Send the body without Content-Encoding.")
    kind, parameters = parse_options_header(headers.get("content-type") or "application/octet-stream")
    if kind == b"application/octet-stream" or kind.startswith(b"audio/"):
        return None
    if kind != b"multipart/form-data":
        raise CallerError(
            "unsupported_media_type",
            "Send multipart/form-data with a part 'file', or the WAV file itself as audio/wav.",
        )
    if not parameters.get(b"boundary"):
        raise _malformed("The Content-Type of the body names no boundary")
    return _Form(parameters[b"boundary"])


def _content_length(headers: Headers) -> int | None:
    text = headers.get("content-length", "")
    return int(text) if text.isascii() and text.isdigit() else None


def _truncated(detail: str) -> CallerError:
    return CallerError("truncated_upload", f"{detail} Upload the file again.")


def _malformed(problem: str) -> CallerError:
    return CallerError("malformed_multipart", f"{problem}.")
