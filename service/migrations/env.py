"""Alembic's entry: runs on the connection that `store.migrate` hands over; there is no alembic.ini."""

from alembic import context

from service.store.schema import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata, render_as_batch=True)
context.run_migrations()
