"""Alembic migrations, shipped in the package and configured from code (`store.migrate`)."""
