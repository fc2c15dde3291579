"""What only an object store can do wrong: stop, hang, answer oddly, and keep parts of what never became whole."""

import asyncio
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator

import pytest

from service.backends import objects
from service.backends.objects import PART_BYTES, ObjectStore
from service.core.errors import AudioMissing, OurError, StorageFull, Unavailable
from tests.engines.s3 import S3

MIB = 1 << 20


@pytest.fixture
def store(s3_server: S3, monkeypatch: pytest.MonkeyPatch) -> ObjectStore:
    """An empty one."""
    return s3_server.store(monkeypatch)


async def mib(count: int) -> AsyncIterator[bytes]:
    for n in range(count):
        yield bytes([n % 256]) * MIB


@pytest.fixture
async def aborted(s3_server: S3) -> AsyncIterator[None]:
    """Whatever the test uploads is completed or aborted in the end."""
    before = s3_server.unfinished_uploads()
    yield
    async with asyncio.timeout(20):
        while await asyncio.to_thread(s3_server.unfinished_uploads) - before:
            await asyncio.sleep(0.05)


@pytest.mark.usefixtures("aborted")
async def test_an_upload_that_fails_is_aborted(store: ObjectStore) -> None:
    under_way = asyncio.Event()

    async def failing() -> AsyncIterator[bytes]:
        async for piece in mib(20):
            yield piece
        under_way.set()
        raise RuntimeError("the caller's")

    with pytest.raises(RuntimeError, match="the caller's"):
        await store.put("k", failing())
    assert under_way.is_set()


@pytest.mark.usefixtures("aborted")
async def test_an_upload_cancelled_at_any_moment_is_aborted_or_removed(store: ObjectStore) -> None:
    ended = set()
    for n in range(16):
        # What is small goes in one request, which is too late to abort as soon as it is made.
        size, moment = (12, n * 0.02) if n < 12 else (1, (n - 12) * 0.002)
        putting = asyncio.create_task(store.put("k", mib(size)))
        await asyncio.sleep(moment)
        while not putting.done():  # and again all the while it cleans up
            putting.cancel()
            await asyncio.sleep(0.002)
        ended.add(putting.cancelled())
        assert await store.keys() == ([] if putting.cancelled() else ["k"])
        await store.delete("k")
    assert True in ended


async def test_a_store_that_stops_is_unavailable_and_comes_back(s3_server: S3, store: ObjectStore) -> None:
    await store.put("before", mib(6))
    more = asyncio.Event()

    async def slow() -> AsyncIterator[bytes]:
        async for piece in mib(8):
            yield piece
        await more.wait()
        async for piece in mib(8):
            yield piece

    putting = asyncio.create_task(store.put("during", slow()))
    await asyncio.sleep(0.2)
    await asyncio.to_thread(s3_server.kill)
    try:
        more.set()
        async with asyncio.timeout(60):
            ends = await asyncio.gather(
                putting, store.put("small", mib(1)), store.put("large", mib(20)), store.read("before", 0, 1),
                store.delete("before"), store.keys(), store.check(), return_exceptions=True,
            )  # fmt: skip
        assert [type(end) for end in ends] == [Unavailable] * 7
    finally:
        await asyncio.to_thread(s3_server.start)
    assert await store.check()
    assert await store.keys() == ["before"]
    assert await store.read("before", 5 * MIB, 2 * MIB) == b"\5" * MIB
    assert await store.put("after", mib(6)) == 6 * MIB


async def test_a_store_that_hangs_is_unavailable_and_fills_no_memory(
    s3_server: S3, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objects, "ASK_SECONDS", 0.5)
    monkeypatch.setattr(objects, "PART_SECONDS", 1)
    store = s3_server.store(monkeypatch)
    await store.put("k", mib(1))
    taken = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal taken
        while True:
            taken += 65_536
            yield bytes(65_536)

    async with asyncio.timeout(60):
        with s3_server.paused():
            for act in (store.read("k", 0, 1), store.check(), store.keys()):
                with pytest.raises(Unavailable):
                    await act
            with pytest.raises(Unavailable):
                await store.put("endless", endless())
        assert taken <= 6 * PART_BYTES
        assert await store.read("k", 0, 1) == b"\0"


async def test_a_bucket_that_is_not_there_is_no_missing_audio(s3_server: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    s3_server.store(monkeypatch)
    store = ObjectStore("s3://nobody-made-it")
    for act in (store.check(), store.read("k", 0, 1), store.put("k", mib(1)), store.put("k", mib(9)), store.keys()):
        with pytest.raises(Unavailable, match="no such bucket"):
            await act


async def test_wrong_credentials_are_told_and_not_shown(s3_server: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    s3_server.store(monkeypatch)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-the-secret")
    store = ObjectStore(s3_server.url)
    for act in (store.check(), store.read("k", 0, 1), store.put("k", mib(1)), store.keys()):
        with pytest.raises(Unavailable, match="refuses the credentials") as caught:
            await act
        assert "turnwire" not in caught.value.detail


def test_a_vendor_whose_settings_are_missing_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME", raising=False)
    with pytest.raises(Unavailable, match="environment"):
        ObjectStore("az://container/prefix")


@pytest.mark.parametrize(
    ("status", "code", "error"),
    [
        ("507 Insufficient Storage", "", StorageFull),
        ("400 Bad Request", "QuotaExceeded", StorageFull),
        ("400 Bad Request", "XMinioStorageFull", StorageFull),
        ("403 Forbidden", "AccessDenied", Unavailable),
        ("404 Not Found", "NoSuchBucket", Unavailable),
        ("404 Not Found", "ContainerNotFound", Unavailable),
        ("500 Internal Server Error", "", Unavailable),
        ("418 I'm a teapot", "", Unavailable),
    ],
)
@pytest.mark.parametrize("size", [1, 9])
async def test_what_the_store_answers_becomes_an_error_of_ours(
    monkeypatch: pytest.MonkeyPatch, status: str, code: str, error: type[OurError], size: int
) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        if "content-length: " in head:
            await reader.readexactly(int(head.split("content-length: ")[1].split("\r\n")[0]))
        body = f"<Error><Code>{code}</Code></Error>"
        writer.write(f"HTTP/1.1 {status}\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1")
    async with server:
        port = server.sockets[0].getsockname()[1]
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        store = ObjectStore("s3://bucket/prefix")
        with pytest.raises(error) as caught:
            await store.put("k", mib(size))
        assert type(caught.value) is error
        assert "127.0.0.1" not in caught.value.detail


async def test_a_key_that_is_missing_is_missing_whatever_is_asked(store: ObjectStore) -> None:
    for start, length in ((0, 1), (0, 0), (10, 10)):
        with pytest.raises(AudioMissing):
            await store.read("k", start, length)


def test_a_process_that_ends_after_its_last_request_ends_well(s3_server: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the pause at the end about one in three is aborted by the interpreter's own end."""
    script = f"""
        import asyncio
        from service.backends.objects import ObjectStore

        async def chunks(count):
            for _ in range(count):
                yield bytes(1 << 20)
            raise RuntimeError

        async def main():
            async with ObjectStore({s3_server.url + "/exits"!r}) as store:
                try:
                    await store.put("k", chunks(7))
                except RuntimeError:
                    pass
                await store.check()

        asyncio.run(main())
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    s3_server.store(monkeypatch)
    running = [subprocess.Popen(command, stderr=subprocess.PIPE) for _ in range(4)]
    assert [(one.communicate(timeout=60)[1], one.returncode) for one in running] == [(b"", 0)] * 4
