"""API keys made by `turnwire keys`, and the secrets the service makes for itself. FLOOR 2, part of the store.

Of a key only its SHA-256 is kept; it has 256 random bits, so a plain hash is enough. Its id, which is a part of it,
is how it is looked up and may be shown. Revoking removes the row.
"""

import hashlib
import re
import secrets
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NamedTuple

from sqlalchemy import BigInteger, Column, LargeBinary, Table, Text, delete, or_, select
from sqlalchemy.ext.asyncio import AsyncConnection

from service.store.schema import metadata, now_ms
from service.store.writer import Writer

_FORM = re.compile(r"tw_([0-9a-f]{12})_[A-Za-z0-9_-]{43}")

api_keys = Table(
    "api_keys",
    metadata,
    Column("id", Text, primary_key=True),
    Column("name", Text, nullable=False),  # the owner; several keys may have one, so that they can be rotated
    Column("sha256", LargeBinary, nullable=False),
    Column("created_ms", BigInteger, nullable=False),
)

own_secrets = Table(
    "own_secrets", metadata, Column("name", Text, primary_key=True), Column("value", LargeBinary, nullable=False)
)


class StoredKey(NamedTuple):
    """What is known of a key."""

    id: str
    name: str
    sha256: bytes
    created_ms: int


def key_id(key: str) -> str | None:
    """The id in what has the form of a stored key."""
    match = _FORM.fullmatch(key)
    return match[1] if match is not None else None


class Keys:
    """The stored keys and secrets."""

    def __init__(
        self, rows: Callable[[Any], Awaitable[Sequence[Any]]], writer: Writer, insert_ignoring: Callable[..., Any]
    ) -> None:
        """Made by the store; `rows` runs a query."""
        self._rows = rows
        self._writer = writer
        self._insert_ignoring = insert_ignoring

    async def all(self) -> list[StoredKey]:
        """Every key, oldest first."""
        query = select(api_keys).order_by(api_keys.c.created_ms, api_keys.c.id)
        return [StoredKey(*row) for row in await self._rows(query)]

    async def create(self, name: str) -> str:
        """A new key in that name; told this once."""
        key_id = secrets.token_hex(6)
        key = f"tw_{key_id}_{secrets.token_urlsafe(32)}"
        row = {"id": key_id, "name": name, "sha256": hashlib.sha256(key.encode()).digest(), "created_ms": now_ms()}

        async def run(connection: AsyncConnection) -> None:
            await connection.execute(self._insert_ignoring(api_keys).values(row).on_conflict_do_nothing())

        await self._writer.write("", run)
        return key

    async def revoke(self, name: str) -> int:
        """Remove the keys of that name, or the one of that id; how many there were."""
        wanted = or_(api_keys.c.name == name, api_keys.c.id == name)

        async def run(connection: AsyncConnection) -> int:
            return (await connection.execute(delete(api_keys).where(wanted))).rowcount

        return await self._writer.write("", run)

    async def secret(self, name: str) -> bytes:
        """32 random bytes, made when they are first asked for and the same ever after."""
        query = select(own_secrets.c.value).where(own_secrets.c.name == name)
        if rows := await self._rows(query):
            return bytes(rows[0].value)

        async def run(connection: AsyncConnection) -> bytes:
            made = self._insert_ignoring(own_secrets).values(name=name, value=secrets.token_bytes(32))
            await connection.execute(made.on_conflict_do_nothing())
            return bytes((await connection.execute(query)).scalar_one())

        return await self._writer.write("", run, patient=True)
