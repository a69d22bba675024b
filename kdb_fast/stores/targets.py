"""Targets as their owners have described them, kept under their names in ``kdb_fast_targets``."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, replace
from typing import Any, NamedTuple, TypeVar

from ..db.address import DatabaseAddress
from ..db.reading import read
from ..errors import SchemaError
from ..records import shell_word, storable_key
from ..tables.column_target import state_table
from ..tables.definition import Definition
from ..tables.keyword import full_text_of
from ..tables.names import qualified
from ..tables.reading import rows_of
from ..tables.table_view import SUFFIX
from ..tables.target import (
    REJECTS,
    RUNS,
    Params,
    Rows,
    Target,
    columns_of,
    identifier,
    rows_on,
)
from .homes import Homes, Kept, find_homes
from .past_runs import LastRun, newest_run, rejected_keys
from .runs import Holder, locked

T = TypeVar("T")

KEEP = (
    "INSERT INTO {kdb_fast_targets} (name, definition) VALUES ({name}, {definition}) ON CONFLICT (name) DO UPDATE "
    "SET definition = excluded.definition, updated_at = {now} "
    "WHERE kdb_fast_targets.definition <> excluded.definition"
)
NOW = {"postgresql": "now()", "sqlite": "strftime('%Y-%m-%d %H:%M:%f', 'now')"}

FORGET_OWN = "DELETE FROM {table} WHERE target = {identity}"
FORGET_STATE = "DELETE FROM {kdb_fast_state} WHERE substr(key, length(key) - length({ends}) + 1) = {ends}"
DROPPED_INDEXES = "SELECT 1 FROM {kdb_fast_state} WHERE key = {key}"
FORGET = "DELETE FROM {kdb_fast_targets} WHERE name = {name}"


def kept_in(address: DatabaseAddress) -> Homes:
    """Where our own tables are in a database, and the targets that are kept there.

    Args:
        address: With the schema of our own tables, where one was named: only that is looked at.

    Raises:
        DatabaseError: The database cannot be reached.
        SchemaError: As :func:`.homes.find_homes`.
    """
    return read(address, lambda connection: homes_on(connection, address))


def homes_on(connection: Any, address: DatabaseAddress) -> Homes:
    """:func:`kept_in` on an open connection."""
    return find_homes(rows_of(connection, address.dialect), address.dialect, address.schema)


def find_in(address: DatabaseAddress, name: str) -> tuple[DatabaseAddress, Definition]:
    """The target of this name, and the address with the schema of our own tables.

    Raises:
        SchemaError: There is none, or several, or this role may not read it.
        DatabaseError: The database cannot be reached.
    """
    found = kept_in(address).one(name)
    return found.where(address), found.definition


def status_in(address: DatabaseAddress, name: str) -> TargetStatus:
    """The state of the target of this name.

    Raises:
        SchemaError: As :func:`find_in`.
        DatabaseError: The database cannot be reached.
    """

    def work(connection: Any) -> TargetStatus:
        found = homes_on(connection, address).one(name)
        return statuses(rows_of(connection, address.dialect), [found])[0]

    return read(address, work)


def statuses_in(address: DatabaseAddress) -> tuple[list[TargetStatus], tuple[str, ...]]:
    """The state of all targets of a database that this role may read, and what it needs to read the others.

    Raises:
        SchemaError: It may not read those of the schema that was named or that the search path leads to.
        DatabaseError: The database cannot be reached.
    """

    def work(connection: Any) -> tuple[list[TargetStatus], tuple[str, ...]]:
        homes = homes_on(connection, address)
        if hidden := homes.hidden.get(str(homes.home.schema)):
            raise SchemaError(hidden)
        return statuses(rows_of(connection, address.dialect), homes.meant), homes.notes

    return read(address, work)


class TargetStatus(NamedTuple):
    """What there is of a target.

    Attributes:
        home: Where our own tables of it are.
        definition: As it is kept.
        rows: Records with a vector, whoever made it; None where the table or column is not there, or cannot be read.
        pieces: Vectors, where texts are cut and a record has several; else None.
        rejected: Records that could not be stored.
        run: The newest run; None where there was none.
    """

    home: Target
    definition: Definition
    rows: int | None
    pieces: int | None
    rejected: int
    run: LastRun | None

    @property
    def state(self) -> str:
        """Of the newest run; ``never`` where there was none."""
        return self.run.state if self.run else "never"

    def as_json(self) -> dict[str, Any]:
        """The values to be printed, the definition's first."""
        run = self.run._asdict() if self.run else None
        return {
            **asdict(self.definition),
            "state_schema": self.home.schema,
            "rows": self.rows,
            "pieces": self.pieces,
            "rejected": self.rejected,
            "state": self.state,
            "run": run,
        }


def statuses(rows: Rows, targets: Iterable[Kept]) -> list[TargetStatus]:
    """The state of each of these targets, counted now.

    Raises:
        DatabaseError: The database cannot answer.
    """
    found = []
    for home, definition in targets:
        own = replace(home, kept_as=definition.identity)
        rejected = len(rejected_keys(rows, own))
        records, pieces = _vectors(rows, home, definition)
        found.append(TargetStatus(home, definition, records, pieces, rejected, newest_run(rows, own)))
    return found


def _vectors(rows: Rows, home: Target, definition: Definition) -> tuple[int | None, int | None]:
    """Records with a vector and, where texts are cut, their pieces."""
    table, column = qualified(*definition.place, home.dialect), identifier(definition.vector, home.dialect)
    first = ", count(CASE WHEN chunk = 0 THEN 1 END)" if definition.chunk else ""
    try:
        vectors, *records = map(int, rows(f"SELECT count({column}){first} FROM {table}", {})[0])  # noqa: S608
    except SchemaError:
        return None, None
    return (records[0], vectors) if records else (vectors, None)


def keep(address: DatabaseAddress, definition: Definition) -> None:
    """Keep a target, in place of the one of its name.

    Args:
        address: With the schema of our own tables, which are up to date.

    Raises:
        SchemaError: This role may not write the table.
        DatabaseError: The database was lost.
    """

    def work(change: Change) -> None:
        home, params = change.home, Params(change.home.dialect)
        name, text = params(definition.name), params(definition.as_json())
        change.execute(home.text(KEEP, name=name, definition=text, now=NOW[home.dialect]), params.values)

    write(address, "keeping the target", work)


def forget(address: DatabaseAddress, definition: Definition, *, with_vectors: bool = False) -> list[str]:
    """Forget a target with its runs, its rejects and what is known of its vectors.

    Args:
        address: With the schema of our own tables.
        with_vectors: Remove the table or column of the vectors too, where kdb-fast has made it.

    Returns:
        What was removed, as messages name it.

    Raises:
        LockedError: A run is going on.
        SchemaError: A run has dropped indexes of it and not built them again, or this role may not.
    """

    def work(change: Change) -> list[str]:
        home = change.home
        holder = change.living(definition.identity)
        if holder is not None:
            raise locked(holder)
        _check_indexes(change, definition)
        params = Params(home.dialect)
        identity = params(definition.identity)
        for table in (RUNS, REJECTS):
            change.execute(home.text(FORGET_OWN, table=home.table(table), identity=identity), params.values)
        params = Params(home.dialect)
        change.execute(home.text(FORGET_STATE, ends=params("/" + definition.identity)), params.values)
        params = Params(home.dialect)
        change.execute(home.text(FORGET, name=params(definition.name)), params.values)
        removed = []
        for statement, shown in _removals(change, definition, with_vectors):
            change.execute(statement, {})
            removed.append(shown)
        return removed

    return write(address, "forgetting the target", work)


def _check_indexes(change: Change, definition: Definition) -> None:
    params = Params(change.home.dialect)
    key = params(f"dropped_indexes/{definition.identity}")
    if change.rows(change.home.text(DROPPED_INDEXES, key=key), params.values):
        raise SchemaError(
            f"A run has dropped indexes of {definition.written} and not built them again yet.",
            remedy=f"Let it end first: kdb-fast reindex {shell_word(definition.name)}",
        )


def _removals(change: Change, definition: Definition, with_vectors: bool) -> Iterator[tuple[str, str]]:
    """Statements that remove a target's tables, each with what it removes."""
    home = change.home
    own = [state_table(definition.name), state_table(definition.name, "pieces")]
    there = columns_of(change.rows, home, [full_text_of(own[0]), *own])
    for table in there if home.dialect == "sqlite" else own:
        if table in there:
            yield f"DROP TABLE {home.table(table)}", home.shown(table)
    if not with_vectors:
        return
    schema, name = definition.place
    table = qualified(schema, name, home.dialect)
    if "view" in definition.created:
        view = f"{name}{SUFFIX}"
        yield f"DROP VIEW IF EXISTS {qualified(schema, view, home.dialect)}", Target(schema).shown(view)
    if definition.into and "table" in definition.created:
        if home.dialect == "sqlite" and definition.keyword:
            yield f"DROP TABLE IF EXISTS {home.table(full_text_of(name))}", full_text_of(name)
        yield f"DROP TABLE IF EXISTS {table}", definition.written
    elif "column" in definition.created and definition.vector in columns_of(
        change.rows, replace(home, schema=schema), (name,)
    ).get(name, ()):
        column = identifier(definition.vector, home.dialect)
        yield f"ALTER TABLE {table} DROP COLUMN {column}", f"{definition.written}.{storable_key(definition.vector)}"


class Change(NamedTuple):
    """A transaction that changes our own tables.

    Attributes:
        execute: Runs a statement; returns how many rows it has changed.
        rows: Runs a statement that gives rows.
        home: Where our own tables are.
        living: The run that is going on on a target of this name, or None for any, if there is one.
    """

    execute: Callable[[str, Mapping[str, Any]], int]
    rows: Rows
    home: Target
    living: Callable[[str | None], Holder | None]


def write(address: DatabaseAddress, what: str, work: Callable[[Change], T]) -> T:
    """``work(change)`` in one transaction, which is committed at its end.

    Args:
        what: What is being done, for messages.

    Raises:
        SchemaError: A table or right is missing.
        DatabaseError: The database cannot be reached.
    """
    if address.dialect == "sqlite":
        from ..db.sqlite_connection import connect_sqlite
        from ..db.sqlite_errors import translated
        from ..db.sqlite_session import transaction
        from .sqlite import runs as sqlite_runs

        with contextlib.closing(connect_sqlite(address)) as file, translated(what), transaction(file):
            return work(
                Change(
                    lambda statement, params: file.execute(statement, params).rowcount,
                    rows_on(file, "sqlite"),
                    Target(),
                    lambda name: sqlite_runs.living(file, name),
                )
            )

    from .postgresql import locks
    from .postgresql import runs as pg_runs
    from .postgresql.session import PgSession

    session = PgSession(address, "targets")

    def attempt() -> T:
        with session.writing() as cursor:
            locks.take(cursor)
            return work(
                Change(
                    lambda statement, params: cursor.execute(statement.encode(), params).rowcount,
                    rows_on(cursor, "postgresql"),
                    session.target,
                    lambda name: pg_runs.living(cursor, session.target, name),
                )
            )

    with contextlib.closing(session):
        return session.retrying(what, attempt)
