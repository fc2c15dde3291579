"""A scripted upstream on a plain socket, able to misbehave below the websocket layer.

Each connection runs `script(peer)` in a thread of its own, so a script is blocking code that reads top to bottom and
goes on while the client's event loop is stuck. A script ends quietly when the client is gone (`EOFError`, `OSError`);
any other error fails the test.
"""

import base64
import hashlib
import json
import re
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0, 1, 2, 8, 9, 10
BEGIN = {"type": "Begin", "id": "5f3e", "expires_at": 1_800_000_000}
TERMINATION = {"type": "Termination", "audio_duration_seconds": 1, "session_duration_seconds": 2}
CERTIFICATE = (
    Path(__file__).parent / "localhost.pem"
)  # self-signed for localhost and 127.0.0.1, and its key; guards nothing

Script = Callable[["Peer"], None]


def turn(order: int, text: str = "hello") -> dict[str, Any]:
    """A final turn."""
    return {"type": "Turn", "turn_order": order, "end_of_turn": True, "transcript": text}


def frame(opcode: int, payload: bytes = b"", *, fin: bool = True, masked: bool = False, rsv: int = 0) -> bytes:
    """One websocket frame as a server sends it, or must not."""
    head = bytes([fin << 7 | rsv << 4 | opcode])
    size, mask = len(payload), masked << 7
    if size < 126:
        head += bytes([mask | size])
    elif size < 65_536:
        head += struct.pack("!BH", mask | 126, size)
    else:
        head += struct.pack("!BQ", mask | 127, size)
    return head + (b"\0\0\0\0" if masked else b"") + payload


def text(message: object) -> bytes:
    """A text frame with `message` as JSON."""
    return frame(TEXT, json.dumps(message).encode())


def close(code: int, reason: str = "") -> bytes:
    """A Close frame."""
    return frame(CLOSE, struct.pack("!H", code) + reason.encode())


class Peer:
    """The server's end of one connection."""

    def __init__(self, sock: socket.socket, over: threading.Event) -> None:
        self.socket = sock
        self.over = over
        self.request = b""
        self._unread = b""

    def send(self, *data: bytes) -> None:
        """Everything in one write."""
        self.socket.sendall(b"".join(data))

    def read_request(self) -> None:
        """The client's upgrade request."""
        while b"\r\n\r\n" not in self._unread:
            self._fill()
        self.request, self._unread = self._unread.split(b"\r\n\r\n", 1)

    def upgrade(self, *then: bytes, accept: str | None = None, upgrade: str = "websocket", extra: str = "") -> None:
        """Accept (or pretend to); `then` travels in the same write."""
        self.read_request()
        found = re.search(rb"sec-websocket-key: *(\S+)", self.request, re.IGNORECASE)
        assert found is not None
        token = hashlib.sha1(found[1] + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest()
        accept = accept or base64.b64encode(token).decode()
        lines = [
            "HTTP/1.1 101 Switching Protocols",
            f"Upgrade: {upgrade}",
            "Connection: Upgrade",
            f"Sec-WebSocket-Accept: {accept}",
        ]
        self.send("\r\n".join([*lines, *filter(None, [extra]), "", ""]).encode(), *then)

    def refuse(self, status: str, body: bytes = b"", extra: str = "") -> None:
        """Answer the upgrade with another status."""
        self.read_request()
        self.send(f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n{extra}\r\n".encode(), body)

    def read(self) -> tuple[int, bytes]:
        """The next frame of the client, unmasked; an unmasked or reserved one is a broken promise."""
        head = self._take(2)
        assert head[1] & 0x80, "a client's frame must be masked"
        assert head[0] & 0xF0 == 0x80, "a client's frame is whole and uses no extension"
        size = head[1] & 0x7F
        if size == 126:
            size = struct.unpack("!H", self._take(2))[0]
        elif size == 127:
            size = struct.unpack("!Q", self._take(8))[0]
        mask, payload = self._take(4), self._take(size)
        key = int.from_bytes((mask * (size // 4 + 1))[:size], "big")
        return head[0] & 15, (int.from_bytes(payload, "big") ^ key).to_bytes(size, "big")

    def read_until(self, opcode: int) -> bytes:
        """Skip to the next frame of this kind."""
        while True:
            kind, payload = self.read()
            if kind == opcode:
                return payload

    def hold(self) -> None:
        """Do nothing until the test is over."""
        self.over.wait(30)

    def reset(self) -> None:
        """Drop the connection with an RST, at once."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()

    def _take(self, size: int) -> bytes:
        while len(self._unread) < size:
            self._fill()
        taken, self._unread = self._unread[:size], self._unread[size:]
        return taken

    def _fill(self) -> None:
        data = self.socket.recv(65_536)
        if not data:
            raise EOFError
        self._unread += data


class RawUpstream:
    """A listening socket; `url` leads to it."""

    def __init__(self, script: Script, *, receive_buffer: int | None, tls: bool) -> None:
        self._script = script
        self._listener = socket.socket()
        if receive_buffer is not None:
            self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self._listener.bind(("127.0.0.1", 0))
        self._listener.listen(512)
        self._tls: ssl.SSLContext | None = None
        if tls:
            self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self._tls.load_cert_chain(CERTIFICATE)
        self.port: int = self._listener.getsockname()[1]
        self.url = f"{'wss' if tls else 'ws'}://127.0.0.1:{self.port}/v3/ws"
        self.peers: list[Peer] = []
        self._over = threading.Event()
        self._errors: list[Exception] = []
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            sock.settimeout(20)
            thread = threading.Thread(target=self._run, args=(sock,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _run(self, sock: socket.socket) -> None:
        try:
            with self._tls.wrap_socket(sock, server_side=True) if self._tls else sock as sock:
                peer = Peer(sock, self._over)
                self.peers.append(peer)
                self._script(peer)
        except (EOFError, OSError):
            pass  # the client has gone
        except Exception as exc:  # noqa: BLE001  raised by `stop`
            self._errors.append(exc)

    def stop(self) -> None:
        """Let scripts end, hang up on those that do not; raise what one of them ran into."""
        self._over.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        patience = time.monotonic() + 1
        for thread in self._threads:
            thread.join(max(0, patience - time.monotonic()))
        for peer in self.peers:
            with suppress(OSError):
                peer.socket.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(5)
            assert not thread.is_alive(), "a script does not end"
        if self._errors:
            raise self._errors[0]


@contextmanager
def raw_upstream(script: Script, *, receive_buffer: int | None = None, tls: bool = False) -> Iterator[RawUpstream]:
    """Listen while the block runs."""
    server = RawUpstream(script, receive_buffer=receive_buffer, tls=tls)
    try:
        yield server
    finally:
        server.stop()
