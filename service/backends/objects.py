"""BlobStore over obstore: S3, Google Cloud Storage and Azure, chosen by the URL. FLOOR 3.

Credentials, region and endpoint come from the environment by their vendor's own names, read by obstore itself:
AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION, and AWS_ENDPOINT_URL for a server of one's own;
GOOGLE_APPLICATION_CREDENTIALS; AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY. Needed are the rights to read,
write, delete and list.

Invariants: a blob is seen whole or not at all; an upload holds a few parts in memory, however large it is; an upload
that fails or is cancelled is aborted before `put` raises, and only one that is killed leaves parts behind, which nobody
sees and a lifecycle rule of the bucket removes. What keeps the store from answering is `Unavailable`, within
`ASK_SECONDS` or, for an upload, `PART_SECONDS`; no text of the library is shown, it holds addresses and requests.
"""

import asyncio
import gc
import re
from collections.abc import AsyncIterator, Awaitable
from contextlib import suppress
from datetime import timedelta
from typing import Self, TypeVar

import obstore
import structlog
from obstore.exceptions import BaseError
from obstore.store import ObjectStore as Store
from obstore.store import from_url

from service.core.errors import AudioMissing, OurError, StorageFull, Unavailable

T = TypeVar("T")

PART_BYTES = 5 << 20  # the least that S3 takes; what is smaller goes in one request
PARTS_AT_ONCE = 2
PIECE_BYTES = 1 << 20  # handed to obstore at a time
ASK_SECONDS = 6.0
PART_SECONDS = 20
ABORT_SECONDS = 5.0
NOBODY = "no-such-job"
ERRORS = (BaseError, OSError, ValueError)  # what obstore raises

log = structlog.get_logger(__name__)


class ObjectStore:
    """Audio under the prefix of a URL, one object a job. Enter it before use."""

    read_seconds = 4.0

    def __init__(self, url: str) -> None:
        """`url`: `s3://bucket/prefix`, `gs://bucket/prefix` or `az://container/prefix`. Raises `Unavailable` when the
        environment lacks what the vendor asks for.
        """
        self._url = url
        try:
            self._store = from_url(
                url,
                # Whether to encrypt is said by the endpoint; given options, obstore no longer reads AWS_ALLOW_HTTP.
                client_options={"connect_timeout": "3s", "timeout": f"{PART_SECONDS}s", "allow_http": True},
                retry_config={
                    "max_retries": 3,
                    "retry_timeout": timedelta(seconds=ASK_SECONDS),
                    "backoff": {"max_backoff": timedelta(seconds=1)},
                },
            )
        except ERRORS as exc:
            raise Unavailable("The audio store's settings or credentials are not in the environment.") from exc

    async def __aenter__(self) -> Self:
        """Connects when it is first used."""
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        """Let obstore's threads come to rest: an interpreter that ends right after a request aborts now and then."""
        gc.collect()
        await asyncio.sleep(0.1)

    async def put(self, key: str, chunks: AsyncIterator[bytes]) -> int:
        """Store all or nothing. Overwrites: keys are made once, and a retried request may find its own first try."""
        upload: _Upload | None = None
        size, held = 0, bytearray()
        try:
            async for chunk in chunks:
                held += chunk
                size += len(chunk)
                if len(held) >= (PART_BYTES if upload is None else PIECE_BYTES):
                    upload = upload or _Upload(self._store, key)
                    if not await upload.give(bytes(held)):
                        break  # it failed; the rest need not come
                    held.clear()
            if upload is None:
                upload = _Upload(self._store, key, bytes(held))
            else:
                await upload.end(bytes(held))
            await asyncio.wait([upload.task])
        except BaseException:
            if upload is not None:
                clearing = asyncio.ensure_future(self._clear(upload, key))
                while not clearing.done():  # whatever else is cancelled meanwhile
                    with suppress(asyncio.CancelledError):
                        await asyncio.wait([clearing])
            raise
        try:
            upload.task.result()
        except ERRORS as exc:
            raise _ours(exc) from None
        return size

    async def _clear(self, upload: "_Upload", key: str) -> None:
        if await upload.abandoned_too_late():
            with suppress(OurError):
                await self.delete(key)

    async def read(self, key: str, start: int, length: int) -> bytes:
        """Up to `length` bytes from `start`."""
        try:
            if length > 0:
                return bytes(await _answer(obstore.get_range_async(self._store, key, start=start, length=length)))
        except _BeyondTheEnd:
            pass
        await _answer(obstore.head_async(self._store, key))
        return b""

    async def delete(self, key: str) -> None:
        """Remove it."""
        with suppress(AudioMissing):
            await _answer(obstore.delete_async(self._store, key))

    async def keys(self) -> list[str]:
        """Every object under the prefix, by its name there."""
        found: list[str] = []
        listing = obstore.list(self._store)
        while True:
            try:
                found += [item["path"] for item in await _answer(anext(listing))]
            except StopAsyncIteration:
                return found

    async def sweep(self) -> int:
        """Nothing: other nodes may be uploading; a lifecycle rule of the bucket removes unfinished uploads."""
        return 0

    async def check(self) -> str:
        """Ask for a key that is not there: the answer tells whether the bucket is."""
        with suppress(AudioMissing):
            await _answer(obstore.get_range_async(self._store, NOBODY, start=0, length=1))
        return self._url


class _Upload:
    """One upload in a task of its own, which reads what is given here: `chunks` run in the task of their caller."""

    def __init__(self, store: Store, key: str, whole: bytes | None = None) -> None:
        """In one request if it is given whole, else in parts."""
        self._pieces: asyncio.Queue[bytes | Exception | None] = asyncio.Queue(1)
        self.task = asyncio.ensure_future(
            obstore.put_async(store, key, self._taken(), use_multipart=True, chunk_size=PART_BYTES,
                              max_concurrency=PARTS_AT_ONCE)
            if whole is None
            else obstore.put_async(store, key, whole, use_multipart=False)
        )  # fmt: skip

    async def _taken(self) -> AsyncIterator[bytes]:
        while (piece := await self._pieces.get()) is not None:
            if isinstance(piece, Exception):
                raise piece
            yield piece

    async def give(self, piece: bytes | None) -> bool:
        """Wait until there is room for it; False when the upload has failed."""
        giving = asyncio.ensure_future(self._pieces.put(piece))
        try:
            await asyncio.wait({giving, self.task}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            giving.cancel()
        return not self.task.done()

    async def end(self, piece: bytes) -> None:
        """That was all."""
        if not piece or await self.give(piece):
            await self.give(None)

    async def abandoned_too_late(self) -> bool:
        """Have it aborted; True if it was stored after all."""
        while not self._pieces.empty():
            self._pieces.get_nowait()
        self._pieces.put_nowait(RuntimeError("abandoned"))
        await asyncio.wait([self.task], timeout=ABORT_SECONDS)
        if not self.task.done():
            self.task.cancel()
            return False
        return not self.task.cancelled() and self.task.exception() is None


class _BeyondTheEnd(Exception):
    """Nothing is there to be read: 416."""


async def _answer(asked: Awaitable[T]) -> T:
    """The answer of the store, its errors as ours. Raises `AudioMissing` where there is no such object."""
    try:
        async with asyncio.timeout(ASK_SECONDS):
            return await asked
    except ERRORS as exc:  # TimeoutError is an OSError
        if "status code: 416" in str(exc):
            raise _BeyondTheEnd from None
        raise _ours(exc) from None


def _ours(exc: Exception) -> OurError:
    """Of the library's text only the status and the code of the answer are looked at."""
    status, code = (
        (found[1] if (found := re.search(pattern, str(exc))) else "")
        for pattern in (r"status code: (\d+)", r"<Code>(\w+)</Code>")
    )
    if status == "507" or "StorageFull" in code or "Quota" in code or "InsufficientStorage" in code:
        return StorageFull("The audio store is full. Nothing of this upload was kept.")
    if code in ("NoSuchBucket", "ContainerNotFound"):
        return Unavailable("The audio store has no such bucket.")
    if isinstance(exc, FileNotFoundError):
        return AudioMissing()
    log.warning("the audio store failed", error=type(exc).__name__, status=status, code=code)
    if status in ("401", "403"):
        return Unavailable("The audio store refuses the credentials, or what they may do.")
    return Unavailable("The audio store does not answer. Nothing was lost; try again in a moment.")
