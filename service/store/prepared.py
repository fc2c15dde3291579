"""Statements that run for every stream, about once a second. FLOOR 2, part of the store.

SQLAlchemy takes several times as long to run a statement as the database does. These are written like all the others,
but compiled once for each kind of database, and then handed to the driver as text with their parameters in its order.
"""

from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from typing import Any

from sqlalchemy import Insert, Update
from sqlalchemy.ext.asyncio import AsyncConnection

Row = Mapping[str, Any]  # values as drivers take them; there may be more than a statement asks for


class Prepared:
    """A statement with at least two parameters, named by its `bindparam`s or after the columns that it inserts."""

    def __init__(self, statement: Insert | Update, *columns: str) -> None:
        """`columns`: those to insert."""
        self._statement = statement
        self._columns = columns
        self._compiled: dict[str, tuple[str, Callable[[Row], Any], Row]] = {}

    async def run(self, connection: AsyncConnection, row: Row) -> int:
        """With one row of parameters; how many rows of the table it changed."""
        text, ordered, constants = self._for(connection)
        return (await connection.exec_driver_sql(text, ordered({**constants, **row}))).rowcount

    async def run_each(self, connection: AsyncConnection, rows: Sequence[Row]) -> None:
        """With each of these rows; there must be one."""
        text, ordered, constants = self._for(connection)
        await connection.exec_driver_sql(text, [ordered({**constants, **row}) for row in rows])

    def _for(self, connection: AsyncConnection) -> tuple[str, Callable[[Row], Any], Row]:
        """For this kind of database: the text, what puts parameters in order, and those that are always the same."""
        kind = connection.dialect.name
        if kind not in self._compiled:
            compiled = self._statement.compile(dialect=connection.dialect, column_keys=self._columns or None)
            assert compiled.positiontup is not None, "the driver takes parameters by name"
            constants = {name: bind.value for name, bind in compiled.binds.items() if not bind.required}
            self._compiled[kind] = str(compiled), itemgetter(*compiled.positiontup), constants
        return self._compiled[kind]
