"""One TCP or TLS connection without a task, a cancel scope or a future per chunk. FLOOR 3.

Until the upgrade a `Stream` is read and written as httpcore does it; from `listen` on, bytes go to a `Receiver` as they
arrive and `send` hands them to the event loop at once. TLS is done here, on memory buffers, and not by the loop: when a
write fails, asyncio and uvloop drop what the kernel has already received, and in it the peer's close code.
`connection_lost` reads it out first, and only this class can then still decrypt it.
"""

import asyncio
import os
import socket
import ssl
from contextlib import suppress
from typing import Any, Protocol, cast

import anyio
import httpcore

_READ_BYTES = 16_384  # the most that a TLS record carries; each read makes room for as much
_LAST_READS = 128  # a bound for reading from a connection that is already lost


class Receiver(Protocol):
    """Whom a stream tells what happens."""

    def data(self, data: bytes) -> None:
        """Bytes arrived."""

    def ended(self, error: Exception | None) -> None:
        """Nothing more will arrive; told once."""

    def blocked(self, blocked: bool) -> None:
        """The peer reads slower than we write, or has caught up."""


class Stream(asyncio.Protocol, httpcore.AsyncNetworkStream):
    """One connection."""

    def __init__(self) -> None:
        """Made by `Backend`; asyncio connects it."""
        self._loop = asyncio.get_running_loop()
        self._receiver: Receiver | None = None
        self._received = bytearray()  # until there is a receiver
        self._change: asyncio.Future[None] | None = None
        self._ended = self._lost = self._blocked = False
        self._error: Exception | None = None
        self._tls: ssl.SSLObject | None = None
        self._shaken = False
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()

    # --- what a receiver uses ----------------------------------------------------------------------------------------

    @property
    def taken(self) -> bool:
        """Whether there is a receiver, who then has to close."""
        return self._receiver is not None

    def listen(self, receiver: Receiver) -> None:
        """Tell `receiver` from now on, beginning with what has already happened."""
        self._receiver = receiver
        if self._received:
            receiver.data(bytes(self._received))
            self._received.clear()
        if self._blocked:
            receiver.blocked(True)
        if self._ended:
            receiver.ended(self._error)

    def send(self, data: bytes) -> None:
        """Write, or buffer what the kernel does not take. Never raises: the receiver is told of a failure."""
        if self._tls is None:
            self._write(data)
            return
        try:
            written = self._tls.write(data)
            while written < len(data):  # a record at a time
                written += self._tls.write(memoryview(data)[written:])
        except ssl.SSLError as exc:
            self._break(exc)
        self._write(self._outgoing.read())

    def pause(self, pause: bool) -> None:
        """Stop or go on reading."""
        if not self._transport.is_closing():
            (self._transport.pause_reading if pause else self._transport.resume_reading)()

    async def finish(self) -> None:
        """Close once everything sent is out; may take for ever."""
        if self._tls is not None:
            with suppress(ssl.SSLError):
                self._tls.unwrap()  # says close_notify and does not wait for the peer's
            self._write(self._outgoing.read())
        self._transport.close()
        while not self._lost:
            await self._changed()

    # --- what httpcore uses ------------------------------------------------------------------------------------------

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        """See httpcore."""
        if not self._received and not self._ended:
            try:
                async with asyncio.timeout(timeout):
                    await self._changed()
            except TimeoutError:
                raise httpcore.ReadTimeout from None
        if not self._received and self._error is not None:
            raise httpcore.ReadError(str(self._error))
        data = bytes(self._received[:max_bytes])
        del self._received[:max_bytes]
        return data

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:  # noqa: ARG002  does not wait
        """See httpcore, which writes no more than a request head before the upgrade."""
        if self._ended:
            raise httpcore.WriteError(str(self._error))
        self.send(buffer)

    async def aclose(self) -> None:
        """Close at once."""
        if not self._lost:  # asyncio's `abort` is not made to be called afterwards
            self._transport.abort()
        while not self._lost:
            await self._changed()

    async def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> "Stream":
        """See httpcore."""
        self._tls = ssl_context.wrap_bio(self._incoming, self._outgoing, server_hostname=server_hostname)
        try:
            async with asyncio.timeout(timeout):
                await self._shake_hands(self._tls)
        except BaseException as exc:
            with anyio.CancelScope(shield=True):
                await self.aclose()  # nobody else does
            if isinstance(exc, TimeoutError):
                raise httpcore.ConnectTimeout from None
            if isinstance(exc, ssl.SSLError):
                raise httpcore.ConnectError(str(exc)) from None
            raise
        self._shaken = True
        self._write(self._outgoing.read())
        self._decrypt(self._tls)
        return self

    async def _shake_hands(self, tls: ssl.SSLObject) -> None:
        while True:
            try:
                return tls.do_handshake()
            except ssl.SSLWantReadError:
                self._write(self._outgoing.read())
            if self._ended:
                raise httpcore.ConnectError("the peer hung up during the TLS handshake")
            await self._changed()

    def get_extra_info(self, info: str) -> Any:  # noqa: ANN401  httpcore's
        """The stream itself for whoever holds a wrapper of it, and what httpcore asks for after TLS."""
        return {"stream": self, "ssl_object": self._tls}.get(info)

    # --- what asyncio calls ------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio."""
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        """See asyncio."""
        if self._tls is None:
            self._deliver(data)
        else:
            self._incoming.write(data)
            if self._shaken:
                self._decrypt(self._tls)
            else:
                self._notify()

    def eof_received(self) -> None:
        """See asyncio, which then closes."""
        self._end(None)

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio. The socket is still open here; what it holds would go with it."""
        if exc is not None and not self._ended:
            with (
                suppress(OSError),
                socket.socket(fileno=os.dup(self._transport.get_extra_info("socket").fileno())) as rest,
            ):
                rest.setblocking(False)
                for _ in range(_LAST_READS):
                    if not (data := rest.recv(_READ_BYTES)):
                        break
                    self.data_received(data)
        self._lost = True
        self._end(exc)
        self._notify()

    def pause_writing(self) -> None:
        """See asyncio."""
        self._blocked = True
        if self._receiver is not None:
            self._receiver.blocked(True)

    def resume_writing(self) -> None:
        """See asyncio."""
        self._blocked = False
        if self._receiver is not None:
            self._receiver.blocked(False)

    # --- inside ------------------------------------------------------------------------------------------------------

    def _deliver(self, data: bytes) -> None:
        if self._receiver is not None:
            self._receiver.data(data)
        else:
            self._received += data
            self._notify()

    def _decrypt(self, tls: ssl.SSLObject) -> None:
        try:
            while self._incoming.pending or tls.pending():
                data = tls.read(_READ_BYTES)
                if not data:  # close_notify
                    self._end(None)
                    self._transport.close()
                    break
                self._deliver(data)
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLError as exc:
            self._break(exc)
        self._write(self._outgoing.read())

    def _write(self, data: bytes) -> None:
        if data and not self._transport.is_closing():
            self._transport.write(data)

    def _break(self, error: Exception) -> None:
        self._end(error)
        self._transport.abort()

    def _end(self, error: Exception | None) -> None:
        if not self._ended:
            self._ended, self._error = True, error
            if self._receiver is not None:
                self._receiver.ended(error)
            self._notify()

    async def _changed(self) -> None:
        self._change = self._loop.create_future()
        await self._change

    def _notify(self) -> None:
        if self._change is not None and not self._change.done():
            self._change.set_result(None)
