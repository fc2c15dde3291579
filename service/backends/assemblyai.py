"""Upstream over httpx-ws: connecting to AssemblyAI Streaming v3 and what its sessions mean. FLOOR 3.

Invariants: whatever goes wrong leaves as `SessionEnded`, never as an exception of a library or an ExceptionGroup; the
API key travels in one header, is not sent in the clear off this machine, and stands in no exception. The socket itself
is `websocket.Channel`.
"""

import asyncio
import ipaddress
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import partial
from ssl import SSLContext
from typing import Any, Self

import h11
import httpcore
import httpx
from httpx_ws import aconnect_ws
from wsproto.utilities import generate_accept_token

from service.backends.network import Transport
from service.backends.websocket import Channel, Limits
from service.core.protocol import TERMINATE, ErrorFrame, Malformed, Message, SessionEnd, SessionEnded, Unknown, decode
from service.telemetry import metrics

_VERSION = "2025-05-12"
_DEFAULTS = Limits()


class AssemblyAI:
    """The transcription service; enter it once per process, then `connect` as often as needed."""

    def __init__(
        self, url: str, api_key: str | None, *, limits: Limits = _DEFAULTS, tls: SSLContext | None = None
    ) -> None:
        """`url` is `ws://` or `wss://`; `tls` replaces the default trust store."""
        parsed = httpx.URL(url)
        if parsed.scheme not in ("ws", "wss") or not parsed.host:
            raise ValueError("The upstream URL must begin with ws:// or wss:// and name a host.")
        self._url = url
        self._key = api_key if parsed.scheme == "wss" or _is_loopback(parsed.host) else None
        self._limits = limits
        self._tls = tls or (httpx.create_ssl_context() if parsed.scheme == "wss" else None)
        self._client: httpx.AsyncClient | None = None

    async def __aenter__(self) -> Self:
        """Open the shared client. No redirect, no proxy, no .netrc: each could change who gets the key.

        Of the environment only SSL_CERT_FILE and SSL_CERT_DIR count, the trust of a self-hosted endpoint.
        """
        limits = self._limits
        timeout = httpx.Timeout(limits.handshake, connect=limits.connect, write=limits.write, pool=limits.connect)
        self._client = httpx.AsyncClient(
            transport=Transport(self._tls), timeout=timeout, trust_env=False, event_hooks={"response": [self._inspect]}
        )
        await self._client.__aenter__()
        return self

    async def __aexit__(self, *exc: object) -> None:
        """Close the shared client; all sessions are over by then."""
        assert self._client is not None
        await self._client.aclose()

    @asynccontextmanager
    async def connect(self, query: str) -> AsyncIterator["Session"]:
        """See `ports.Upstream.connect`."""
        channel = await self._open(query)
        try:
            yield Session(channel, self._limits)
        finally:
            await channel.close()

    async def _open(self, query: str) -> Channel:
        assert self._client is not None, "enter AssemblyAI before connecting"
        headers = {"AssemblyAI-Version": _VERSION, "Accept-Encoding": "identity"}
        if self._key is not None:
            headers["Authorization"] = self._key
        session_class: Any = partial(Channel, limits=self._limits)  # not one of theirs, which they never ask
        channel: Channel
        url = f"{self._url}{'&' if '?' in self._url else '?'}{query}"
        try:
            async with (
                asyncio.timeout(self._limits.connect + self._limits.handshake),
                aconnect_ws(url, self._client, headers=headers, session_class=session_class) as channel,
            ):
                await channel.start()
            return channel
        except httpcore.RemoteProtocolError as exc:
            garbage = isinstance(exc.__cause__, h11.RemoteProtocolError)  # else it hung up without a word
            end = SessionEnd(kind="invalid" if garbage else "unreachable", reason=str(exc))
        except (TimeoutError, httpcore.TimeoutException):
            end = SessionEnd(kind="unreachable", reason="no answer in time")
        except (httpcore.NetworkError, httpcore.ProtocolError, OSError) as exc:
            end = SessionEnd(kind="unreachable", reason=str(exc) or type(exc).__name__)
        raise SessionEnded(end)

    async def _inspect(self, response: httpx.Response) -> None:
        """Let only a genuine upgrade pass: httpx-ws checks neither Accept nor Upgrade and drops a refusal's body."""
        if response.status_code != 101:
            raise SessionEnded(await self._refusal(response))
        key = response.request.headers["sec-websocket-key"].encode()
        headers = response.headers
        if headers.get("upgrade", "").lower() != "websocket":
            wrong = "no Upgrade: websocket"
        elif headers.get("sec-websocket-accept", "").encode() != generate_accept_token(key):
            wrong = "a wrong Sec-WebSocket-Accept"
        elif "sec-websocket-extensions" in headers or "sec-websocket-protocol" in headers:
            wrong = "an extension or subprotocol nobody asked for"
        else:
            return
        raise SessionEnded(SessionEnd(kind="invalid", reason=f"the upgrade was answered with {wrong}"))

    async def _refusal(self, response: httpx.Response) -> SessionEnd:
        body = b""
        try:
            async for piece in response.aiter_raw():
                body += piece
                if len(body) >= self._limits.refusal_bytes:
                    break
        except (httpcore.NetworkError, httpcore.ProtocolError, httpcore.TimeoutException):
            pass  # the status says enough
        text = body[: self._limits.refusal_bytes].decode(errors="replace").strip()
        if self._key:
            text = text.replace(self._key, "***")  # debugging proxies echo headers
        retry_after = _retry_after(response.headers.get("retry-after"))
        return SessionEnd(kind="refused", code=response.status_code, reason=text, retry_after=retry_after)


class Session:
    """`ports.UpstreamSession` over a `Channel`."""

    def __init__(self, channel: Channel, limits: Limits) -> None:
        """Made by `AssemblyAI.connect`."""
        self._channel = channel
        self._tolerance = limits.malformed_messages
        self._error: ErrorFrame | None = None

    @property
    def ready(self) -> bool:
        """See `ports.UpstreamSession`."""
        return not (self._channel.stuck or self._channel.failed)

    @property
    def failed(self) -> bool:
        """See `ports.UpstreamSession`."""
        return self._channel.failed

    def send(self, frame: bytes) -> None:
        """See `ports.UpstreamSession`."""
        self._channel.push(frame)

    def finish(self) -> None:
        """See `ports.UpstreamSession`."""
        self._channel.push(TERMINATE)

    async def receive(self) -> Message:
        """See `ports.UpstreamSession`. An Error frame is not returned: it becomes the end's code and reason."""
        while self._tolerance > 0 and (frame := await self._channel.pull()) is not None:
            try:
                message = _decode(frame)
            except Malformed as exc:
                metrics.upstream_oddities.labels(kind="malformed").inc()
                self._tolerance -= 1
                if self._tolerance == 0:
                    self._channel.fail("malformed", exc.detail)
                continue
            if not isinstance(message, ErrorFrame):
                if isinstance(message, Unknown):
                    metrics.upstream_oddities.labels(kind="unknown").inc()
                return message
            self._error = message
            self._channel.expect_end(SessionEnd(kind="closed"))
        raise SessionEnded(self._end())

    def _end(self) -> SessionEnd:
        end = self._channel.end
        assert end is not None
        if self._error is None:
            return end
        code = end.code if self._error.error_code is None else self._error.error_code
        return SessionEnd(kind="closed", code=code, reason=self._error.error or end.reason)


def _decode(frame: str | bytes) -> Message:
    if isinstance(frame, bytes):
        raise Malformed("AssemblyAI sent a binary message.")
    return decode(frame)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _retry_after(value: str | None) -> float | None:
    """Seconds, from either form of RFC 9110 section 10.2.3."""
    try:
        if value is None or value.isdigit():
            return None if value is None else float(value)
        return max(0.0, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):  # not a date, or one without a zone
        return None
