"""Rejected records: what both databases have in common.

A record that cannot be stored is kept by key, hash of its text and position in its input, with the reason; key and
detail in a form that every table can hold (:func:`~kdb_fast.records.storable_key`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ..receipt import Receipt
from ..records import Key, Reject, decode_key, key_json
from .base import FlushSlot

DETAIL_CHARS = 500
"""Of a reject's detail as it is kept."""

INTO_TABLE = (
    "INTO {kdb_fast_rejects} (entity_name, record_id, content_hash, reason, detail, position, run) "
    "VALUES (%s, %s, %s, %s, %s, %s, %s)"
)
"""What :func:`row_of` gives."""

READ = (
    "SELECT entity_name, record_id, reason, detail, position, run, rejected_at, content_hash FROM {kdb_fast_rejects} "
)
NEWEST_FIRST = "ORDER BY run DESC, position, entity_name, record_id"

NAMES = ("entity", "record_id", "reason", "detail", "position", "run", "rejected_at", "content_hash")
"""What the columns of ``READ`` are called outside the database."""

RECEIPTS = (
    "SELECT n.run, n.receipt FROM {kdb_fast_runs} n WHERE n.run < %s AND n.run IN "
    "(SELECT r.run FROM {kdb_fast_rejects} r WHERE r.entity_name = %s)"
)
"""Run and receipt of the runs before one that have rejected records of an entity."""


def row_of(reject: Reject, run: int, storable: Callable[..., str]) -> tuple[object, ...]:
    """A row of the table.

    Args:
        storable: :func:`~kdb_fast.records.storable_key`, or one that also knows what the database can hold.
    """
    return (
        *key_columns(reject.key, storable),
        reject.content_hash,
        reject.reason,
        storable(reject.detail, DETAIL_CHARS),
        reject.position,
        run,
    )


def key_columns(key: Key, storable: Callable[..., str]) -> tuple[str, str]:
    """What the two columns of a key hold: entity and record id, or of a key of another kind all of it in the second."""
    entity, record_id = key if len(key) == 2 else ("", key_json(key))
    return storable(entity), storable(record_id)


def as_dictionary(row: Sequence[Any]) -> dict[str, Any]:
    """A row of ``READ`` by name, the hash in hexadecimal digits."""
    return dict(zip(NAMES, (*row[:-1], bytes(row[-1]).hex()), strict=True))


def refused(slots: Sequence[FlushSlot], rows: Iterable[tuple[int, int, str, str]]) -> list[Reject]:
    """Rejects for rows that the database has refused.

    Args:
        rows: (slot, row, reason, detail) of each.
    """
    by_number = {flush_slot.slot.number: flush_slot.slot for flush_slot in slots}
    found = []
    for slot, row, reason, detail in rows:
        key, content = by_number[slot].raw_rows()[row]
        found.append(Reject(decode_key(key), reason, detail, hashlib.sha256(content).digest()))
    return found


def runs_of_input(receipts: Iterable[tuple[int, str | None]], name: str) -> list[int]:
    """The runs whose receipt (JSON) names this input."""
    return [run for run, receipt in receipts if receipt and Receipt.from_json(json.loads(receipt)).input == name]
