"""Targets as their owners have described them, kept under their names in ``kdb_fast_targets``."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, NamedTuple, TypeVar

from ..db.address import DatabaseAddress
from ..db.reading import read
from ..errors import SchemaError
from ..records import command_word, storable_key
from ..tables.column_target import state_table
from ..tables.definition import Definition
from ..tables.describe import find_kept, no_target
from ..tables.keyword import full_text_of
from ..tables.names import qualified
from ..tables.reading import rows_of
from ..tables.table_view import SUFFIX
from ..tables.target import (
    REJECTS,
    RUNS,
    TARGETS,
    Params,
    Rows,
    Target,
    columns_of,
    find_target,
    identifier,
    rows_on,
)
from .past_runs import LastRun, newest_runs, rejected_keys
from .runs import Holder, locked

T = TypeVar("T")

LIST = "SELECT definition FROM {kdb_fast_targets} ORDER BY name"

MAY_READ = "SELECT has_table_privilege(%(table)s, 'SELECT')"

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


def kept(rows: Rows, home: Target, *, required: bool = True) -> list[Definition]:
    """All targets that are kept, by name; [] where there is no table of them.

    Args:
        required: Also where this role may not read the table it is [] otherwise: who reads KameleonDB's index need not.

    Raises:
        SchemaError: One was described by a newer kdb-fast, or this role may not read the table.
    """
    if TARGETS not in columns_of(rows, home, (TARGETS,)):
        return []
    if not required and home.dialect == "postgresql" and not rows(MAY_READ, {"table": home.regclass(TARGETS)})[0][0]:
        return []
    return [Definition.from_json(definition) for (definition,) in rows(home.text(LIST), {})]


def kept_in(address: DatabaseAddress, *, required: bool = True) -> tuple[DatabaseAddress, list[Definition]]:
    """The targets that are kept in a database, and its address with the schema of our own tables.

    Args:
        required: As for :func:`kept`.

    Raises:
        DatabaseError: The database cannot be reached.
        SchemaError: As :func:`kept`.
    """

    def work(connection: Any) -> tuple[DatabaseAddress, list[Definition]]:
        rows = rows_of(connection, address.dialect)
        home = find_target(rows, address.dialect, address.schema, plain=True)
        return replace(address, schema=home.schema), kept(rows, home, required=required)

    return read(address, work)


def find_in(address: DatabaseAddress, name: str) -> tuple[DatabaseAddress, Definition]:
    """The target of this name, and the address with the schema of our own tables.

    Raises:
        SchemaError: There is none.
        DatabaseError: The database cannot be reached.
    """
    where, definitions = kept_in(address)
    return where, _named(name, definitions, address.dialect)


def statuses_in(address: DatabaseAddress, name: str | None = None) -> list[TargetStatus]:
    """The state of all targets of a database, or of the one of this name.

    Raises:
        SchemaError: There is none of this name.
        DatabaseError: The database cannot be reached.
    """
    where, definitions = kept_in(address)
    if name is not None:
        definitions = [_named(name, definitions, address.dialect)]

    def work(connection: Any) -> list[TargetStatus]:
        return statuses(rows_of(connection, where.dialect), Target(where.schema), definitions)

    return read(where, work)


def _named(name: str, definitions: Sequence[Definition], dialect: str) -> Definition:
    found = find_kept(name, definitions, dialect)
    if found is None:
        raise no_target(name, definitions)
    return found


class TargetStatus(NamedTuple):
    """What there is of a target.

    Attributes:
        definition: As it is kept.
        rows: Rows with a vector, whoever made it; None where the table or column is not there, or may not be read.
        rejected: Records that could not be stored.
        run: The newest run; None where there was none.
    """

    definition: Definition
    rows: int | None
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
            "rows": self.rows,
            "rejected": self.rejected,
            "state": self.state,
            "run": run,
        }


def statuses(rows: Rows, home: Target, definitions: Iterable[Definition]) -> list[TargetStatus]:
    """The state of each of these targets, counted now.

    Raises:
        DatabaseError: The database cannot answer.
    """
    found = []
    for definition in definitions:
        own = replace(home, kept_as=definition.identity)
        newest = newest_runs(rows, own, ", ".join(LastRun._fields), 1)
        run = LastRun(*newest[0]) if newest else None
        found.append(TargetStatus(definition, _vectors(rows, home, definition), len(rejected_keys(rows, own)), run))
    return found


def _vectors(rows: Rows, home: Target, definition: Definition) -> int | None:
    schema, table = definition.place
    column = identifier(definition.vector, home.dialect)
    try:
        return int(rows(f"SELECT count({column}) FROM {qualified(schema, table, home.dialect)}", {})[0][0])  # noqa: S608
    except SchemaError:
        return None


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
            remedy=f"Let it end first: kdb-fast reindex {command_word(definition.name)}",
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
        with session.transaction() as cursor:
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
