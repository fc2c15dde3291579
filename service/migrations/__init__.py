"""Alembic migrations, shipped in the package and configured from code (`store.migrate`).

The release before works on the database while a migration runs and after it, until the last of its processes is
replaced. So a migration only adds: tables, indexes, and columns that are nullable or have a default of the server. What
is no longer wanted is first left unused by one release and removed by a migration of the next; what is to be renamed
is added, written to both by one release, and removed so. Its revision is the next number, and nothing is ever changed
in one that was released. A test holds every step to this. PostgreSQL waits no longer than two seconds for a lock on a
table, then everything is undone and tried again.
"""
