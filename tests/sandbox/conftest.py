"""Fixtures of the sandbox's tests: a sandbox that hears numbered words, twenty times as fast as the world."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from service.sandbox.app import Sandbox, run_sandbox
from service.sandbox.recogniser import NumberedWords

SPEED = 20.0


@pytest.fixture
async def sandbox() -> AsyncIterator[Sandbox]:
    async with run_sandbox(recogniser=NumberedWords, speed=SPEED, keep_audio=True) as running:
        yield running
        # A session that outlives its client is a leak.
        async with asyncio.timeout(5):
            await running.settled()
