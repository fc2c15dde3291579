"""BlobStore over obstore: S3, Google Cloud Storage and Azure, chosen by the URL. FLOOR 3.

Credentials, region and endpoint come from the environment by their vendor's own names, read by obstore itself:
AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION, and AWS_ENDPOINT_URL for a server of one's own;
GOOGLE_APPLICATION_CREDENTIALS; AZURE_STORAGE_ACCOUNT_NAME and its like. Uploads are multipart with bounded memory; what
an interrupted one left behind is invisible, and removed by a lifecycle rule of the bucket. Whatever keeps the store
from answering is `Unavailable` within seconds: who can wait tries again.
"""

import asyncio
import gc
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Self

import obstore
import structlog
from obstore.exceptions import BaseError
from obstore.store import from_url

from service.core.errors import AudioMissing, Unavailable

PART_BYTES = 8 << 20
PARTS_IN_FLIGHT = 2
CHECK_PREFIX = "no-such-job"

log = structlog.get_logger(__name__)


class ObjectStore:
    """Audio under the prefix of a URL, one object a job. Enter it before use."""

    def __init__(self, url: str) -> None:
        """`url`: `s3://bucket/prefix`, `gs://…` or `az://…`."""
        self._url = url
        self._store = from_url(
            url,
            # Whether to encrypt is said by the endpoint; given options, obstore no longer reads AWS_ALLOW_HTTP.
            client_options={"connect_timeout": "3s", "timeout": "30s", "allow_http": True},
            retry_config={
                "max_retries": 2,
                "retry_timeout": timedelta(seconds=5),
                "backoff": {
                    "init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=1), "base": 2,
                },
            },
        )  # fmt: skip

    async def __aenter__(self) -> Self:
        """Connects when it is first used."""
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        """Let obstore's threads come to rest: an interpreter that ends right after a request may abort."""
        gc.collect()
        await asyncio.sleep(0.1)

    async def put(self, key: str, chunks: AsyncIterator[bytes]) -> int:
        """Store all or nothing."""
        size, problem = 0, None

        async def counted() -> AsyncIterator[bytes]:
            nonlocal size, problem
            try:
                async for chunk in chunks:
                    size += len(chunk)
                    yield chunk
            except BaseException as exc:
                problem = exc
                raise

        try:
            await obstore.put_async(
                self._store, key, counted(), use_multipart=True, chunk_size=PART_BYTES, max_concurrency=PARTS_IN_FLIGHT
            )
        except Exception as exc:
            if problem is not None:
                raise problem from None
            raise self._away(exc) from exc
        return size

    async def read(self, key: str, start: int, length: int) -> bytes:
        """Up to `length` bytes from `start`."""
        try:
            return bytes(await obstore.get_range_async(self._store, key, start=start, length=length))
        except FileNotFoundError:
            raise AudioMissing from None
        except Exception as exc:
            if start >= await self._size(key):  # nothing is there to be got, which is told as an error
                return b""
            raise self._away(exc) from exc

    async def _size(self, key: str) -> int:
        try:
            return (await obstore.head_async(self._store, key))["size"]
        except FileNotFoundError:
            raise AudioMissing from None
        except Exception as exc:
            raise self._away(exc) from exc

    async def delete(self, key: str) -> None:
        """Remove it."""
        try:
            await obstore.delete_async(self._store, key)
        except FileNotFoundError:
            pass
        except Exception as exc:
            raise self._away(exc) from exc

    async def keys(self) -> list[str]:
        """Every object under the prefix, by its name there."""
        found: list[str] = []
        try:
            async for page in obstore.list(self._store):
                found += [item["path"] for item in page]
        except Exception as exc:
            raise self._away(exc) from exc
        return found

    async def sweep(self) -> int:
        """Nothing: other nodes may be uploading; a lifecycle rule of the bucket removes unfinished uploads."""
        return 0

    async def check(self) -> str:
        """Raises `Unavailable` when the bucket cannot be asked."""
        try:
            await obstore.list(
                self._store, prefix=CHECK_PREFIX
            ).collect_async()  # finds nothing in a bucket that is there
        except Exception as exc:
            raise self._away(exc) from exc
        return self._url

    def _away(self, exc: Exception) -> Unavailable:
        assert isinstance(exc, BaseError | OSError | ValueError), exc
        log.warning("the audio store does not answer", error=type(exc).__name__)
        return Unavailable(f"The audio store does not answer ({type(exc).__name__}); try again in a moment.")
