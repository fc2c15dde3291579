"""The contract of a Bus: hints to whoever listens now, bounded, waiting for nobody.

Runs on every kind of `BUSES`; another is added by naming it there and opening it in the fixture `bus`. A bus may lose,
double and reorder; what is tested here is what holds when nothing goes wrong, and that nobody ever waits.
"""

import asyncio
import uuid
from collections.abc import AsyncIterator

import pytest

from service.backends.memory import MemoryBus
from service.backends.nats import NatsBroker
from service.core.job import Event, hint
from service.ports import Bus
from tests.doubles import an_event, listening
from tests.engines.nats import Nats

BUSES = ["memory", "nats"]


@pytest.fixture(params=BUSES)
async def bus(request: pytest.FixtureRequest) -> AsyncIterator[Bus]:
    """A bus of each kind."""
    if request.param == "memory":
        yield MemoryBus()
    else:
        server: Nats = request.getfixturevalue("nats_server")
        async with NatsBroker(server.url, prefix=f"t{uuid.uuid4().hex}") as broker:
            yield broker.bus


async def received(heard: asyncio.Queue[Event], count: int) -> list[Event]:
    async with asyncio.timeout(5):
        return [await heard.get() for _ in range(count)]


async def nothing_more(heard: asyncio.Queue[Event]) -> bool:
    try:
        async with asyncio.timeout(0.05):
            await heard.get()
    except TimeoutError:
        return True
    return False


async def test_everyone_who_listens_gets_what_is_published_from_then_on(bus: Bus) -> None:
    before, durable, ephemeral = an_event("j1", 1), an_event("j1", 2, "turn.final"), an_event("j1", None, after_seq=2)
    bus.publish("events.j1", before)
    async with listening(bus, "events.j1") as one, listening(bus, "events.j1") as other:
        for event in (durable, ephemeral, hint("j1", "deleted")):
            bus.publish("events.j1", event)
        for subscription in (one, other):
            assert await received(subscription, 3) == [durable, ephemeral, hint("j1", "deleted")]
            assert await nothing_more(subscription)


async def test_topics_are_apart(bus: Bus) -> None:
    async with (
        listening(bus, "events.j1") as events,
        listening(bus, "control.j1") as control,
        listening(bus, "events.j2") as others,
    ):
        bus.publish("control.j1", hint("j1", "cancel"))
        bus.publish("events.j2", an_event("j2", 1))
        assert (await received(control, 1))[0].type == "cancel"
        assert (await received(others, 1))[0].job_id == "j2"
        assert await nothing_more(events)


async def test_an_event_arrives_with_its_bytes_and_its_place(bus: Bus) -> None:
    sent = an_event("j1", None, "turn.partial", after_seq=7, turn={"transcript": "a\u2028b\r\n\0"})
    async with listening(bus, "events.j1") as subscription:
        bus.publish("events.j1", sent)
        (got,) = await received(subscription, 1)
    assert (got.job_id, got.seq, got.type, got.json, got.sse, got.after_seq) == (
        sent.job_id, sent.seq, sent.type, sent.json, sent.sse, 7,
    )  # fmt: skip


async def test_who_has_left_is_forgotten(bus: Bus) -> None:
    for _ in range(3):
        with pytest.raises(RuntimeError, match="left"):
            async with listening(bus, "events.j1"):
                raise RuntimeError("left")
    bus.publish("events.j1", an_event("j1", 1))
    async with listening(bus, "events.j1") as subscription:
        assert await nothing_more(subscription)


async def test_the_memory_bus_keeps_no_topic_without_a_listener() -> None:
    bus = MemoryBus()
    async with listening(bus, "events.j1"), listening(bus, "events.j1"):
        pass
    assert not bus._topics
    bus.publish("events.j1", an_event("j1", 1))
    assert not bus._topics


async def test_the_memory_bus_hands_on_the_very_event() -> None:
    """What was encoded once is never encoded again."""
    bus, sent = MemoryBus(), an_event("j1", 1)
    async with listening(bus, "events.j1") as one, listening(bus, "events.j1") as other:
        bus.publish("events.j1", sent)
        assert await one.get() is sent
        assert await other.get() is sent
