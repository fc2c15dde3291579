"""Webhooks to send, audio to remove, and when a job ended."""

import time

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Make the outbox; jobs that have ended before are kept as if they ended now."""
    op.create_table(
        "webhooks",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("job_id", sa.Text, nullable=False),
        sa.Column("seq", sa.Integer, nullable=False),
        sa.Column("type", sa.Text, nullable=False),
        sa.Column("url", sa.Text, nullable=False),
        sa.Column("endpoint", sa.Text, nullable=False),
        sa.Column("status", sa.Text, nullable=False),
        sa.Column("tries", sa.Integer, nullable=False),
        sa.Column("due_ms", sa.BigInteger),
        sa.Column("lease_until_ms", sa.BigInteger, nullable=False),
        sa.Column("epoch", sa.Integer, nullable=False),
        sa.Column("log", sa.LargeBinary, nullable=False),
    )
    op.create_index("webhooks_by_due", "webhooks", ["due_ms"])
    op.create_index("webhooks_by_job", "webhooks", ["job_id"])
    op.create_table("doomed_audio", sa.Column("job_id", sa.Text, primary_key=True))
    op.add_column("jobs", sa.Column("ended_ms", sa.BigInteger))
    op.add_column("jobs", sa.Column("audio_kept", sa.Boolean, nullable=False, server_default=sa.true()))
    op.create_index("jobs_by_end", "jobs", ["ended_ms"])
    op.create_index("jobs_by_audio", "jobs", ["audio_kept", "ended_ms"])
    ended = sa.text("UPDATE jobs SET ended_ms = :now WHERE status IN ('completed', 'failed', 'canceled')")
    op.get_bind().execute(ended, {"now": time.time_ns() // 1_000_000})
