"""Runs, rejects and state are a target's, and a reject is kept by its whole key.

What is there already belongs to ``kdb_search``, the only target until now. A reject's key was kept as text of at most
200 characters, so that two long keys could be one; now it is JSON (:func:`kdb_fast.records.key_json`), told from others
by its SHA-256. What was cut or escaped stays so in the rows that are carried along.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from .step import Rewrite, Step

_ABANDON = (
    # No run is going on. Of those that say so the newest is left to the next run, which looks at it.
    "UPDATE {kdb_fast_runs} SET state = 'abandoned', ended_at = CURRENT_TIMESTAMP WHERE state = 'running' "
    "AND run < (SELECT max(run) FROM {kdb_fast_runs} WHERE state = 'running')"
)
_STATE = "UPDATE {kdb_fast_state} SET key = 'dropped_indexes/kdb_search' WHERE key = 'dropped_indexes'"


def _key_and_hash(row: tuple[Any, ...]) -> tuple[Any, ...]:
    """Key, its hash, and the row, which begins with entity and record id."""
    key = json.dumps(row[:2], separators=(",", ":"))
    return key, hashlib.sha256(key.encode()).digest(), *row


POSTGRESQL: tuple[Step, ...] = (
    "ALTER TABLE {kdb_fast_runs} ADD COLUMN target text NOT NULL DEFAULT 'kdb_search'",
    _ABANDON,
    "CREATE UNIQUE INDEX ON {kdb_fast_runs} (target) WHERE state = 'running'",
    # The same table, since roles have rights on it.
    "ALTER TABLE {kdb_fast_rejects} ADD COLUMN target text NOT NULL DEFAULT 'kdb_search', ADD COLUMN key text, "
    "ADD COLUMN key_hash bytea",
    Rewrite(
        "SELECT DISTINCT entity_name, record_id FROM {kdb_fast_rejects}",
        _key_and_hash,
        "UPDATE {kdb_fast_rejects} SET key = %s, key_hash = %s WHERE entity_name = %s AND record_id = %s",
    ),
    # The old primary key goes with its columns.
    "ALTER TABLE {kdb_fast_rejects} DROP COLUMN entity_name, DROP COLUMN record_id, ALTER COLUMN key SET NOT NULL, "
    "ADD PRIMARY KEY (target, key_hash, content_hash, position)",
    _STATE,
)

SQLITE: tuple[Step, ...] = (
    "ALTER TABLE {kdb_fast_runs} ADD COLUMN target TEXT NOT NULL DEFAULT 'kdb_search'",
    _ABANDON,
    "CREATE UNIQUE INDEX kdb_fast_runs_running ON {kdb_fast_runs} (target) WHERE state = 'running'",
    "ALTER TABLE {kdb_fast_rejects} RENAME TO kdb_fast_rejects_before",
    """
CREATE TABLE {kdb_fast_rejects} (
  target TEXT NOT NULL DEFAULT 'kdb_search',
  key TEXT NOT NULL,
  key_hash BLOB NOT NULL,
  content_hash BLOB NOT NULL,
  position INTEGER NOT NULL DEFAULT 0,
  reason TEXT NOT NULL,
  detail TEXT NOT NULL,
  run INTEGER NOT NULL,
  rejected_at TEXT NOT NULL DEFAULT (strftime('%Y-%m-%d %H:%M:%f', 'now')),
  PRIMARY KEY (target, key_hash, content_hash, position)
)
""",
    Rewrite(
        "SELECT entity_name, record_id, content_hash, position, reason, detail, run, rejected_at "
        "FROM kdb_fast_rejects_before",
        lambda row: (*_key_and_hash(row)[:2], *row[2:]),
        "INSERT INTO {kdb_fast_rejects} (key, key_hash, content_hash, position, reason, detail, run, rejected_at) "
        "VALUES (%s, %s, %s, %s, %s, %s, %s, %s)",
    ),
    "DROP TABLE kdb_fast_rejects_before",
    _STATE,
)
