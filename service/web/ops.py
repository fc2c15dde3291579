"""For the operator: alive, ready, metrics. FLOOR 5.

`/healthz` says that the process answers, nothing more: restarting it mends no database. `/readyz` asks every part
by name, each for two seconds at most and never AssemblyAI: its outage is waited out, jobs are still taken. A full
queue is no fault either; it is told and answered 429.
"""

import asyncio
import contextlib
from collections.abc import Awaitable

import msgspec
from fastapi import APIRouter
from starlette.responses import Response

from service.core.errors import OurError
from service.core.job import to_json
from service.runtime import Runtime
from service.telemetry import METRICS_CONTENT_TYPE, metrics, render
from service.web.context import Services
from service.web.schemas import json_answer

CHECK_SECONDS = 2.0

router = APIRouter()


class Check(msgspec.Struct):
    """One part of the service."""

    ok: bool
    detail: str


class Readiness(msgspec.Struct):
    """Whether requests should come here."""

    status: str
    checks: dict[str, Check]


@router.get(
    "/healthz",
    summary="Alive",
    responses={200: {"description": "The process answers", "content": {"application/json": {}}}},
)
async def healthz() -> Response:
    """Asks nobody."""
    return Response(b'{"status":"ok"}', media_type="application/json")


@router.get(
    "/readyz",
    summary="Ready",
    responses={
        200: json_answer("Every part works", "Readiness"),
        503: json_answer("Some part does not, or the process is being stopped", "Readiness"),
    },
)
async def readyz(runtime: Services) -> Response:
    """Every part by name."""
    database, audio, queue = await asyncio.gather(
        _check(runtime.store.check()), _check(runtime.blobs.check()), _check(_queue(runtime))
    )
    draining = runtime.draining.is_set()
    checks = {
        "database": database,
        "audio": audio,
        "queue": queue,
        "draining": Check(not draining, "is being stopped" if draining else "no"),
    }
    ready = all(check.ok for check in checks.values())
    return Response(
        to_json(Readiness("ready" if ready else "not ready", checks)),
        200 if ready else 503,
        media_type="application/json",
    )


async def _queue(runtime: Runtime) -> str:
    where = await runtime.queue.check()
    with contextlib.suppress(Exception):  # a database that does not answer is told by its own check
        depth, _ = await runtime.store.queue()
        return f"{where}, {depth} of at most {runtime.settings.max_queue} jobs waiting"
    return where


async def _check(part: Awaitable[str]) -> Check:
    try:
        async with asyncio.timeout(CHECK_SECONDS):
            return Check(True, await part)
    except TimeoutError:
        return Check(False, f"no answer within {CHECK_SECONDS:g} s")
    except OurError as exc:
        return Check(False, exc.detail)
    except Exception as exc:  # noqa: BLE001 - whatever a backend raises: this part does not work; the text may hold a secret
        return Check(False, f"fails with {type(exc).__name__}")


@router.get(
    "/metrics", summary="Metrics", responses={200: {"description": "Prometheus text", "content": {"text/plain": {}}}}
)
async def metrics_text(runtime: Services) -> Response:
    """What is kept in the database is asked for now."""
    with contextlib.suppress(Exception):  # the other metrics are worth most when the database is down
        async with asyncio.timeout(CHECK_SECONDS):
            depth, oldest_ms = await runtime.store.queue()
            metrics.queue_depth.set(depth)
            metrics.queue_oldest_seconds.set(
                (runtime.clock.utc_ms() - oldest_ms) / 1000 if oldest_ms is not None else 0
            )
    return Response(render(), media_type=METRICS_CONTENT_TYPE)
