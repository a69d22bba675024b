"""PostgreSQL: records that could not be stored, with their reasons."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from ...records import KeptReject, Key, Reject, decode_key, encode_key, key_of_json
from ...tables.pieces import record_key
from ...tables.target import REJECTS, Target
from .. import rejects as shared
from ..base import FlushSlot
from .check import column_names
from .session import PgSession

if TYPE_CHECKING:
    import psycopg

    Cursor = psycopg.Cursor[tuple[Any, ...]]

WRITE = (
    f"INSERT {shared.INTO_TABLE} ON CONFLICT (target, key_hash, content_hash, position) "
    "DO UPDATE SET reason = EXCLUDED.reason, detail = EXCLUDED.detail, run = EXCLUDED.run, rejected_at = now()"
)
GROUPS = "EXISTS (SELECT FROM unnest(%s::text[]) p WHERE starts_with(key, p))"
"""Whether a key is one of these entities, by what it begins with."""
RECORDS_OF_GROUPS = GROUPS.replace("(key, p)", """(key, p) AND key <> p || '""]'""")
"""The same, without lines that became no record."""
DELETE = "DELETE FROM {kdb_fast_rejects} WHERE target = %s"


def write(cursor: Cursor, session: PgSession, run: int, rejects: Sequence[Reject]) -> None:
    """Keep rejected records, within a flush's transaction."""
    rows = [shared.row_of(reject, run, session.target.name, session.storable) for reject in rejects]
    cursor.executemany(session.target.statement(WRITE), rows)


def of_other_runs(cursor: Cursor, target: Target, run: int) -> dict[bytes, bytes]:
    """Rejects of other runs than this one: key as a block of rows has it → its hash."""
    found = {}
    for key, digest in cursor.execute(target.statement(f"SELECT key, key_hash {shared.OTHERS}"), (target.name, run)):
        with contextlib.suppress(UnicodeEncodeError):  # half a character, which no row can have
            found[encode_key(key_of_json(key))] = digest
    return found


def forget_stored(
    cursor: Cursor,
    target: Target,
    run: int,
    rejects: dict[bytes, bytes],
    slots: Sequence[FlushSlot],
    unwritten: set[tuple[int, int]],
    in_pieces: bool = False,
) -> None:
    """A record that a run has stored is no longer rejected; what this run itself rejected stays.

    Args:
        rejects: Those of other runs.
        unwritten: (slot, row) of the slots' rows that were not stored.
        in_pieces: A row is a piece of a record. One that is not whole yet may be rejected again by a later flush.
    """
    stored = [
        digest
        for block, skip, _ in slots
        for row, (key, _) in enumerate(block.raw_rows())
        if row not in skip
        and (block.number, row) not in unwritten
        and (digest := rejects.get(encode_key(record_key(decode_key(key))) if in_pieces else key)) is not None
    ]
    if stored:
        cursor.execute(target.statement(f"{DELETE} AND key_hash = ANY(%s) AND run <> %s"), (target.name, stored, run))


def forget_keys(cursor: Cursor, target: Target, slots: Sequence[FlushSlot]) -> None:
    """The records of all rows of these slots are no longer rejected."""
    hashes = [shared.key_hash(decode_key(key)) for block, _, _ in slots for key, _ in block.raw_rows()]
    if hashes:
        cursor.execute(target.statement(f"{DELETE} AND key_hash = ANY(%s)"), (target.name, hashes))


def read(session: PgSession, entity: str | None) -> list[KeptReject]:
    """See :meth:`kdb_fast.stores.base.Store.rejects`."""

    def work() -> list[KeptReject]:
        with session.transaction() as cursor:
            key, which, values = _which(cursor, session, entity)
            statement = session.target.statement(shared.READ.replace("<key>", key).replace("<which>", which))
            rows = cursor.execute(statement, values).fetchall()
        return [shared.kept_reject(row, session.target, session.storable) for row in rows]

    return session.retrying("reading the rejects", work)


def _which(cursor: Cursor, session: PgSession, entity: str | None) -> tuple[str, str, tuple[object, ...]]:
    """Columns of the key, and condition and parameters of the target's rejects of an entity or all."""
    target = session.target
    if "key" not in column_names(cursor, target, REJECTS):
        which = ("true", ()) if entity is None else ("entity_name = %s", (session.storable(entity),))
        return shared.NAMES_OF_KEY, *which
    if entity is None:
        return shared.KEY, "target = %s", (target.name,)
    prefixes = shared.group_prefixes(entity, session.storable)
    return shared.KEY, f"target = %s AND {GROUPS}", (target.name, prefixes)


def forget_older(session: PgSession, entities: Sequence[str], run: int) -> int:
    """See :meth:`kdb_fast.stores.base.Store.forget_older_rejects`."""
    prefixes = shared.groups_prefixes(entities, session.storable)
    statement = session.target.statement(f"{DELETE} AND run < %s AND {RECORDS_OF_GROUPS}")
    values = (session.target.name, run, prefixes)
    return session.retrying(
        "forgetting older rejects", lambda: session.connection().execute(statement, values).rowcount
    )


def forget_of_input(session: PgSession, entity: str | None, name: str, run: int) -> int:
    """See :meth:`kdb_fast.stores.base.Store.forget_rejects_of_input`."""
    target, group, values = session.target, "true", list[list[str]]()
    if entity is not None:
        group, values = GROUPS, [shared.group_prefixes(entity, session.storable)]
    receipts = target.statement(shared.RECEIPTS.replace("<group>", group))
    forget = target.statement(f"{DELETE} AND {group} AND run = ANY(%s)")

    def work() -> int:
        found = session.connection().execute(receipts, (run, target.name, *values)).fetchall()
        runs = shared.runs_of_input(found, name)
        return session.connection().execute(forget, (target.name, *values, runs)).rowcount if runs else 0

    return session.retrying("forgetting older rejects", work)


def clear(session: PgSession, keys: Iterable[Key] | None, entity: str | None) -> int:
    """See :meth:`kdb_fast.stores.base.Store.clear_rejects`."""
    target = session.target
    hashes = None if keys is None else [shared.key_hash(key) for key in keys]

    def work() -> int:
        with session.writing() as cursor:
            if hashes is not None:
                of_keys = target.statement(f"{DELETE} AND key_hash = ANY(%s)")
                return cursor.execute(of_keys, (target.name, hashes)).rowcount
            _, which, values = _which(cursor, session, entity)
            return cursor.execute(target.statement(shared.CLEAR.replace("<which>", which)), values).rowcount

    return session.retrying("clearing the rejects", work)
