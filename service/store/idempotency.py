"""Idempotency keys: which job an upload with that key has become. FLOOR 2, part of the store.

A key is taken in the transaction that creates its job, so one that is found has a job, and of two uploads that race
for it one wins. Keys are per owner, live for `KEPT_SECONDS` on the database's clock, and go with their job; what has
expired is removed by whoever takes the next key.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Select, delete, select, tuple_
from sqlalchemy.ext.asyncio import AsyncConnection

from service.store.schema import idempotency, now_ms

KEPT_SECONDS = 24 * 3600


@dataclass(frozen=True, slots=True)
class Use:
    """What a key stands for: a job, and the fingerprint of the file and options that it was made of."""

    job_id: str
    fingerprint: str


def lookup(owner: str, key: str) -> Select[str, str]:
    """The query for the use of a key."""
    return select(idempotency.c.job_id, idempotency.c.fingerprint).where(
        idempotency.c.owner == owner, idempotency.c.key == key, idempotency.c.expires_ms > now_ms()
    )


async def take(
    connection: AsyncConnection, insert_ignoring: Callable[..., Any], owner: str, key: str, use: Use
) -> Use | None:
    """Take a key; None, or who has it. Whose commit is tried again has it already."""
    # None that another process has in its hands: two that tidy up must not wait for each other.
    expired = select(idempotency.c.owner, idempotency.c.key).where(idempotency.c.expires_ms <= now_ms())
    place = tuple_(idempotency.c.owner, idempotency.c.key)
    await connection.execute(delete(idempotency).where(place.in_(expired.with_for_update(skip_locked=True))))
    values = {
        "job_id": use.job_id, "fingerprint": use.fingerprint, "expires_ms": now_ms() + KEPT_SECONDS * 1000,
    }  # fmt: skip
    taking = insert_ignoring(idempotency).values(owner=owner, key=key, **values)
    free = idempotency.c.expires_ms <= now_ms()
    await connection.execute(taking.on_conflict_do_update(index_elements=["owner", "key"], set_=values, where=free))
    row = (await connection.execute(lookup(owner, key))).one()
    found = Use(row[0], row[1])
    return None if found == use else found
