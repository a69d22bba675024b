"""What kdb-fast has made in a database: what ``uninstall`` removes, and what it leaves behind."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

from ..db.address import DatabaseAddress
from ..db.reading import read
from ..errors import SchemaError
from ..records import storable_key
from ..tables.definition import Definition
from ..tables.kdb_search import KDB_SEARCH
from ..tables.keyword import full_text_of
from ..tables.reading import rows_of
from ..tables.table_view import SUFFIX
from ..tables.target import Rows, Target, columns_of
from .homes import Homes
from .runs import locked
from .targets import Change, homes_on, write

PREFIX = "kdb_fast_"
"""What the names of our own tables and columns begin with, and no others do."""

OWN_TABLES = {
    "postgresql": (
        "SELECT c.relname::text FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace "
        "WHERE n.nspname = %(schema)s AND starts_with(c.relname::text, %(prefix)s) AND c.relkind = 'r' ORDER BY 1"
    ),
    "sqlite": (
        "SELECT name FROM sqlite_master WHERE type = 'table' AND substr(name, 1, length(:prefix)) = :prefix "
        "AND (sql LIKE 'CREATE VIRTUAL%' OR NOT EXISTS (SELECT 1 FROM sqlite_master v "
        # The tables in which a virtual one keeps its rows go with it.
        "WHERE v.sql LIKE 'CREATE VIRTUAL%' AND sqlite_master.name LIKE v.name || '\\_%' ESCAPE '\\')) ORDER BY 1"
    ),
}


class Leftovers(NamedTuple):
    """What there is in a database.

    Attributes:
        removed: Our own tables, as messages name them.
        left: What stays, a sentence each, with what removes it.
    """

    removed: list[str]
    left: list[str]


def look(address: DatabaseAddress) -> Leftovers:
    """What an :func:`uninstall` would remove and leave behind.

    Raises:
        DatabaseError: The database cannot be reached.
    """

    def work(connection: Any) -> Leftovers:
        rows, (homes, home) = rows_of(connection, address.dialect), _home(connection, address)
        return Leftovers([home.shown(name) for name in _own_tables(rows, home)], _left(rows, homes, home))

    return read(address, work)


def uninstall(address: DatabaseAddress) -> Leftovers:
    """Remove our own tables: runs, rejects, descriptions of targets, and what is known of their vectors.

    Returns:
        What was removed, and what is left.

    Raises:
        LockedError: A run is going on.
        SchemaError: This role may not.
        DatabaseError: The database cannot be reached.
    """
    found = look(address)

    def work(change: Change) -> None:
        if (holder := change.living(None)) is not None:
            raise locked(holder)
        for name in _own_tables(change.rows, change.home):
            change.execute(f"DROP TABLE {change.home.table(name)}", {})

    home = read(address, lambda connection: _home(connection, address)[1])
    write(replace(address, schema=home.schema), "removing the tables", work)
    return found


def _home(connection: Any, address: DatabaseAddress) -> tuple[Homes, Target]:
    """Where our own tables are, and the schema of those that are meant: where the search path leads to none, the only
    one that has some.

    Raises:
        SchemaError: Several others have some.
    """
    homes = homes_on(connection, address)
    shown = [Target(schema).shown() for schema in homes.schemas]
    if homes.alone or homes.home.schema in homes.schemas or not shown:
        return homes, homes.home
    if len(shown) > 1:
        raise SchemaError(
            f"There are tables of kdb-fast in the schemas {', '.join(shown)}.",
            remedy=f"Say which are meant: --state-schema {shown[0]}",
        )
    return homes, replace(homes.home, schema=homes.schemas[0])


def _own_tables(rows: Rows, home: Target) -> list[str]:
    values = {"prefix": PREFIX} | ({} if home.schema is None else {"schema": home.schema})
    return [name for (name,) in rows(OWN_TABLES[home.dialect], values)]


def _left(rows: Rows, homes: Homes, home: Target) -> list[str]:
    left = [_vectors(definition, home) for definition in homes.of(home)]
    for schema in map(Target, homes.schemas):
        if schema.schema != home.schema:
            left.append(f"the tables of kdb-fast in the schema {schema.shown()}: --state-schema {schema.shown()}")
    index = replace(home, index=KDB_SEARCH)
    columns = columns_of(rows, index, (KDB_SEARCH.name,)).get(KDB_SEARCH.name, frozenset())
    if columns:
        ours = ", ".join(f"DROP COLUMN {name}" for name in sorted(columns) if name.startswith(PREFIX))
        left.append(
            f"{index.index_shown}: KameleonDB's search index"
            + (f"; without our columns: ALTER TABLE {index.index_shown} {ours};" if ours else "")
        )
    if home.pgvector is not None:
        left.append("the extension vector")
    return left


def _vectors(definition: Definition, home: Target) -> str:
    """The vectors of a target."""
    name = storable_key(definition.name)
    if definition.into:
        (schema, table), removes = definition.place, ""
        if "view" in definition.created:
            removes += f" DROP VIEW {Target(schema).shown(table + SUFFIX)};"
        if home.dialect == "sqlite" and definition.keyword:
            removes += f" DROP TABLE {Target(schema).shown(full_text_of(table))};"
        removes += f" DROP TABLE {definition.written};"
        return f"{definition.written}: the table of vectors of the target {name}:{removes}"
    shown = f"{definition.place_shown}: the vectors of the target {name}"
    return f"{shown}, in a column that kdb-fast has made" if "column" in definition.created else shown
