"""SQLite: records that could not be stored, with their reasons."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Sequence

from ...db.sqlite import moment
from ...db.sqlite_session import transaction
from ...records import KeptReject, Key, Reject, storable_key
from ...tables.target import REJECTS, Target
from .. import rejects as shared
from .check import columns

_BEGINS = "substr(kdb_fast_rejects.key, 1, length(p.value)) = p.value"  # json_each() has a column "key" too
GROUPS = f"EXISTS (SELECT 1 FROM json_each(%s) p WHERE {_BEGINS})"  # noqa: S608 - a constant
"""Whether a key is one of these entities, by what it begins with."""
RECORDS_OF_GROUPS = GROUPS.replace(_BEGINS, f"""{_BEGINS} AND kdb_fast_rejects.key <> p.value || '""]'""")
"""The same, without lines that became no record."""
DELETE = "DELETE FROM {kdb_fast_rejects} WHERE target = %s"


def _statement(target: Target, template: str) -> str:
    return target.statement(template).decode().replace("%s", "?")


def _prefixes(entity: str) -> str:
    """What kept keys of an entity begin with, for ``GROUPS``."""
    return json.dumps(shared.group_prefixes(entity, storable_key))


def write(connection: sqlite3.Connection, target: Target, run: int, rejects: Sequence[Reject]) -> None:
    """Keep rejected records, within a flush's transaction."""
    connection.executemany(
        _statement(target, f"INSERT OR REPLACE {shared.INTO_TABLE}"),
        [shared.row_of(reject, run, target.name, storable_key) for reject in rejects],
    )


def forget_stored(connection: sqlite3.Connection, target: Target, run: int, stored: Sequence[Key]) -> None:
    """A record that a run has stored is no longer rejected; what this run itself rejected stays."""
    others = _statement(target, f"SELECT EXISTS (SELECT 1 {shared.OTHERS})")
    if connection.execute(others, (target.name, run)).fetchone()[0]:
        connection.executemany(
            _statement(target, f"{DELETE} AND key_hash = %s AND run <> %s"),
            [(target.name, shared.key_hash(key), run) for key in stored],
        )


def read(connection: sqlite3.Connection, target: Target, entity: str | None) -> list[KeptReject]:
    """See :meth:`kdb_fast.stores.base.Store.rejects`."""
    key, which, values = _which(connection, target, entity)
    rows = connection.execute(_statement(target, shared.READ.replace("<key>", key).replace("<which>", which)), values)
    return [shared.kept_reject((*row[:-2], moment(row[-2]), row[-1]), target, storable_key) for row in rows]


def _which(connection: sqlite3.Connection, target: Target, entity: str | None) -> tuple[str, str, tuple[object, ...]]:
    """Columns of the key, and condition and parameters of the target's rejects of an entity or all."""
    if "key" not in columns(connection, REJECTS):
        which = ("true", ()) if entity is None else ("entity_name = %s", (storable_key(entity),))
        return shared.NAMES_OF_KEY, *which
    if entity is None:
        return shared.KEY, "target = %s", (target.name,)
    return shared.KEY, f"target = %s AND {GROUPS}", (target.name, _prefixes(entity))


def forget_older(connection: sqlite3.Connection, target: Target, entities: Sequence[str], run: int) -> int:
    """See :meth:`kdb_fast.stores.base.Store.forget_older_rejects`."""
    prefixes = json.dumps(shared.groups_prefixes(entities, storable_key))
    statement = _statement(target, f"{DELETE} AND run < %s AND {RECORDS_OF_GROUPS}")
    return connection.execute(statement, (target.name, run, prefixes)).rowcount


def forget_of_input(connection: sqlite3.Connection, target: Target, entity: str | None, name: str, run: int) -> int:
    """See :meth:`kdb_fast.stores.base.Store.forget_rejects_of_input`."""
    group, values = ("true", ()) if entity is None else (GROUPS, (_prefixes(entity),))
    receipts = _statement(target, shared.RECEIPTS.replace("<group>", group))
    found = connection.execute(receipts, (run, target.name, *values)).fetchall()
    return connection.executemany(
        _statement(target, f"{DELETE} AND {group} AND run = %s"),
        [(target.name, *values, number) for number in shared.runs_of_input(found, name)],
    ).rowcount


def clear(connection: sqlite3.Connection, target: Target, keys: Iterable[Key] | None, entity: str | None) -> int:
    """See :meth:`kdb_fast.stores.base.Store.clear_rejects`."""
    with transaction(connection):
        if keys is not None:
            return connection.executemany(
                _statement(target, f"{DELETE} AND key_hash = %s"),
                [(target.name, shared.key_hash(key)) for key in keys],
            ).rowcount
        _, which, values = _which(connection, target, entity)
        return connection.execute(_statement(target, shared.CLEAR.replace("<which>", which)), values).rowcount
