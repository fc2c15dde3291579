"""Follows the events of jobs, one connection each, and throws them away: a process of `tests.bench.whole`.

`python -m tests.bench.subscribers PORT`. A line on stdin is a job's id, or `stats`: answered with the events since the last time
and the ms that turns took from the far end (which stamps their first word) to here, as JSON.
"""

import json
import os
import re
import select
import socket
import sys
import time
from collections import deque

from tests.bench.harness import percentile

STAMP = re.compile(rb'"transcript":"at(\d+)')


class Followers:
    """All connections of one epoll, as cheap as Python can."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._poll = select.epoll()
        self._poll.register(0, select.EPOLLIN)
        self._sockets: dict[int, socket.socket] = {}
        self._events = 0
        self._delays: deque[float] = deque(maxlen=100_000)

    def run(self) -> None:
        """Until stdin ends."""
        lines = b""
        while True:
            for descriptor, _ in self._poll.poll():
                if descriptor == 0:
                    if not (data := os.read(0, 65536)):
                        return
                    *whole, lines = (lines + data).split(b"\n")
                    for line in whole:
                        self._told(line.decode())
                else:
                    self._read(descriptor)

    def _told(self, line: str) -> None:
        if line == "stats":
            milliseconds = {f"p{part}": 1000 * percentile(self._delays, part / 100) for part in (50, 99)}
            print(json.dumps({"events": self._events, **milliseconds}), flush=True)
            self._events = 0
            self._delays.clear()
            return
        connection = socket.create_connection(("127.0.0.1", self._port))
        connection.sendall(f"GET /jobs/{line}/events HTTP/1.1\r\nHost: 127.0.0.1:{self._port}\r\n\r\n".encode())
        self._sockets[connection.fileno()] = connection
        self._poll.register(connection, select.EPOLLIN)

    def _read(self, descriptor: int) -> None:
        try:
            data = self._sockets[descriptor].recv(262_144)
        except ConnectionError:
            data = b""
        if not data:
            self._poll.unregister(descriptor)
            self._sockets.pop(descriptor).close()
            return
        now = time.monotonic()
        self._events += data.count(b"\ndata: ")
        self._delays.extend(now - int(stamp) / 1e6 for stamp in STAMP.findall(data))


if __name__ == "__main__":
    Followers(int(sys.argv[1])).run()
