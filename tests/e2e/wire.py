"""A TCP proxy in front of a server that can stop: what a network does to one process while the server is well."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from tests.engines import free_ports


class Wire:
    """Leads to a port of this machine, from a port of its own."""

    def __init__(self, server_port: int) -> None:
        """Open it with `wire`."""
        (self.port,) = free_ports(1)
        self._server_port = server_port
        self._passing = asyncio.Event()
        self._passing.set()
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._connections: set[asyncio.Task[None]] = set()

    async def cut(self, how: str) -> None:
        """`frozen`: every connection stays and nothing passes. `refused`: all are broken, and no new one is made."""
        if how == "frozen":
            self._passing.clear()
        else:
            await self._close()

    async def mend(self) -> None:
        """All passes again; what was sent into frozen connections arrives now."""
        self._passing.set()
        if self._server is None:
            self._server = await asyncio.start_server(self._connect, "127.0.0.1", self.port)

    async def _close(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        for writer in self._writers:
            writer.transport.abort()
        for task in self._connections:
            task.cancel()
        if self._connections:
            await asyncio.wait(self._connections)

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        mine = {writer}
        self._writers.add(writer)
        try:
            await self._passing.wait()
            there, back = await asyncio.open_connection("127.0.0.1", self._server_port)
            mine.add(back)
            self._writers.add(back)
            await asyncio.gather(self._pump(reader, back), self._pump(there, writer))
        except (OSError, asyncio.CancelledError):
            pass  # one side is gone: so is the other
        finally:
            for each in mine:
                each.transport.abort()
            self._writers -= mine
            self._connections.discard(task)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            await self._passing.wait()
            writer.write(data)
            await writer.drain()
        with suppress(OSError):
            writer.write_eof()


@asynccontextmanager
async def wire(server_port: int) -> AsyncIterator[Wire]:
    """A wire that passes everything."""
    made = Wire(server_port)
    await made.mend()
    try:
        yield made
    finally:
        await made._close()
