"""From the definition of a target to the target, as the database that is written has it now."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar

from ..db.address import DatabaseAddress
from ..errors import UsageError
from ..tables.column_target import ColumnTarget
from ..tables.definition import Definition
from ..tables.key import KeyColumn
from ..tables.names import as_typed
from ..tables.relation import Relation
from ..tables.table_target import TableTarget
from ..tables.table_view import view_name, view_statement
from ..tables.target import Target, columns_of
from .targets import Change, write

if TYPE_CHECKING:
    import sqlite3

    import psycopg

T = TypeVar("T")


def find_table_target(
    address: DatabaseAddress,
    definition: Definition,
    key: Sequence[KeyColumn],
    relation: Relation | None,
    text: str,
    *,
    replace: bool = False,
    vacuum: bool = False,
) -> ColumnTarget | TableTarget:
    """What a run of this definition writes.

    Args:
        address: With the schema of our own tables.
        key: By which the rows that are read are told apart.
        relation: What is read; None for a file.
        text: SQL expression of a row's text.
        replace: Vectors of other programs are overwritten.
        vacuum: PostgreSQL: free the versions of rows that are left behind, during the run.

    Raises:
        SchemaError: A run could not write it.
        DatabaseError: The database cannot be reached.
    """
    if definition.into:
        return _table_of_vectors(address, definition, key, relation, text)
    names = [column.name for column in key]
    name, table, vector = definition.name, definition.table, definition.vector
    if address.dialect == "sqlite":
        from .sqlite.column_find import find_column as find_in_file

        return _in_file(
            address,
            lambda file: dataclasses.replace(
                find_in_file(
                    file, name, table, text=text, vector=vector, form=definition.form, key=names,
                    replace=replace,
                ),
                keyword=definition.keyword,
            ),
        )  # fmt: skip
    from .postgresql.column_find import find_column

    place = as_typed(definition.schema, table)
    return _in_postgresql(
        address,
        lambda cursor, home: dataclasses.replace(
            find_column(
                cursor, home, name, place, text=text, vector=vector, form=definition.form, key=names,
                replace=replace, vacuum=vacuum,
            ),
            keyword=definition.keyword,
        ),
    )  # fmt: skip


def _table_of_vectors(
    address: DatabaseAddress, definition: Definition, key: Sequence[KeyColumn], relation: Relation | None, text: str
) -> TableTarget:
    name, into, source = definition.name, definition.into, None if definition.source else relation
    parts = _Parts(
        vector=definition.vector,
        # Where it cannot be read beside the vectors.
        content=bool(relation is None or definition.query or definition.chunk or definition.source),
        chunked=bool(definition.chunk),
        keyword=definition.keyword,
        text=text if source is not None else "",
    )
    if address.dialect == "sqlite":
        from .sqlite.table_find import find_table as find_in_file

        vec0 = definition.form == "vec0"
        return _in_file(
            address,
            lambda file: find_in_file(file, name, into, key=key, source=source, vec0=vec0, **parts),
        )
    from .postgresql.table_find import find_table

    place = as_typed(definition.into_schema, into)
    return _in_postgresql(
        address,
        lambda cursor, home: find_table(cursor, home, name, place, key=key, source=source, **parts),
    )


class _Parts(TypedDict):
    """What a table of vectors has beside its key; see :class:`~kdb_fast.tables.table_target.TableTarget`."""

    vector: str
    content: bool
    chunked: bool
    keyword: str
    text: str


def keyword_of(address: DatabaseAddress, language: str) -> str:
    """What keyword search in a language is made with: a text search configuration of PostgreSQL, or a tokenizer.

    Args:
        language: '' for the database's own.

    Raises:
        SchemaError: There is none.
        DatabaseError: The database cannot be reached.
    """
    if address.dialect == "sqlite":
        from .sqlite.keyword import find_tokenizer

        return _in_file(address, lambda file: find_tokenizer(file, language))
    from .postgresql.keyword import find_configuration

    return _in_postgresql(address, lambda cursor, home: find_configuration(cursor, language))


def create_vector_column(address: DatabaseAddress, definition: Definition, dimensions: int) -> None:
    """Add the column of the vectors to the table, which has none of this name.

    Raises:
        SchemaError: The database refuses it.
        DatabaseError: The database cannot be reached.
    """
    table, vector = definition.table, definition.vector
    if address.dialect == "sqlite":
        from .sqlite.column_find import create_column as create_in_file

        _in_file(address, lambda file: create_in_file(file, table, vector, definition.form or "blob"))
        return
    from .postgresql.column_effects import check_updates
    from .postgresql.column_find import create_column, find_column

    place = as_typed(definition.schema, table)

    def work(cursor: psycopg.Cursor[tuple[Any, ...]], home: Target) -> None:
        create_column(cursor, home, place, vector, dimensions)
        made = find_column(cursor, home, definition.name, place, text="", vector=vector, key=definition.key)
        check_updates(cursor, made)  # else the column is not made

    _in_postgresql(address, work)


def check_view(definition: Definition) -> None:
    """Raise UsageError where a view could not join a table of vectors to what it was made from."""
    if not (definition.into and definition.table):
        raise UsageError("--with-source belongs to --into, and to a table or view that is read.")


def make_view(address: DatabaseAddress, target: ColumnTarget | TableTarget, relation: Relation | None) -> bool:
    """Make the view that joins a table of vectors to what it was made from; False where there is one.

    Raises:
        SchemaError: This role may not make it.
    """
    assert isinstance(target, TableTarget)
    assert relation is not None
    name = view_name(target)

    def work(change: Change) -> bool:
        if columns_of(change.rows, dataclasses.replace(change.home, schema=target.schema), (name,)):
            return False
        change.execute(view_statement(target, relation), {})
        return True

    return write(address, "making the view", work)


def _in_file(address: DatabaseAddress, work: Callable[[sqlite3.Connection], T]) -> T:
    from ..db.sqlite_connection import connect_sqlite
    from ..db.sqlite_errors import translated
    from ..db.sqlite_session import transaction

    with contextlib.closing(connect_sqlite(address)) as file, translated("looking at the table"), transaction(file):
        return work(file)


def _in_postgresql(address: DatabaseAddress, work: Callable[[psycopg.Cursor[tuple[Any, ...]], Target], T]) -> T:
    from .postgresql.session import PgSession

    session = PgSession(address, "targets")

    def attempt() -> T:
        with session.transaction() as cursor:
            return work(cursor, session.target)

    with contextlib.closing(session):
        return session.retrying("looking at the table", attempt)
