"""What was said, to be searched; idempotency keys; peaks."""

import msgspec
import sqlalchemy as sa
from alembic import op

from service.core.words import searchable

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Make the tables, and make the jobs that are there searchable."""
    said = op.create_table(
        "said",
        sa.Column("job_id", sa.Text, primary_key=True),
        sa.Column("idx", sa.Integer, primary_key=True),
        sa.Column("words", sa.Text, nullable=False),
    )
    op.create_table(
        "idempotency",
        sa.Column("owner", sa.Text, primary_key=True),
        sa.Column("key", sa.Text, primary_key=True),
        sa.Column("job_id", sa.Text, nullable=False),
        sa.Column("fingerprint", sa.Text, nullable=False),
        sa.Column("expires_ms", sa.BigInteger, nullable=False),
    )
    op.create_index("idempotency_by_job", "idempotency", ["job_id"])
    op.create_index("idempotency_by_expiry", "idempotency", ["expires_ms"])
    op.create_table(
        "peaks", sa.Column("job_id", sa.Text, primary_key=True), sa.Column("doc", sa.LargeBinary, nullable=False)
    )
    connection = op.get_bind()
    for (job_id,) in connection.execute(sa.text("SELECT id FROM jobs")).all():
        texts = []
        for query, member in (
            ("SELECT -1, doc FROM jobs WHERE id = :id", "filename"),
            ("SELECT idx, doc FROM turns WHERE job_id = :id", "transcript"),
        ):
            rows = connection.execute(sa.text(query), {"id": job_id})
            texts += [(idx, searchable(msgspec.json.decode(doc)[member])) for idx, doc in rows]
        connection.execute(sa.insert(said), [{"job_id": job_id, "idx": idx, "words": text} for idx, text in texts])
