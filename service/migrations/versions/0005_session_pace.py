"""When the next upstream session may begin."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    """Make the table."""
    op.create_table(
        "session_pace",
        sa.Column("upstream", sa.Text, primary_key=True),
        sa.Column("next_ms", sa.BigInteger, nullable=False),
    )
