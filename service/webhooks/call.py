"""One call of a URL that a stranger chose. Part of FLOOR 3.

Invariants: the host is resolved once and called only if every address it has is public or in a network the operator
allows; the connection goes to such an address and nowhere else; no proxy, no redirect, and of the answer nothing is
looked at but its head, nor more read than `MAX_ANSWER_BYTES`. However the URL spells the host, it is the addresses
that are judged.
"""

import asyncio
import ipaddress
import socket
import ssl
import threading
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import anyio
import httpcore
import httpx

from service.ports import Clock

CALL_SECONDS = 15.0  # for everything, from the name server to the head of the answer
CONNECT_SECONDS = 5.0  # then the next address is tried
MAX_ANSWER_BYTES = 64 * 1024
_READ_BYTES = 8 * 1024  # parsing them takes the event loop a few milliseconds at the worst

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Resolve = Callable[[str, int], Awaitable[Sequence[str]]]


class NoAnswer(Exception):
    """A call that was not made or not answered; the text is for whoever chose the URL."""


class Answer(NamedTuple):
    """The head of an answer; `retry_after` is empty where there is none."""

    status: int
    retry_after: str


# --- where a call may go (pure) --------------------------------------------------------------------------------------

# Written down, because `is_global` differs between versions of Python and lets multicast and 6to4 pass.
# https://www.iana.org/assignments/iana-ipv4-special-registry and .../iana-ipv6-special-registry
_SPECIAL_V4 = tuple(map(ipaddress.IPv4Network, (
    "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/24",
    "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24",
    "224.0.0.0/4", "240.0.0.0/4",
)))  # fmt: skip
_GLOBAL_V6 = ipaddress.IPv6Network("2000::/3")  # outside: mapped, NAT64, loopback, link-local, unique local, multicast
_SPECIAL_V6 = tuple(map(ipaddress.IPv6Network, ("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20")))


def is_public(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Whether it is an ordinary address of the Internet, with no other address hidden in it."""
    if isinstance(address, ipaddress.IPv4Address):
        return not any(address in network for network in _SPECIAL_V4)
    return address in _GLOBAL_V6 and not any(address in network for network in _SPECIAL_V6)


def refusal(scheme: str, addresses: Sequence[str], allow: Sequence[Network]) -> str | None:
    """Why a host with these addresses is not called. It names none of them: they may be nobody's business."""
    if not addresses:
        return "The host has no address."
    for address in map(ipaddress.ip_address, addresses):
        if any(address in network for network in allow):
            continue
        if not is_public(address):
            return "The host's address is not public."
        if scheme != "https":
            return "Only https is called."
    return None


# --- the call --------------------------------------------------------------------------------------------------------


async def resolve(host: str, port: int) -> Sequence[str]:
    """The addresses of a host, best first.

    In a thread of its own: a name server that does not answer must hold up neither the threads that read audio nor
    the end of the process.
    """
    loop = asyncio.get_running_loop()
    found: asyncio.Future[Sequence[str]] = loop.create_future()

    def tell(addresses: Sequence[str]) -> None:
        if not found.done():
            found.set_result(addresses)

    def look_up() -> None:
        addresses: list[str] = []
        with suppress(OSError, UnicodeError):  # no such host, no host name at all
            infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            addresses = list(dict.fromkeys(str(info[4][0]) for info in infos))
        with suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(tell, addresses)

    threading.Thread(target=look_up, name="webhook-lookup", daemon=True).start()
    return await found


class Caller:
    """Makes calls."""

    def __init__(
        self,
        clock: Clock,
        allow: Sequence[Network] = (),
        *,
        tls: ssl.SSLContext | None = None,
        resolve: Resolve = resolve,
        network: httpcore.AsyncNetworkBackend | None = None,
    ) -> None:
        """`allow`: networks called beside public addresses, by plain http too. The rest stands in for the world."""
        self._clock = clock
        self._allow = allow
        self._tls = tls or httpx.create_ssl_context(trust_env=False)  # one for all: it takes longer than a handshake
        self._resolve = resolve
        self._network = network or httpcore.AnyIOBackend()

    async def post(self, url: str, headers: Mapping[str, str], body: bytes) -> Answer:
        """Send JSON. Raises `NoAnswer`."""
        try:
            async with asyncio.timeout(self._clock.real(CALL_SECONDS)):
                return await self._post(url, headers, body)
        except NoAnswer:
            raise
        except TimeoutError:
            raise NoAnswer(f"There was no answer within {CALL_SECONDS:g} s.") from None
        except (httpcore.ConnectError, httpcore.ConnectTimeout):
            raise NoAnswer("The connection failed, or TLS did.") from None
        except Exception as exc:  # a stranger's URL and server must not find the one that nobody thought of
            raise NoAnswer("The connection ended without a sound answer.") from exc

    async def _post(self, url: str, headers: Mapping[str, str], body: bytes) -> Answer:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port or {"https": 443}.get(parts.scheme, 80)
        addresses = await self._resolve(host, port)
        reason = refusal(parts.scheme, addresses, self._allow)
        if reason is not None:
            raise NoAnswer(reason)
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        target = httpcore.URL(scheme=parts.scheme, host=host, port=port, target=path)
        ours = {"Host": parts.netloc, "Content-Type": "application/json", "Content-Length": str(len(body)),
                "User-Agent": "Turnwire", "Connection": "close"}  # fmt: skip
        request = httpcore.Request("POST", target, headers=list({**ours, **headers}.items()), content=body)
        network = _Pinned(self._network, addresses, self._clock.real(CONNECT_SECONDS))
        try:
            connection = httpcore.AsyncHTTPConnection(target.origin, ssl_context=self._tls, network_backend=network)
            response = await connection.handle_async_request(request)
        finally:
            await network.close()
        retry_after = next((value for name, value in response.headers if name.lower() == b"retry-after"), b"")
        return Answer(response.status, retry_after.decode("latin-1"))


class _Pinned(httpcore.AsyncNetworkBackend):
    """Connects to addresses already judged, whatever the host is called; TLS and `Host` go by the name."""

    def __init__(self, network: httpcore.AsyncNetworkBackend, addresses: Sequence[str], timeout: float) -> None:
        self._network = network
        self._addresses = addresses
        self._timeout = timeout
        self._stream: httpcore.AsyncNetworkStream | None = None

    async def connect_tcp(
        self,
        host: str,  # noqa: ARG002 - not looked up again
        port: int,
        timeout: float | None = None,  # noqa: ARG002 - never set here, like the rest
        local_address: str | None = None,  # noqa: ARG002
        socket_options: Iterable[Any] | None = None,  # noqa: ARG002
    ) -> httpcore.AsyncNetworkStream:
        """See httpcore."""
        for address in self._addresses[:-1]:
            with suppress(httpcore.ConnectError, httpcore.ConnectTimeout):
                return await self._connect(address, port)
        return await self._connect(self._addresses[-1], port)

    async def _connect(self, address: str, port: int) -> httpcore.AsyncNetworkStream:
        self._stream = await self._network.connect_tcp(address, port, timeout=self._timeout)
        return _Bounded(self._stream)

    async def close(self) -> None:
        """Also what httpcore leaves open when it is cancelled between TCP and TLS."""
        if self._stream is not None:
            with anyio.CancelScope(shield=True):
                await self._stream.aclose()


class _Bounded(httpcore.AsyncNetworkStream):
    """A connection of which no more is read than an answer may have, whatever it is made of: a head may have no end."""

    def __init__(self, stream: httpcore.AsyncNetworkStream) -> None:
        self._stream = stream
        self._left = MAX_ANSWER_BYTES

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        if self._left <= 0:
            raise httpcore.ReadError
        data = await self._stream.read(min(max_bytes, _READ_BYTES, self._left), timeout)
        self._left -= len(data)
        return data

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        await self._stream.write(buffer, timeout)

    async def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.AsyncNetworkStream:
        return _Bounded(await self._stream.start_tls(ssl_context, server_hostname, timeout))

    async def aclose(self) -> None:
        await self._stream.aclose()

    def get_extra_info(self, info: str) -> Any:  # noqa: ANN401 - httpcore's
        return self._stream.get_extra_info(info)
