"""Rejected records: what both databases have in common.

A record that cannot be stored is kept by target, key, hash of its text and position in its input, with the reason; the
detail in a form that every table can hold (:func:`~kdb_fast.records.storable_key`), the key as JSON of ASCII only.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ..errors import RecordError
from ..receipt import Receipt
from ..records import KeptReject, Key, Reject, decode_key, key_json, key_of_json, shown_key
from ..tables.pieces import piece_of, record_key
from ..tables.target import ALL, Target
from .base import FlushSlot

DETAIL_CHARS = 500
"""Of a reject's detail as it is kept."""

PART_CHARS = 1000
"""Of a text within a key as it is kept; the hash is that of the whole key."""

INTO_TABLE = (
    "INTO {kdb_fast_rejects} (target, key, key_hash, content_hash, position, reason, detail, run) "
    "VALUES (%s, %s, %s, %s, %s, %s, %s, %s)"
)
"""What :func:`row_of` gives."""

READ = (
    "SELECT <key>, reason, detail, position, run, rejected_at, content_hash FROM {kdb_fast_rejects} WHERE <which> "
    "ORDER BY run DESC, position, <key>"
)
KEY = "key"
NAMES_OF_KEY = "entity_name, record_id"
"""The key in a table that is not migrated yet, which has no column of that name, and none for the target."""

NOT_FINITE = ("not_finite", "the vector has NaN or infinity")
"""Reason and detail of a row that no database is to have."""

CLEAR = "DELETE FROM {kdb_fast_rejects} WHERE <which>"

OTHERS = "FROM {kdb_fast_rejects} WHERE target = %s AND run <> %s"
"""Rejects of other runs than one."""

RECEIPTS = (
    "SELECT n.run, n.receipt FROM {kdb_fast_runs} n WHERE n.run < %s AND n.run IN "
    "(SELECT run FROM {kdb_fast_rejects} WHERE target = %s AND <group>)"
)
"""Run and receipt of the runs before one that have rejected records of a group."""


def row_of(reject: Reject, run: int, target: str, storable: Callable[..., str]) -> tuple[object, ...]:
    """A row of the table.

    Args:
        target: The target's name.
        storable: :func:`~kdb_fast.records.storable_key`, or one that also knows what the database can hold.
    """
    return (
        target,
        kept_key(reject.key),
        key_hash(reject.key),
        reject.content_hash,
        reject.position,
        reject.reason,
        storable(reject.detail, DETAIL_CHARS),
        run,
    )


def kept_key(key: Key) -> str:
    """A key as the table keeps it: JSON, without the end of very long texts."""
    return key_json(tuple(f"{p[:PART_CHARS]}…" if isinstance(p, str) and len(p) > PART_CHARS else p for p in key))


def key_hash(key: Key) -> bytes:
    """By which the table tells keys apart."""
    return hashlib.sha256(key_json(key).encode()).digest()


def group_prefixes(group: str, storable: Callable[..., str]) -> list[str]:
    """What kept keys of an entity begin with; earlier versions kept its name as ``storable`` gives it."""
    return sorted({kept_key((name,))[:-1] + "," for name in (group, storable(group))})


def groups_prefixes(groups: Iterable[str], storable: Callable[..., str]) -> list[str]:
    """What kept keys of these entities begin with; :data:`~kdb_fast.tables.target.ALL` is all of them."""
    return ["["] if ALL in groups else [prefix for group in groups for prefix in group_prefixes(group, storable)]


def kept_reject(row: Sequence[Any], target: Target, storable: Callable[..., str]) -> KeptReject:
    """A row of ``READ``.

    Args:
        row: Its key as JSON, or in the two columns of tables that are not migrated yet.
        target: Its target; of one without groups the whole key is the record's id.
        storable: As for :func:`row_of`.
    """
    *of_key, reason, detail, position, run, rejected_at, digest = row
    key = key_of_json(of_key[0]) if len(of_key) == 1 else tuple(of_key)
    entity, record_id = key if target.grouped and len(key) == 2 else ("", ", ".join(map(str, key)))
    names = storable(entity), storable(record_id)
    return KeptReject(*names, reason, detail, position, run, rejected_at, bytes(digest).hex())


def refused(
    slots: Sequence[FlushSlot], rows: Iterable[tuple[int, int, str, str]], *, in_pieces: bool = False
) -> list[Reject]:
    """Rejects for rows that the database has refused.

    Args:
        rows: (slot, row, reason, detail) of each.
        in_pieces: A row is a piece of a record, which is rejected.
    """
    by_number = {flush_slot.slot.number: flush_slot.slot for flush_slot in slots}
    found = []
    for slot, row, reason, detail in rows:
        raw, content = by_number[slot].raw_rows()[row]
        key, digest = decode_key(raw), hashlib.sha256(content).digest()
        if in_pieces:
            key, digest = record_key(key), piece_of(key).content_hash
        found.append(Reject(key, reason, detail, digest))
    return found


def refusal_of_unit(slots: Sequence[FlushSlot], rows: Iterable[tuple[int, int, str, str]]) -> RecordError:
    """What a caller is told whose unit is taken back; ``rows`` as in :func:`refused`, of which the first is named."""
    first = refused(slots, rows)[0]
    return RecordError(
        f"The record {shown_key(first.key)} was refused ({first.reason}): {first.detail}.",
        remedy="Nothing of the batch was stored.",
    )


def runs_of_input(receipts: Iterable[tuple[int, str | None]], name: str) -> list[int]:
    """The runs whose receipt (JSON) names this input."""
    return [run for run, receipt in receipts if receipt and Receipt.from_json(json.loads(receipt)).input == name]
