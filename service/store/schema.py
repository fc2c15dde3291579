"""The tables, once for SQLite and PostgreSQL. Migrations under `service/migrations` build them; a test compares the
two.
"""

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
    UniqueConstraint,
    true,
)
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement

metadata = MetaData()

# `doc` is the whole public job as JSON; the columns beside it are what queries, fences and leases look at.
jobs = Table(
    "jobs",
    metadata,
    Column("id", Text, primary_key=True),
    Column("owner", Text, nullable=False),
    Column("status", Text, nullable=False),
    Column("created_ms", BigInteger, nullable=False),
    Column("epoch", Integer, nullable=False),  # fencing token: every claim takes the next one
    Column("lease_until_ms", BigInteger, nullable=False),  # on the database's clock
    Column("not_before_ms", BigInteger, nullable=False),  # on the database's clock
    Column(
        "strikes", Integer, nullable=False
    ),  # claims since the last final or hand-back: what too_many_attempts counts
    Column("event_seq", Integer, nullable=False),
    Column("cancel_requested", Boolean, nullable=False),
    Column("doc", LargeBinary, nullable=False),
    Column("ended_ms", BigInteger),  # on the database's clock; null until the job is terminal
    Column("audio_kept", Boolean, nullable=False, default=True, server_default=true()),
    Index("jobs_by_status", "status", "created_ms", "id"),
    Index("jobs_by_owner", "owner", "created_ms", "id"),
    Index("jobs_by_end", "ended_ms"),
    Index("jobs_by_audio", "audio_kept", "ended_ms"),
)

turns = Table(
    "turns",
    metadata,
    Column("job_id", Text, primary_key=True),
    Column("idx", Integer, primary_key=True),
    Column("session_id", Text, nullable=False),
    Column("turn_order", Integer, nullable=False),
    Column("end_ms", Integer, nullable=False),
    Column("doc", LargeBinary, nullable=False),
    UniqueConstraint("job_id", "session_id", "turn_order"),
)

events = Table(
    "events",
    metadata,
    Column("job_id", Text, primary_key=True),
    Column("seq", Integer, primary_key=True),
    Column("type", Text, nullable=False),
    Column("doc", LargeBinary, nullable=False),
)

# What a transaction has promised to the world outside the database. A webhook's body is the event that it tells.
webhooks = Table(
    "webhooks",
    metadata,
    Column("id", Text, primary_key=True),  # the `webhook-id`
    Column("job_id", Text, nullable=False),
    Column("seq", Integer, nullable=False),
    Column("type", Text, nullable=False),
    Column("url", Text, nullable=False),
    Column("endpoint", Text, nullable=False),  # host and port: what shares a bound on attempts at once
    Column("status", Text, nullable=False),
    Column("tries", Integer, nullable=False),  # of the schedule it is on; redelivery begins another
    Column("due_ms", BigInteger),  # on the database's clock; null when there is nothing to do
    Column("lease_until_ms", BigInteger, nullable=False),
    Column("epoch", Integer, nullable=False),  # fencing token, like that of jobs
    Column("log", LargeBinary, nullable=False),  # its attempts as JSON
    Index("webhooks_by_due", "due_ms"),
    Index("webhooks_by_job", "job_id"),
)

# What a search looks at: the words of each final as it stands now (`core.words.searchable`), and those of the file's
# name as turn -1. Apart from `turns`, whose rows are some fifty times as long: a search may have to look at all of it.
said = Table(
    "said",
    metadata,
    Column("job_id", Text, primary_key=True),
    Column("idx", Integer, primary_key=True),
    Column("words", Text, nullable=False),
)

# Idempotency keys of accepted uploads.
idempotency = Table(
    "idempotency",
    metadata,
    Column("owner", Text, primary_key=True),
    Column("key", Text, primary_key=True),
    Column("job_id", Text, nullable=False),
    Column("fingerprint", Text, nullable=False),  # of the file and the options
    Column("expires_ms", BigInteger, nullable=False),  # on the database's clock
    Index("idempotency_by_job", "job_id"),
    Index("idempotency_by_expiry", "expires_ms"),
)

# The public JSON of a job's peaks, once somebody has asked for them; never without the audio.
peaks = Table("peaks", metadata, Column("job_id", Text, primary_key=True), Column("doc", LargeBinary, nullable=False))

# When the next session may begin at an upstream, by its host; on the database's clock. Kept where sessions are paced.
session_pace = Table(
    "session_pace",
    metadata,
    Column("upstream", Text, primary_key=True),
    Column("next_ms", BigInteger, nullable=False),
)

doomed_audio = Table("doomed_audio", metadata, Column("job_id", Text, primary_key=True))


class now_ms(FunctionElement[int]):  # noqa: N801 - reads as a function in queries
    """The database's own clock, Unix milliseconds: leases of several machines must share one clock."""

    type = BigInteger()
    inherit_cache = True


@compiles(now_ms)
def _now_ms(_element: now_ms, _compiler: object, **_kw: object) -> str:
    return "CAST(EXTRACT(EPOCH FROM clock_timestamp()) * 1000 AS BIGINT)"


@compiles(now_ms, "sqlite")
def _now_ms_sqlite(_element: now_ms, _compiler: object, **_kw: object) -> str:
    return "CAST((julianday('now') - 2440587.5) * 86400000 AS INTEGER)"
