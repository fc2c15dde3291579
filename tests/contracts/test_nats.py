"""What NATS can do wrong: be away from the start, be killed, lose its data, hang, refuse, and bring garbage.

Each test has a server of its own, which starts in some 20 ms.
"""

import asyncio
import ssl
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from pathlib import Path

import nats
import pytest
import structlog
import structlog.testing
import uvloop
from nats.js.api import StreamConfig

from service.backends.nats import NatsBroker, connection, queue
from service.core.errors import Unavailable
from service.core.job import BEHIND, Event
from service.ports import Delivery
from tests.doubles import an_event, listening
from tests.engines.nats import Nats

LOOPS = {"uvloop": uvloop.new_event_loop}  # what the service runs on; the contracts of queue and bus run on asyncio's
CERTIFICATE = Path(__file__).parent.parent / "localhost.pem"
SECRET = "s3cret,/?#@:"  # what a URL must have encoded
ENCODED = "s3cret%2C%2F%3F%23%40%3A"


@pytest.fixture
def server() -> Iterator[Nats]:
    """Running."""
    with Nats() as running:
        yield running


@pytest.fixture
async def broker(server: Nats) -> AsyncIterator[NatsBroker]:
    """Connected."""
    async with NatsBroker(server.url) as opened:
        yield opened


async def reconnected(broker: NatsBroker, act: Callable[[], None]) -> None:
    """Do what ends the connection and wait for the next one."""
    before = broker._keeper.connection
    await asyncio.to_thread(act)
    async with asyncio.timeout(30):
        while broker._keeper.connection is before or not broker._keeper._up.is_set():
            await asyncio.sleep(0.01)


def restart(server: Nats, end: Callable[[], None]) -> None:
    end()
    server.start()


async def heard(broker: NatsBroker, subscription: asyncio.Queue[Event], topic: str = "events.j1") -> None:
    """What is published now arrives."""
    sent = an_event("j1", uuid.uuid4().int >> 80)
    async with asyncio.timeout(10):
        broker.bus.publish(topic, sent)
        while await subscription.get() != sent:
            pass


async def delivered(broker: NatsBroker) -> Delivery:
    async with asyncio.timeout(20):
        return await broker.queue.next()


async def rung(broker: NatsBroker, job_id: str, epoch: int = 0) -> None:
    """Ring until somebody hears, as the reconciler does."""
    while True:
        await broker.queue.announce(job_id, epoch)
        await asyncio.sleep(0.2)


async def counted(broker: NatsBroker, detail: str) -> None:
    """What the queue says of itself in the end: answers to deliveries are not waited for."""
    async with asyncio.timeout(10):
        while await broker.queue.check() != detail:
            await asyncio.sleep(0.01)


async def refused(broker: NatsBroker, why: str) -> str:
    """What the check says, once it knows `why`."""
    async with asyncio.timeout(20):
        while True:
            with pytest.raises(Unavailable) as caught:
                await broker.queue.check()
            if why in caught.value.detail:
                return caught.value.detail


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """For what is not going to be connected."""
    monkeypatch.setattr(connection, "CONNECT_SECONDS", 0.2)
    monkeypatch.setattr(queue, "ASK_SECONDS", 0.2)


# --- away ------------------------------------------------------------------------------------------------------------


async def test_a_process_starts_and_works_while_the_server_is_away_and_finds_it_when_it_comes(server: Nats) -> None:
    server.stop()
    began = time.monotonic()
    with structlog.testing.capture_logs() as logs:
        async with NatsBroker(server.url) as broker, listening(broker.bus, "events.j1") as subscription:
            for n in range(1000):
                broker.bus.publish("events.j1", an_event("j1", n))
                await broker.queue.announce("j1", n)
            waiting = asyncio.create_task(delivered(broker))
            await refused(broker, "nobody listens")
            assert time.monotonic() - began < 15, "nothing waits for the server"
            await reconnected(broker, server.start)
            await heard(broker, subscription)
            await broker.queue.announce("j2", 0)
            assert (await waiting).job_id == "j2"
            await counted(broker, "0 waiting, 1 taken")
    assert [line["event"] for line in logs] == ["broker connected"]


async def test_a_server_that_is_killed_loses_no_job_and_is_found_again(server: Nats, broker: NatsBroker) -> None:
    await broker.queue.announce("held", 0)
    await broker.queue.announce("waits", 0)
    held = await delivered(broker)
    assert held.job_id == "held"
    async with listening(broker.bus, "events.j1") as one, listening(broker.bus, "control.j1") as other:
        await reconnected(broker, lambda: restart(server, server.kill))
        await heard(broker, one)
        await heard(broker, other, "control.j1")
    await held.extend()
    assert (await delivered(broker)).job_id == "waits"
    await held.done()
    await counted(broker, "0 waiting, 1 taken")


@pytest.mark.parametrize("act", ["kill", "wipe"])
async def test_who_waits_for_a_job_gets_it_from_the_server_that_comes_back(
    server: Nats, broker: NatsBroker, act: str
) -> None:
    waiting = asyncio.create_task(delivered(broker))
    await asyncio.sleep(0.1)
    assert not waiting.done()
    await reconnected(broker, lambda: restart(server, getattr(server, act)))
    ringing = asyncio.create_task(rung(broker, "j1"))
    assert (await waiting).job_id == "j1"
    ringing.cancel()


async def test_a_stream_that_somebody_deletes_is_made_again(server: Nats, broker: NatsBroker) -> None:
    waiting = asyncio.create_task(delivered(broker))
    client = await nats.connect(server.url)
    await client.jetstream().delete_stream("turnwire-jobs")
    await client.close()
    ringing = asyncio.create_task(rung(broker, "j1"))
    assert (await waiting).job_id == "j1"
    ringing.cancel()
    assert "taken" in await broker.queue.check()


async def test_a_stream_of_the_operators_own_is_left_as_it_is(server: Nats) -> None:
    client = await nats.connect(server.url)
    await client.jetstream().add_stream(
        StreamConfig(name="turnwire-jobs", subjects=["turnwire.jobs.>"], description="mine")
    )
    async with NatsBroker(server.url) as broker:
        await broker.queue.announce("j1", 0)
        assert (await delivered(broker)).job_id == "j1"
        assert (await client.jetstream().stream_info("turnwire-jobs")).config.description == "mine"
    await client.close()


# --- hanging ---------------------------------------------------------------------------------------------------------


async def test_nobody_waits_for_a_server_that_hangs_and_little_is_kept_for_it(
    server: Nats, broker: NatsBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "SILENT_SECONDS", 1.0)
    held = broker._keeper.connection
    assert held is not None
    async with listening(broker.bus, "events.j1") as subscription:
        with server.paused():
            for n in range(20_000):
                broker.bus.publish("events.j1", an_event("j1", n, text="x" * 1000))
                await broker.queue.announce("j1", n)
                if n % 100 == 0:
                    await asyncio.sleep(0)
            kept = held._socket()
            assert kept is not None
            assert kept.get_write_buffer_size() <= connection.BUFFER_BYTES + 200_000
            async with asyncio.timeout(10):
                async with listening(broker.bus, "events.j2"):
                    pass
                with pytest.raises(Unavailable):
                    await broker.queue.check()
                while broker._keeper.connection is held:
                    await asyncio.sleep(0.05)
        async with asyncio.timeout(20):
            await broker._keeper.connected()
        await heard(broker, subscription)
    assert await broker.queue.check()


async def test_a_short_pause_costs_nothing_but_time(server: Nats, broker: NatsBroker) -> None:
    held = broker._keeper.connection
    async with listening(broker.bus, "events.j1") as subscription:
        with server.paused():
            for n in range(100):
                broker.bus.publish("events.j1", an_event("j1", n))
            await asyncio.sleep(0.5)
        async with asyncio.timeout(10):
            assert [(await subscription.get()).seq for _ in range(100)] == list(range(100))
    assert broker._keeper.connection is held


async def test_closing_does_not_wait_for_a_server_that_hangs(server: Nats) -> None:
    broker = NatsBroker(server.url)
    async with asyncio.timeout(10):
        async with broker, listening(broker.bus, "events.j1"):
            waiting = asyncio.create_task(broker.queue.next())
            with server.paused():
                for n in range(20_000):
                    broker.bus.publish("events.j1", an_event("j1", n, text="x" * 1000))
                    if n % 100 == 0:
                        await asyncio.sleep(0)
                await broker.__aexit__()
            waiting.cancel()
            with suppress(asyncio.CancelledError):
                await waiting
    assert [task.get_name() for task in asyncio.all_tasks() if task is not asyncio.current_task()] == []


# --- deliveries ------------------------------------------------------------------------------------------------------


async def test_who_stops_waiting_leaves_the_next_job_to_the_others(server: Nats, broker: NatsBroker) -> None:
    """Its request lives on at the server for some seconds; what comes on it goes back at once."""
    for n in range(5):
        leaving = [asyncio.create_task(broker.queue.next()) for _ in range(3)]
        await asyncio.sleep(0.02 * n)
        for task in leaving:
            task.cancel()
        await asyncio.wait(leaving)
    async with NatsBroker(server.url) as other:
        began = time.monotonic()
        await other.queue.announce("j1", 0)
        assert (await delivered(other)).job_id == "j1"
        assert time.monotonic() - began < queue.ACK_SECONDS / 2, "it was given back, not left to run out"


async def test_a_job_that_comes_as_its_waiter_is_cancelled_goes_back(server: Nats, broker: NatsBroker) -> None:
    """At any moment between the message's arrival and the waiter's going on with it."""
    for n in range(40):
        waiting = asyncio.create_task(broker.queue.next())
        await asyncio.sleep(0.002)
        await broker.queue.announce(f"j{n}", 0)
        for _ in range(n // 2):
            await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait([waiting])
        taken = await delivered(broker) if waiting.cancelled() else waiting.result()
        assert taken.job_id == f"j{n}"
        await taken.done()
    await counted(broker, "0 waiting, 0 taken")


async def test_a_job_whose_worker_falls_silent_comes_again_and_one_that_lives_does_not(
    server: Nats, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queue, "ACK_SECONDS", 0.6)
    async with NatsBroker(server.url) as dead, NatsBroker(server.url) as alive:
        await dead.queue.announce("silent", 0)
        await dead.queue.announce("alive", 0)
        assert (await delivered(dead)).job_id == "silent"
        lives = await delivered(dead)
        assert lives.job_id == "alive"
        waiting = asyncio.create_task(delivered(alive))
        for _ in range(20):
            await lives.extend()
            await asyncio.sleep(0.1)
        again = await waiting
        assert again.job_id == "silent"
        await again.done()
        await lives.done()
        await counted(alive, "0 waiting, 0 taken")


async def test_ringing_for_what_waits_or_is_worked_on_makes_no_second_delivery_of_its_epoch(
    server: Nats, broker: NatsBroker
) -> None:
    """However long after: no window decides, so the reconcilers of many workers may ring for every job they see."""
    for _ in range(3):
        for n in range(10):
            await broker.queue.announce(f"j{n}", 4)
    await counted(broker, "10 waiting, 0 taken")
    held = await delivered(broker)
    await broker.queue.announce(held.job_id, 4)
    await counted(broker, "9 waiting, 1 taken")
    await held.done()
    await counted(broker, "9 waiting, 0 taken")
    await broker.queue.announce(held.job_id, 4)
    await counted(broker, "10 waiting, 0 taken")


# --- messages --------------------------------------------------------------------------------------------------------


async def test_garbage_ends_no_subscription(server: Nats, broker: NatsBroker) -> None:
    client = await nats.connect(server.url)
    async with listening(broker.bus, "events.j1") as subscription:
        for garbage in (b"", b"\x00", b"{}", b"\xff" * 100, b"\x95\x01\x02\x03\x04\x05", b"\xdd\xff\xff\xff\xff"):
            await client.publish("turnwire.events.j1", garbage)
            await client.publish("turnwire.events.j1", garbage, headers={"a": "b"})
        await client.flush()
        await heard(broker, subscription)
    await client.close()


async def test_of_an_event_too_large_followers_learn_that_there_is_more_to_read(
    server: Nats, broker: NatsBroker
) -> None:
    large = "x" * (1 << 20)
    after = an_event("j1", 8)
    async with listening(broker.bus, "events.j1") as subscription, asyncio.timeout(10):
        broker.bus.publish("events.j1", an_event("j1", None, after_seq=6, text=large))  # a partial: the next will do
        broker.bus.publish("events.j1", an_event("j1", 7, text=large))
        broker.bus.publish("events.j1", after)
        told = await subscription.get()
        assert (told.job_id, told.seq, told.type) == ("j1", None, BEHIND)
        assert await subscription.get() == after


async def test_a_newer_release_may_say_more(server: Nats, broker: NatsBroker) -> None:
    import msgspec

    client = await nats.connect(server.url)
    async with listening(broker.bus, "events.j1") as subscription, asyncio.timeout(10):
        await client.publish("turnwire.events.j1", msgspec.msgpack.encode(["j1", 3, "new", b"{}", 0, {"more": 1}]))
        assert await subscription.get() == Event("j1", 3, "new", b"{}")
    await client.close()


async def test_the_server_holds_one_subscription_per_topic_however_many_listen(
    server: Nats, broker: NatsBroker
) -> None:
    held = broker._keeper.connection
    assert held is not None
    before = len(held._handlers)
    async with listening(broker.bus, "events.j1"):
        async with listening(broker.bus, "events.j1") as other, listening(broker.bus, "events.j1"):
            assert len(held._handlers) == before + 1
        assert len(held._handlers) == before + 1
        await asyncio.sleep(0)
        assert other.empty()
    assert len(held._handlers) == before
    assert not broker.bus._topics


# --- who may ---------------------------------------------------------------------------------------------------------

USERS = {"users": [{"user": "turnwire", "password": SECRET}]}


@pytest.mark.parametrize(
    ("authorization", "login"),
    [(USERS, f"turnwire:{ENCODED}"), ({"token": SECRET}, ENCODED)],
    ids=["user and password", "token"],
)
async def test_credentials_come_in_the_url_and_are_shown_nowhere(
    monkeypatch: pytest.MonkeyPatch, authorization: object, login: str
) -> None:
    with Nats(authorization=authorization) as server, structlog.testing.capture_logs() as logs:
        right, wrong = (server.url.replace("//", f"//{one}@") for one in (login, login[:-3]))
        async with NatsBroker(right) as broker, listening(broker.bus, "events.j1") as subscription:
            await heard(broker, subscription)
        monkeypatch.setattr(connection, "CONNECT_SECONDS", 0.2)
        async with NatsBroker(wrong) as broker:
            told = await refused(broker, "refuses the user, password or token")
    assert "s3cret" not in f"{logs}{told}{broker!r}"


@pytest.mark.usefixtures("hasty")
async def test_one_whose_credentials_are_mended_gets_in(server: Nats) -> None:
    """The server ends a connection for other reasons than to be restarted, and a client must outlive them all."""
    server.stop()
    server.configure(authorization={"token": "other"})
    server.start()
    async with NatsBroker(server.url.replace("//", "//mine@")) as broker:
        await refused(broker, "refuses")
        server.configure(authorization={"token": "mine"})
        await reconnected(broker, lambda: restart(server, server.stop))
        assert await broker.queue.check()


@pytest.mark.usefixtures("hasty")
async def test_tls_is_used_where_it_is_asked_for_and_nothing_is_told_without_it(
    server: Nats, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with NatsBroker(server.url.replace("nats:", "tls:").replace("//", "//turnwire:s3cret@")) as broker:
        await refused(broker, "TLS fails")
    tls = {"cert_file": str(CERTIFICATE), "key_file": str(CERTIFICATE)}
    with Nats(tls=tls, authorization=USERS) as other:
        url = other.url.replace("127.0.0.1", "localhost").replace("//", f"//turnwire:{ENCODED}@")
        async with NatsBroker(url) as broker:
            await refused(broker, "TLS fails")  # nobody vouches for its certificate
        monkeypatch.setenv("SSL_CERT_FILE", str(CERTIFICATE))
        assert ssl.create_default_context().cert_store_stats()["x509"]
        for scheme in ("nats:", "tls:"):
            async with NatsBroker(url.replace("nats:", scheme)) as broker:
                assert await broker.queue.check()


@pytest.mark.usefixtures("hasty")
async def test_without_jetstream_the_bus_works_and_the_check_says_what_is_missing() -> None:
    with Nats(jetstream=False) as server:
        async with NatsBroker(server.url) as broker, listening(broker.bus, "events.j1") as subscription:
            await heard(broker, subscription)
            await refused(broker, "JetStream is not enabled")
