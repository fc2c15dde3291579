"""`turnwire keys`: API keys kept in the database. FLOOR 6.

They work on the database itself, so also before the first start and while the service runs, which looks every few
seconds.
"""

import asyncio
import re
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from service.cli.terminal import CommandError, database_place, result_line, say

if TYPE_CHECKING:
    from service.store.keys import Keys

T = TypeVar("T")

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Make, list and revoke API keys.",
    epilog="""\b
Examples:
  turnwire keys create ci
  turnwire keys ls
  turnwire keys revoke ci""",
)


@app.command(
    epilog="""\b
Examples:
  turnwire keys create ci
  turnwire keys create ci > key.txt; turnwire jobs ls --key @key.txt"""
)
def create(
    name: Annotated[str, typer.Argument(metavar="NAME", show_default=False, help="Owner of what is done with it.")],
) -> None:
    """Make a key and print it, this once.

    A name may have several keys; they own the same jobs. From the first key on the service asks everybody for one.
    """
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", name):
        raise CommandError("NAME should be of letters, digits, '.', '_' and '-', at most 64", 2)
    result_line(_with(lambda keys: keys.create(name)))
    say("Keep it: only its SHA-256 is stored. It counts within 5 seconds where the service runs")


@app.command(
    epilog="""Tab-separated and without a head: id, name, created_at.

\b
Example:
  turnwire keys ls"""
)
def ls() -> None:
    """List keys, oldest first.

    Those of TURNWIRE_API_KEYS are not among them.
    """
    from service.core.job import rfc3339

    for key in _with(lambda keys: keys.all()):
        result_line(f"{key.id}\t{key.name}\t{rfc3339(key.created_ms)}")


@app.command(
    epilog="""\b
Examples:
  turnwire keys revoke ci
  turnwire keys ls | cut -f1 | xargs -r -n1 turnwire keys revoke"""
)
def revoke(
    name: Annotated[str, typer.Argument(metavar="NAME", show_default=False, help="A name: all its keys. Or one id.")],
) -> None:
    """Revoke all keys of a name, or one by its id.

    A running service refuses them within 5 seconds. Job tokens made with them work until they expire, a day at most.
    """
    revoked = _with(lambda keys: keys.revoke(name))
    if revoked == 0:
        raise CommandError(f"no stored key has the name or the id {name}; `turnwire keys ls` lists them")
    say(f"Revoked {revoked} key{'' if revoked == 1 else 's'}")


def _with(run: "Callable[[Keys], Awaitable[T]]") -> T:
    """What `run` makes of the stored keys."""
    from sqlalchemy.exc import DBAPIError

    from service.core.errors import TurnwireError
    from service.runtime import database_url
    from service.settings import load_settings
    from service.store import migrate, open_store, schema_is_current

    settings = load_settings()

    async def work() -> T:
        url = database_url(settings)
        if settings.database_url is None:
            settings.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            await migrate(url)
        elif not await schema_is_current(url):
            raise CommandError(f"the database {database_place(settings)} is not up to date: run `turnwire migrate`")
        async with open_store(url) as store:
            return await run(store.keys)

    try:
        return asyncio.run(work())
    except (TurnwireError, DBAPIError) as exc:
        text = exc.detail if isinstance(exc, TurnwireError) else str(exc.orig)
        raise CommandError(f"the database {database_place(settings)} cannot be used: {text}") from None
