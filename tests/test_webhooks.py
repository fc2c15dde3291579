"""Webhooks from the terminal state to a real endpoint: promised with it, signed, repeated, never lost and never in the way."""

import asyncio
import base64
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import update
from sqlalchemy.ext.asyncio import AsyncConnection
from standardwebhooks import Webhook

from service.core.job import Claim, Status
from service.runtime import SystemClock, open_runtime
from service.settings import load_settings
from service.store import MAX_STRIKES, Record, Store, Write, open_store
from service.store.outbox import Attempt, Delivery
from service.store.schema import webhooks
from service.web.app import create_app
from service.webhooks import AT_ONCE, AT_ONCE_PER_ENDPOINT, SCHEDULE, Webhooks
from service.webhooks.call import Caller
from service.worker import start_worker
from tests.doubles import add_job, an_event, append, start
from tests.endpoint import Answer, Call, endpoint, repeating, silence, status, trusting
from tests.kit import BytesUpload, eventually, running
from tests.marked import marked_wav
from tests.test_webhook_calls import LOOPBACK

SECRET, OLD_SECRET = ("whsec_" + base64.b64encode(bytes([n]) * 32).decode() for n in (1, 2))
SETTINGS: dict[str, Any] = {"webhook_secret": SECRET, "webhook_allow": "127.0.0.0/8"}


@pytest.fixture
def database(each_database: str) -> str:
    """Of each kind."""
    return each_database


# --- an outbox with something in it ----------------------------------------------------------------------------------


async def end_job(
    store: Store, url: str, job_id: str = "j1", status: Status = Status.CANCELED, **options: object
) -> str:
    """A job that has ended; the id of the webhook it promises."""
    await add_job(store, job_id, options={"webhook_url": url, **options})
    await append(store, job_id, (f"job.{status}", {"job": {"id": job_id, "note": "häh"}}), status=status)
    return f"msg_{job_id}_2"


@asynccontextmanager
async def sending(store: Store, *, speed: float = 10.0, times: int = 1) -> AsyncIterator[None]:
    """`times` workers, as far as they send webhooks."""
    clock = SystemClock(speed)
    caller = Caller(clock, LOOPBACK, tls=trusting())
    tasks = [
        asyncio.create_task(Webhooks(store.outbox, clock, caller, [SECRET, OLD_SECRET]).run()) for _ in range(times)
    ]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


async def later(store: Store, seconds: float) -> None:
    """Let time pass for the outbox."""
    past = int(seconds * 1000)

    async def run(connection: AsyncConnection) -> None:
        await connection.execute(update(webhooks).values(due_ms=webhooks.c.due_ms - past))
        held = webhooks.c.lease_until_ms > 0
        await connection.execute(update(webhooks).where(held).values(lease_until_ms=webhooks.c.lease_until_ms - past))

    await store._writer.write("", run, patient=True)


async def the_delivery(store: Store, job_id: str = "j1") -> Delivery:
    [delivery] = await store.outbox.deliveries(job_id)
    return delivery


async def attempts(store: Store, number: int, job_id: str = "j1") -> Delivery:
    """The delivery once that many attempts are written down."""
    async with asyncio.timeout(10):
        while len((delivery := await the_delivery(store, job_id)).attempts) < number:
            await asyncio.sleep(0.005)
    return delivery


def verified(call: Call) -> dict[str, object]:
    """The body of a call, its signature checked by the official library."""
    body = Webhook(OLD_SECRET).verify(call.body, call.headers)
    assert Webhook(SECRET).verify(call.body, call.headers) == body
    assert isinstance(body, dict)
    return body


# --- promised with the terminal state --------------------------------------------------------------------------------


async def end_by_amend(store: Store) -> None:
    await append(store, "j1", ("job.canceled", {"job": {}}), status=Status.CANCELED)


async def end_by_write(store: Store) -> None:
    held = await store.claim("j1", lease_s=60, begin=start)
    assert isinstance(held, Claim)
    held.job.status = Status.CANCELED
    for _ in range(2):  # once more, as when the answer to the commit was lost
        await store.write(held, Write(held.job, [an_event("j1", 3, "job.canceled", job={})]), after_seq=2)


async def end_by_claim(store: Store) -> None:
    def begin(record: Record, strikes: int) -> object:
        job, made = start(record, strikes)
        if strikes >= MAX_STRIKES:
            job.status, made = Status.FAILED, [an_event("j1", record.event_seq + 1, "job.canceled", job={})]
        return job, made

    for _ in range(MAX_STRIKES + 1):
        await store.claim("j1", lease_s=-1, begin=begin)  # type: ignore[arg-type]


@pytest.mark.parametrize("end", [end_by_amend, end_by_write, end_by_claim])
async def test_every_way_to_end_promises_one_webhook(store: Store, end: object) -> None:
    await add_job(store, options={"webhook_url": "https://Hooks.example:8443/a"})
    assert await store.outbox.deliveries("j1") == []
    assert callable(end)
    await end(store)
    delivery = await the_delivery(store)
    seq = await store.newest_seq("j1")
    assert (delivery.id, delivery.type) == (f"msg_j1_{seq}", "job.canceled")
    assert (delivery.url, delivery.status, delivery.attempts) == ("https://Hooks.example:8443/a", "pending", [])
    assert delivery.next_attempt_at is not None
    assert delivery.next_attempt_at > "2026"
    [due] = await store.outbox.due(10, but_for=[])
    assert due.endpoint == "hooks.example:8443"


async def test_only_what_was_asked_for_is_promised(store: Store) -> None:
    await add_job(store, "j1")
    await append(store, "j1", ("job.canceled", {"job": {}}), status=Status.CANCELED)
    await end_job(store, "https://a.example/", "j2", webhook_events=["job.failed", "job.completed"])
    await end_job(store, "https://a.example/", "j3", webhook_events=["job.canceled"])
    assert [len(await store.outbox.deliveries(job_id)) for job_id in ("j1", "j2", "j3")] == [0, 0, 1]


async def test_a_promise_goes_with_its_job(store: Store) -> None:
    await end_job(store, "https://a.example/")
    [due] = await store.outbox.due(10, but_for=[])
    await store.delete("j1")
    assert await store.outbox.claim(due) is None
    assert await store.outbox.deliveries("j1") == []


# --- attempts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tls", [False, True])
async def test_a_webhook_is_signed_and_sent_once(store: Store, tls: bool) -> None:
    async with endpoint(tls=tls) as here, sending(store, times=2):
        webhook_id = await end_job(store, here.url("/hook?a=b"))
        delivery = await attempts(store, 1)
        [call] = here.calls
        assert call.line == "POST /hook?a=b HTTP/1.1"
        assert call.headers["webhook-id"] == webhook_id == delivery.id
        event = (await store.events_after("j1", 1))[0]
        told = json.loads(event.json)
        assert verified(call) == {"type": "job.canceled", "timestamp": told["at"], "data": {"job": told["job"]}}
        assert (delivery.status, delivery.next_attempt_at) == ("delivered", None)
        [attempt] = delivery.attempts
        assert (attempt.status_code, attempt.error) == (204, None)
        assert attempt.duration_ms < 5000
        assert await store.outbox.due(10, but_for=[]) == []


async def test_a_webhook_nobody_takes_is_tried_ten_times(store: Store) -> None:
    async with endpoint(status(302, "Location: /"), status(500)) as here, sending(store, speed=20):
        await end_job(store, here.url())
        for number, wait in enumerate([*SCHEDULE[1:], 0], 1):
            delivery = await attempts(store, number)
            assert delivery.status == ("pending" if number < 10 else "failed")
            await later(store, wait * 0.85)
            assert await store.outbox.due(10, but_for=[]) == []
            await later(store, wait * 0.3)
        assert [attempt.status_code for attempt in delivery.attempts] == [302] + [500] * 9
        assert delivery.next_attempt_at is None
        assert len({(call.headers["webhook-id"], call.body) for call in here.calls}) == 1
        for call in here.calls:
            verified(call)


@pytest.mark.parametrize(
    ("answer", "code", "state", "wait_s"),
    [
        (status(410), 410, "failed", None),
        (status(503, "Retry-After: 7200"), 503, "pending", 7200),
        (status(429, "retry-after: nonsense"), 429, "pending", 5),
        (repeating(b"HTTP/1.1 200 OK\r\n\r\n", bytes(65536)), 200, "delivered", None),
    ],
    ids=["410", "Retry-After", "429", "a huge body"],
)
async def test_what_comes_of_an_answer(
    store: Store, answer: Answer, code: int, state: str, wait_s: float | None
) -> None:
    async with endpoint(answer) as here, sending(store):
        await end_job(store, here.url())
        delivery = await attempts(store, 1)
        assert (delivery.attempts[0].status_code, delivery.status) == (code, state)
        if wait_s is None:
            assert delivery.next_attempt_at is None
        else:
            assert delivery.next_attempt_at is not None
            wait = datetime.fromisoformat(delivery.next_attempt_at) - datetime.fromisoformat(delivery.attempts[0].at)
            assert 0.9 * wait_s <= wait.total_seconds() < 1.1 * wait_s + 2
        assert len(here.calls) == 1


async def test_what_is_not_called_says_why_and_is_tried_again(store: Store) -> None:
    async with sending(store):
        await end_job(store, "https://10.0.0.1/")
        delivery = await attempts(store, 1)
        assert delivery.status == "pending"
        assert delivery.attempts[0].error == "The host's address is not public."
        assert delivery.attempts[0].status_code is None
        await later(store, 6)
        assert len((await attempts(store, 2)).attempts) == 2


# --- slow endpoints, several workers ---------------------------------------------------------------------------------


async def test_a_slow_endpoint_delays_no_other(store: Store) -> None:
    async with endpoint(silence) as slow, endpoint() as quick:
        for n in range(AT_ONCE + 1):
            await end_job(store, slow.url(), f"s{n:02}")
        await end_job(store, quick.url(), "q")
        async with sending(store, speed=1):
            await attempts(store, 1, "q")
            await eventually(lambda: len(slow.calls) == AT_ONCE_PER_ENDPOINT)
            assert slow.connections == AT_ONCE_PER_ENDPOINT


async def test_a_slow_endpoint_is_given_up_in_time(store: Store) -> None:
    async with endpoint(silence) as slow, sending(store, speed=50):
        await end_job(store, slow.url())
        delivery = await attempts(store, 1)
        assert delivery.attempts[0].error == "There was no answer within 15 s."
        assert delivery.attempts[0].duration_ms >= 15_000
        assert delivery.status == "pending"


async def test_several_workers_send_each_webhook_once(store: Store, database: str) -> None:
    async with AsyncExitStack() as stack:
        here = await stack.enter_async_context(endpoint())
        ids = {await end_job(store, here.url(), f"j{n}") for n in range(40)}
        for _ in range(3):
            await stack.enter_async_context(sending(await stack.enter_async_context(open_store(database))))
        for n in range(40):
            await attempts(store, 1, f"j{n}")
        assert sorted(call.headers["webhook-id"] for call in here.calls) == sorted(ids)


async def test_a_redelivery_waits_for_the_attempt_under_way(store: Store) -> None:
    async with endpoint(silence) as slow, sending(store, speed=1):
        webhook_id = await end_job(store, slow.url())
        await eventually(lambda: bool(slow.calls))
        before = await the_delivery(store)
        assert await store.outbox.redeliver("j1", webhook_id) == before
        assert await store.outbox.due(10, but_for=[]) == []


async def test_an_attempt_whose_lease_ran_out_is_fenced(store: Store) -> None:
    await end_job(store, "https://a.example/")
    [due] = await store.outbox.due(10, but_for=[])
    slow = await store.outbox.claim(due)
    assert slow is not None
    assert await store.outbox.due(10, but_for=[]) == []
    assert await store.outbox.claim(due) is None
    await later(store, 31)
    [due] = await store.outbox.due(10, but_for=[])
    quick = await store.outbox.claim(due)
    assert quick is not None
    attempt = Attempt(at="2026-11-21T00:00:00.000Z", status_code=200, error=None, duration_ms=1)
    await store.outbox.record(slow, attempt, "failed", None)
    assert (await the_delivery(store)).attempts == []
    await store.outbox.record(quick, attempt, "delivered", None)
    assert (await the_delivery(store)).status == "delivered"


# --- crashes ---------------------------------------------------------------------------------------------------------

KILLED = """
import asyncio, os, signal, sys
from pathlib import Path
from service.runtime import open_runtime
from service.settings import load_settings
from tests.kit import BytesUpload
from tests.marked import marked_wav

async def main(data, url, secret):
    settings = load_settings(data_dir=Path(data), upstream_url="ws://127.0.0.1:9/", webhook_secret=secret)
    async with open_runtime(settings) as runtime:
        upload = BytesUpload(marked_wav(400), {"webhook_url": url})
        job = await runtime.intake.accept(upload, owner="", query=[], raw_length=None)
        await runtime.intake.cancel(job.id)
        print(job.id, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main(*sys.argv[1:]))
"""


async def test_killed_between_commit_and_send_it_is_sent_all_the_same(tmp_path: Path) -> None:
    async with endpoint(silence, status(204)) as here:
        command = [sys.executable, "-c", KILLED, str(tmp_path / "data"), here.url(), SECRET]
        root = Path(__file__).parent.parent
        killed = await asyncio.to_thread(subprocess.run, command, capture_output=True, cwd=root, text=True, check=False)
        assert killed.returncode == -9, killed.stderr
        job_id = killed.stdout.strip()
        assert here.connections == 0
        for call in (1, 2):  # and once more, when the first attempt is cut off before its answer
            async with running(tmp_path, **SETTINGS) as kit:
                await eventually(lambda call=call: len(here.calls) >= call)
        async with running(tmp_path, **SETTINGS) as kit:
            delivery = await attempts(kit.runtime.store, 1, job_id)
        assert delivery.status == "delivered"
        assert {call.headers["webhook-id"] for call in here.calls} == {f"msg_{job_id}_2"} == {delivery.id}
        assert 2 <= len(here.calls) <= 3
        assert len({call.body for call in here.calls}) == 1


# --- the whole service -----------------------------------------------------------------------------------------------


async def test_a_job_tells_its_end_and_waits_for_nobody(tmp_path: Path) -> None:
    async with endpoint(silence) as slow, endpoint() as quick, running(tmp_path, **SETTINGS) as kit:
        first = await kit.submit(marked_wav(400), webhook_url=slow.url())
        await kit.follow(first.id)
        await eventually(lambda: bool(slow.calls))
        job, events = await kit.run(marked_wav(1000), webhook_url=quick.url(), webhook_events="job.completed")
        await eventually(lambda: bool(quick.calls))
        [call] = quick.calls
        body = Webhook(SECRET).verify(call.body, call.headers)
        assert body == {"type": "job.completed", "timestamp": events[-1]["at"], "data": {"job": events[-1]["job"]}}
        assert body["data"]["job"]["status"] == job.status == "completed"
        assert body["data"]["job"]["options"]["webhook_url"] == quick.url()


def client(app: object, key: str) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app=app)  # type: ignore[arg-type]
    return httpx.AsyncClient(
        transport=transport, base_url="http://localhost", headers={"Authorization": f"Bearer {key}"}
    )


async def test_the_log_and_a_redelivery_over_http(tmp_path: Path) -> None:
    mine, theirs = "m" * 16, "t" * 16
    settings = load_settings(
        data_dir=tmp_path, upstream_url="ws://127.0.0.1:9/", api_keys=f"me:{mine},they:{theirs}", **SETTINGS
    )
    async with AsyncExitStack() as stack:
        here = await stack.enter_async_context(endpoint(status(410), status(204)))
        runtime = await stack.enter_async_context(open_runtime(settings))
        app = create_app(runtime)
        me, they = [await stack.enter_async_context(client(app, key)) for key in (mine, theirs)]
        upload = BytesUpload(marked_wav(400), {"webhook_url": here.url()})
        job = await runtime.intake.accept(upload, owner="me", query=[], raw_length=None)
        their_upload = BytesUpload(marked_wav(400), {"webhook_url": here.url(), "webhook_events": "job.completed"})
        their_job = await runtime.intake.accept(their_upload, owner="they", query=[], raw_length=None)
        path = f"/jobs/{job.id}/deliveries"
        assert (await me.get(path)).json() == {"data": []}
        await runtime.intake.cancel(job.id)
        await start_worker(runtime, stack)
        webhook_id = (await attempts(runtime.store, 1, job.id)).id
        [first] = (await me.get(path)).json()["data"]
        assert (first["id"], first["status"], first["url"]) == (webhook_id, "failed", here.url())
        assert [(a["status_code"], a["error"]) for a in first["attempts"]] == [(410, None)]
        assert (await they.get(path)).status_code == 404
        elsewhere = f"/jobs/{their_job.id}/deliveries/{webhook_id}/redeliver"
        for who, where in [
            (they, f"{path}/{webhook_id}/redeliver"),
            (they, elsewhere),
            (me, elsewhere),
            (me, f"{path}/msg_other/redeliver"),
            (me, f"{path}/msg_{job.id}_9/redeliver"),
        ]:
            answer = await who.post(where)
            assert (answer.status_code, answer.json()["code"]) == (404, "not_found")
        again = await me.post(f"{path}/{webhook_id}/redeliver")
        assert (again.status_code, again.json()["status"]) == (202, "pending")
        assert again.json()["next_attempt_at"]
        assert (await attempts(runtime.store, 2, job.id)).status == "delivered"
        assert {call.headers["webhook-id"] for call in here.calls} == {webhook_id}
        document = (await me.get("/openapi.json")).json()
        assert {p for p in document["paths"] if "deliveries" in p} == {
            "/jobs/{job_id}/deliveries", "/jobs/{job_id}/deliveries/{delivery}/redeliver",
        }  # fmt: skip
