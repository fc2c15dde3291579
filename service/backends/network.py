"""How connections come to be: httpcore's network backend and httpx's transport over `Stream`. FLOOR 3.

Invariants: a connect that fails or is cancelled leaves no socket behind; nothing is shared between connections but the
TLS context, so none waits for another and none can leak into a pool.
"""

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator, Iterable
from itertools import chain, zip_longest
from typing import Any

import anyio
import httpcore
import httpx

from service.backends.stream import Stream

_NEXT_ADDRESS = 0.25  # seconds until the next address is tried as well (RFC 8305)


class Backend(httpcore.AsyncNetworkBackend):
    """Makes streams."""

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,  # noqa: ARG002  never set here
        socket_options: Iterable[Any] | None = None,  # noqa: ARG002  never set here
    ) -> Stream:
        """See httpcore."""
        try:
            async with asyncio.timeout(timeout):
                sock = await _dial(host, port)
                try:
                    return (await asyncio.get_running_loop().create_connection(Stream, sock=sock))[1]
                except BaseException:
                    sock.close()
                    raise
        except TimeoutError:
            raise httpcore.ConnectTimeout from None
        except OSError as exc:
            raise httpcore.ConnectError(str(exc)) from None


async def _dial(host: str, port: int) -> socket.socket:
    """Race the addresses of `host`, families in turn: one that swallows packets then costs a quarter of a second.

    asyncio can do this by itself, uvloop cannot.
    """
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    families = [[info for info in found if info[0] == family] for family in dict.fromkeys(info[0] for info in found)]
    waiting = [info for info in chain.from_iterable(zip_longest(*families)) if info is not None]
    racing: set[asyncio.Task[socket.socket]] = set()
    failure: BaseException | None = None
    try:
        while waiting or racing:
            if waiting:
                family, _, protocol, _, address = waiting.pop(0)
                racing.add(asyncio.create_task(_try(family, protocol, address)))
            pause = _NEXT_ADDRESS if waiting else None
            done, racing = await asyncio.wait(racing, timeout=pause, return_when=asyncio.FIRST_COMPLETED)
            while done:
                task = done.pop()
                if (failure := task.exception()) is None:
                    racing |= done
                    return task.result()
    finally:
        for task in racing:
            task.add_done_callback(_discard)
            task.cancel()
    raise failure or OSError("no address found")


async def _try(family: int, protocol: int, address: Any) -> socket.socket:  # noqa: ANN401  its form is the family's
    sock = socket.socket(family, socket.SOCK_STREAM, protocol)
    try:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        await asyncio.get_running_loop().sock_connect(sock, address)
    except BaseException:
        sock.close()
        raise
    return sock


def _discard(task: asyncio.Task[socket.socket]) -> None:
    if not task.cancelled() and task.exception() is None:
        task.result().close()


class Transport(httpx.AsyncBaseTransport):
    """One connection per request. A pool has nothing to reuse, walks its list per connect, leaks what is cancelled."""

    def __init__(self, tls: ssl.SSLContext | None) -> None:
        """`tls` is shared by all connections: making one costs more than a handshake."""
        self._tls = tls
        self._backend = Backend()

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """See httpx. Exceptions leave as httpcore's."""
        url = request.url
        target = httpcore.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path)
        upgrade = httpcore.Request("GET", target, headers=request.headers.raw, extensions=request.extensions)
        connection = httpcore.AsyncHTTPConnection(target.origin, ssl_context=self._tls, network_backend=self._backend)
        try:
            response = await connection.handle_async_request(upgrade)
        except BaseException:
            with anyio.CancelScope(shield=True):
                await connection.aclose()
            raise
        stream = response.extensions["network_stream"].get_extra_info("stream")
        body = _Upgraded(stream) if response.status == 101 else _Body(connection, response)
        return httpx.Response(response.status, headers=response.headers, stream=body, extensions=response.extensions)


class _Upgraded(httpx.AsyncByteStream):
    """No body but a stream, which is closed with the response only while nobody has taken it over."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    async def aclose(self) -> None:
        if not self._stream.taken:
            await self._stream.aclose()


class _Body(httpx.AsyncByteStream):
    def __init__(self, connection: httpcore.AsyncHTTPConnection, response: httpcore.Response) -> None:
        self._connection = connection
        self._response = response

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for piece in self._response.aiter_stream():
            yield piece

    async def aclose(self) -> None:
        await self._connection.aclose()
