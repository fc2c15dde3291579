"""The one task that writes, seen from callers that have left."""

import asyncio
import gc
from typing import Any

from sqlalchemy.ext.asyncio import AsyncConnection

from service.core.errors import Fenced
from service.store import Store


async def test_a_refusal_that_nobody_waits_for_is_no_news(store: Store) -> None:
    """A heartbeat that is cancelled because its job has just ended is refused: that must not fill the log."""
    complaints: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
    refused = asyncio.Event()

    async def run(_: AsyncConnection) -> None:
        refused.set()
        raise Fenced

    caller = asyncio.create_task(store._writer.write("job", run, patient=True))
    await asyncio.sleep(0)
    caller.cancel()
    await asyncio.wait([caller])
    await refused.wait()
    await store._writer.write("job", _nothing)
    del caller
    gc.collect()
    assert not complaints


async def _nothing(_: AsyncConnection) -> None:
    pass
