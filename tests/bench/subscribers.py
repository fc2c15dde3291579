"""Follows the events of jobs whose ids come on stdin, one connection each, and throws them away: part of `tests.bench.streams`.

`python -m tests.bench.subscribers PORT`
"""

import asyncio
import sys


async def follow(port: int, job_id: str) -> None:
    """Read until the end."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"GET /jobs/{job_id}/events HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n\r\n".encode())
    while await reader.read(65536):
        pass


async def main() -> None:
    """One task a line."""
    tasks = []
    lines = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    while line := await lines.readline():
        tasks.append(asyncio.create_task(follow(int(sys.argv[1]), line.decode().strip())))


if __name__ == "__main__":
    asyncio.run(main())
