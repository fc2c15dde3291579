"""A webhook endpoint on a real socket that behaves as it is told, and the network between it and us, which keeps count."""

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpcore

CERTIFICATE = Path(__file__).parent / "localhost.pem"  # of localhost and 127.0.0.1, with its key, signed by itself
Answer = Callable[[asyncio.StreamWriter], Awaitable[None]]


# --- answers ---------------------------------------------------------------------------------------------------------


def status(code: int, *headers: str) -> Answer:
    """An answer without a body."""

    async def answer(writer: asyncio.StreamWriter) -> None:
        writer.write("\r\n".join([f"HTTP/1.1 {code} X", "Content-Length: 0", *headers, "", ""]).encode())

    return answer


def repeating(first: bytes, more: bytes = b"") -> Answer:
    """`first`, and `more` for ever, as fast as it is taken."""

    async def answer(writer: asyncio.StreamWriter) -> None:
        writer.write(first)
        await writer.drain()
        while more:
            writer.write(more)
            await writer.drain()

    return answer


async def silence(_writer: asyncio.StreamWriter) -> None:
    """No answer."""


# --- the endpoint ----------------------------------------------------------------------------------------------------


@dataclass
class Call:
    """One request as it came."""

    line: str
    headers: dict[str, str]
    body: bytes


@dataclass
class Endpoint:
    """`plan` has the answers in order, the last for all that follow."""

    plan: list[Answer]
    tls: ssl.SSLContext | None = None
    calls: list[Call] = field(default_factory=list)
    connections: int = 0
    open: int = 0
    names: list[str | None] = field(default_factory=list)  # asked for in TLS
    port: int = 0

    def url(self, path: str = "/hook", host: str = "127.0.0.1") -> str:
        """Where it is."""
        return f"{'https' if self.tls else 'http'}://{host}:{self.port}{path}"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection."""
        self.connections += 1
        self.open += 1
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
            headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:] if line)}
            self.calls.append(Call(head[0], headers, await reader.readexactly(int(headers["content-length"]))))
            await (self.plan.pop(0) if len(self.plan) > 1 else self.plan[0])(writer)
            await reader.read()  # until the other side hangs up
        except (ConnectionError, asyncio.IncompleteReadError, ssl.SSLError):
            pass
        finally:
            self.open -= 1
            writer.close()
            with suppress(ConnectionError, ssl.SSLError):
                await writer.wait_closed()


@asynccontextmanager
async def endpoint(*plan: Answer, tls: bool = False, host: str = "127.0.0.1") -> AsyncIterator[Endpoint]:
    """A listening endpoint; without a plan it answers 204."""
    there = Endpoint(list(plan) or [status(204)])
    if tls:
        there.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        there.tls.load_cert_chain(CERTIFICATE)
        there.tls.sni_callback = lambda _socket, name, _context: there.names.append(name)
    serving: set[asyncio.Task[None]] = set()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(there.serve(reader, writer))
        serving.add(task)
        task.add_done_callback(serving.discard)

    server = await asyncio.start_server(accept, host, 0, ssl=there.tls)
    there.port = server.sockets[0].getsockname()[1]
    try:
        yield there
    finally:
        server.close()
        for task in list(serving):
            task.cancel()
        await asyncio.gather(*serving, return_exceptions=True)
        await server.wait_closed()


def trusting() -> ssl.SSLContext:
    """A client's context that knows the certificate of the tests."""
    return ssl.create_default_context(cafile=str(CERTIFICATE))


# --- the network between ---------------------------------------------------------------------------------------------


class Network(httpcore.AsyncNetworkBackend):
    """Writes down where connections go and what is read; `lead` leads an address elsewhere, to None: nobody there."""

    def __init__(self, lead: dict[str, str | None] | None = None) -> None:
        """Without `lead` every address is itself."""
        self._real = httpcore.AnyIOBackend()
        self._lead = lead or {}
        self.dialed: list[str] = []
        self.read = 0

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        self.dialed.append(host)
        there = self._lead.get(host, host)
        if there is None:
            raise httpcore.ConnectError("nobody there")
        return _Metered(await self._real.connect_tcp(there, port, timeout=timeout), self)


class _Metered(httpcore.AsyncNetworkStream):
    def __init__(self, inner: httpcore.AsyncNetworkStream, network: Network) -> None:
        self._inner = inner
        self._network = network

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        data = await self._inner.read(max_bytes, timeout)
        self._network.read += len(data)
        return data

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        await self._inner.write(buffer, timeout)

    async def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.AsyncNetworkStream:
        return _Metered(await self._inner.start_tls(ssl_context, server_hostname, timeout), self._network)

    async def aclose(self) -> None:
        await self._inner.aclose()

    def get_extra_info(self, info: str) -> Any:
        return self._inner.get_extra_info(info)
