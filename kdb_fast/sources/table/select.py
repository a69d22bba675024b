"""From the description of a target to the rows that are read; what cannot be read is refused before all else."""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Sequence
from dataclasses import replace

from ...db import pg_errors, pg_settings
from ...errors import KdbFastError, SchemaError
from ...records import shell_word, storable_key
from ...tables.definition import Definition
from ...tables.find_relation import EMPTY_KEY, describe_query, find_relation, key_of, no_key, no_place
from ...tables.key import KeyColumn
from ...tables.names import as_one_expression, as_typed, one_line, or_nearest, said_of_expression
from ...tables.relation import Relation
from ...tables.selection import Selection
from ...tables.target import Dialect, Target, rows_on
from ...tables.text import is_expression, text_columns, text_expression
from ..reader import Reader

NO_RIGHT = "42501"
NUMBERS = "N"
"""Category of PostgreSQL's types of numbers."""

NOT_SQL = re.compile(r'column "?([^"]+?)"? does not exist|no such column: "?([^"\s]+)')
"""How both databases say so in English; in another language no nearest name is proposed."""


def select(reader: Reader, definition: Definition) -> Selection:
    """What the description says, found fit to be read.

    Raises:
        SchemaError: No such table or column, no key, no right, or an expression that cannot be read.
        UsageError: The description makes no sense.
    """
    dialect = reader.address.dialect
    query = definition.query.strip().rstrip(";").rstrip()
    relation = _relation(reader, definition, query)
    if not relation.is_table and not definition.into:
        raise no_place(relation)
    key, indexed = _key(relation, definition.key, dialect)
    names = definition.text
    if not names and not definition.template:
        vector = () if definition.into else (definition.vector,)
        names = text_columns(relation, (*(part.name for part in key), *vector), provider=definition.provider)
    text = text_expression(relation, names, definition.template, dialect)
    selection = Selection(dialect, relation, key, text, definition.filter, query, indexed)
    _check_expressions(reader, selection, definition.text)
    if indexed:
        _check_not_null(reader, selection)
    elif dialect == "postgresql":
        check_unique(reader, selection, selection.source(), selection.keys_as("{}"))
        selection = replace(selection, paged=relation.kind == "view" and _is_simple(reader, selection))
    return selection


def _relation(reader: Reader, definition: Definition, query: str) -> Relation:
    dialect = reader.address.dialect
    if not query:
        return find_relation(reader.fetch, dialect, as_typed(definition.schema, definition.table))
    connection = reader.connection()
    try:
        return describe_query(connection, dialect, query)
    except KdbFastError:
        raise
    except Exception as error:
        explain = pg_errors.explain("reading the query", error, reader.address)
        if not isinstance(error, sqlite3.Error) and not isinstance(explain, SchemaError):
            raise explain from error
        why = pg_errors.primary_message(error).rstrip(".")
        raise SchemaError(f"The query cannot be read: {why}.", remedy="Give one SELECT.") from None


def _key(relation: Relation, wanted: Sequence[str], dialect: Dialect) -> tuple[tuple[KeyColumn, ...], bool]:
    """The columns of the key, and whether they are those of a unique index."""
    if (key := key_of(relation, wanted)) is not None:
        return key, True
    if relation.is_table or not wanted:
        raise no_key(relation, dialect, wanted)
    columns = [column for column in map(relation.column, wanted) if column is not None]
    typed = dialect == "sqlite"
    return tuple(KeyColumn(c.name, c.value_type, c.name, None, EMPTY_KEY, typed=typed) for c in columns), False


# -- what the database says of it --------------------------------------------------------------------------


def _check_expressions(reader: Reader, selection: Selection, text: Sequence[str]) -> None:
    """Refuse a text or a filter that is no SQL over the columns."""
    shown = selection.relation.shown
    why = _refused(reader, selection)
    if why is None:
        for part in text:
            _check_type(reader, selection, part)
        return
    if selection.filter and _refused(reader, replace(selection, filter="")) is None:
        raise SchemaError(
            f"The --filter of {shown} cannot be read: {said_of_expression(why)}",
            remedy="Give an SQL condition over its columns, such as: --filter published",
        )
    raise SchemaError(
        f"The text of {shown} cannot be read by {storable_key(one_line(selection.text))}: {why}",
        remedy="Give columns, or SQL expressions over them.",
    )


def _refused(reader: Reader, selection: Selection) -> str | None:
    """Why the rows cannot be read; None where they can."""
    relation = selection.relation
    try:
        if selection.filter:
            whole = as_one_expression(selection.escaped(selection.filter))
            reader.fetch(f"SELECT {whole} FROM {selection.rows} t LIMIT 0", {})  # noqa: S608
        reader.fetch(f"SELECT {selection.selected} FROM {selection.source()} LIMIT 0", {})  # noqa: S608
    except SchemaError as error:
        cause = error.__cause__ or error
        reason = pg_errors.primary_message(cause).rstrip(".")
        if pg_errors.sqlstate(cause) == NO_RIGHT:
            role = Target(reader.fetch("SELECT current_user::text", {})[0][0]).shown()
            raise SchemaError(
                f"The role {role} may not read {relation.shown}: {reason}.",
                remedy=f"Let its owner run: GRANT SELECT ON {relation.shown} TO {role};",
            ) from None
        missing = NOT_SQL.search(reason)
        if missing is None:
            return f"{reason}."
        return reason + or_nearest(missing[1] or missing[2], (column.name for column in relation.columns))
    return None


def check_rows(reader: Reader, selection: Selection, text: Sequence[str], limit: int | None) -> None:
    """Refuse SQL that fails on a row, such as a cast of what is no number; the columns of a table cannot.

    Args:
        text: The columns and expressions that are embedded.
        limit: Only so many rows will be read.
    """
    relation = selection.relation
    written = [*(part for part in text if is_expression(relation, part)), *filter(None, [selection.filter])]
    if (relation.is_table and not written) or (selection.dialect == "sqlite" and not selection.paged):
        return  # or every row is copied at the start
    rows = f"SELECT {selection.text_as_text} AS kdb_fast_text FROM {selection.source()}"  # noqa: S608
    if limit is not None:
        rows += f" ORDER BY {selection.order} LIMIT {limit}" if selection.paged else f" LIMIT {limit}"
    try:
        reader.fetch(f"SELECT count(kdb_fast_text) FROM ({rows}) kdb_fast_rows", {})  # noqa: S608
    except SchemaError as error:
        reason = pg_errors.primary_message(error.__cause__ or error).rstrip(".")
        raise SchemaError(
            f"A row of {relation.shown} cannot be read{' by ' if written else ''}"
            f"{', '.join(storable_key(part) for part in written)}: {reason}.",
            remedy="Make it take every row (such as by CASE WHEN … THEN … END), or leave such rows out: --filter SQL.",
        ) from None


def _check_type(reader: Reader, selection: Selection, part: str) -> None:
    """Refuse an expression that is a number."""
    if selection.dialect == "sqlite" or not is_expression(selection.relation, part):
        return
    found = reader.fetch(
        "SELECT typcategory::text, format_type(oid, NULL) FROM pg_type WHERE oid = pg_typeof(("  # noqa: S608
        f"SELECT ({selection.escaped(part)}\n) FROM {selection.rows} t LIMIT 0))",
        {},
    )
    for category, kind in found:
        if category == NUMBERS:
            raise SchemaError(
                f"--text {storable_key(part)} is of type {kind}; expected text.",
                remedy=f"To embed it all the same, make text of it: --text {shell_word(f'CAST({part} AS text)')}",
            )


def _check_not_null(reader: Reader, selection: Selection) -> None:
    """Refuse a table in which a row has no key: it could not be found again."""
    if not selection.can_be_null:
        return
    names = ", ".join(storable_key(key.name) for key in selection.key)
    null = " OR ".join(f"{column} IS NULL" for column in selection.keys_as("{}"))
    if reader.fetch(f"SELECT 1 FROM {selection.rows} t WHERE {null} LIMIT 1", {}):  # noqa: S608
        raise SchemaError(
            f"The key ({names}) of {selection.relation.shown} is NULL in a row; it could not be found again.",
            remedy="Name another --key, or let no row have NULL there.",
        )


def check_unique(reader: Reader, selection: Selection, source: str, keys: Sequence[str]) -> None:
    """Refuse rows whose key is NULL or that of another row.

    Args:
        source: What stands after FROM.
        keys: The columns of the key there.

    Raises:
        SchemaError: There is such a row.
    """
    group, null = ", ".join(keys), " OR ".join(f"{key} IS NULL" for key in keys)
    shown = ", ".join(f"CAST({key} AS text)" for key in keys)
    statement = f"SELECT {shown}, count(*) FROM {source} GROUP BY {group} HAVING count(*) > 1 OR {null} LIMIT 1"  # noqa: S608
    found = reader.fetch(statement, {}, only_reading=True)
    if found:
        *values, count = found[0]
        names = ", ".join(storable_key(key.name) for key in selection.key)
        key = ", ".join("NULL" if value is None else storable_key(value, 60) for value in values)
        what = selection.relation.shown
        raise SchemaError(
            f"The key ({names}) of {what} is NULL in a row."
            if None in values
            else f"The key ({names}) of {what} does not tell its rows apart: {count:,} have {key}.",
            remedy="Name columns that do, each with its own --key; in a query of two tables, SELECT 'a' AS source … "
            "tells the rows of one from those of the other.",
        )


def _is_simple(reader: Reader, selection: Selection) -> bool:
    """Whether a view is no more than rows of a table, which an index gives in the order of the key."""
    regclass = selection.relation.regclass
    updatable = reader.fetch("SELECT pg_relation_is_updatable(to_regclass(%(view)s), false) & 4", {"view": regclass})
    if not updatable[0][0]:
        return False
    page = f"SELECT {selection.selected} FROM {selection.source()} ORDER BY {selection.order} LIMIT 9"  # noqa: S608
    with pg_settings.transaction(reader.connection(), "SET LOCAL enable_sort = off"):
        plan = rows_on(reader.connection(), "postgresql")(f"EXPLAIN (FORMAT JSON) {page}", {})[0][0]
    return "Sort" not in (plan if isinstance(plan, str) else json.dumps(plan))
