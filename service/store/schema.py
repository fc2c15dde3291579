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
    Index("jobs_by_status", "status", "created_ms", "id"),
    Index("jobs_by_owner", "owner", "created_ms", "id"),
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


class filename(FunctionElement[str]):  # noqa: N801 - reads as a function in queries
    """The file's name of a row of `jobs`, out of its document."""

    type = Text()
    inherit_cache = True


@compiles(filename)
def _filename(_element: filename, _compiler: object, **_kw: object) -> str:
    return "(convert_from(jobs.doc, 'UTF8')::json ->> 'filename')"


@compiles(filename, "sqlite")
def _filename_sqlite(_element: filename, _compiler: object, **_kw: object) -> str:
    return "json_extract(CAST(jobs.doc AS TEXT), '$.filename')"
