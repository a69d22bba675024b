"""From the definition of a target to the target, as the database that is written has it now."""

from __future__ import annotations

import contextlib

from ..db.address import DatabaseAddress
from ..tables.column_target import ColumnTarget
from ..tables.definition import Definition
from ..tables.describe import quoted
from ..tables.selection import Selection


def find_table_target(address: DatabaseAddress, definition: Definition, selection: Selection) -> ColumnTarget:
    """What a run of this definition writes.

    Args:
        address: With the schema of our own tables.
        selection: What is read.

    Raises:
        SchemaError: A run could not write it.
    """
    if address.dialect == "sqlite":
        from ..db.sqlite_connection import connect_sqlite
        from ..db.sqlite_errors import translated
        from .sqlite import column_find as sqlite_find

        with contextlib.closing(connect_sqlite(address)) as connection, translated("looking at the table"):
            return sqlite_find.find_column(
                connection,
                definition.name,
                definition.table,
                text=selection.text,
                vector=definition.vector,
                form=definition.form,
                key=[key.name for key in selection.key],
            )

    from .postgresql import column_find as pg_find
    from .postgresql.session import PgSession

    session = PgSession(address, "targets")

    def work() -> ColumnTarget:
        with session.transaction() as cursor:
            return pg_find.find_column(
                cursor,
                session.target,
                definition.name,
                quoted(definition.schema, definition.table),
                text=selection.text,
                vector=definition.vector,
                key=[key.name for key in selection.key],
            )

    with contextlib.closing(session):
        return session.retrying("looking at the table", work)
