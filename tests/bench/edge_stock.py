"""What the service's edge is compared with: the usual FastAPI server, as its tutorials write it. Nothing is tuned.

`UploadFile` behind `Depends` for uploads, sse-starlette for events, uvicorn to serve. `python -m tests.bench.edge_stock`
says its address on stderr.
"""

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import uvicorn
from fastapi import Depends, FastAPI, Header, HTTPException, UploadFile
from sse_starlette import EventSourceResponse

KEY = "a-key-of-the-benchmark"
listeners: set["asyncio.Queue[str]"] = set()


def told(text: str) -> None:
    """Tell it to everybody who listens."""
    data = json.dumps({"at": time.time(), "text": text})
    for queue in listeners:
        queue.put_nowait(data)


async def chatter() -> None:
    """What a chatty job says, once somebody listens."""
    while True:
        await asyncio.sleep(0.1)
        if chatty:
            told("x" * 8000)


chatty: list[bool] = []


@asynccontextmanager
async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
    """The job that talks."""
    task = asyncio.create_task(chatter())
    yield
    task.cancel()


app = FastAPI(lifespan=lifespan)


def caller(authorization: str = Header("")) -> str:
    """Who calls."""
    if authorization != f"Bearer {KEY}":
        raise HTTPException(401)
    return "me"


@app.post("/jobs", status_code=202)
async def upload(file: UploadFile, _owner: str = Depends(caller)) -> dict[str, int]:
    """Take a file."""
    size = 0
    while piece := await file.read(1 << 20):
        size += len(piece)
    return {"size": size}


@app.get("/jobs/it/events")
async def events() -> EventSourceResponse:
    """Follow."""

    async def follow() -> AsyncIterator[dict[str, str]]:
        queue: asyncio.Queue[str] = asyncio.Queue()
        listeners.add(queue)
        try:
            while True:
                yield {"event": "turn.final", "data": await queue.get()}
        finally:
            listeners.discard(queue)

    return EventSourceResponse(follow())


@app.post("/push")
async def push() -> None:
    """One event for all."""
    told("now")


@app.post("/talk")
async def talk() -> None:
    """Begin to talk."""
    chatty.append(True)


@app.get("/healthz")
async def healthz() -> dict[str, str]:
    """Alive."""
    return {"status": "ok"}


if __name__ == "__main__":
    server = uvicorn.Server(uvicorn.Config(app, port=0, access_log=False, log_level="warning"))

    async def main() -> None:
        """Serve, and say where."""
        serving = asyncio.create_task(server.serve())
        while not server.started and not serving.done():
            await asyncio.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        sys.stderr.write(f"serves http://127.0.0.1:{port},\n")
        await serving

    asyncio.run(main())
