"""What is taken for granted of `asyncio.Event`, of ours as well."""

import asyncio

import pytest

from service.flag import Flag

KINDS = pytest.mark.parametrize("kind", [asyncio.Event, Flag])


@KINDS
async def test_all_who_wait_go_on(kind: type[Flag]) -> None:
    flag = kind()
    waiting = [asyncio.create_task(flag.wait()) for _ in range(3)]
    await asyncio.sleep(0)
    assert not flag.is_set()
    flag.set()
    flag.clear()  # they were told all the same
    flag.set()
    async with asyncio.timeout(5):
        await asyncio.gather(*waiting)
        await flag.wait()
    flag.clear()
    late = asyncio.create_task(flag.wait())
    assert not (await asyncio.wait([late], timeout=0.01))[0]
    flag.set()
    await late


@KINDS
async def test_one_who_gives_up_is_in_nobodys_way(kind: type[Flag]) -> None:
    flag = kind()
    patient, hasty = asyncio.create_task(flag.wait()), asyncio.create_task(flag.wait())
    await asyncio.sleep(0)
    hasty.cancel()
    flag.set()  # before the cancelled one has run
    async with asyncio.timeout(5):
        await patient
        await asyncio.wait([hasty])
    assert hasty.cancelled()
