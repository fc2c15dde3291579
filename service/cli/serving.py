"""`turnwire serve`, `worker`, `sandbox` and `migrate`, and the whole service in the process of `transcribe`. FLOOR 6.

The parts are opened on one stack: sandbox, runtime, worker, HTTP server; they end in the opposite order, so that jobs
are handed back while there is still an upstream to say Terminate to.
"""

import asyncio
import gc
import secrets
import tempfile
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit

import typer
from typer.core import TyperCommand

from service.cli.terminal import CommandError, database_place, say

if TYPE_CHECKING:
    from collections.abc import Callable

    from starlette.types import ASGIApp

    from service.runtime import Runtime
    from service.settings import Settings
    from service.web.server import HttpServer
    from service.worker import Worker

SERVE_EXAMPLES = """\b
Examples:
  turnwire serve --sandbox                      try everything without an account
  ASSEMBLYAI_API_KEY=... turnwire serve
  curl -F file=@talk.wav http://127.0.0.1:8000/jobs"""

WORKER_EXAMPLES = """\b
Example:
  TURNWIRE_BROKER_URL=nats://... TURNWIRE_DATABASE_URL=postgresql+asyncpg://... \\
  TURNWIRE_AUDIO_URL=s3://bucket turnwire worker --port 8001"""

MIGRATE_EXAMPLES = """\b
Example:
  TURNWIRE_DATA_DIR=/var/lib/turnwire turnwire migrate"""


Host = Annotated[
    str | None,
    typer.Option(metavar="ADDRESS", show_default="127.0.0.1", help="Address to listen on; also TURNWIRE_HOST."),
]
Port = Annotated[
    int | None,
    typer.Option(metavar="N", min=0, max=65535, show_default="8000", help="Port, 0: a free one; also TURNWIRE_PORT."),
]


def serve(
    host: Host = None,
    port: Port = None,
    sandbox: Annotated[
        bool, typer.Option("--sandbox", help="Listen with the local sandbox instead of AssemblyAI; needs no account.")
    ] = False,
) -> None:
    """Serve the API and the page, and transcribe, in one process.

    In cluster mode, where a broker is set, it leaves transcribing to `turnwire worker`. Settings come
    from the environment and .env: TURNWIRE_..., and ASSEMBLYAI_API_KEY.

    SIGTERM and SIGINT drain: no job is begun, running ones are handed back and go on at the next start; exit code 0.
    A second signal ends at once.
    """
    from service.settings import load_settings

    settings = load_settings(host=host, port=port)
    if settings.cluster and sandbox:
        raise CommandError(
            "--sandbox: in cluster mode workers transcribe; run `turnwire sandbox` and give them its address as "
            "TURNWIRE_UPSTREAM_URL",
            2,
        )
    with asyncio.Runner(loop_factory=_loop) as runner:
        runner.run(_serve(settings, with_sandbox=sandbox))


def worker(host: Host = None, port: Port = None) -> None:
    """Take jobs and transcribe them, in cluster mode.

    It serves nothing but its health and metrics. SIGTERM and SIGINT drain: no job is begun, running ones are handed to
    other workers; exit code 0. A second signal ends at once.
    """
    from service.settings import load_settings

    settings = load_settings(host=host, port=port)
    if not settings.cluster:
        raise CommandError(
            "worker: TURNWIRE_BROKER_URL is not set, so that `turnwire serve` transcribes by itself; workers need a "
            "nats:// broker",
            2,
        )
    with asyncio.Runner(loop_factory=_loop) as runner:
        runner.run(_work(settings))


def _loop() -> asyncio.AbstractEventLoop:
    _allow_open_files()
    try:
        import uvloop
    except ImportError:  # not made for every platform
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


def _allow_open_files() -> None:
    """As many as the system lets us: a followed stream takes two, and the usual soft limit is 1,024."""
    with suppress(ImportError, OSError, ValueError):  # not on every platform, and not beyond what its kernel has
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class SandboxCommand(TyperCommand):
    """With the formats of its files beneath the help, read only then."""

    def get_help(self, ctx: Any) -> str:  # noqa: ANN401 - as typer's own
        """The help, formats included, as they are."""
        from service.sandbox.help import HELP

        return f"{super().get_help(ctx)}\n\n{HELP}"


def sandbox(
    host: Annotated[
        str,
        typer.Option(
            metavar="ADDRESS",
            help="Address to listen on; off loopback no key is asked for.",
        ),
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(metavar="N", min=0, max=65535, help="Port to listen on; 0: a free one.")] = 8765,
    script: Annotated[
        Path | None,
        typer.Option(metavar="FILE", exists=True, dir_okay=False, help="What sessions shall hear instead; see below."),
    ] = None,
    faults: Annotated[
        Path | None, typer.Option(metavar="FILE", exists=True, dir_okay=False, help="What goes wrong; see below.")
    ] = None,
    speed: Annotated[
        float, typer.Option(metavar="N", min=0.01, max=1000, help="How fast its clock runs, for tests of clients.")
    ] = 1.0,
) -> None:
    """Run the local AssemblyAI-compatible endpoint.

    It speaks Streaming v3, by default on this machine only, and needs no account. Real speech is recognised offline if
    `pip install '.[sandbox]'` was done; else every session hears numbered words.

    \b
    Examples:
      turnwire sandbox
      turnwire sandbox --script talk.json --faults faults.json
      TURNWIRE_UPSTREAM_URL=ws://127.0.0.1:8765/v3/ws turnwire serve
    """
    from service.sandbox.app import serve_forever
    from service.sandbox.script import PlanFileError
    from service.settings import is_loopback

    try:
        asyncio.run(serve_forever(host, port, script, faults, speed, keyless=not is_loopback(host)))
    except PlanFileError as exc:
        raise CommandError(str(exc), 2) from None


def migrate() -> None:
    """Bring the database up to date.

    `turnwire serve` does it by itself where it runs alone, the processes of a cluster do not. Any number may run at
    once, and while the release before still works on the database.
    """
    from service.core.errors import Unavailable
    from service.runtime import database_url
    from service.settings import load_settings
    from service.store import migrate as bring_up_to_date

    settings = load_settings()
    if settings.database_url is None:
        settings.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        asyncio.run(bring_up_to_date(database_url(settings)))
    except Unavailable as exc:
        raise CommandError(f"{database_place(settings)}: {exc.detail}") from None
    say(f"The database {database_place(settings)} is up to date")


# --- composing -------------------------------------------------------------------------------------------------------


async def _serve(settings: "Settings", *, with_sandbox: bool) -> None:
    from service.settings import check_upstream
    from service.telemetry import configure_logging
    from service.web.app import create_app

    configure_logging(settings.log_format, settings.log_level)
    async with AsyncExitStack() as stack:
        if settings.cluster:
            runtime = await _open_runtime(settings, stack)
            server = _listen(runtime, create_app)
            say(f"Turnwire serves {server.url}, transcribed by its workers")
            await server.serve_until_signal(_nothing)
            return
        upstream = urlsplit(settings.upstream_url).netloc
        if with_sandbox:
            settings, upstream = await _with_sandbox(settings, stack), "the sandbox"
        check_upstream(settings)
        server, worker = await _open_both(settings, stack)
        say(f"Turnwire serves {server.url}, data in {settings.data_dir.resolve()}, transcribed by {upstream}")
        await server.serve_until_signal(worker.drain)


async def _work(settings: "Settings") -> None:
    from service.settings import check_upstream
    from service.telemetry import configure_logging
    from service.web.app import create_worker_app
    from service.worker import start_worker

    configure_logging(settings.log_format, settings.log_level)
    check_upstream(settings)
    async with AsyncExitStack() as stack:
        runtime = await _open_runtime(settings, stack)
        server = _listen(runtime, create_worker_app)
        worker = await start_worker(runtime, stack)
        upstream = urlsplit(settings.upstream_url).netloc
        say(f"Turnwire works, health and metrics at {server.url}, transcribed by {upstream}")
        await server.serve_until_signal(worker.drain)


async def _nothing() -> None:
    """What an API node of a cluster stops before its event streams end."""


async def _with_sandbox(settings: "Settings", stack: AsyncExitStack) -> "Settings":
    """The same settings with a sandbox of this process as upstream. It asks for a key but is not given the real one."""
    from pydantic import SecretStr

    from service.sandbox.app import run_sandbox
    from service.sandbox.recogniser import default_recogniser

    running = await stack.enter_async_context(run_sandbox(recogniser=default_recogniser(), max_records=0))
    return settings.model_copy(update={"upstream_url": running.url, "assemblyai_api_key": SecretStr("sandbox")})


async def _open_runtime(settings: "Settings", stack: AsyncExitStack) -> "Runtime":
    from service.runtime import open_runtime
    from service.settings import check_bind

    runtime = await stack.enter_async_context(open_runtime(settings))
    check_bind(settings, stored_keys=bool(runtime.stored_keys))
    return runtime


async def _open_both(settings: "Settings", stack: AsyncExitStack) -> "tuple[HttpServer, Worker]":
    from service.web.app import create_app
    from service.worker import start_worker

    runtime = await _open_runtime(settings, stack)
    worker = await start_worker(runtime, stack)
    return _listen(runtime, create_app), worker


def _listen(runtime: "Runtime", create: "Callable[[Runtime], ASGIApp]") -> "HttpServer":
    from service.web.server import HttpServer

    try:
        server = HttpServer(runtime, create(runtime))
        gc.freeze()  # what is there now stays: looking through it would stop every stream for a tenth of a second
        return server
    except OSError as exc:
        where = f"{runtime.settings.host}, port {runtime.settings.port}"
        raise CommandError(f"cannot listen on {where}: {exc.strerror}; --host and --port choose others") from None


@asynccontextmanager
async def local_service(keep: Path | None) -> AsyncIterator[tuple[str, str]]:
    """The whole service on a free port of this machine while the context lasts; its URL, and a key only we know.

    Without an AssemblyAI key, where one is needed, the sandbox transcribes. Data goes to `keep`, else it is removed.
    """
    from pydantic import SecretStr

    from service.settings import ApiKey, SettingsError, check_upstream, load_settings
    from service.telemetry import configure_logging

    settings = load_settings()
    configure_logging(settings.log_format, "error")  # what matters is told by the job's events
    async with AsyncExitStack() as stack:
        directory = keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="turnwire-")))
        # The key has no name, so that the jobs belong to whoever serves this directory later without keys.
        key = secrets.token_urlsafe(32)
        settings = settings.model_copy(
            update={
                "data_dir": directory,
                "host": "127.0.0.1",
                "port": 0,
                "allowed_hosts": (),
                "api_keys": (ApiKey("", SecretStr(key)),),
                "auth": None,
            }
        )
        try:
            check_upstream(settings)
        except SettingsError:
            if settings.assemblyai_api_key is not None:
                raise
            say("ASSEMBLYAI_API_KEY is not set: the local sandbox transcribes, not AssemblyAI")
            settings = await _with_sandbox(settings, stack)
        server, worker = await _open_both(settings, stack)
        serving = asyncio.create_task(server.serve(worker.drain), name="local-service")
        try:
            yield server.url, key
        finally:
            server.stop()
            await serving
    if keep is not None:
        say(f"Kept in {keep}; to look at it: TURNWIRE_DATA_DIR={keep} turnwire serve")
