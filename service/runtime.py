"""THE composition root: the one place that names concrete classes. FLOOR 4.

`open_runtime` builds everything on one AsyncExitStack, so that whatever fails half way is undone, and yields a frozen
set of parts.
"""

import asyncio
import fcntl
import os
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import structlog
from sqlalchemy import URL

from service.backends.assemblyai import AssemblyAI
from service.backends.local import LocalBlobs
from service.backends.memory import MemoryBus, MemoryQueue
from service.core.errors import Unavailable
from service.feed import Feed
from service.intake import Intake
from service.pacer import Pacer
from service.ports import BlobStore, Bus, Clock, JobQueue, Upstream
from service.retention import Sweeper, remove_orphans
from service.settings import Settings, SettingsError
from service.store import Store, migrate, open_store, schema_is_current
from service.store.keys import StoredKey
from service.telemetry import metrics
from service.transcription import Heartbeat, SessionGate, Transcriber
from service.waveform import Waveforms
from service.webhooks import Webhooks
from service.webhooks.call import Caller

DATABASE_PATIENCE_SECONDS = 60.0  # less than what a container has to start
DATABASE_RETRY_SECONDS = 2.0

log = structlog.get_logger(__name__)


class SystemClock:
    """The wall's time, or `speed` times faster for tests."""

    def __init__(self, speed: float = 1.0) -> None:
        """Only a constructor argument: no setting makes production time run faster."""
        self._speed = speed

    def now(self) -> float:
        """Monotonic seconds."""
        return time.monotonic() * self._speed

    def utc_ms(self) -> int:
        """Unix milliseconds."""
        return time.time_ns() // 1_000_000

    async def sleep(self, seconds: float) -> None:
        """Suspend."""
        await asyncio.sleep(seconds / self._speed)

    def real(self, seconds: float) -> float:
        """The event loop's seconds."""
        return seconds / self._speed


@dataclass(frozen=True, slots=True)
class Runtime:
    """The parts of one process."""

    settings: Settings
    clock: Clock
    store: Store
    blobs: BlobStore
    queue: JobQueue
    bus: Bus
    feed: Feed
    intake: Intake
    waveforms: Waveforms
    transcriber: Transcriber
    sweeper: Sweeper
    webhooks: Webhooks | None
    token_secret: bytes
    stored_keys: Sequence[StoredKey]  # as they were when it was opened
    draining: asyncio.Event


@asynccontextmanager
async def open_runtime(
    settings: Settings, *, clock: Clock | None = None, upstream: Upstream | None = None
) -> AsyncIterator[Runtime]:
    """Open everything `settings` names; `clock` and `upstream` stand in for the outside world in tests. Raises
    `SettingsError`.
    """
    clock = clock or SystemClock()
    async with AsyncExitStack() as stack:
        url = database_url(settings)
        if settings.cluster:
            await _check_schema(url, clock)
        else:
            settings.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            stack.callback(os.close, _lock(settings.data_dir))
            await migrate(url)
        alone = settings.database_url is None  # whoever holds the lock is the only one who works on these jobs
        store = await stack.enter_async_context(open_store(url))
        if alone:
            await store.expire_leases()
        blobs = await _open_blobs(settings, store, clock, stack)
        queue, bus = await open_broker(settings, clock, stack)
        if upstream is None:
            key = settings.assemblyai_api_key
            client = AssemblyAI(settings.upstream_url, key.get_secret_value() if key is not None else None)
            upstream = await stack.enter_async_context(client)
        waveforms = Waveforms(store, blobs)
        stack.push_async_callback(waveforms.close)
        yield Runtime(
            settings=settings,
            clock=clock,
            store=store,
            blobs=blobs,
            queue=queue,
            bus=bus,
            feed=Feed(store, bus, clock),
            intake=Intake(
                store=store, blobs=blobs, queue=queue, bus=bus, clock=clock, default_model=settings.speech_model,
                max_audio_s=settings.max_audio_hours * 3600, max_queue=settings.max_queue,
                webhooks_enabled=bool(settings.webhook_secret),
            ),
            waveforms=waveforms,
            transcriber=Transcriber(
                store=store, bus=bus, blobs=blobs, upstream=upstream,
                pacer=Pacer(clock, metrics.loop_lag.observe), clock=clock,
                gate=_gate(settings, store, clock), heartbeat=Heartbeat(store, clock),
                patience_s=settings.upstream_patience, alone=alone,
            ),
            sweeper=Sweeper(
                store=store, blobs=blobs, clock=clock,
                retain_jobs_s=settings.retain_jobs, retain_audio_s=settings.retain_audio,
            ),
            webhooks=_webhooks(settings, store, clock),
            token_secret=await _token_secret(settings, store),
            stored_keys=await store.keys.all(),
            draining=asyncio.Event(),
        )  # fmt: skip


def _gate(settings: Settings, store: Store, clock: Clock) -> SessionGate:
    """All processes on a database that stream to the same host share its limit."""
    reserve = partial(store.pace.reserve, urlsplit(settings.upstream_url).netloc)
    return SessionGate(clock, per_minute=settings.sessions_per_minute, reserve=reserve)


def _webhooks(settings: Settings, store: Store, clock: Clock) -> Webhooks | None:
    if not settings.webhook_secret:
        return None
    secrets = [secret.get_secret_value() for secret in settings.webhook_secret]
    return Webhooks(store.outbox, clock, Caller(clock, settings.webhook_allow), secrets)


async def _token_secret(settings: Settings, store: Store) -> bytes:
    if settings.token_secret is not None:
        return settings.token_secret.get_secret_value().encode()
    return await store.keys.secret("job_tokens")


def database_url(settings: Settings) -> str:
    """Where the truth is kept."""
    if settings.database_url is not None:
        return settings.database_url.get_secret_value()
    file = str(settings.data_dir.resolve() / "turnwire.db")
    return URL.create("sqlite+aiosqlite", database=file).render_as_string(hide_password=False)


async def _check_schema(url: str, clock: Clock) -> None:
    """Processes of a cluster do not migrate: another release may be running on this database. After a power cut they
    may well be up before it.
    """
    deadline = clock.now() + DATABASE_PATIENCE_SECONDS
    while True:
        try:
            current = await schema_is_current(url)
            break
        except Unavailable as exc:
            if clock.now() > deadline:
                raise Unavailable(f"TURNWIRE_DATABASE_URL: the database does not answer; {exc.detail}") from exc
            log.warning("waiting for the database to answer", reason=exc.detail)
        await clock.sleep(DATABASE_RETRY_SECONDS)
    if not current:
        raise SettingsError("TURNWIRE_DATABASE_URL: the database is not of this version; run `turnwire migrate`")


async def _open_blobs(settings: Settings, store: Store, clock: Clock, stack: AsyncExitStack) -> BlobStore:
    shared = await open_objects(settings, stack)
    if shared is not None:
        return shared
    blobs = LocalBlobs(settings.data_dir / "audio")
    await blobs.sweep()
    await remove_orphans(store, blobs, clock.utc_ms())  # nobody uploads to a locked directory
    return blobs


async def open_objects(settings: Settings, stack: AsyncExitStack) -> BlobStore | None:
    """The shared audio store, where there is one. Raises `Unavailable` when it cannot even be asked."""
    if settings.audio_url is None:
        return None
    from service.backends.objects import ObjectStore

    return await stack.enter_async_context(ObjectStore(settings.audio_url.get_secret_value()))


async def open_broker(settings: Settings, clock: Clock, stack: AsyncExitStack) -> tuple[JobQueue, Bus]:
    """What rings between processes, or within this one. It need not be there."""
    if settings.cluster:
        from service.backends.nats import NatsBroker

        broker = await stack.enter_async_context(NatsBroker(settings.broker_url.get_secret_value()))
        return broker.queue, broker.bus
    return MemoryQueue(clock), MemoryBus()


def _lock(directory: Path) -> int:
    """Hold the data directory until the returned descriptor is closed; the kernel lets go of it when the process
    dies.
    """
    descriptor = os.open(directory / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise SettingsError(
            f"TURNWIRE_DATA_DIR: another Turnwire process uses {directory}; stop it, or set another directory"
        ) from None
    return descriptor
