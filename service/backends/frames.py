"""RFC 6455 frames as a client needs them: messages to frames, masked in C, and arriving bytes to messages. FLOOR 3.

No I/O and no state machine: closing is the session's. Invariants: one pass over the bytes and at most one copy of them;
what is not a server's frame, and what would grow beyond the limit, is refused at its header, before its payload.
"""

import os
from collections.abc import Callable, Iterator
from struct import pack
from typing import Literal

from websockets.speedups import apply_mask

CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0, 1, 2, 8, 9, 10
_FIN, _MASKED = 0x80, 0x80
_DATA = frozenset(fin | opcode for fin in (0, _FIN) for opcode in (CONTINUATION, TEXT, BINARY))
_CONTROL = frozenset(_FIN | opcode for opcode in (CLOSE, PING, PONG))


class Unreadable(Exception):
    """No frame can be told from the next any more."""

    def __init__(self, kind: Literal["invalid", "oversized"], reason: str) -> None:
        """Both as in `SessionEnd`."""
        super().__init__(reason)
        self.kind = kind
        self.reason = reason


def _keys() -> Iterator[bytes]:
    """Masking keys, unpredictable as section 5.3 wants them; one system call for a thousand."""
    while True:
        pool = os.urandom(4096)
        for start in range(0, 4096, 4):
            yield pool[start : start + 4]


_next_key = _keys().__next__


def encode(opcode: int, payload: bytes) -> bytes:
    """One whole frame."""
    size = len(payload)
    if size < 126:
        head = pack("!BB", _FIN | opcode, _MASKED | size)
    elif size < 65_536:
        head = pack("!BBH", _FIN | opcode, _MASKED | 126, size)
    else:
        head = pack("!BBQ", _FIN | opcode, _MASKED | 127, size)
    key = _next_key()
    return b"".join((head, key, apply_mask(payload, key)))


class Parser:
    """Calls `take(opcode, payload)` for every message, its fragments joined, and every control frame, up to a Close."""

    def __init__(self, take: Callable[[int, bytes], None], limit: int) -> None:
        """`limit`: bytes of one message."""
        self._take = take
        self._limit = limit
        self._over = False
        self._rest: list[bytes] = []  # of a frame that is not yet whole
        self._rest_size = 0
        self._needed = 0  # bytes from the beginning of the rest until something can be done with it
        self._message: bytearray | None = None  # one that comes in fragments
        self._message_opcode = 0

    def feed(self, data: bytes) -> bool:
        """Whether a frame was completed. Raises `Unreadable`, once and for all."""
        if self._over:
            return False
        if self._rest:
            self._rest.append(data)
            self._rest_size += len(data)
            if self._rest_size < self._needed:
                return False
            data = b"".join(self._rest)
            self._rest.clear()
        try:
            position = self._frames(data)
        except Unreadable:
            self._over = True
            raise
        if position < len(data):
            self._rest.append(data[position:])
            self._rest_size = len(data) - position
        return position > 0

    def _frames(self, data: bytes) -> int:
        """Take every whole frame; where the rest begins, of which `_needed` is known."""
        position, size = 0, len(data)
        while not self._over:
            self._needed = 2
            if size - position < 2:
                break
            first, length = data[position], data[position + 1]
            if length > (127 if first in _DATA else 125 if first in _CONTROL else -1):
                raise Unreadable(
                    "invalid", f"not a server's websocket frame: it begins with {first:#04x} {length:#04x}"
                )
            start = position + 2
            if length > 125:
                start += 2 if length == 126 else 8
                self._needed = start - position
                if size < start:
                    break
                length = int.from_bytes(data[position + 2 : start], "big")
            if length + len(self._message or b"") > self._limit:
                raise Unreadable("oversized", f"a message of more than {self._limit} bytes")
            stop = start + length
            self._needed = stop - position
            if size < stop:
                break
            self._frame(first, data[start:stop])
            position = stop
        return position

    def _frame(self, first: int, payload: bytes) -> None:
        opcode = first & 0x0F
        if opcode >= CLOSE:
            self._over = opcode == CLOSE
            self._take(opcode, payload)
        elif (opcode == CONTINUATION) is (self._message is None):
            raise Unreadable("invalid", "fragments of messages out of order")
        elif self._message is None and first & _FIN:
            self._take(opcode, payload)
        else:
            if self._message is None:
                self._message, self._message_opcode = bytearray(), opcode
            self._message += payload
            if first & _FIN:
                whole, self._message = bytes(self._message), None
                self._take(self._message_opcode, whole)
