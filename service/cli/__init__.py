"""The command line, `turnwire` and `python -m service`. FLOOR 6.

Results on stdout, everything else on stderr; exit code 0 done, 1 failed, 2 wrong use. `Commands` is the one place where
a failure becomes a line and an exit code. Only typer is imported here and at the top of the commands' modules; what a
command needs is imported when it runs, so that `--help` is there at once.
"""

import errno
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from service.cli import doctor, jobs, keys, serving, transcribe
from service.cli.terminal import CommandError, say

CLUSTER_PACKAGES = ("asyncpg", "nats", "obstore")


class Commands(TyperGroup):
    """The root group."""

    def invoke(self, ctx: Any) -> Any:  # noqa: ANN401 - as typer's own
        """Run a command; what stops it leaves as one line."""
        try:
            return super().invoke(ctx)
        except CommandError as exc:
            say(f"turnwire: {exc}")
            raise typer.Exit(exc.code) from None
        except OSError as exc:
            if exc.errno == errno.EPIPE:  # `| head`; typer ends quietly
                raise
            say(f"turnwire: {exc.strerror or exc}{f': {exc.filename}' if exc.filename else ''}")
            raise typer.Exit(1) from None
        except ModuleNotFoundError as exc:
            if exc.name not in CLUSTER_PACKAGES:
                raise
            say(f"turnwire: {exc.name} is not installed, which these settings need: pip install '.[cluster]'")
            raise typer.Exit(1) from None
        except Exception as exc:
            from service.core.errors import OurError  # these cost too much for every start
            from service.settings import SettingsError

            if not isinstance(exc, OurError | SettingsError):
                raise
            say(f"turnwire: {exc}")
            raise typer.Exit(1 if isinstance(exc, OurError) else 2) from None


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,  # its traceback would show local variables, keys among them
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="""\b
Examples:
  turnwire transcribe talk.wav          a file to text, live, in one process
  turnwire serve --sandbox              the service, without an account
  turnwire jobs ls                      what it has done
  turnwire doctor                       what is missing, and what to do

\b
Results are on stdout, everything else is on stderr.
Exit code: 0 done, 1 failed, 2 wrong use.""",
)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"turnwire {version('turnwire')}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Upload a WAV, follow its turns live, keep them: a job service for AssemblyAI's Streaming API v3."""


app.command(epilog=transcribe.EXAMPLES)(transcribe.transcribe)
app.command(epilog=serving.SERVE_EXAMPLES)(serving.serve)
app.command(epilog=serving.WORKER_EXAMPLES)(serving.worker)
app.command(cls=serving.SandboxCommand)(serving.sandbox)
app.command(epilog=serving.MIGRATE_EXAMPLES)(serving.migrate)
app.add_typer(jobs.app, name="jobs")
app.add_typer(keys.app, name="keys")
app.command(epilog=doctor.EXAMPLES)(doctor.doctor)


def main() -> None:
    """The console script."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]  # a terminal that cannot show it must not end the command
    app(prog_name="turnwire")
