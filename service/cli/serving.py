"""`turnwire serve`, `sandbox` and `migrate`, and the whole service in the process of `transcribe`. FLOOR 6.

The parts are opened on one stack: sandbox, runtime, worker, HTTP server; they end in the opposite order, so that jobs
are handed back while there is still an upstream to say Terminate to.
"""

import asyncio
import secrets
import tempfile
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit

import typer
from typer.core import TyperCommand

from service.cli.terminal import CommandError, say

if TYPE_CHECKING:
    from service.settings import Settings
    from service.web.server import HttpServer
    from service.worker import Worker

SERVE_EXAMPLES = """\b
Examples:
  turnwire serve --sandbox                      try everything without an account
  ASSEMBLYAI_API_KEY=... turnwire serve
  curl -F file=@talk.wav http://127.0.0.1:8000/jobs"""

MIGRATE_EXAMPLES = """\b
Example:
  TURNWIRE_DATA_DIR=/var/lib/turnwire turnwire migrate"""


def serve(
    host: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", show_default="127.0.0.1", help="Address to listen on; also TURNWIRE_HOST."),
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=0, max=65535, show_default="8000", help="Port, 0: a free one; also TURNWIRE_PORT."
        ),
    ] = None,
    sandbox: Annotated[
        bool, typer.Option("--sandbox", help="Listen with the local sandbox instead of AssemblyAI; needs no account.")
    ] = False,
) -> None:
    """Serve the API and the page, and transcribe, in one process.

    Settings come from the environment and .env: TURNWIRE_..., and ASSEMBLYAI_API_KEY.

    SIGTERM and SIGINT drain: no job is begun, running ones are handed back and go on at the next start; exit code 0.
    A second signal ends at once.
    """
    from service.settings import load_settings

    settings = load_settings(host=host, port=port)
    with asyncio.Runner(loop_factory=_loop) as runner:
        runner.run(_serve(settings, with_sandbox=sandbox))


def _loop() -> asyncio.AbstractEventLoop:
    try:
        import uvloop
    except ImportError:  # not made for every platform
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


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

    `turnwire serve` does it by itself; this is for doing it before.
    """
    from service.runtime import database_url
    from service.settings import load_settings
    from service.store import migrate as bring_up_to_date

    settings = load_settings()
    settings.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    asyncio.run(bring_up_to_date(database_url(settings)))
    say(f"The database in {settings.data_dir.resolve()} is up to date")


# --- composing -------------------------------------------------------------------------------------------------------


async def _serve(settings: "Settings", *, with_sandbox: bool) -> None:
    from service.settings import check_upstream
    from service.telemetry import configure_logging

    configure_logging(settings.log_format, settings.log_level)
    async with AsyncExitStack() as stack:
        upstream = urlsplit(settings.upstream_url).netloc
        if with_sandbox:
            settings, upstream = await _with_sandbox(settings, stack), "the sandbox"
        check_upstream(settings)
        server, worker = await _open(settings, stack)
        say(f"Turnwire serves {server.url}, data in {settings.data_dir.resolve()}, transcribed by {upstream}")
        await server.serve_until_signal(worker.drain)


async def _with_sandbox(settings: "Settings", stack: AsyncExitStack) -> "Settings":
    """The same settings with a sandbox of this process as upstream. It asks for a key but is not given the real one."""
    from pydantic import SecretStr

    from service.sandbox.app import run_sandbox
    from service.sandbox.recogniser import default_recogniser

    running = await stack.enter_async_context(run_sandbox(recogniser=default_recogniser(), max_records=0))
    return settings.model_copy(update={"upstream_url": running.url, "assemblyai_api_key": SecretStr("sandbox")})


async def _open(settings: "Settings", stack: AsyncExitStack) -> "tuple[HttpServer, Worker]":
    from service.runtime import open_runtime
    from service.settings import check_bind
    from service.web.app import create_app
    from service.web.server import HttpServer
    from service.worker import start_worker

    runtime = await stack.enter_async_context(open_runtime(settings))
    check_bind(settings, stored_keys=bool(runtime.stored_keys))
    worker = await start_worker(runtime, stack)
    try:
        server = HttpServer(runtime, create_app(runtime))
    except OSError as exc:
        where = f"{settings.host}, port {settings.port}"
        raise CommandError(f"cannot listen on {where}: {exc.strerror}; --host and --port choose others") from None
    return server, worker


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
        server, worker = await _open(settings, stack)
        serving = asyncio.create_task(server.serve(worker.drain), name="local-service")
        try:
            yield server.url, key
        finally:
            server.stop()
            await serving
    if keep is not None:
        say(f"Kept in {keep}; to look at it: TURNWIRE_DATA_DIR={keep} turnwire serve")
