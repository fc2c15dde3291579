"""The outbound half of a session: messages as JSON text frames, and every way a session can end.

An `Ending` is data (`faults.Ending`): the rules' own errors and the planned faults take the same way out. Once `muted`,
nothing of the application leaves any more, but the connection lives.
"""

import asyncio
import contextlib
import json
import socket
import struct
from typing import Any

from websockets.asyncio.server import ServerConnection
from websockets.exceptions import ConnectionClosed

from service.sandbox.faults import Close, Drop, Ending, Eof, ErrorFrame

EOF_GRACE_S = 5.0


class Wire:
    """One client's connection, as seen by the session that talks to it."""

    def __init__(self, connection: ServerConnection) -> None:
        self.connection = connection
        self.muted = False
        self.deaf = False

    async def send(self, message: dict[str, Any] | str | bytes) -> None:
        if not self.muted:
            await self.connection.send(
                message if isinstance(message, str | bytes) else json.dumps(message, separators=(",", ":"))
            )

    async def end(self, ending: Ending) -> None:
        """Leave as told; returns when the connection is gone."""
        with contextlib.suppress(ConnectionClosed):
            match ending:
                case ErrorFrame():
                    await self._error(ending)
                case Close(code=code, reason=reason):
                    await self._close(code, reason)
                case Eof():
                    await self._eof()
                case Drop():
                    self.abort()

    def stop_reading(self) -> None:
        """Take nothing more from the kernel: no audio, no ping, not even the end of the connection."""
        self.deaf = True
        transport = self.connection.transport
        # A small buffer fills within seconds; with the kernel's default a client could write for minutes and notice
        # nothing.
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        transport.pause_reading()

    def abort(self) -> None:
        """Cut the connection as a crash would: linger 0 makes the kernel send RST."""
        with contextlib.suppress(OSError, AttributeError):
            peer = self.connection.transport.get_extra_info("socket")
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.transport.abort()

    async def _error(self, ending: ErrorFrame) -> None:
        code, text = ending.said
        message: dict[str, Any] = {"type": "Error", "error_code": code, "error": text}
        if not ending.with_type:
            del message["type"]
        if not ending.with_code:
            del message["error_code"]
        await self.send(message)
        if ending.close:
            await self._close(ending.close_code if ending.close_code is not None else code, ending.reason)
        else:
            await self.drain()

    async def _close(self, code: int, reason: str) -> None:
        # The client may still be sending: read on, or its answering close would wait behind audio nobody takes.
        reading = asyncio.create_task(self.drain())
        try:
            await self.connection.close(code, reason)
        finally:
            reading.cancel()
            await asyncio.wait([reading])

    async def _eof(self) -> None:
        # Half-close: FIN without a close frame. Closing both ways at once could turn into RST if audio lies unread.
        self.connection.transport.write_eof()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(EOF_GRACE_S):
                await self.drain()
        self.connection.transport.abort()

    async def drain(self) -> None:
        """Read and drop whatever comes, until the client is gone."""
        with contextlib.suppress(ConnectionClosed):
            while True:
                await self.connection.recv()
