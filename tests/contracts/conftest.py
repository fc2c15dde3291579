"""Where a backend leans on how the event loop treats sockets, its module names the loops to run on in `LOOPS`."""

import asyncio
from collections.abc import Callable, Mapping
from types import ModuleType

import pytest
import uvloop

ASYNCIO: Mapping[str, Callable[[], asyncio.AbstractEventLoop]] = {"asyncio": asyncio.new_event_loop}
BOTH: Mapping[str, Callable[[], asyncio.AbstractEventLoop]] = {**ASYNCIO, "uvloop": uvloop.new_event_loop}


def pytest_asyncio_loop_factories(item: pytest.Item) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """See pytest-asyncio."""
    module = item.getparent(pytest.Module)
    found: ModuleType | None = module.obj if module else None
    return getattr(found, "LOOPS", ASYNCIO)
